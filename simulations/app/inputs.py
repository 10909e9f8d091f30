"""The inputs of a run: model, tokens, clients and workers, described or prepared before the run
has a folder, so that a mistake leaves nothing behind.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from flwr.serverapp import Grid

from fedlora.attack.base import Squad
from fedlora.core.cache import cache_root
from fedlora.core.config import describe
from fedlora.core.errors import ConfigError, ModelError
from fedlora.core.reading import json_in
from fedlora.core.types import LocalPlan, Setting
from fedlora.data.store import TokenStore, find_or_prepare
from fedlora.engine.base import EngineSpec, WorkerEngine
from fedlora.engine.worker import WorkerSpec
from fedlora.models.head import FROZEN, LOCAL
from fedlora.models.masks import load_masks
from fedlora.models.modules import ModelInfo
from fedlora.models.number_format import AUTO, number_format
from fedlora.models.spec import ModelSpec
from fedlora.models.stored import PrunedBase, inspect, require_masked
from fedlora.population.ranks import rank_text
from fedlora.population.sampling import Roster, enroll, panel
from fedlora.server.headed import Headed
from fedlora.server.method import Method
from fedlora.server.schedule import EvaluationSchedule
from fedlora.server.session import Session
from fedlora.server.virtual_time import VirtualTime
from simulations.app.limits import check_model, check_rounds, check_tokens, data_notes
from simulations.app.parts import Parts
from simulations.app.prefix import settled_prefix
from simulations.app.silos import Silos, meet
from simulations.app.unseen import unseen_model
from simulations.app.virtual import timed_clients


@dataclasses.dataclass(frozen=True)
class RunInputs:
    """The model, the data, the clients and what a worker needs, before round 1."""

    info: ModelInfo
    store: TokenStore | None
    """None: clients are silos, and the server holds none of their data."""
    data: str
    """Identity of the data: the store's name, or `simulations.app.silos.Silos.key`."""
    roster: Roster
    worker: WorkerSpec
    pruned: PrunedBase | None = None
    """Facts of a pruned model; None: the model is dense."""
    notes: tuple[str, ...] = ()
    """What was done to the examples so that they fit (`simulations.app.limits.data_notes`)."""
    silos: Silos | None = None
    """The silos of the run; None: its clients are virtual."""
    virtual: VirtualTime | None = None
    """The clock of a run whose clients have devices."""

    def setting(self, parts: Parts) -> Setting:
        """What the method of the run is told."""
        return Setting(
            self.info.modules,
            self.info.parameters,
            parts.ranks.alpha,
            self.roster.clients,
            parts.seed,
            mask=self.info.mask,
            density=self.pruned.density if self.pruned else 1.0,
            trainable=self.roster.trainable,
        )


def prepare_inputs(parts: Parts, emit: Callable[[str], None]) -> RunInputs:
    """Describe the model, prepare the data and enrol the clients."""
    parts = dataclasses.replace(parts, model=settled_model(parts, emit))
    model = parts.model.resolved()
    info = model.describe()
    check_model(parts, info)
    check_zeros_kept(parts.client, info, emit)
    pruned = _inspected(parts.client, info, model.folder()) if info.mask else None
    folder = find_or_prepare(parts.data, model.tokenizer, model.tokenizer_id(), cache_root())
    store = TokenStore(folder)
    if model.classifies:
        model = model.with_labels(store.labels, parts.seed)
        info = model.describe()
    if model.head == LOCAL or parts.strategy.private:
        emit(f"clients that never took part are evaluated with {unseen_of(parts)}")
    check_tokens(store, info)
    timed = timed_clients(parts, model, info, store, emit)
    roster = enroll(
        parts.population,
        parts.ranks,
        store.clients,
        info.modules,
        info.parameters,
        parts.seed,
        parts.client.loss,
        assigned=timed.assigned if timed else None,
    )
    check_groups(parts.evaluate, roster)
    check_rounds(parts.federation, roster, emit)
    engine = settled_prefix(parts, settled_engine(parts, info, emit), info, roster, emit)
    squad = Squad.drawn(parts.attack, roster.trainable, parts.seed) if parts.attack.acts else None
    device = parts.runtime.worker_device
    worker = WorkerSpec(model, folder, engine, device, attack=squad)
    data = f"{store.folder.name}{f'+{timed.files}' if timed and timed.files else ''}"
    virtual = timed.clock if timed else None
    notes = data_notes(store)
    return RunInputs(info, store, data, roster, worker, pruned, notes, virtual=virtual)


