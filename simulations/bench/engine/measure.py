"""Agreement first, then interleaved repeats: one case, every side."""

import gc
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from fedlora.core.config import describe
from fedlora.core.types import TrainJob
from fedlora.wire.codec import encode_payload
from simulations.bench.engine.cases import (
    Case,
    World,
    fed,
    real_tokens,
    sample,
)
from simulations.bench.engine.hosts import (
    Group,
    Host,
    Run,
    hosts,
    notes_of,
)
from simulations.bench.engine.sides import (
    ENGINES,
    REFERENCES,
    Outcome,
)
from simulations.bench.peak import flop, gemm_peak, measure_shape

TOLERANCE = {"float32": (1e-4, 0.05), "bfloat16": (1e-2, 0.5)}
"""Largest difference to the PEFT loop that is rounding: of a loss, and of an adapter relative to
how far that adapter moved. Adam divides small gradients by their own size, so single numbers of an
adapter differ more than any loss does."""


@dataclass(frozen=True)
class Entry:
    """One way to run a side."""

    side: str
    processes: int = 1
    threads: int = 1
    """Threads of each process."""

    @property
    def label(self) -> str:
        """For tables and JSON."""
        return f"{self.side} {self.processes}x{self.threads}"


ENTRIES = (
    Entry("trainer"),
    Entry("trainer", threads=2),
    Entry("peft loop"),
    Entry("peft loop", threads=2),
    Entry("peft loop", processes=2),
    *(Entry(engine, processes) for engine in ENGINES for processes in (1, 2)),
)
LABELS = {e.label: e for e in ENTRIES}


@dataclass(frozen=True)
class Effort:
    """How long to measure."""

    repeats: int = 5
    trainer_clients: int = 16
    """Clients, evenly spread by tokens, that stand for all where each has a Trainer; 0: all."""


@dataclass(frozen=True)
class Cohort:
    """Jobs and what they weigh."""

    jobs: list[TrainJob]
    weights: list[int]
    """Real tokens of each job."""
    last: int
    """Each example's last token: it needs no forward, but Hugging Face's batches contain it."""

    @property
    def tokens(self) -> int:
        """Real tokens of all."""
        return sum(self.weights)


def cohort_of(world: World, size: int = 0) -> Cohort:
    """The world's jobs, or ``size`` of them that stand for all."""
    everyone = [real_tokens(j, world.store) for j in world.jobs]
    jobs = sample(world.jobs, everyone, size)
    weights = [real_tokens(j, world.store) for j in jobs]
    last = sum(len(batch) for j in jobs for batch in fed(j, world.store))
    return Cohort(jobs, weights, last)


def differences(
    jobs: Sequence[TrainJob], found: Sequence[Outcome], reference: Sequence[Outcome]
) -> tuple[float, float]:
    """Largest difference of any loss, and of any adapter relative to its own way from the start."""
    known = {o.client: o for o in reference}
    starts = {j.client.id: j.start for j in jobs}
    loss = adapter = 0.0
    for outcome in found:
        other = known[outcome.client]
        for name in outcome.losses.keys() & other.losses.keys():
            loss = max(loss, abs(outcome.losses[name] - other.losses[name]))
        way = other.row - encode_payload(starts[outcome.client])[0]
        gap = np.linalg.norm(outcome.row - other.row) / np.linalg.norm(way)
        adapter = max(adapter, float(gap))
    return loss, adapter


def measure(case: Case, entries: Sequence[Entry], effort: Effort) -> dict[str, Any]:
    """One case: work, limit, and per entry its repeats, memory, padding and difference.

    A side that does not train what the PEFT loop trains is not timed; its entries say so.
    """
    world = World(replace(case, device="cpu"))
    everyone, few = cohort_of(world), cohort_of(world, effort.trainer_clients)
    work = flop(measure_shape(world.model), everyone.jobs, world.store)
    cohorts = {e.label: few if e.side == "trainer" else everyone for e in entries}
    counts: dict[str, int] = {}
    for e in entries:
        counts[e.side] = max(counts.get(e.side, 0), e.processes)
    peaks = [gemm_peak(case.dtype, case.device)]
    with hosts(case, counts) as opened:
        checked = check(case, opened, {e.side: cohorts[e.label] for e in entries})
        timed = [e for e in entries if not checked[e.side]["error"]]
        runs = repeat(timed, opened, cohorts, effort.repeats)
        peaks.append(gemm_peak(case.dtype, case.device))
        memory = {e.label: Group(opened[e.side][: e.processes]).memory() for e in timed}
    found: dict[str, Any] = {}
    for e in entries:
        own = cohorts[e.label]
        found[e.label] = {**vars(e), "clients": len(own.jobs), "tokens": own.tokens}
        found[e.label] |= checked[e.side]
        found[e.label]["repeats"] = [
            {"wall_s": r.wall, "cpu_s": r.cpu} for r in runs.get(e.label, [])
        ]
        growth, peak = memory.get(e.label, (None, None))
        found[e.label] |= {"peak_growth_mb": growth, "peak_mb": peak}
    return {
        "config": {**asdict(case), "plan": describe(everyone.jobs[0].plan)},
        "clients": len(everyone.jobs),
        "tokens": everyone.tokens,
        "flop": work,
        "gemm_peaks": peaks,
        "entries": found,
    }


