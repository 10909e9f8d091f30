"""The inputs of a run: model, tokens, clients and workers, described or prepared before the run
has a folder, so that a mistake leaves nothing behind.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch

from fedlora.core.cache import cache_root
from fedlora.core.config import describe
from fedlora.core.errors import ConfigError, ModelError
from fedlora.core.types import LocalPlan
from fedlora.data.store import TokenStore, prepare
from fedlora.engine.base import EngineSpec
from fedlora.engine.worker import WorkerSpec, resolve_device
from fedlora.models.masks import load_masks
from fedlora.models.modules import ModelInfo
from fedlora.models.stored import PrunedBase, inspect, require_masked
from fedlora.population.sampling import Roster, enroll, panel
from fedlora.server.schedule import EvaluationSchedule
from simulations.app.parts import Parts


@dataclasses.dataclass(frozen=True)
class RunInputs:
    """The model, the data, the clients and what a worker needs, before round 1."""

    info: ModelInfo
    store: Path
    roster: Roster
    worker: WorkerSpec
    pruned: PrunedBase | None = None
    """Facts of a pruned model; None: the model is dense."""


def prepare_inputs(parts: Parts, emit: Callable[[str], None]) -> RunInputs:
    """Describe the model, prepare the data and enrol the clients."""
    model = parts.model.resolved()
    info = model.describe()
    check_zeros_kept(parts.client, info, emit)
    pruned = _inspected(parts.client, info, model.folder()) if info.mask else None
    folder = prepare(parts.data, model.tokenizer(), model.tokenizer_id(), cache_root())
    clients = TokenStore(folder).clients
    roster = enroll(
        parts.population, parts.ranks, clients, info.modules, info.parameters, parts.seed
    )
    check_groups(parts.evaluate, roster)
    emit(
        f"{info.name}: {info.parameters:,} parameters, {len(info.modules)} adapted modules; "
        f"{parts.data.name}: {len(roster.clients):,} clients, {len(roster.trainable):,} train, "
        f"{roster.per_round} per round; clients by rank {roster.rank_counts()}"
    )
    engine = settled_engine(parts, info, emit)
    worker = WorkerSpec(model, folder, engine, parts.runtime.worker_device)
    return RunInputs(info, folder, roster, worker, pruned)


def settled_engine(parts: Parts, info: ModelInfo, emit: Callable[[str], None]) -> EngineSpec:
    """The engine with everything decided that the configuration leaves to it, so that all workers
    of a run, also after a resume, do the same. What was decided is shown."""
    runtime, dtype = parts.runtime, getattr(torch, parts.model.dtype)
    on_gpu = runtime.worker_device == "auto" and runtime.gpus_per_worker > 0
    device = torch.device("cuda") if on_gpu else resolve_device(runtime.worker_device)
    engine = parts.engine.settled(info, dtype, device)
    given = describe(parts.engine)
    for key, value in describe(engine).items():
        if value != given[key]:
            emit(f"engine.{key}={value}, decided from the model and the device")
    return engine


def check_groups(schedule: EvaluationSchedule, roster: Roster) -> None:
    """Refuse to evaluate a group that has no clients.

    Raises:
        ConfigError: naming the group and how to fill it.
    """
    for group in schedule.groups:
        if schedule.every and group != "participants" and not panel(roster, group, 1, 0):
            raise ConfigError(
                f"evaluate.groups: {group} has no clients; set population.unseen_fraction or "
                "population.unseen_categories, or leave the group out"
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