def prepare_silos(parts: Parts, grid: Grid, emit: Callable[[str], None]) -> RunInputs:
    """Describe the model and meet the silos; no data is opened here."""
    parts = dataclasses.replace(parts, model=settled_model(parts, emit))
    info = parts.model.describe()
    check_model(parts, info)
    check_zeros_kept(parts.client, info, emit)
    pruned = _inspected(parts.client, info, parts.model.folder()) if info.mask else None
    engine = settled_engine(parts, info, emit)
    if isinstance(engine, WorkerEngine):
        engine = dataclasses.replace(engine, prefix="off")
    silos = meet(grid, parts, info, engine, emit)
    roster = silos.enroll(parts, info)
    check_groups(parts.evaluate, roster)
    check_rounds(parts.federation, roster, emit)
    worker = WorkerSpec(parts.model.resolved(), Path(), engine, parts.runtime.worker_device)
    return RunInputs(info, None, silos.key, roster, worker, pruned, silos=silos)


def method_of(parts: Parts, inputs: RunInputs) -> Method:
    """The method of a run: its strategy, over updates with heads if clients train those."""
    model = inputs.worker.model
    if model.head == FROZEN:
        return parts.strategy
    return Headed(parts.strategy, model.head_state(), model.head)


def headline(inputs: RunInputs, data: str, session: Session) -> str:
    """One line on the model, the data and the clients, with the ranks that they hold and, where the
    method has them train others, those too.

    Args:
        inputs: of the run.
        data: name of the data source.
        session: before its first round.
    """
    info, roster = inputs.info, inputs.roster
    counts = Counter((c.ranks, c.tier) for c in roster.clients)
    first = {(c.ranks, c.tier): c for c in reversed(roster.clients)}
    held, trained = Counter[str](), Counter[str]()
    for alike, count in counts.items():
        enlisted = session.method.enlist(session.state, first[alike])
        held[rank_text(alike[0], info.modules)] += count
        trained[rank_text(enlisted.ranks, info.modules)] += count
    line = (
        f"{info.name}: {info.parameters:,} parameters, {len(info.modules)} adapted modules"
        f"{_in_blocks(info)}; "
        f"{data}: {len(roster.clients):,} clients, {len(roster.trainable):,} train, "
        f"{roster.per_round} per round; clients hold {_by_rank(held)}"
    )
    if trained == held:
        return line
    return f"{line}; under {session.method.label} they train {_by_rank(trained)}"


def _in_blocks(info: ModelInfo) -> str:
    """Where the adapted modules are, if some blocks have none: `` in blocks 28, 29 of 0..29``."""
    if not info.adapted or len(info.adapted) == info.blocks:
        return ""
    numbers = ", ".join(map(str, info.adapted))
    return f" in block{'s' * (len(info.adapted) > 1)} {numbers} of 0..{info.blocks - 1}"


def _by_rank(counts: Counter[str]) -> str:
    """``rank 15 (1,280 clients), rank 2 (80 clients)``, most frequent first."""
    if len(counts) == 1:
        return f"rank {next(iter(counts))} (all clients)"
    return ", ".join(f"rank {text} ({n:,} clients)" for text, n in counts.most_common())


def settled_model(parts: Parts, emit: Callable[[str], None]) -> ModelSpec:
    """The model with its number format decided. A decision is shown, for results depend on it."""
    device = _worker_device(parts)
    model = parts.model.settled(device)
    if model != parts.model:
        reason = number_format(device)[1]
        note = "; results differ from those in float32" if model.dtype == "bfloat16" else ""
        emit(f"model.dtype={model.dtype}: {reason}{note}")
    return model


