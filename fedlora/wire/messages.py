"""Cohorts and their results as Flower messages.

A message carries a cohort: the distinct start payloads once, however many clients share them, and
one row per job. Layout of a request (`RecordDict`):

    starts  ArrayRecord   "0", "1", ...: the flat array of each distinct payload; "shared": that of
                          the tensors that several of them hold, as a moved base under factors
    residuals ArrayRecord by client id, float32: what rounding has withheld of its replies so far
    changes ArrayRecord by client id, bytes: starts as changes of what their clients keep themselves
    cohort  ConfigRecord  header (JSON, see `encode_jobs`), worker (JSON), source, wire, nonce

and of a reply:

    payloads ArrayRecord  the flat array of each update, by client id
    residuals ArrayRecord by client id: what rounding has withheld after this reply
    results  ConfigRecord rows (JSON): one update, evaluation or failure per job; notes (JSON): of
                          the engine; nonce: that of the request

A client on a machine of its own keeps what is withheld itself (`fedlora.wire.recall`): nothing of
it is in either message.

A reply is foreign input. Nothing in it is cast: what has another type, shape or format than the
request asked for costs only the client whose row it is.
"""

import dataclasses
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeAlias, cast

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedlora.core.checks import is_real, one_line, real
from fedlora.core.config import build, describe
from fedlora.core.confusion import Confusion
from fedlora.core.metric import Metric
from fedlora.core.payload import Payload
from fedlora.core.seeding import torch_generator
from fedlora.core.types import (
    Client,
    EvaluateJob,
    Evaluation,
    Failure,
    LocalPlan,
    Ranks,
    TrainJob,
    Update,
)
from fedlora.wire.change import Named
from fedlora.wire.codec import (
    decode_payload,
    decode_shared,
    encode_payload,
    encode_reply,
    encode_together,
    flatten,
    plan_from_json,
    plan_to_json,
    shapes_of,
    unflatten,
)
from fedlora.wire.recall import (
    FORGOTTEN,
    Forgotten,
    Held,
    Memory,
    Recalls,
    compressed,
    recalls_to_json,
)
from fedlora.wire.tensors import NO_FORMAT, Format

log = logging.getLogger(__name__)

SHARED = "shared"
"""The array of what several starts of a request hold."""
MOST_NOTES = 16
"""Notes of one reply that are read."""

Job: TypeAlias = TrainJob | EvaluateJob
Result: TypeAlias = Update | Evaluation | Failure


@dataclass(frozen=True)
class Envelope:
    """What a worker finds in a request."""

    worker: str
    """JSON description of the worker: model, data, engine, device."""
    source: str
    """Hash of the server's sources; a worker with other sources refuses."""
    wire: str
    jobs: list[Job]
    """No two jobs share a tensor that is trained: a client that writes into its start changes no
    other client's."""
    nonce: str = ""
    """Identifies the request; the reply repeats it."""
    up: Format = NO_FORMAT
    """The format of replies, if it acts."""
    lost: list[Failure] = field(default_factory=list)
    """Clients whose jobs cannot be read, for they have forgotten what these build on."""
    memory: Memory | None = None
    """Where the client keeps what it needs; None: no job asks for it."""


class _Distinct:
    """Numbers values by first appearance, so that each is sent once."""

    def __init__(self) -> None:
        self.index: dict[Any, int] = {}
        self.values: list[Any] = []

    def add(self, key: Any, value: Any) -> int:
        if key not in self.index:
            self.index[key] = len(self.values)
            self.values.append(value)
        return self.index[key]


