"""Whether a run computes the output of its frozen blocks once per example (`engine.prefix`).

Decided before round 1 from what the run will do, not from measurements, so that all workers, and a
run that is continued, do the same.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace

from fedlora.core.cache import cache_root
from fedlora.core.errors import ConfigError
from fedlora.engine.base import AUTO, OFF, ON, STATES, EngineSpec, WorkerEngine
from fedlora.models.modules import ModelInfo
from fedlora.population.sampling import Roster, panel
from fedlora.population.workload import training_tokens
from fedlora.server.schedule import EvaluationSchedule
from simulations.app.parts import Parts

WORTH = 2.0
"""Visits per example from which states are worth their computation, writing and reading."""


@dataclass(frozen=True)
class Visits:
    """Tokens of a run, in expectation."""

    computed: float
    """Tokens of all examples that are visited at least once."""
    visited: float
    """Tokens of all visits of examples."""

    @property
    def each(self) -> float:
        """Visits per example."""
        return self.visited / self.computed if self.computed else 0.0


def settled_prefix(
    parts: Parts, engine: EngineSpec, info: ModelInfo, roster: Roster, emit: Callable[[str], None]
) -> EngineSpec:
    """The engine with ``prefix`` decided. What ``auto`` decided is shown with its reason.

    Raises:
        ConfigError: if ``on`` is impossible, or does not fit ``engine.prefix_gb``.
    """
    if not isinstance(engine, WorkerEngine) or engine.prefix == OFF:
        return engine
    asked = engine.prefix
    if not info.frozen_blocks:
        if asked == AUTO:
            return replace(engine, prefix=OFF)
        raise ConfigError(
            f"engine.prefix={asked}: no block of {info.name} lies before the first adapter "
            "(model.layers=top:k leaves the others without); use engine.prefix=auto or off"
        )
    visits = _visits(parts, roster)
    room = engine.prefix_gb if asked != AUTO else min(engine.prefix_gb, _free())
    sizes = {
        kind: _gigabytes(parts, replace(engine, prefix=kind), info, visits)
        for kind in ((ON, STATES) if asked == AUTO else (asked,))
    }
    chosen = next((kind for kind, size in sizes.items() if size <= room), OFF)
    size = sizes.get(chosen, min(sizes.values()))
    takes = f"the states of all examples take about {size:.2g} GB"
    if asked != AUTO:
        if chosen == OFF:
            raise ConfigError(
                f"engine.prefix={asked}: {takes}, more than engine.prefix_gb="
                f"{engine.prefix_gb:g}: give more room, use engine.prefix_dtype=bfloat16, or "
                "engine.prefix=auto"
            )
        return engine
    reason = ""
    if visits.each < WORTH:
        reason = f"an example is visited {visits.each:.1f} times, which is too seldom"
    elif chosen == OFF:
        reason = (
            f"{takes}, more than engine.prefix_gb={engine.prefix_gb:g} or the disk has room for"
        )
    about = f"the first {info.frozen_blocks} of {info.blocks} blocks carry no adapter"
    if reason:
        emit(f"engine.prefix=off: {about}, but {reason}")
        return replace(engine, prefix=OFF)
    emit(
        f"engine.prefix={chosen}: {about}, and an example is visited {visits.each:.1f} times: they "
        f"are computed once; {takes}"
    )
    return replace(engine, prefix=chosen)


def _gigabytes(parts: Parts, engine: WorkerEngine, info: ModelInfo, visits: Visits) -> float:
    """What all examples that are visited take on disk, in 10^9 bytes."""
    return visits.computed * engine.state_width(info) * _bytes(parts, engine) / 1e9


def _visits(parts: Parts, roster: Roster) -> Visits:
    """The visits in training, by uniformly drawn cohorts, and in evaluation of fixed panels."""
    shards = [roster.shards[i] for i in roster.trainable]
    rounds, part = parts.federation.rounds, roster.per_round / max(1, len(shards))
    held = sum(s.holds("train")[1] for s in shards)
    once = sum(training_tokens(s, parts.client) for s in shards)
    computed, visited = (1 - (1 - part) ** rounds) * held, rounds * part * once
    schedule = parts.evaluate
    times = sum(schedule.due(r, rounds) for r in range(rounds + 1)) * len(schedule.adapters)
    read = _evaluated(schedule, roster) if times else 0
    return Visits(computed + read, visited + times * read)


def _evaluated(schedule: EvaluationSchedule, roster: Roster) -> int:
    """Tokens of the fixed panels."""
    split, seed = schedule.plan.split, schedule.seed if schedule.seed is not None else roster.seed
    names = [g for g in schedule.groups if g != "participants"]
    ids = {c.id for g in names for c in panel(roster, g, schedule.clients, seed, split)}
    return sum(roster.shards[i].holds(split)[1] for i in ids)


def _bytes(parts: Parts, engine: WorkerEngine) -> int:
    """Bytes of one scalar of the states."""
    return 2 if "bfloat16" in (parts.model.dtype, engine.prefix_dtype) else 4


def _free() -> float:
    """10^9 bytes that the disk of the cache has free."""
    place = cache_root()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free / 1e9
