"""Exchanges of a split as the content of Flower messages, and clients as Flower's node state.

One message holds the messages to all clients on one node (`Down`), or their answers (`Up`). Layout
of both, and of a node's state:

    split   ConfigRecord  header (JSON): one entry per client; worker, source, wire in a request
    arrays  ArrayRecord   "<client>/<what>/<name>": activations, gradients, labels, adapters,
            optimizer state

Activations and gradients are the arrays of `fedlora.wire.rows`, so the values of both
transports are bitwise identical.
"""

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray
from torch import Tensor

from fedlora.core.checks import one_line, real
from fedlora.core.config import build, describe
from fedlora.core.payload import plain_factors
from fedlora.core.types import (
    Adapter,
    Client,
    Failure,
    LocalPlan,
    Ranks,
)
from fedlora.split.batches import Labels, Shape
from fedlora.split.protocol import Cut, Down, InitMessage, Terms, Up
from fedlora.split.trainable import OptimizerState
from fedlora.techniques.lora.payload import LowRankPayload
from fedlora.wire.codec import decode_payload, encode_payload, plan_from_json, plan_to_json
from fedlora.wire.messages import failure_from

Arrays = dict[str, NDArray[Any]]
Answer = Up | Failure


@dataclass(frozen=True)
class Request:
    """The content of a message to a worker."""

    worker: str
    source: str
    wire: str
    """Number format of adapters."""
    nonce: str
    """Identifies the exchange; the answers repeat it."""
    downs: Mapping[int, Down]
    inits: Mapping[int, InitMessage]
    """Messages to clients that begin the round with this exchange."""


def encode_downs(
    downs: Mapping[int, Down],
    inits: Mapping[int, InitMessage],
    *,
    worker: str,
    source: str,
    wire: str,
    nonce: str = "",
) -> RecordDict:
    """Encode the messages to a node's clients in one exchange.

    Args:
        downs: by client.
        inits: for clients that begin the round with this exchange.
        worker, source, wire, nonce: as in `fedlora.wire.messages.encode_jobs`.
    """
    arrays: Arrays = {}
    header = {}
    for i, down in downs.items():
        header[str(i)] = _down_header(i, down, arrays, wire)
        if i in inits:
            header[str(i)]["init"] = init_header(i, inits[i], arrays, wire)
    return _content(header, arrays, worker=worker, source=source, wire=wire, nonce=nonce)


def decode_downs(content: RecordDict) -> Request:
    """The inverse of `encode_downs`."""
    config = content.config_records["split"]
    found = _found(content)
    header = json.loads(str(config["header"]))
    return Request(
        worker=str(config["worker"]),
        source=str(config["source"]),
        wire=str(config["wire"]),
        nonce=str(config["nonce"]),
        downs={int(i): _down(int(i), h, found) for i, h in header.items()},
        inits={
            int(i): read_init(int(i), h["init"], found) for i, h in header.items() if "init" in h
        },
    )


def encode_ups(answers: Mapping[int, Answer], *, wire: str, nonce: str = "") -> RecordDict:
    """Encode the answers of a node's clients. An answer that cannot be sent is a failure."""
    arrays: Arrays = {}
    header = {}
    for i, answer in answers.items():
        try:
            header[str(i)] = _up_header(i, answer, arrays, wire)
        except Exception as error:  # whatever a client answered, it costs that client alone
            why = f"its answer cannot be sent: {type(error).__name__}: {error}"
            header[str(i)] = {"failure": ["RejectedUpdate", why, ""]}
    return _content(header, arrays, nonce=nonce)


def decode_ups(
    content: RecordDict, clients: Mapping[int, Client], *, wire: str = "", nonce: str = ""
) -> dict[int, Answer]:
    """The inverse of `encode_ups`. A client whose answer cannot be read has failed.

    Args:
        content: of a reply.
        clients: those that were asked, by id; answers of others are left out.
        wire: number format of adapters that is due; empty: any.
        nonce: of the request; a reply to another one answers for no client.

    Raises:
        ValueError, KeyError: if nothing in it can be read.
    """
    config = content.config_records["split"]
    if config.get("nonce", "") != nonce:
        raise ValueError("it answers another message than this exchange's")
    header = json.loads(str(config["header"]))
    answers: dict[int, Answer] = {}
    for i, client in clients.items():
        if str(i) not in header:
            answers[i] = Failure(client, "NoReply", "the reply says nothing of it")
            continue
        try:
            answers[i] = _up(client, header[str(i)], _found(content, f"{i}/"), wire)
        except Exception as error:  # a reply is foreign input
            answers[i] = Failure(client, "RejectedUpdate", unreadable(error))
    return answers


