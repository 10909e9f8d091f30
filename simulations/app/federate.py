"""From a composed configuration to a finished run: the same for Flower's ServerApp, the launcher's
in-process runs, tests and notebooks.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from flwr.serverapp import Grid
from omegaconf import DictConfig, OmegaConf

from fedlora.core.cache import cache_root
from fedlora.core.config import build
from fedlora.core.errors import ConfigError, ModelError, RunError
from fedlora.core.files import claim, write_file
from fedlora.core.techniques import TECHNIQUES, technique
from fedlora.core.types import (
    LocalPlan,
    MaskedScale,
    Rebased,
    Setting,
    SparseDelta,
)
from fedlora.data.source import Source
from fedlora.data.store import TokenStore, prepare
from fedlora.engine.base import EngineSpec
from fedlora.engine.worker import WorkerSpec
from fedlora.models.masks import load_masks
from fedlora.models.modules import ModelInfo
from fedlora.models.spec import ModelSpec
from fedlora.models.stored import PrunedBase, inspect, require_masked
from fedlora.population.ranks import RankDistribution
from fedlora.population.sampling import (
    Population,
    Roster,
    enroll,
    panel,
)
from fedlora.prune.spec import calibration_traffic
from fedlora.run import checkpoint
from fedlora.run.environment import environment
from fedlora.run.source_hash import source_hash
from fedlora.run.tracking import (
    Trackers,
    Tracking,
    track,
)
from fedlora.server.session import (
    EvaluationSchedule,
    Rounds,
    Session,
)
from fedlora.techniques.spp.audit import ZeroAudit
from simulations.app.compose import absolute
from simulations.app.runtime import Runtime
from simulations.tools.base_model import FILE as MODEL
from strategies.base import LoRAStrategy, Setup

T = TypeVar("T")
VOLATILE = ("rounds", "output_dir", "resume", "report", "name", "runtime", "tracking", "experiment")
"""Keys that may change between a run and its continuation: results do not depend on them."""
ELSEWHERE = {
    "federation": ("rounds", "timeout_s", "keep", "clients_per_message"),
    "data": ("path",),
    "model": ("path",),
}
"""The same, within groups; data and model are identified by what they contain."""


@dataclasses.dataclass(frozen=True)
class Parts:
    """A configuration as values: every group built and checked, nothing loaded yet."""

    name: str
    seed: int
    output_dir: str
    resume: str
    report: bool
    strategy: LoRAStrategy
    client: LocalPlan
    ranks: RankDistribution
    population: Population
    model: ModelSpec
    data: Source
    engine: EngineSpec
    evaluate: EvaluationSchedule
    runtime: Runtime
    tracking: Tracking
    federation: Rounds
    resolved: dict[str, Any]
    """The whole configuration as plain values, for the run folder."""

    def hash(self, data: str, model: str) -> str:
        """Identity of everything that results depend on.

        Args:
            data: key of the token store: the content of the data, wherever it lies.
            model: fingerprint of the base model, wherever it lies.
        """
        stable = {k: v for k, v in self.resolved.items() if k not in VOLATILE}
        for group, keys in ELSEWHERE.items():
            stable[group] = {k: v for k, v in self.resolved[group].items() if k not in keys}
        return checkpoint.config_hash(stable | {"_data": data, "_model": model})


def build_parts(cfg: DictConfig) -> Parts:
    """Every group of a composed configuration as a checked value.

    Raises:
        ConfigError: naming group, key, value and what is allowed.
    """

    def part(group: str, base: type[T]) -> T:
        return build(cfg[group], base, group)

    resolved = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(resolved, dict)
    known = {f.name for f in dataclasses.fields(Parts)} - {"resolved"} | {"rounds", "experiment"}
    for key in resolved.keys() - known:
        raise ConfigError(f"unknown key {key}={resolved[key]!r}; known: {sorted(known)}")
    for key, kind in (
        ("seed", int),
        ("rounds", int),
        ("report", bool),
        ("name", str),
        ("output_dir", str),
        ("resume", str),
    ):
        if type(cfg[key]) is not kind:
            raise ConfigError(f"{key}={cfg[key]!r} must be of type {kind.__name__}")
    if cfg.seed < 0:
        raise ConfigError(f"seed={cfg.seed} must be >= 0")
    if not re.fullmatch(r"[\w,=+-][\w.,=+ -]*", cfg.name):
        raise ConfigError(
            f"name={cfg.name!r} must be letters, digits and any of '_.,=+- ', not starting with a "
            "dot: it becomes a folder of output_dir"
        )
    parts = Parts(
        name=str(cfg.name),
        seed=cfg.seed,
        output_dir=str(cfg.output_dir),
        resume=str(cfg.resume),
        report=cfg.report,
        strategy=part("strategy", LoRAStrategy),  # type: ignore[type-abstract]
        client=part("client", LocalPlan),
        ranks=part("ranks", RankDistribution),
        population=part("population", Population),
        model=part("model", ModelSpec),  # type: ignore[type-abstract]
        data=part("data", Source),  # type: ignore[type-abstract]
        engine=part("engine", EngineSpec),
        evaluate=part("evaluate", EvaluationSchedule),
        runtime=part("runtime", Runtime),
        tracking=part("tracking", Tracking),  # type: ignore[type-abstract]
        federation=part("federation", Rounds),
        resolved={str(k): v for k, v in resolved.items()},
    )
    quantization = str(getattr(parts.model, "quantization", "none"))
    try:
        parts.strategy.check(Setup(parts.client, parts.federation.wire, quantization))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return parts


def run_folder(parts: Parts) -> Path:
    """Where this run writes, absolute. A new run never writes into an old run's folder.

    Raises:
        ConfigError: if ``resume`` names a folder that no run has left.
    """
    if parts.resume not in ("never", "auto"):
        folder = absolute(parts.resume)
        if not (folder / "status.json").is_file():
            raise ConfigError(
                f"resume={parts.resume!r} is neither never, auto nor a run folder: there is no "
                f"{folder / 'status.json'}"
            )
        return folder
    base = absolute(parts.output_dir) / parts.name
    taken = [p for p in _numbered(base) if p.exists()]
    if parts.resume == "never":
        return next(p for p in _numbered(base, endless=True) if not p.exists())
    begun = [p for p in taken if any((p / "checkpoints").glob("round_*"))]
    return (begun or taken or [base])[-1]


def _numbered(base: Path, endless: bool = False) -> Iterator[Path]:
    """``name``, ``name-2``, ``name-3``, ...: all in use, or without end."""
    i = 1
    while True:
        path = base if i == 1 else base.with_name(f"{base.name}-{i}")
        if not endless and not path.exists():
            return
        yield path
        i += 1


def run(cfg: DictConfig, grid_of: Callable[[Parts], Grid], emit: Callable[[str], None]) -> Path:
    """Do the whole run, and leave a run folder.

    Args:
        cfg: a composed configuration.
        grid_of: gives the Flower grid once the parts are known.
        emit: shows one line to whoever watches.

    Returns:
        The absolute run folder.

    Raises:
        ConfigError, DataError, ModelError, RunError: one sentence each; whatever rounds were
            complete are on disk.
    """
    parts = build_parts(cfg)
    # The server's linear algebra: its last bits must not depend on how many cores a machine has.
    torch.set_num_threads(parts.federation.threads)
    ground = prepare_ground(parts, emit)
    folder = run_folder(parts)
    session = new_session(parts, ground, folder, emit)
    with claim(folder):
        emit(f"run folder: {folder}")
        open_session(session, parts, ground)
        try:
            with _status(folder, session):
                strategy = parts.strategy.bind(
                    session, worker=ground.worker.to_json(), source=source_hash()
                )
                if session.done < session.rounds.rounds or session.evaluation_missing():
                    strategy.start(grid_of(parts))
                _export(session, parts, ground.info, ground.worker.model)
        finally:
            session.tracker.close()
    if parts.report:
        _report(folder, emit)
    emit(f"run folder: {folder}")
    return folder


@dataclasses.dataclass(frozen=True)
class Ground:
    """What a run stands on. Made before its folder, so that a mistake leaves nothing behind."""

    info: ModelInfo
    store: Path
    roster: Roster
    worker: WorkerSpec
    pruned: PrunedBase | None = None
    """Of a pruned model."""


def prepare_ground(parts: Parts, emit: Callable[[str], None]) -> Ground:
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
    worker = WorkerSpec(model, folder, parts.engine, parts.runtime.worker_device)
    return Ground(info, folder, roster, worker, pruned)


def check_zeros_kept(plan: LocalPlan, info: ModelInfo, emit: Callable[[str], None]) -> None:
    """Refuse what needs a pruned model on a dense one, and say what the others do to its zeros.

    Raises:
        ConfigError: naming the model and what to use.
    """
    kind = TECHNIQUES[technique(plan)]
    if kind.keeps_zeros and not info.mask:
        raise ConfigError(
            f"{kind.key} {kind.does}, and {info.name} is dense: use "
            "model=pruned (model@model.base=... is what it prunes), or model=hf with the folder of "
            "a pruned model"
        )
    if info.mask and not kind.keeps_zeros:
        keep = " or ".join(t.strategy for t in TECHNIQUES.values() if t.keeps_zeros)
        emit(
            f"{info.name} is pruned, and what {kind.client} trains fills its zeros when it is "
            f"merged: {keep} keeps them"
        )


def _inspected(plan: LocalPlan, info: ModelInfo, folder: Path) -> PrunedBase:
    """A pruned model that holds what its masks say and, where zeros are kept, masks of what is
    adapted.

    Raises:
        ModelError: naming a layer.
    """
    if TECHNIQUES[technique(plan)].keeps_zeros:
        if info.splits:
            raise ModelError(
                f"{info.name} was pruned with {info.splits[0].path} whole, and its mask is of the "
                "whole layer: use model.split_qkv=false"
            )
        require_masked((m.path for m in info.modules), load_masks(folder), info.name)
    return inspect(folder)


def new_session(parts: Parts, ground: Ground, folder: Path, emit: Callable[[str], None]) -> Session:
    """The run before its first round. Writes nothing yet.

    Raises:
        ConfigError: for ranks, cuts or a model that the method cannot do with.
    """
    info, roster = ground.info, ground.roster
    setting = Setting(
        info.modules,
        info.parameters,
        parts.ranks.alpha,
        roster.clients,
        parts.seed,
        mask=info.mask,
        density=ground.pruned.density if ground.pruned else 1.0,
    )
    model = ground.worker.model
    audit = ZeroAudit(model.folder(), getattr(torch, model.dtype)) if info.mask else None
    try:
        return Session(
            method=parts.strategy,
            setting=setting,
            roster=roster,
            plan=parts.client,
            schedule=parts.evaluate,
            rounds=parts.federation,
            workers=parts.runtime.expected_workers,
            messages_per_worker=parts.engine.messages_per_worker,
            folder=folder,
            tracker=Trackers(()),
            config_hash=parts.hash(ground.store.name, info.fingerprint),
            audit=audit,
            emit=emit,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


def open_session(session: Session, parts: Parts, ground: Ground) -> None:
    """Go on from the run's checkpoint if there is one; then the run's first files.

    Raises:
        RunError: if the checkpoint was written under another configuration, naming what differs.
    """
    folder, roster = session.folder, session.roster
    try:
        if parts.resume != "never" and session.resume():
            session.emit(f"resuming after round {session.done} of {session.rounds.rounds}")
    except RunError as error:
        raise RunError(f"{error}{changed(folder, parts.resolved)}") from error
    write_start(parts, ground, folder)
    session.tracker = track(parts.tracking, folder, parts.name, session.done or -1)
    about = {"environment": environment(), "clients_by_rank": roster.rank_counts()}
    session.tracker.config(parts.resolved | about)
    if ground.pruned is not None and not session.done:
        session.tracker.round(_handed_out(ground.pruned, ground.worker.model.folder()))


def _handed_out(pruned: PrunedBase, folder: Path) -> dict[str, float | int | str]:
    """The record of what came before round 1: how clients came to a pruned model."""
    record: dict[str, float | int | str] = {"kind": "model", "round": 0}
    record |= {"model/density": pruned.density, "model/down_bytes": pruned.bytes}
    return record | calibration_traffic(folder)


def changed(folder: Path, resolved: Mapping[str, Any]) -> str:
    """What results depend on and is not as in a run folder's config.yaml, in words."""
    file = folder / "config.yaml"
    if not file.is_file():
        return ""
    before = OmegaConf.to_container(OmegaConf.load(file))
    assert isinstance(before, dict)
    old, new = (dict(_flat(values)) for values in (before, resolved))
    free = {*VOLATILE, *(f"{group}.{key}" for group, keys in ELSEWHERE.items() for key in keys)}
    found = [
        f"{key}={new.get(key)!r}, was {old.get(key)!r}"
        for key in dict.fromkeys([*old, *new])
        if key.split(".")[0] not in free and key not in free and old.get(key) != new.get(key)
    ]
    return f". What differs: {'; '.join(found)}" if found else ""