def check(
    case: Case, opened: Mapping[str, list[Host]], cohorts: Mapping[str, Cohort]
) -> dict[str, dict[str, Any]]:
    """Train once with every side, on all of its processes, and compare; this also warms them up.

    With dropout PEFT draws other masks than our engines, which are then compared among themselves.
    A side with nothing to compare it to has no differences.
    """
    runs = {s: Group(opened[s]).train(c.jobs, c.weights) for s, c in cohorts.items()}
    exact = all(j.plan.dropout == 0 for c in cohorts.values() for j in c.jobs)
    found: dict[str, dict[str, Any]] = {}
    for side, run in runs.items():
        known = ["peft loop"] * exact + ["sequential"] * (side in ENGINES)
        reference = next((name for name in known if name in runs), "")
        agreed = Agreement()
        if reference:
            agreed = agreement(case, cohorts[side], run, runs[reference])
        found[side] = vars(agreed) | {"reference": reference} | padding(side, cohorts[side], run)
        notes = (host.call(notes_of) for host in opened[side])
        found[side]["notes"] = sorted({note for of_host in notes for note in of_host})
    return found


@dataclass(frozen=True)
class Agreement:
    """How far a side is from the one it is held against."""

    error: str = ""
    """If it is further than rounding explains."""
    loss_difference: float | None = None
    adapter_difference: float | None = None


def agreement(case: Case, cohort: Cohort, run: Run, reference: Run) -> Agreement:
    """Compare two trainings of the same jobs."""
    loss, adapter = differences(cohort.jobs, run.outcomes, reference.outcomes)
    allowed, error = TOLERANCE[case.dtype], ""
    if not (loss <= allowed[0] and adapter <= allowed[1]):
        error = (
            f"trains something else: loss differs by {loss:.1e} (allowed {allowed[0]:.0e}), "
            f"adapter by {adapter:.1e} (allowed {allowed[1]:.0e})"
        )
    return Agreement(error, loss, adapter)


def padding(side: str, cohort: Cohort, run: Run) -> dict[str, Any]:
    """Which share of what went through the base model was padding, and how often it ran."""
    real = cohort.tokens + (cohort.last if side in REFERENCES else 0)
    positions = run.count.positions
    return {
        "padding_share": 1 - real / positions if positions else None,
        "forwards": run.count.forwards,
    }


def repeat(
    entries: Sequence[Entry],
    opened: Mapping[str, list[Host]],
    cohorts: Mapping[str, Cohort],
    repeats: int,
) -> dict[str, list[Run]]:
    """Entries interleaved, in an order that moves on by one each time. Outcomes are let go."""
    runs: dict[str, list[Run]] = {e.label: [] for e in entries}
    for r in range(repeats):
        at = r % len(entries)
        for e in (*entries[at:], *entries[:at]):
            own = cohorts[e.label]
            gc.collect()
            run = Group(opened[e.side][: e.processes]).train(own.jobs, own.weights, e.threads)
            runs[e.label].append(replace(run, outcomes=[]))
    return runs


# ------------------------------------------------------------------------------------------- rates


def rate(entry: Mapping[str, Any], best: bool = False, clock: str = "wall_s") -> float:
    """Real tokens per second of wall or CPU (``cpu_s``): median of the repeats, or the best."""
    seconds = [r[clock] for r in entry["repeats"]]
    return float(entry["tokens"] / (min(seconds) if best else statistics.median(seconds)))


def limit(record: Mapping[str, Any], cores: int = 1) -> float:
    """Tokens per second that arithmetic alone allows on so many cores."""
    return float(cores * max(record["gemm_peaks"]) * record["tokens"] / record["flop"])


def fastest(record: Mapping[str, Any], side: str, processes: int = 1) -> dict[str, Any] | None:
    """A side's entry with the thread count that suits it best."""
    found = [
        e
        for e in record["entries"].values()
        if (e["side"], e["processes"]) == (side, processes) and e["repeats"]
    ]
    return max(found, key=rate) if found else None


def cores(entry: Mapping[str, Any]) -> int:
    """How many cores an entry can keep busy."""
    return int(entry["processes"] * entry["threads"])


def trains_otherwise(record: Mapping[str, Any]) -> bool:
    """Name the sides of a comparison that differ from its first by more than float32's rounding.

    Args:
        record: with ``loss_difference`` and ``adapter_difference`` by side.
    """
    loss, adapter = TOLERANCE["float32"]
    wrong = [n for n, gap in record["loss_difference"].items() if not gap <= loss]
    wrong += [n for n, gap in record["adapter_difference"].items() if not gap <= adapter]
    for name in dict.fromkeys(wrong):
        print(f"{name} trains something else: losses or adapters differ by more than rounding")
    return bool(wrong)