def encode_jobs(
    jobs: Sequence[Job],
    *,
    worker: str,
    source: str,
    wire: str,
    nonce: str = "",
    up: Format = NO_FORMAT,
    down: Format = NO_FORMAT,
) -> RecordDict:
    """A cohort as the content of one Flower message. Payloads shared by identity travel once, and
    so do tensors that several payloads hold.

    Args:
        jobs: one for each client.
        worker: JSON description of what is to be opened.
        source: hash of the server's sources.
        wire: number format of starts and replies.
        nonce: identifies the message.
        up: the format of replies in place of ``wire``, if it acts.
        down: that of the starts that clients know in part (`TrainJob.recall`).
    """
    payloads, plans, ranks = _Distinct(), _Distinct(), _Distinct()
    rows = []
    for job in jobs:
        payload = None if compressed(job) else _sent(job)
        start = -1 if payload is None else payloads.add(id(payload), payload)
        plan, pattern = plans.add(job.plan, job.plan), ranks.add(job.client.ranks, job.client.ranks)
        client = [job.client.id, job.client.num_examples, job.client.tier]
        rows.append([job.seed, job.round, *client, pattern, start, plan])
    residuals = {
        str(j.client.id): j.residual
        for j in jobs
        if isinstance(j, TrainJob) and j.residual is not None
    }
    encoded, (common, common_header) = encode_together(payloads.values, wire)
    header = {
        "rows": rows,
        "payloads": [h for _, h in encoded],
        "shared": common_header,
        "plans": [plan_to_json(p) for p in plans.values],
        "ranks": [dict(r) for r in ranks.values],
        "residuals": {cid: shapes_of(t) for cid, t in residuals.items()},
        "recalls": recalls_to_json(jobs, down),
    }
    config = ConfigRecord(
        {
            "header": json.dumps(header),
            "worker": worker,
            "source": source,
            "wire": wire,
            "nonce": nonce,
            **({"up": json.dumps(describe(up))} if up.acts else {}),
            **({"down": json.dumps(describe(down))} if down.acts else {}),
        }
    )
    arrays = {str(i): Array(a) for i, (a, _) in enumerate(encoded)}
    starts = ArrayRecord(arrays | ({SHARED: Array(common)} if common.size else {}))
    changes = {str(j.client.id): Array(told.data) for j in jobs if (told := compressed(j))}
    return RecordDict(
        {
            "starts": starts,
            "residuals": _put_residuals(residuals),
            "changes": ArrayRecord(changes),
            "cohort": config,
        }
    )


def _sent(job: Job) -> Payload | None:
    """What a job's client is to start from."""
    if isinstance(job, EvaluateJob):
        return job.adapter
    return job.start if job.sent is None else job.sent


def decode_jobs(content: RecordDict, memory: Callable[[str], Memory] | None = None) -> Envelope:
    """The inverse of `encode_jobs`.

    Args:
        content: of a request.
        memory: of this client, by the description of the worker; None: it has none of its own.

    Raises:
        ValueError: if a job builds on a memory and there is none.
    """
    config = content.config_records["cohort"]
    header = json.loads(str(config["header"]))
    arrays = content.array_records["starts"]
    shared = decode_shared(arrays[SHARED].numpy(), header["shared"]) if SHARED in arrays else []
    payloads = [
        decode_payload(arrays[str(i)].numpy(), h, shared=shared)
        for i, h in enumerate(header["payloads"])
    ]
    plans = [plan_from_json(p) for p in header["plans"]]
    ranks = [Ranks(r) for r in header["ranks"]]
    residuals = _take_residuals(content, header["residuals"])
    changes = {cid: array.numpy() for cid, array in content.array_records["changes"].items()}
    own = _memory(header["recalls"], str(config["worker"]), memory)
    recalls = Recalls(header["recalls"], changes, _format(config, "down"), own)
    jobs, lost = list[Job](), list[Failure]()
    for seed, round_, cid, n, tier, pattern, start, plan in header["rows"]:
        client = Client(cid, ranks[pattern], n, tier)
        payload, local = None if start < 0 else payloads[start], plans[plan]
        if not isinstance(local, LocalPlan):
            jobs.append(EvaluateJob(seed, round_, client, payload, local))
            continue
        try:
            mine = recalls.of(cid, seed)
        except Forgotten as error:
            lost.append(Failure(client, FORGOTTEN, str(error)))
            continue
        begun = cast(Payload, payload if mine.start is None else mine.start).copy()
        left = residuals.get(cid) if mine.recall is None else mine.withheld
        jobs.append(TrainJob(seed, round_, client, begun, local, left, recall=mine.recall))
    return Envelope(
        worker=str(config["worker"]),
        source=str(config["source"]),
        wire=str(config["wire"]),
        jobs=jobs,
        nonce=str(config["nonce"]),
        up=_format(config, "up"),
        lost=lost,
        memory=own,
    )


def _format(config: ConfigRecord, name: str) -> Format:
    return build(json.loads(str(config[name])), Format, name) if name in config else NO_FORMAT


def _memory(
    recalls: Mapping[str, Any], worker: str, memory: Callable[[str], Memory] | None
) -> Memory | None:
    """The client's memory, if a job asks for it."""
    if not recalls:
        return None
    if memory is None:
        raise ValueError("a job builds on what its client keeps, and this one keeps nothing itself")
    return memory(worker)


