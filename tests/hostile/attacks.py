"""The table of hostile replies: what a client's update, row, header, array or metrics can be."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from flwr.app import Array, RecordDict
from torch import Tensor

from fedlora.core.types import Factors, Failure, TrainJob, Update
from fedlora.techniques.lora.payload import LowRankPayload
from fedlora.wire.change import change
from fedlora.wire.messages import Result
from tests.hostile.world import BAD, NEIGHBOUR, Edit, Spoil, honest, tensors, with_tensors


class NotApplicable(Exception):
    """The payload of this method has no such part."""


@dataclass(frozen=True)
class Attack:
    """One way to answer."""

    name: str
    spoil: Spoil = honest
    edit: Edit | None = None


# --- the numbers of an update -----------------------------------------------------------------


def one(value: float) -> Spoil:
    """One entry of the first tensor."""

    def spoil(job: TrainJob, update: Update) -> Sequence[Result]:
        sent = tensors(update)
        next(iter(sent.values())).view(-1)[0] = value
        return [with_tensors(update, sent)]

    return spoil


def every(value: float) -> Spoil:
    def spoil(job: TrainJob, update: Update) -> Sequence[Result]:
        return [with_tensors(update, {n: t.fill_(value) for n, t in tensors(update).items()})]

    return spoil


def stretched(factor: float) -> Spoil:
    """The change from the start, times a factor."""

    def spoil(job: TrainJob, update: Update) -> Sequence[Result]:
        return [with_tensors(update, _plus(job, update, lambda d: (factor - 1) * d))]

    return spoil


def one_stretched(factor: float) -> Spoil:
    """The largest entry of the change of each tensor, times a factor."""

    def largest(d: Tensor) -> Tensor:
        return torch.where(d.abs() == d.abs().max(), (factor - 1) * d, 0.0)

    def spoil(job: TrainJob, update: Update) -> Sequence[Result]:
        return [with_tensors(update, _plus(job, update, largest))]

    return spoil


def _plus(job: TrainJob, update: Update, more: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    sent = tensors(update)
    way = change(sent, dict(job.start.tensors()))
    return {n: (t + more(way[n])).to(t.dtype) for n, t in sent.items()}


def turned(job: TrainJob, update: Update) -> Sequence[Result]:
    """``1000 A`` and ``B / 1000``: the same weights, and an average of factors is ruined."""
    if not isinstance(update.payload, LowRankPayload):
        raise NotApplicable
    factors = {p: Factors(1e3 * f.a, f.b / 1e3, f.alpha) for p, f in update.payload.items()}
    return [replace(update, payload=LowRankPayload(factors))]


def cast(dtype: torch.dtype) -> Spoil:
    """What training returned, in another type."""

    def spoil(job: TrainJob, update: Update) -> Sequence[Result]:
        return [with_tensors(update, {n: t.to(dtype) for n, t in tensors(update).items()})]

    return spoil


def changed(**fields: Any) -> Spoil:
    return lambda job, update: [replace(update, **fields)]


def metrics(**more: Any) -> Spoil:
    return lambda job, update: [replace(update, metrics={**update.metrics, **more})]


def twice(job: TrainJob, update: Update) -> Sequence[Result]:
    """A second reply follows the first."""
    return [update, *stretched(3.0)(job, update)]


def as_neighbour(job: TrainJob, update: Update) -> Sequence[Result]:
    """A reply in the name of a client of another message."""
    return [replace(update, client=replace(update.client, id=0))]


def mutating(job: TrainJob, update: Update) -> Sequence[Result]:
    """It writes into its start, from which others of its message begin too."""
    factors = job.start.low_rank()
    own = (
        dict(job.start.tensors())
        if factors is None
        else {f"{p}/{s}": getattr(f, s) for p, f in factors.items() for s in "ab"}
    )
    for t in own.values():
        t.fill_(1e9)
    return [update]


def long_failure(job: TrainJob, update: Update) -> Sequence[Result]:
    return [Failure(job.client, "K" * 10**4, "\x1b[2J\n" + "m" * 10**6, "t" * 10**6)]


# --- the row, the header and the array of a reply ---------------------------------------------


def row(edit: Callable[[dict[str, Any]], Any]) -> Edit:
    """Change, or replace, the hostile client's row."""

    def apply(content: RecordDict) -> None:
        record = content.config_records["results"]
        rows = json.loads(str(record["rows"]))
        for at, found in enumerate(rows):
            if found["client"] == BAD:
                put = edit(found)
                rows[at] = found if put is None else put
        record["rows"] = json.dumps(rows)

    return apply


