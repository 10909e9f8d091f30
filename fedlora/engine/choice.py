"""Which rank indices a client trains: the probe before its round, and the decision after it.

A job whose plan has a choice is executed twice. The probe trains the same client from the same
start as the choice's `IndexChoice.probe` says, in the same order and with the same dropout as its
round; what it has trained is looked at and dropped. The second pass begins at the start again and
trains what was chosen.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from fedlora.core.choice import Chosen
from fedlora.core.errors import CLIENT_ERRORS
from fedlora.core.types import Failure, TrainJob, Update
from fedlora.engine.base import failure

SPENT = ("steps", "tokens", "seconds", "cpu_seconds")
"""Metrics of an update that include those of its probe."""
ALONE = ("steps", "tokens", "seconds")
"""Metrics of the probe that are stated beside, as ``probe_<name>``."""

Train = Callable[[Sequence[TrainJob]], Iterator[Update | Failure]]


def is_undecided(job: TrainJob) -> bool:
    """Whether the job's rank indices must be chosen before it is trained."""
    return job.plan.choice is not None and job.chosen is None


def probe_of(job: TrainJob) -> TrainJob | None:
    """The job that precedes an undecided one; None: its choice needs none."""
    assert job.plan.choice is not None
    plan = job.plan.choice.probe(job.plan)
    return None if plan is None else replace(job, plan=plan)


def decided(job: TrainJob, probe: Update | None) -> TrainJob:
    """An undecided job with its rank indices.

    Args:
        job: as it came.
        probe: the result of `probe_of`; None: there was none.

    Raises:
        ValueError: if its start has no rank indices to choose from.
    """
    assert job.plan.choice is not None
    if not job.start.chooses:
        raise ValueError(f"client {job.client.id} cannot choose rank indices of {job.start.noun}")
    probed = None if probe is None else probe.payload.low_rank()
    indices = job.plan.choice.choose(job, probed)
    spent = {} if probe is None else {name: probe.metrics[name] for name in SPENT}
    return replace(job, chosen=Chosen(indices, spent))


def with_choices(jobs: Sequence[TrainJob], train: Train) -> Iterator[Update | Failure]:
    """Train jobs of different clients together: first all probes, then all jobs.

    Args:
        jobs: some or none of them undecided.
        train: trains jobs that are decided.
    """
    undecided = {j.client.id: j for j in jobs if is_undecided(j)}
    if not undecided:
        yield from train(jobs)
        return

    # The probes; of what they train only the decisions are kept.
    ready = {j.client.id: j for j in jobs if j.client.id not in undecided}
    probes = {i: probe_of(j) for i, j in undecided.items()}
    for i in [i for i, probe in probes.items() if probe is None]:
        probes.pop(i)
        yield from _decide(undecided[i], None, ready)
    for result in train([p for p in probes.values() if p is not None]):
        if isinstance(result, Failure):
            yield result
        else:
            yield from _decide(undecided[result.client.id], result, ready)

    # The jobs in the order in which they came.
    yield from train([ready[j.client.id] for j in jobs if j.client.id in ready])


def _decide(
    job: TrainJob, probe: Update | None, ready: dict[int, TrainJob]
) -> Iterator[Update | Failure]:
    """Add a decided job to the others; yield a failure if it cannot be decided."""
    try:
        ready[job.client.id] = decided(job, probe)
    except CLIENT_ERRORS as error:
        yield failure(job.client, error)


def with_probe(metrics: Mapping[str, float], probe: Mapping[str, float]) -> Mapping[str, float]:
    """The metrics of an update with the cost of its probe; as they are, if there was none."""
    if not probe:
        return metrics
    own = {f"probe_{name}": probe[name] for name in ALONE}
    return {**metrics, **{name: metrics[name] + probe[name] for name in SPENT}, **own}