def _put_residuals(residuals: Mapping[str, Named]) -> ArrayRecord:
    return ArrayRecord({cid: Array(flatten(t, "float32")) for cid, t in residuals.items()})


def _take_residuals(content: RecordDict, shapes: Mapping[str, Any]) -> dict[int, Named]:
    """What `_put_residuals` put there, by client id."""
    arrays = content.array_records["residuals"]
    return {
        int(cid): unflatten(arrays[cid].numpy(), {"dtype": "float32", "tensors": s})
        for cid, s in shapes.items()
    }


def encode_results(
    results: Sequence[Result],
    *,
    wire: str,
    notes: Sequence[str] = (),
    jobs: Sequence[Job] = (),
    nonce: str = "",
    up: Format = NO_FORMAT,
    memory: Memory | None = None,
) -> RecordDict:
    """Results of a cohort, and what its engine says of itself, as the content of one reply.

    A result that cannot be sent is its client's failure. Of several results of one client the first
    is sent.

    Args:
        results: one per job.
        wire: number format of updates.
        notes: of the engine.
        jobs: as they were received; updates of a format that rounds are changes from their starts.
        nonce: of the request (`Envelope`).
        up: format of updates in place of ``wire``, if it acts.
        memory: of a client that keeps what it needs itself (`Envelope.memory`).
    """
    trained = {j.client.id: j for j in jobs if isinstance(j, TrainJob)}
    reply = _Reply({}, {}, memory)
    rows: dict[int, str] = {}
    for result in results:
        who = result.client
        if who.id in rows:
            log.warning("client %d has a second result, which is left out", who.id)
            continue
        try:
            rows[who.id] = json.dumps(_encode_row(result, wire, trained.get(who.id), reply, up))
        except Exception as error:  # whatever a client returned, it costs that client alone
            why = f"its result cannot be sent: {type(error).__name__}: {error}"
            failure = Failure(who, "RejectedUpdate", why)
            rows[who.id] = json.dumps(_encode_row(failure, wire, None, reply))
    config = ConfigRecord(
        {
            "rows": f"[{', '.join(rows.values())}]",
            "notes": json.dumps(list(notes)),
            "nonce": nonce,
        }
    )
    return RecordDict(
        {
            "payloads": ArrayRecord(reply.arrays),
            "residuals": _put_residuals(reply.residuals),
            "results": config,
        }
    )


@dataclass(frozen=True)
class _Reply:
    """The arrays of a reply that is being written, by client id."""

    arrays: dict[str, Array]
    residuals: dict[str, Named]
    memory: Memory | None = None


def _encode_row(
    result: Result, wire: str, job: TrainJob | None, reply: _Reply, up: Format = NO_FORMAT
) -> dict[str, Any]:
    """One result as JSON; its arrays are added to the reply."""
    row: dict[str, Any] = {"client": result.client.id}
    if isinstance(result, Failure):
        return row | {"failure": [result.kind, result.message, result.traceback]}
    if isinstance(result, Evaluation):
        measured = {n: dataclasses.astuple(m) for n, m in result.metrics.items()}
        return row | {"evaluation": measured}
    left: Named | None = None
    if job is None:
        array, header = encode_payload(result.payload, wire)
    else:
        draw = torch_generator(job.seed, "compress", job.round, job.client.id)
        array, header, left = encode_reply(result.payload, wire, job.start, job.residual, up, draw)
    key = str(result.client.id)
    if job is not None and job.recall is not None and reply.memory is not None:
        sent = dict(job.start.tensors()) if job.recall.start is not None else {}
        reply.memory.keep(job.round, Held(sent, left or {}), job.recall.since)
        left = None
    reply.arrays[key] = Array(array)
    if left is not None:
        reply.residuals[key] = left
        row["residual"] = shapes_of(left)
    return row | {
        "payload": header,
        "ranks": dict(result.client.ranks),
        "num_examples": result.num_examples,
        "metrics": dict(result.metrics),
    }


@dataclass(frozen=True)
class Glance:
    """What a reply says without decoding its payloads."""

    clients: int
    failed: int
    losses: list[float]
    """Finite training losses of the updates in it."""
    notes: tuple[str, ...] = ()
    """What the engine says of itself."""