def header(edit: Callable[[dict[str, Any]], Any]) -> Edit:
    """Change the header of its payload."""

    def change_row(found: dict[str, Any]) -> None:
        h = json.loads(found["payload"])
        edit(h)
        found["payload"] = json.dumps(h)

    return row(change_row)


def alpha(value: object) -> Edit:
    def edit(h: dict[str, Any]) -> None:
        inner = h["header"]
        if isinstance(inner.get("alpha"), dict):
            inner["alpha"] = dict.fromkeys(inner["alpha"], value)
        elif name := next((n for n in ("alpha", "lora_alpha") if n in inner), ""):
            inner[name] = value
        else:
            inner["density"] = value  # of a sparse update

    return header(edit)


def array(edit: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]) -> Edit:
    """Change the flat array of its payload; the header stays."""

    def apply(content: RecordDict) -> None:
        arrays = content.array_records["payloads"]
        arrays[str(BAD)] = Array(edit(np.array(arrays[str(BAD)].numpy())))

    return apply


def no_array(content: RecordDict) -> None:
    del content.array_records["payloads"][str(BAD)]


def pickled(content: RecordDict) -> None:
    """An array of objects, which would have to be unpickled."""
    old = content.array_records["payloads"][str(BAD)]
    content.array_records["payloads"][str(BAD)] = Array(
        dtype="object", shape=old.shape, stype=old.stype, data=old.data[:40] + b"cos\nsystem\n"
    )


def other_wire(content: RecordDict) -> None:
    header(lambda h: h.update(dtype="float64"))(content)
    array(lambda a: a.astype(np.float64))(content)


def reordered(h: dict[str, Any]) -> None:
    inner = h["header"]
    for name, found in inner.items():
        if isinstance(found, dict) and len(found) > 1:
            inner[name] = dict(reversed(found.items()))
        elif isinstance(found, list) and len(found) > 1:
            inner[name] = found[::-1]


def one_more_tensor(content: RecordDict) -> None:
    header(lambda h: h["tensors"].append(["evil", 2]))(content)
    array(lambda a: np.concatenate([a, a[:2]]))(content)


def neighbours_row(content: RecordDict) -> None:
    """Its row comes last and says that it is its neighbour's."""
    record = content.config_records["results"]
    rows = sorted(json.loads(str(record["rows"])), key=lambda r: r["client"] == BAD)
    rows[-1] |= {"client": NEIGHBOUR, "num_examples": 1}
    record["rows"] = json.dumps(rows)


def residual(content: RecordDict) -> None:
    content.array_records["residuals"][str(BAD)] = Array(np.ones(3, np.float32))
    row(lambda r: r.update(residual=[["x", 3]]))(content)


def forged_ranks(found: dict[str, Any]) -> None:
    found["ranks"]["another.module"] = 1


def reversed_ranks(found: dict[str, Any]) -> None:
    found["ranks"] = dict(reversed(found["ranks"].items()))
    found["ranks"] = {p: r + 1 for p, r in found["ranks"].items()}