def _worker_device(parts: Parts) -> torch.device:
    """The workers' kind of device."""
    name = parts.runtime.worker_device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def settled_engine(parts: Parts, info: ModelInfo, emit: Callable[[str], None]) -> EngineSpec:
    """The engine with everything decided that the configuration leaves to it, so that all workers
    of a run, also after a resume, do the same. What was decided is shown."""
    dtype = getattr(torch, parts.model.dtype)
    engine = parts.engine.settled(info, dtype, _worker_device(parts))
    given = describe(parts.engine)
    for key, value in describe(engine).items():
        if value != given[key]:
            emit(f"engine.{key}={value}, decided from the model and the device")
    return engine


def as_it_began(
    inputs: RunInputs, parts: Parts, folder: Path, emit: Callable[[str], None]
) -> RunInputs:
    """The inputs of a run that goes on: what its first start decided for engine and number format
    still holds, even on another machine. What the configuration decides is the same, or it could
    not go on.

    Raises:
        ModelError: if the run folder's record of its workers cannot be read.
    """
    file = folder / "worker.json"
    if not file.is_file():
        return inputs
    told: dict[str, Any] = json_in(file, "what the run's workers were told,")
    before = told.get("engine", {})
    asked, now = describe(parts.engine), describe(inputs.worker.engine)
    decided = {key for key, value in now.items() if value != asked.get(key)}
    changed = {key: before[key] for key in decided if before.get(key, now[key]) != now[key]}
    for key, value in changed.items():
        emit(f"engine.{key}={value}, as decided when this run began")
    engine = dataclasses.replace(inputs.worker.engine, **changed)
    model = inputs.worker.model
    dtype = told.get("model", {}).get("dtype", model.dtype)
    if parts.model.dtype == AUTO and dtype != model.dtype:
        emit(f"model.dtype={dtype}, as decided when this run began")
        model = dataclasses.replace(model, dtype=dtype)
    worker = dataclasses.replace(inputs.worker, engine=engine, model=model)
    return dataclasses.replace(inputs, worker=worker)


def unseen_of(parts: Parts) -> str:
    """What clients that never took part in this run are evaluated with."""
    model, private = parts.model, parts.strategy.private
    return unseen_model(model.head, classifies=model.classifies, private=private)


def check_groups(schedule: EvaluationSchedule, roster: Roster) -> None:
    """Refuse to evaluate a group that has no clients, or none with examples to evaluate.

    Raises:
        ConfigError: naming the group and how to fill it.
    """
    split = schedule.plan.split
    for group in schedule.groups if schedule.every else ():
        name = "seen" if group == "participants" else group
        if not roster.groups[name]:
            raise ConfigError(
                f"evaluate.groups: {group} has no clients; set population.unseen_fraction or "
                "population.unseen_categories, or leave the group out"
            )
        if not panel(roster, name, 1, 0, split):
            raise ConfigError(
                f"evaluate.groups: none of the {len(roster.groups[name])} clients of {group} has "
                f"examples in the {split} split; use another evaluate.plan.split, data with such a "
                "split (data.test_fraction, data.eval_fraction, data.train_on=train), or "
                "evaluate=none"
            )


def check_zeros_kept(plan: LocalPlan, info: ModelInfo, emit: Callable[[str], None]) -> None:
    """Refuse what needs a pruned model on a dense one, and say what the others do to its zeros.

    Raises:
        ConfigError: naming the model and what to use.
    """
    kind = plan.technique
    if kind.keeps_zeros and not info.mask:
        raise ConfigError(
            f"{kind.key} {kind.does}, and {info.name} is dense: use "
            "model=pruned (model@model.base=... is what it prunes), or model=hf with the folder of "
            "a pruned model"
        )
    if info.mask and not kind.keeps_zeros:
        emit(
            f"{info.name} is pruned, and what {kind.client} trains fills its zeros when it is "
            "merged: strategy=spp keeps them"
        )


def _inspected(plan: LocalPlan, info: ModelInfo, folder: Path) -> PrunedBase:
    """A pruned model that holds what its masks say and, where zeros are kept, masks of what is
    adapted.

    Raises:
        ModelError: naming a layer.
    """
    if plan.technique.keeps_zeros:
        if info.splits:
            raise ModelError(
                f"{info.name} was pruned with {info.splits[0].path} whole, and its mask is of the "
                "whole layer: use model.split_qkv=false"
            )
        require_masked((m.path for m in info.modules), load_masks(folder), info.name)
    return inspect(folder)