def _flat(values: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def check_groups(schedule: EvaluationSchedule, roster: Roster) -> None:
    """Refuse to evaluate a group that has no clients.

    Raises:
        ConfigError: naming the group and how to fill it.
    """
    for group in schedule.groups:
        if schedule.every and group != "participants" and not panel(roster, group, 1, 0):
            raise ConfigError(
                f"evaluate.groups: {group} has no clients; set population.unseen_share or "
                "population.unseen_categories, or leave the group out"
            )


def write_start(parts: Parts, ground: Ground, folder: Path) -> None:
    """config.yaml, environment.json, model.json and population.json of the run folder."""
    info, roster = ground.info, ground.roster
    write_file(folder / "config.yaml", OmegaConf.to_yaml(parts.resolved))
    _write_json(folder / "environment.json", environment())
    model = {"name": info.name, "fingerprint": info.fingerprint, "mask": info.mask}
    _write_json(folder / MODEL, model | {"folder": str(ground.worker.model.folder())})
    population = {
        "clients": len(roster.clients),
        "per_round": roster.per_round,
        "tiers": roster.tier_counts(),
        "ranks": roster.rank_counts(),
        "groups": {name: len(ids) for name, ids in roster.groups.items()},
    }
    _write_json(folder / "population.json", population)


def _write_json(path: Path, value: object) -> None:
    write_file(path, json.dumps(value, indent=1, default=str) + "\n")


@contextmanager
def _status(folder: Path, session: Session) -> Iterator[None]:
    """status.json says how the run ended, also if it is killed (then it still says running)."""

    def write(status: str, error: BaseException | None = None) -> None:
        _write_json(
            folder / "status.json",
            {
                "status": status,
                "rounds_done": session.done,
                "kind": type(error).__name__ if error else "",
                "message": str(error) if error else "",
            },
        )

    write("running")
    try:
        yield
    except BaseException as error:
        write("failed", error)
        raise
    write("completed")


def _report(folder: Path, emit: Callable[[str], None]) -> None:
    """A finished run stays finished whatever happens to its pictures."""
    # matplotlib takes seconds that a start need not wait for
    from simulations.reporting.report import write_report

    try:
        emit(f"report: {write_report(folder)}")
    except Exception as error:
        emit(f"report.html was not written: {type(error).__name__}: {error}")


def _export(session: Session, parts: Parts, info: ModelInfo, model: ModelSpec) -> None:
    """The global adapter at the population's largest ranks, in PEFT's format; ``update/`` if the
    method's update is more than two factors per layer."""
    from fedlora.models.export import save_peft, save_update  # PEFT: seconds nobody need wait
    from fedlora.techniques.spp.peft import save_spp

    adapter = session.method.global_adapter(session.state, session.setting.max_ranks)
    if isinstance(adapter, SparseDelta):
        session.emit("adapter/ is not written: the run ended in a sparse stage, before any LoRA")
        return
    base = str(model.folder())
    if isinstance(adapter, MaskedScale):
        save_spp(adapter, info, session.folder / "adapter", base, parts.client.dropout)
        return
    if isinstance(adapter, Rebased):
        save_update(adapter, info, session.folder / "update")
        session.emit(
            "update/ instead of adapter/: the update is of full rank; simulations.tools.merge adds "
            "it to the model"
        )
        return
    save_peft(adapter, info, session.folder / "adapter", base, parts.client.dropout)