NUMBERS: Mapping[str, Spoil] = {
    "NaN in one entry": one(math.nan),
    "inf in one entry": one(math.inf),
    "-inf everywhere": every(-math.inf),
    "1e30 in one entry": one(1e30),
    "1e30 everywhere": every(1e30),
    "1e15 in one entry": one(1e15),
    "1e15 everywhere": every(1e15),
    "9e5 everywhere: products of 1e12": every(9e5),
    "change x 1000": stretched(1e3),
    "change x -1000": stretched(-1e3),
    "change x 1000 in one entry": one_stretched(1e3),
    "1000 A and B / 1000": turned,
    "int64 tensors": cast(torch.int64),
    "float16 tensors": cast(torch.float16),
    "complex tensors": cast(torch.complex64),
    "bool tensors": cast(torch.bool),
}
CLAIMS: Mapping[str, Spoil] = {
    "1e9 examples": changed(num_examples=10**9),
    "fewer examples than it holds": changed(num_examples=1),
    "-1 examples": changed(num_examples=-1),
    "1.5 examples": changed(num_examples=1.5),
    "true examples": changed(num_examples=True),
    "text as examples": changed(num_examples="many"),
    "NaN examples": changed(num_examples=math.nan),
    "metric NaN": metrics(loss=math.nan),
    "metric inf": metrics(tokens=math.inf),
    "metric 1e308": metrics(tokens=1e308),
    "metric negative count": metrics(tokens=-5.0),
    "metric text": metrics(tokens="many"),
    "metric true": metrics(tokens=True),
    "metric null": metrics(loss=None),
    "metric list": metrics(loss=[1.0]),
    "metric exchanged_up 1e9": metrics(exchanged_up=1e9),
    "metric exchanged_down 1": metrics(exchanged_down=1.0),
    "metric exchanged_up 1e300": metrics(exchanged_up=1e300),
    "metric named round": metrics(round=99.0),
    "metric named client": metrics(client=float(NEIGHBOUR)),
    "metric named rank": metrics(rank=7.0),
    "metric named bytes_up": metrics(bytes_up=0.0),
    "metric named failure": metrics(failure=1.0),
    "metric name of 10,000 letters": metrics(**{"k" * 10**4: 1.0}),
    "metric name with an escape": metrics(**{"\x1b[2J": 1.0}),
    "metric without a name": metrics(**{"": 1.0}),
    "1,000 metrics": metrics(**{f"m{i}": 1.0 for i in range(1000)}),
    "the name of a client elsewhere": as_neighbour,
    "a failure of 1 MB with escapes": long_failure,
}
ROWS: Mapping[str, Edit] = {
    "array int64": array(lambda a: a.astype(np.int64)),
    "array float16": array(lambda a: a.astype(np.float16)),
    "array complex64": array(lambda a: a.astype(np.complex64)),
    "array bool": array(lambda a: a.astype(np.bool_)),
    "array float64": array(lambda a: a.astype(np.float64)),
    "array uint16": array(lambda a: a.view(np.uint16)),
    "array of two dimensions": array(lambda a: a.reshape(1, -1)),
    "array cut": array(lambda a: a[:-1]),
    "array of objects": pickled,
    "array missing": no_array,
    "another wire": other_wire,
    "one tensor more": one_more_tensor,
    "text as alpha": alpha("12"),
    "words as alpha": alpha("twelve"),
    "null as alpha": alpha(None),
    "true as alpha": alpha(True),
    "NaN as alpha": alpha(math.nan),
    "1e30 as alpha": alpha(1e30),
    "modules in another order": header(reordered),
    "an unknown payload class": header(lambda h: h.update(_target_="os.system")),
    "another payload class": header(lambda h: h.update(_target_="fedlora.techniques.Evil")),
    "negative shape": header(lambda h: h["tensors"][0].__setitem__(1, -1)),
    "text as shape": header(lambda h: h["tensors"][0].__setitem__(1, "4")),
    "header of another kind": header(lambda h: h.update(of="gift")),
    "header not JSON": row(lambda r: r.update(payload="{")),
    "ranks of one module more": row(forged_ranks),
    "ranks in another order": row(reversed_ranks),
    "ranks as text": row(lambda r: r.update(ranks="high")),
    "metrics no mapping": row(lambda r: r.update(metrics=[1.0])),
    "row without payload": row(lambda r: r.pop("payload") and None),
    "row is a list": row(lambda r: [1, 2]),
    "row is null": row(lambda r: "null"),
    "client as text": row(lambda r: r.update(client=str(BAD))),
    "client as 2.0": row(lambda r: r.update(client=float(BAD))),
    "client as a list": row(lambda r: r.update(client=[BAD])),
    "client 999": row(lambda r: r.update(client=999)),
    "the name of its neighbour, later": neighbours_row,
    "a residual that was not asked for": residual,
}
HARMLESS: Mapping[str, Spoil] = {
    "a second reply": twice,
    "it writes into its start": mutating,
}

ATTACKS = (
    *(Attack(name, spoil=spoil) for name, spoil in (NUMBERS | CLAIMS).items()),
    *(Attack(name, edit=edit) for name, edit in ROWS.items()),
)
