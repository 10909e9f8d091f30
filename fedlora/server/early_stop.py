"""Early stopping: a run ends when a metric of its evaluations no longer improves.

What is watched follows from the configuration, how the run stands from its recorded evaluations
alone. So a run that was killed and goes on stops after the same round as one that was not.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedlora.core.checks import is_real
from fedlora.core.metric import DERIVED, LOWEST, SPREADS, TIER, TRAINED, UNTRAINED, Scorer
from fedlora.server.schedule import AUTO, EvaluationSchedule, Rounds


@dataclass(frozen=True)
class Watch:
    """Which number of which evaluations decides, and how."""

    metric: str
    """As records name it."""
    group: str
    adapter: str
    lower: bool
    """Whether smaller values are better."""
    patience: int
    """The run stops after so many evaluations in a row without improvement."""
    min_delta: float = 0.0
    """A value improves on another by more than this."""

    @property
    def of(self) -> str:
        """``loss_response_weighted of unseen_random (full)``"""
        return f"{self.metric} of {self.group} ({self.adapter})"

    def improves(self, value: float, on: float | None, by: float = 0.0) -> bool:
        """Whether a value is better than another, or is the first."""
        if on is None:
            return True
        return on - value > by if self.lower else value - on > by


@dataclass(frozen=True)
class Standing:
    """How a run stands by its evaluations."""

    evaluated: int = 0
    """The round before the last evaluation."""
    best: float | None = None
    """The best value; None: none was measured."""
    best_round: int = 0
    """The first round after which it was measured."""
    without: int = 0
    """Evaluations in a row that have not improved."""


def standing(values: Iterable[tuple[int, float | None]], watch: Watch) -> Standing:
    """How a run stands.

    An evaluation improves if its value is better by more than ``min_delta`` than that of the last
    one that did; the first value does. One that measured nothing (all clients failed, or the model
    diverged) does not.

    Args:
        values: round and value of every evaluation, by round.
        watch: how they are compared.

    >>> watch = Watch("loss", "seen", "full", lower=True, patience=2, min_delta=0.1)
    >>> standing([(0, 5.0), (1, 4.0), (2, 3.95), (3, 4.2)], watch)
    Standing(evaluated=3, best=3.95, best_round=2, without=2)
    """
    found, mark = Standing(), None
    for round, value in values:
        best, best_round, without = found.best, found.best_round, found.without + 1
        if value is not None and watch.improves(value, mark, watch.min_delta):
            mark, without = value, 0
        if value is not None and watch.improves(value, best):
            best, best_round = value, round
        found = Standing(round, best, best_round, without)
    return found


def stopped(found: Standing, watch: Watch) -> str:
    """The sentence with which a run ends early; empty: it goes on."""
    if found.without < watch.patience:
        return ""
    by = f" by more than {watch.min_delta:g}" if watch.min_delta else ""
    best = "none was measured"
    if found.best is not None:
        best = f"best {found.best:.6g} at round {found.best_round}"
    return (
        f"stopped at round {found.evaluated}: no improvement of {watch.of}{by} in "
        f"{watch.patience} evaluation{'s' * (watch.patience > 1)}; {best}"
    )


def watched_values(
    records: Sequence[Mapping[str, Any]], watch: Watch
) -> list[tuple[int, float | None]]:
    """Round and value of every evaluation that is watched, by round.

    Args:
        records: of ``metrics.jsonl``, those that count.
        watch: what is looked at.

    Raises:
        ValueError: if evaluations measured something, and none of them this metric.
    """
    key = ("evaluate", watch.group, watch.adapter)
    mine = [r for r in records if (r.get("kind"), r.get("group"), r.get("adapter")) == key]
    measured = [r for r in mine if r.get("clients")]
    if measured and not any(watch.metric in r for r in measured):
        names = ", ".join(sorted(name for name in measured[0] if _is_metric(name, measured[0])))
        raise ValueError(
            f"federation.watch={watch.metric!r}: no evaluation of {watch.group} "
            f"({watch.adapter}) reports it; they report {names}"
        )
    found = {}
    for record in mine:
        value = record.get(watch.metric)
        found[int(record["round"])] = float(value) if is_real(value) else None
    return sorted(found.items())


def _is_metric(name: str, record: Mapping[str, Any]) -> bool:
    return f"{name}_weighted" in record or name.endswith(DERIVED)


def watch_of(
    rounds: Rounds, schedule: EvaluationSchedule, scorers: Sequence[Scorer], loss: str
) -> Watch | None:
    """What a configuration watches; None: its runs do not stop early.

    Args:
        rounds: with ``patience`` and what belongs to it.
        schedule: of the evaluations.
        scorers: what they measure.
        loss: the metric that ``federation.watch=auto`` means.

    Raises:
        ValueError: naming key, value and what is allowed, if no evaluation reports that metric.
    """
    if not rounds.patience:
        return None
    if not schedule.every:
        raise ValueError(
            f"federation.patience={rounds.patience} counts evaluations, and evaluate.every=0 asks "
            "for none; choose an evaluation, or federation.patience=0"
        )
    group = _chosen("watch_group", rounds.watch_group, "groups", schedule.groups)
    adapter = _chosen("watch_adapter", rounds.watch_adapter, "adapters", schedule.adapters)
    metric = loss if rounds.watch == AUTO else rounds.watch
    dues = {name: due for scorer in scorers for name, due in scorer.dues.items()}
    known = dues.get(metric) or dues.get(_measured(metric))
    if known is None and all(scorer.dues for scorer in scorers):
        raise ValueError(
            f"federation.watch={metric!r}: no evaluation of this run reports it; they report "
            f"{sorted(dues)}, each also with _weighted"
        )
    better = rounds.better
    if better == AUTO:  # of a spread over clients no metric says what is better
        better = known.better if known and not metric.endswith(SPREADS) else ""
    if not better:
        raise ValueError(
            f"federation.better=auto: {metric} does not say which of its values are better; "
            "state federation.better=lowest or highest"
        )
    lower = better == LOWEST
    return Watch(metric, group, adapter, lower, rounds.patience, rounds.min_delta)


def _chosen(key: str, value: str, listed: str, allowed: Sequence[str]) -> str:
    """The value of a key, of which auto means the first of those that are evaluated."""
    if value != AUTO and value not in allowed:
        raise ValueError(
            f"federation.{key}={value!r} is not evaluated: evaluate.{listed}={list(allowed)}"
        )
    return allowed[0] if value == AUTO else value


def _measured(name: str) -> str:
    """The metric from which a summary has made a number of this name."""
    for start in (TRAINED, UNTRAINED):
        name = name.removeprefix(start)
    if name.startswith(TIER):
        name = name.rpartition("/")[2]
    end = next((e for e in DERIVED if name.endswith(e)), "")
    return name.removesuffix(end)
