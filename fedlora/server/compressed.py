"""Starts in few bytes: what a client is sent is the change of what it was sent last.

    d = C(A⁰ - H)       H: what the client holds, or zero where it holds nothing of that shape
    H ← H + d           at both ends, bit for bit: the client trains from this

The client's reply is its change from ``H``, and the server adds it to its own ``A⁰``: rounding on
the way down is no part of what the client learnt, and is not repeated, for the next ``d`` is a
change of what the client has. A simulation hands its virtual clients ``H`` itself; a client on a
machine of its own is sent ``d``, and keeps ``H`` there (`fedlora.wire.recall`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from fedlora.algebra.init import sample_a
from fedlora.core.payload import Payload, plain_factors
from fedlora.core.recall import CompressedStart
from fedlora.core.seeding import torch_generator
from fedlora.core.types import TrainJob
from fedlora.server.client_state import STARTS, ClientStore
from fedlora.wire.change import Named, change, restored
from fedlora.wire.recall import digest
from fedlora.wire.tensors import Format


def with_compressed_starts(
    jobs: Sequence[TrainJob], down: Format, store: ClientStore
) -> tuple[list[TrainJob], dict[int, int] | None]:
    """The jobs with what is sent in place of their starts, and its bytes by client id; None: starts
    travel as values.

    Clients that hold nothing and share a start are sent the same.
    """
    if not down.acts:
        return list(jobs), None
    first = dict[int, tuple[Payload, CompressedStart]]()
    found, sizes = [], dict[int, int]()
    for job in jobs:
        held = store.get(job.client.id, STARTS)
        if held is None and id(job.start) in first:
            sent, told = first[id(job.start)]
        else:
            sent, told = compressed_start(job, down, held or {})
        if held is None:
            first.setdefault(id(job.start), (sent, told))
        recall = None if job.recall is None else replace(job.recall, start=told)
        found.append(replace(job, sent=sent, recall=recall))
        sizes[job.client.id] = len(told.data)
    return found, sizes


def compressed_start(job: TrainJob, down: Format, held: Named) -> tuple[Payload, CompressedStart]:
    """What a client trains from, and what tells it so.

    Args:
        job: with the server's own start.
        down: the format.
        held: what the client was sent last.
    """
    own = {name: t.detach().cpu() for name, t in job.start.tensors()}
    drawn = {name: t for name, t in seeded(job, own).items() if name not in held}
    known = {**drawn, **held}
    moved = change(own, known)
    draw = torch_generator(job.seed, "compress-start", job.round, job.client.id)
    data = down.encode(moved, draw)
    read = down.decode(data, {name: tuple(t.shape) for name, t in moved.items()})
    told = restored(read, known)
    cast = {name: told[name].to(t.dtype) for name, t in own.items()}
    before = "" if job.recall is None else digest(held)
    sent = type(job.start).from_header(job.start.header(), cast)
    return sent, CompressedStart(data, tuple(drawn), before)


def seeded(job: TrainJob, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The frozen factors of a start that its client draws from the run's seed by itself
    (`fedlora.server.missed.seeded_bytes`)."""
    factors = None if job.plan.train_a else plain_factors(job.start)
    return {
        name: own[name]
        for path, f in (factors or {}).items()
        if (name := f"{path}/a") in own
        and bool((f.a == sample_a(job.seed, path, *f.a.shape)).all())
    }
