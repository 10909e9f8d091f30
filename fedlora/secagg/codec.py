"""Stages of the protocol as the content of Flower messages, and members in a node's state.

One message holds a stage for all clients on one node, or their answers. Layout of a request:

    secagg  ConfigRecord  header (JSON): stage, instance, what is common, one entry per client;
            worker, source, nonce
    blocks  ArrayRecord   "<client>/<what>": keys and sealed shares; "state", "bases": tensors
    cohort, starts, ...   jobs, in the vector stage of the first exchange (`fedlora.wire.messages`)

and of an answer:

    secagg  ConfigRecord  rows (JSON): per client a report or a failure; notes (JSON), nonce; its
            name is "results" after training
    blocks  ArrayRecord   "<client>": keys, sealed shares, a vector, or shares
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeAlias

import numpy as np
import safetensors.torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray
from torch import Tensor

from fedlora.core.checks import one_line, real
from fedlora.core.types import Client, Failure
from fedlora.secagg.protocol import Member
from fedlora.wire.messages import failure_from

Blocks: TypeAlias = NDArray[np.generic]
HEADER, BLOCKS, RESULTS = "secagg", "blocks", "results"


@dataclass(frozen=True)
class Request:
    """A stage as a node is asked for it."""

    stage: str
    instance: str
    """The protocol's; the node's clients are members of it."""
    clients: Mapping[int, Mapping[str, Any]]
    """Client id -> what concerns it alone, as JSON values."""
    common: Mapping[str, Any]
    """What concerns all, as JSON values."""
    blocks: Mapping[str, Blocks] = field(default_factory=dict)
    worker: str = ""
    source: str = ""
    nonce: str = ""

    def rows(self, name: str, width: int) -> list[bytes]:
        """A block ``[n, width]`` of bytes, row by row.

        Raises:
            ValueError: if it has another form.
        """
        return rows_of(self.blocks[name], width)


@dataclass(frozen=True)
class Answer:
    """What one client answers to a stage."""

    block: Blocks
    report: Mapping[str, Any] = field(default_factory=dict)
    """JSON values: of the vector stage ``num_examples``, ``metrics``, ``cut``."""


def encode_request(request: Request, jobs: RecordDict | None = None) -> RecordDict:
    """A request as the content of a message.

    Args:
        request: of these clients.
        jobs: theirs, as `fedlora.wire.messages.encode_jobs` makes them; None: they train nothing.
    """
    header = {
        "stage": request.stage,
        "instance": request.instance,
        "clients": {str(i): dict(own) for i, own in request.clients.items()},
        "common": dict(request.common),
    }
    config = ConfigRecord(
        {
            "header": json.dumps(header),
            "worker": request.worker,
            "source": request.source,
            "nonce": request.nonce,
        }
    )
    found = RecordDict({HEADER: config, BLOCKS: _arrays(request.blocks)})
    for name, record in (jobs or {}).items():
        found[name] = record
    return found


def decode_request(content: RecordDict) -> Request:
    """The inverse of `encode_request`; jobs are read with `fedlora.wire.messages.decode_jobs`."""
    config = content.config_records[HEADER]
    header = json.loads(str(config["header"]))
    return Request(
        stage=str(header["stage"]),
        instance=str(header["instance"]),
        clients={int(i): own for i, own in header["clients"].items()},
        common=header["common"],
        blocks={n: a.numpy() for n, a in content.array_records[BLOCKS].items()},
        worker=str(config["worker"]),
        source=str(config["source"]),
        nonce=str(config["nonce"]),
    )


def encode_answers(
    answers: Mapping[int, Answer | Failure],
    *,
    nonce: str,
    notes: Sequence[str] = (),
    trained: bool = False,
) -> RecordDict:
    """The answers of a node's clients as the content of a reply.

    Args:
        answers: by client id.
        nonce: of the request.
        notes: of the engine.
        trained: whether they tell of training: then a server shows progress
            (`fedlora.wire.messages.glance`).
    """
    rows: list[dict[str, Any]] = []
    blocks: dict[str, Blocks] = {}
    for i, answer in answers.items():
        if isinstance(answer, Failure):
            told = [answer.kind, answer.message, answer.traceback]
            rows.append({"client": i, "failure": told})
        else:
            blocks[str(i)] = answer.block
            rows.append({"client": i, **answer.report})
    config = ConfigRecord({"rows": json.dumps(rows), "notes": json.dumps([*notes]), "nonce": nonce})
    return RecordDict({RESULTS if trained else HEADER: config, BLOCKS: _arrays(blocks)})


def decode_answers(
    content: RecordDict,
    clients: Mapping[int, Client],
    form: Mapping[int, tuple[np.dtype[Any], tuple[int, ...]]],
    nonce: str,
) -> dict[int, Answer | Failure]:
    """The inverse of `encode_answers`. A client whose answer cannot be read, or is missing, has
    failed; answers of clients that were not asked are left out.

    Args:
        content: of a reply.
        clients: those that were asked, by id.
        form: type and shape of the block that is due, by client id.
        nonce: of the request; a reply to another one answers for no client.

    Raises:
        ValueError, KeyError: if nothing in it can be read.
    """
    records = content.config_records
    config = records[RESULTS if RESULTS in records else HEADER]
    if config.get("nonce", "") != nonce:
        raise ValueError("it answers another message than this stage's")
    rows = json.loads(str(config["rows"]))
    named = {r["client"]: r for r in rows if isinstance(r, dict) and type(r.get("client")) is int}
    found: dict[int, Answer | Failure] = {}
    for i, client in clients.items():
        if i not in named:
            found[i] = Failure(client, "NoReply", "the reply says nothing of it")
            continue
        try:
            found[i] = _answer(client, named[i], content.array_records[BLOCKS], *form[i])
        except Exception as error:  # a reply is foreign input
            why = f"its reply cannot be read: {type(error).__name__}: {error}"
            found[i] = Failure(client, "RejectedUpdate", one_line(why))
    return found


def _answer(
    client: Client,
    row: Mapping[str, Any],
    blocks: ArrayRecord,
    dtype: np.dtype[Any],
    shape: tuple[int, ...],
) -> Answer | Failure:
    if "failure" in row:
        return failure_from(client, row["failure"])
    block = blocks[str(client.id)].numpy()
    if block.dtype != dtype or block.shape != shape:
        raise ValueError(
            f"its block is {block.dtype} of shape {block.shape}, {dtype} of shape {shape} is due"
        )
    report = {k: v for k, v in row.items() if k != "client"}
    if "metrics" in report:
        metrics = dict(report["metrics"])
        report["metrics"] = {n: real(f"its metric {n:.64}", v) for n, v in metrics.items()}
    return Answer(block, report)


def rows_of(block: Blocks, width: int) -> list[bytes]:
    """Bytes ``[n, width]``, row by row.

    Raises:
        ValueError: if the block has another form.
    """
    if block.dtype != np.uint8 or block.ndim != 2 or block.shape[1] != width:
        raise ValueError(f"a block is {block.dtype} of shape {block.shape}, [n, {width}] is due")
    return [row.tobytes() for row in block]


def block_of(rows: Sequence[bytes], width: int) -> Blocks:
    """The inverse of `rows_of`."""
    return np.frombuffer(b"".join(rows), dtype=np.uint8).reshape(len(rows), width)


def tensor_block(tensors: Mapping[str, Tensor]) -> Blocks:
    """Named tensors as bytes, exact in every type."""
    own = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    return np.frombuffer(safetensors.torch.save(own), dtype=np.uint8)


def tensors_of(block: Blocks) -> dict[str, Tensor]:
    """The inverse of `tensor_block`."""
    return safetensors.torch.load(block.tobytes())


def _arrays(blocks: Mapping[str, Blocks]) -> ArrayRecord:
    return ArrayRecord({n: Array(np.require(b, requirements="C")) for n, b in blocks.items()})


# --- a node's state -----------------------------------------------------------------------------


def store_member(state: RecordDict, member: Member) -> None:
    """Put a member into its node's state."""
    plain = {k: _plain(v) for k, v in asdict(member).items()}
    state[f"{HEADER}/{member.id}"] = ConfigRecord({"member": json.dumps(plain)})


