"""How long the server needs for a round of every preset, beside FedIT.

80 clients in four tiers of ranks have trained (random changes, no model); measured is what follows
their replies: the next state, and the starts of the same clients from it. The round is the second,
so that no first state hides what a later one costs. Layers are those of the tiny model, or of some
blocks of SmolLM2-135M, times as many as the model has more. Every repeat does all presets once,
beginning with another one each time; a round's updates are made anew and not timed. What clients
would compute themselves (`fedlora.server.method.Method.kept`) is not timed either.
"""

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedlora.algebra.state import Kept, State
from fedlora.core.types import LocalPlan, Setting, TrainJob
from fedlora.population.ranks import RankDistribution
from fedlora.server.method import Method
from fedlora.server.training_round import training_jobs
from simulations.bench.aggregation import ALPHA
from simulations.bench.costs.presets import parts_of
from simulations.bench.costs.shapes import SEED, Shapes, answered, population

CLIENTS = 80
ROUND = 3  # of the starts; rounds 1, 2, 4 and so on also compare starts of equal variants


@dataclass(frozen=True)
class Server:
    """A preset's server after its first round."""

    method: Method
    plan: LocalPlan
    setting: Setting
    state: State
    kept: Mapping[int, Kept]
    """What each client keeps."""

    def jobs(self, state: State) -> list[TrainJob]:
        """The starts of all clients from a state."""
        return training_jobs(
            self.method,
            state,
            self.setting.clients,
            self.plan,
            seed=SEED,
            round=ROUND,
            kept=self.kept.get,
        )

    def round(self) -> dict[str, dict[str, float]]:
        """CPU and wall milliseconds of the average and of the starts after it."""
        updates = [answered(job) for job in self.jobs(self.state)]
        gc.collect()
        after, averaging = timed(lambda: self.method.aggregate(self.state, updates))
        _, starting = timed(lambda: self.jobs(after))
        return {"aggregate": averaging, "starts": starting}


def timed(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """A result, and the CPU and wall milliseconds that it took."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    spent = (time.process_time() - cpu) * 1e3, (time.perf_counter() - wall) * 1e3
    return result, {"cpu_ms": spent[0], "wall_ms": spent[1]}


def server_of(preset: str, setting: Setting) -> Server:
    """A preset's server after one round of all clients."""
    parts = parts_of(preset)
    method, state = parts.strategy, parts.strategy.init_state(setting)
    jobs = training_jobs(method, state, setting.clients, parts.client, seed=SEED, round=1)
    updates = [answered(job) for job in jobs]
    kept = {
        job.client.id: held
        for job, update in zip(jobs, updates, strict=True)
        if (held := method.kept(state, job.client, None, job.start, update)) is not None
    }
    return Server(method, parts.client, setting, method.aggregate(state, updates), kept)


def measure(
    presets: Sequence[str], shapes: Shapes, repeats: int, clients: int = CLIENTS
) -> dict[str, Any]:
    """All repeats of all presets on some layers.

    A preset's server is made anew for every repeat: all of them at once would not fit.

    Args:
        presets: to measure.
        shapes: of the layers.
        repeats: of each.
        clients: of a round.
    """
    setting = population(shapes, RankDistribution("uniform", alpha=ALPHA), clients)
    rounds: dict[str, list[dict[str, dict[str, float]]]] = {name: [] for name in presets}
    for i in range(repeats):
        turn = i % len(presets)
        for name in [*presets[turn:], *presets[:turn]]:
            rounds[name].append(server_of(name, setting).round())
    tiers = {c.tier: c.ranks.label for c in setting.clients}
    return {
        "clients": clients,
        "ranks": tiers,
        "blocks": shapes.blocks,
        "scale": shapes.scale,
        "presets": {
            name: {
                part: {
                    clock: [r[part][clock] * shapes.scale for r in found]
                    for clock in ("cpu_ms", "wall_ms")
                }
                for part in ("aggregate", "starts")
            }
            for name, found in rounds.items()
        },
    }