def glance(content: RecordDict) -> Glance:
    """Look at a reply for progress alone: costs nothing that grows with the adapters."""
    results = content.config_records["results"]
    rows = json.loads(str(results["rows"]))
    notes = json.loads(str(results.get("notes", "[]")))[:MOST_NOTES]
    found = (row.get("metrics", {}).get("loss") for row in rows)
    losses = [float(x) for x in found if is_real(x) and math.isfinite(x)]
    failed = sum("failure" in row for row in rows)
    return Glance(len(rows), failed, losses, tuple(one_line(note) for note in notes))


def decode_results(
    content: RecordDict,
    clients: Mapping[int, Client],
    starts: Mapping[int, Payload] = MappingProxyType({}),
    *,
    wire: str = "",
    nonce: str = "",
    up: Format = NO_FORMAT,
) -> list[Result]:
    """The inverse of `encode_results`.

    A row that cannot be read becomes a `Failure` of kind ``RejectedUpdate`` of its client, so that
    one bad client costs its own work alone. Of several rows of one client the first counts. Clients
    that were asked and not answered for are failures too; rows of clients that were not asked are
    left out.

    Args:
        content: of a reply.
        clients: those that were asked, by id.
        starts: what they were to train from, by client id, as it is here: changes are added to it.
        wire: the wire dtype that is due; empty: any.
        nonce: of the request; a reply to another one answers for no client.
        up: the format that is due in place of ``wire``, if it acts.

    Raises:
        ValueError: if the reply answers another request.
    """
    record = content.config_records["results"]
    if record.get("nonce", "") != nonce:
        raise ValueError("it answers another message than this round's")
    results: dict[int, Result] = {}
    for row in json.loads(str(record["rows"])):
        cid = row.get("client") if isinstance(row, dict) else None
        client = clients.get(cid) if type(cid) is int else None
        if client is None or client.id in results:
            why = "a second time" if client else "which was not asked"
            log.warning("a reply says something of client %.40r, %s: left out", cid, why)
            continue
        try:
            start = starts.get(client.id)
            results[client.id] = _decode_row(row, client, content, start, wire, up)
        except Exception as error:  # whatever a foreign row can do wrong, it is that row's fault
            why = one_line(f"its reply cannot be read: {type(error).__name__}: {error}")
            results[client.id] = Failure(client, "RejectedUpdate", why)
    for cid in clients.keys() - results.keys():
        results[cid] = Failure(clients[cid], "NoReply", "the reply says nothing of it")
    return [results[cid] for cid in sorted(results)]


def _decode_row(
    row: Mapping[str, Any],
    client: Client,
    content: RecordDict,
    start: Payload | None,
    wire: str,
    up: Format,
) -> Result:
    if "failure" in row:
        return failure_from(client, row["failure"])
    if "evaluation" in row:
        measured = row["evaluation"].items()
        return Evaluation(client, {name: _decode_metric(name, m) for name, m in measured})
    metrics = {name: real(f"its metric {name:.64}", v) for name, v in row["metrics"].items()}
    array = content.array_records["payloads"][str(client.id)].numpy()
    payload = decode_payload(array, row["payload"], trusted=False, start=start, wire=wire, up=up)
    residual = None
    if "residual" in row:
        residual = _take_residuals(content, {str(client.id): row["residual"]})[client.id]
    sender = client
    if dict(client.ranks) != row["ranks"]:
        sender = Client(client.id, Ranks(row["ranks"]), client.num_examples, client.tier)
    sent = array.nbytes if up.acts else 0
    return Update(sender, payload, row["num_examples"], metrics, residual, sent)


def _decode_metric(name: str, fields: Sequence[Any]) -> Metric:
    value, weight, over_clients, interval, worst, counts = fields
    if not isinstance(interval, bool):
        raise ValueError(f"metric {name:.64}: interval={interval!r} is neither true nor false")
    said = f"metric {name:.64}"
    table = None if counts is None else Confusion(counts[0], tuple(map(tuple, counts[1])))
    numbers = real(said, value), real(said, weight)
    return Metric(*numbers, str(over_clients), interval, str(worst), table)


def failure_from(client: Client, texts: Any) -> Failure:
    """A failure as a worker reports it: its texts are foreign, so each is cut to some length."""
    kind, message, trace = (str(text) for text in texts)
    return Failure(client, one_line(kind, 80), one_line(message, 1000), trace[-20_000:])