def load_member(state: RecordDict, i: int, instance: str) -> Member:
    """A member from its node's state.

    Raises:
        ValueError: if the node has none of this client and instance.
    """
    key = f"{HEADER}/{i}"
    raw = json.loads(str(state.config_records[key]["member"])) if key in state else {}
    if raw.get("instance") != instance:
        raise ValueError(f"client {i} has not begun this secure sum on this node")
    values: dict[str, Any] = {}
    for f in fields(Member):
        value = raw[f.name]
        if isinstance(value, dict):
            values[f.name] = {int(j): bytes.fromhex(v) for j, v in value.items()}
        else:
            values[f.name] = bytes.fromhex(value) if f.type is bytes else value
    return Member(**values)


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.hex()
    return {str(j): v.hex() for j, v in value.items()} if isinstance(value, dict) else value


def store_tensors(state: RecordDict, i: int, tensors: Mapping[str, Tensor]) -> None:
    """Keep a client's tensors on its node until the next exchange."""
    found = ArrayRecord({"tensors": Array(tensor_block(tensors))})
    state[f"{HEADER}/{i}/tensors"] = found


def take_tensors(state: RecordDict, i: int) -> dict[str, Tensor]:
    """What `store_tensors` kept; it is kept no longer.

    Raises:
        ValueError: if there is nothing.
    """
    key = f"{HEADER}/{i}/tensors"
    if key not in state:
        raise ValueError(f"client {i} has kept nothing for this exchange")
    found = tensors_of(state.array_records[key]["tensors"].numpy())
    del state[key]
    return found