def unreadable(error: Exception) -> str:
    """Why a reply, or a part of it, was left out."""
    return one_line(f"its reply cannot be read: {type(error).__name__}: {error}")


def init_header(i: int, init: InitMessage, arrays: Arrays, wire: str) -> dict[str, Any]:
    """An `InitMessage` as JSON; its arrays are added to ``arrays``."""
    _put_state(arrays, i, init.optimizer_state)
    client = init.client
    return {
        "client": [client.id, dict(client.ranks), client.num_examples, client.tier],
        "plan": plan_to_json(init.plan),
        "cut": json.dumps(describe(init.cut)),
        "terms": json.dumps(describe(init.terms)),
        "adapter": _put_adapter(arrays, f"{i}/start", init.adapter, wire),
        "round": init.round,
    }


def read_init(i: int, header: Mapping[str, Any], found: Arrays) -> InitMessage:
    """The inverse of `init_header`."""
    cid, ranks, examples, tier = header["client"]
    return InitMessage(
        client=Client(cid, Ranks(ranks), examples, tier),
        plan=_plan(header["plan"]),
        cut=_cut(header["cut"]),
        terms=_terms(header["terms"]),
        adapter=_adapter(found, f"{i}/start", header["adapter"]),
        optimizer_state=_state(found, i),
        round=_whole("round", header["round"]),
    )


# A client is read from its node's state with every message; its configuration is the same text each
# time, and takes longer to build than a small client's step.


def _plan(text: str) -> LocalPlan:
    plan = plan_from_json(text)
    assert isinstance(plan, LocalPlan)
    return plan


@functools.lru_cache(maxsize=64)
def _cut(text: str) -> Cut:
    return build(json.loads(text), Cut, "cut")


@functools.lru_cache(maxsize=64)
def _terms(text: str) -> Terms:
    return build(json.loads(text), Terms, "terms")


def _down_header(i: int, down: Down, arrays: Arrays, wire: str) -> dict[str, Any]:
    for name, parts in (("gradient", down.gradient), ("middle", down.middle)):
        _put(arrays, f"{i}/{name}", parts or {})
    header: dict[str, Any] = {
        "step": down.step,
        "of": down.of,
        "rate": down.rate,
        "forward": down.forward,
        "upload": down.upload,
        "gradient": down.gradient is not None,
        "middle": down.middle is not None,
    }
    if down.adapter is not None:
        header["adapter"] = _put_adapter(arrays, f"{i}/adapter", down.adapter, wire)
    return header


def _down(i: int, h: Mapping[str, Any], found: Arrays) -> Down:
    return Down(
        step=h["step"],
        of=h["of"],
        rate=h["rate"],
        forward=h["forward"],
        upload=h["upload"],
        gradient=_get(found, f"{i}/gradient") if h["gradient"] else None,
        middle=_get(found, f"{i}/middle") if h["middle"] else None,
        adapter=_adapter(found, f"{i}/adapter", h["adapter"]) if "adapter" in h else None,
    )


def _up_header(i: int, up: Answer, arrays: Arrays, wire: str) -> dict[str, Any]:
    if isinstance(up, Failure):
        return {"failure": [up.kind, up.message, up.traceback]}
    _put(arrays, f"{i}/hidden", up.hidden or {})
    header: dict[str, Any] = {
        "numbers": [up.step, up.loss, up.tokens, up.grad_norm],
        "hidden": up.hidden is not None,
    }
    if up.shape is not None:
        arrays[f"{i}/lengths"] = np.array(up.shape.lengths, dtype=np.int32)
    if up.labels is not None:
        arrays[f"{i}/labels/first"] = np.array(up.labels.first, dtype=np.int32)
        if up.labels.gaps:
            arrays[f"{i}/labels/gaps"] = np.array(up.labels.gaps, dtype=np.int32)
        arrays[f"{i}/labels/targets"] = up.labels.targets.numpy().astype(np.int32)
    if up.adapter is not None:
        header["adapter"] = _put_adapter(arrays, f"{i}/adapter", up.adapter, wire)
        _put_state(arrays, i, up.optimizer_state or {})
    return header


def _up(client: Client, h: Mapping[str, Any], found: Arrays, wire: str) -> Answer:
    i = client.id
    if "failure" in h:
        return failure_from(client, h["failure"])
    step, loss, tokens, grad_norm = h["numbers"]
    labels = _get(found, f"{i}/labels")
    lengths = found.get(f"{i}/lengths")
    return Up(
        step=_whole("step", step),
        loss=real("loss", loss),
        tokens=_whole("tokens", tokens),
        grad_norm=real("grad_norm", grad_norm),
        hidden=_get(found, f"{i}/hidden") if h["hidden"] else None,
        shape=None if lengths is None else Shape(_integers("lengths", lengths)),
        labels=_labels(labels) if labels else None,
        adapter=_adapter(found, f"{i}/adapter", h["adapter"], wire) if "adapter" in h else None,
        optimizer_state=_state(found, i) if "adapter" in h else None,
    )


def _labels(arrays: Arrays) -> Labels:
    targets = torch.tensor(_integers("targets", arrays["targets"]), dtype=torch.int64)
    gaps = _integers("gaps", arrays.get("gaps", np.zeros(0, dtype=np.int32)))
    return Labels(_integers("first", arrays["first"]), targets, gaps)


def _integers(name: str, array: NDArray[Any]) -> tuple[int, ...]:
    if array.dtype != np.int32 or array.ndim != 1:
        raise ValueError(f"{name} is {array.dtype} of shape {array.shape}, int32 [n] is due")
    return tuple(array.tolist())


def _whole(name: str, value: object) -> int:
    if type(value) is not int:
        raise ValueError(f"{name} is {value!r:.80}, expected a whole number")
    return value


def _content(header: Mapping[str, Any], arrays: Arrays, **more: str) -> RecordDict:
    config = ConfigRecord({"header": json.dumps(header), **more})
    records = {name: Array(np.require(a, requirements="C")) for name, a in arrays.items()}
    return RecordDict({"split": config, "arrays": ArrayRecord(records)})


def _found(content: RecordDict, prefix: str = "") -> Arrays:
    """The arrays whose names begin with the prefix; others are not even decoded."""
    arrays = content.array_records["arrays"].items()
    return {name: a.numpy() for name, a in arrays if name.startswith(prefix)}


def _put(arrays: Arrays, prefix: str, parts: Mapping[str, NDArray[Any]]) -> None:
    for name, part in parts.items():
        arrays[f"{prefix}/{name}"] = part


def _get(found: Arrays, prefix: str) -> Arrays:
    start = f"{prefix}/"
    return {name[len(start) :]: a for name, a in found.items() if name.startswith(start)}


def _put_adapter(arrays: Arrays, name: str, adapter: Adapter, wire: str) -> str:
    arrays[name], header = encode_payload(LowRankPayload(adapter), wire)
    return header


def _adapter(found: Arrays, name: str, header: str, wire: str = "") -> Adapter:
    payload = decode_payload(found[name], header, trusted=False, wire=wire)
    factors = plain_factors(payload)
    if factors is None:
        raise ValueError(f"it holds {payload.noun} where factors are required")
    return factors


def _put_state(arrays: Arrays, i: int, optimizer_state: OptimizerState) -> None:
    _put(arrays, f"{i}/optimizer", {k: _numpy(v) for k, v in optimizer_state.items()})


def _state(found: Arrays, i: int) -> OptimizerState:
    return {k: torch.from_numpy(np.array(v)) for k, v in _get(found, f"{i}/optimizer").items()}


def _numpy(tensor: Tensor) -> NDArray[Any]:
    array: NDArray[Any] = tensor.detach().cpu().numpy()
    return array
