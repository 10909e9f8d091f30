"""Builds checked values from a composed configuration, one per group, before anything is loaded."""

import dataclasses
import os
import re
from typing import Any, TypeVar

import torch
from omegaconf import DictConfig, OmegaConf

from fedlora.attack.base import Attack
from fedlora.core.config import build
from fedlora.core.errors import ConfigError
from fedlora.core.types import LocalPlan
from fedlora.data.source import Source
from fedlora.devices.table import Devices
from fedlora.engine.base import EngineSpec
from fedlora.evaluation.scorers import DEFAULT, scorers_of
from fedlora.models.head import AVERAGED, FROZEN, LOCAL
from fedlora.models.spec import ModelSpec
from fedlora.population.ranks import RankDistribution
from fedlora.population.sampling import Population
from fedlora.robust.rule import Rule
from fedlora.run.tracking import Tracking
from fedlora.secagg.config import SecAgg
from fedlora.server.analyses import Analyses
from fedlora.server.buffered import Buffered
from fedlora.server.early_stop import Watch, watch_of
from fedlora.server.method import Method, Setup
from fedlora.server.postprocess import Postprocessor
from fedlora.server.schedule import BUFFERED, EvaluationSchedule, Rounds
from fedlora.techniques.lora.technique import LoRA
from fedlora.wire.tensors import Compression
from simulations.app.compose import CONF
from simulations.app.compression import check_compression
from simulations.app.device_checks import check_devices
from simulations.app.hints import meant
from simulations.app.identity import run_hash
from simulations.app.runtime import Runtime
from simulations.app.secagg_checks import check_secagg
from simulations.app.silo_checks import check_silos
from simulations.app.silo_runtime import SiloRuntime
from strategies.base import LoRAStrategy

T = TypeVar("T")


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
    analyses: Analyses
    tracking: Tracking
    federation: Rounds
    postprocess: tuple[Postprocessor, ...]
    robust: Rule
    attack: Attack
    compression: Compression
    secagg: SecAgg
    devices: Devices | None
    resolved: dict[str, Any]
    """The whole configuration as plain values, for the run folder."""

    @property
    def buffered(self) -> Buffered | None:
        """How results are buffered; None: rounds are synchronous.

        Raises:
            ValueError: naming a setting that makes no sense.
        """
        rounds = self.federation
        if rounds.mode != BUFFERED:
            return None
        return Buffered(
            rounds.buffer,
            rounds.concurrency,
            rounds.staleness,
            rounds.max_staleness,
            rounds.normalise,
        )

    @property
    def watch(self) -> Watch | None:
        """What ends the run early; None: nothing does.

        Raises:
            ConfigError: if no evaluation reports it.
        """
        classifies = self.model.classifies
        scorers = scorers_of(self.evaluate.plan, classifies)
        loss = "loss_weighted" if classifies else "loss_response_weighted"
        try:
            return watch_of(self.federation, self.evaluate, scorers, loss)
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def hash(self, data: str, model: str) -> str:
        """Identity of everything that results depend on (`simulations.app.identity.run_hash`)."""
        return run_hash(self.resolved, data, model)


def build_parts(cfg: DictConfig) -> Parts:
    """Build every group of a composed configuration as a checked value.

    Raises:
        ConfigError: naming group, key, value and what is allowed.
    """

    resolved = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(resolved, dict)
    known = {f.name for f in dataclasses.fields(Parts)} - {"resolved"} | {"rounds", "experiment"}
    for key, value in resolved.items():
        if key not in known:
            hint = meant(str(key), cfg, CONF)
            raise ConfigError(f"unknown key {key!s}={value!r}{hint}; known: {sorted(known)}")
    _check_plain_keys(cfg)
    parts = _of_task(_build_groups(cfg, {str(k): v for k, v in resolved.items()}))
    parts = with_attack_measured(parts)
    _check_strategy(parts, postprocess=[*cfg.postprocess])
    check_compression(parts)
    check_secagg(parts)
    check_devices(parts)
    if isinstance(parts.runtime, SiloRuntime):
        check_silos(parts)
    _ = parts.watch  # refuses what no evaluation reports
    try:
        parts.tracking.check(parts.name)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return parts


def check_machine(runtime: Runtime) -> None:
    """Refuse CPUs and GPUs that this machine does not have (`Runtime.check_machine`)."""
    runtime.check_machine(len(os.sched_getaffinity(0)), torch.cuda.device_count())


def _check_plain_keys(cfg: DictConfig) -> None:
    """Check types and values of the keys that belong to no group.

    Raises:
        ConfigError: naming key, value and what is allowed.
    """
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


def _build_groups(cfg: DictConfig, resolved: dict[str, Any]) -> Parts:
    """Build every group by its ``_target_``."""

    def part(group: str, base: type[T]) -> T:
        return build(cfg[group], base, group)

    return Parts(
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
        engine=part("engine", EngineSpec),  # type: ignore[type-abstract]
        evaluate=part("evaluate", EvaluationSchedule),
        runtime=part("runtime", Runtime),
        analyses=part("analyses", Analyses),
        tracking=part("tracking", Tracking),  # type: ignore[type-abstract]
        federation=part("federation", Rounds),
        postprocess=tuple(
            build(node, Postprocessor, f"postprocess.{name}")
            for name, node in cfg.postprocess.items()
        ),
        robust=part("robust", Rule),
        attack=part("attack", Attack),
        compression=part("compression", Compression),
        secagg=part("secagg", SecAgg),
        devices=part("devices", Devices) if cfg.devices else None,
        resolved=resolved,
    )


def _of_task(parts: Parts) -> Parts:
    """The parts with what follows from the model's task: a classifier writes no text.

    Raises:
        ConfigError: if the data are of another task.
    """
    classifies, data = parts.model.classifies, parts.data
    if data.labelled and not classifies:
        raise ConfigError(
            f"data={data.name} has texts with labels, and model.task={parts.model.task} learns to "
            "write: use model.task=classification, or data with answers"
        )
    if classifies and not data.labelled:
        raise ConfigError(
            f"model.task=classification needs labels, and data={data.name} has none: use "
            "data=intents or data with a label column, or model.task=causal_lm"
        )
    _check_head(parts)
    if not classifies or not parts.evaluate.plan.generate:
        return parts
    plan = dataclasses.replace(parts.evaluate.plan, generate=False)
    return dataclasses.replace(parts, evaluate=dataclasses.replace(parts.evaluate, plan=plan))


def with_attack_measured(parts: Parts) -> Parts:
    """The parts whose evaluations also measure the attack, if it can be measured.

    Raises:
        ConfigError: if no client of the run could carry it out.
    """
    attack, plan = parts.attack, parts.evaluate.plan
    if not attack.acts:
        return parts
    named = f"attack={type(attack).__name__.lower()}"
    if isinstance(parts.runtime, SiloRuntime):
        raise ConfigError(
            f"{named}: a silo does what its own operator says; use attack=none, or a simulation"
        )
    if type(parts.strategy).run_round is not Method.run_round:
        raise ConfigError(
            f"{named}: clients of {parts.strategy.label} train together with the server, and "
            "attacks are on clients that train alone; use another strategy, such as fedit"
        )
    scorer = attack.scorer(parts.model.classifies)
    if scorer is None:
        return parts
    metrics = (*(DEFAULT if plan.metrics is None else plan.metrics), scorer)
    plan = dataclasses.replace(plan, metrics=metrics)
    return dataclasses.replace(parts, evaluate=dataclasses.replace(parts.evaluate, plan=plan))


def _check_head(parts: Parts) -> None:
    """Refuse a trained head with a strategy that could not average it, or an evaluation that would
    not use it.

    Raises:
        ConfigError: one sentence that says why not and what to use instead.
    """
    mode, strategy, given = parts.model.head, parts.strategy, f"model.head={parts.model.head}"
    if mode == FROZEN:
        return
    if strategy.technique is not LoRA:
        raise ConfigError(
            f"{given}: clients of {strategy.label} train {strategy.technique.averaged}, and a head "
            "trains beside LoRA's factors only; use model.head=frozen, or a strategy of LoRA"
        )
    if mode == AVERAGED and not strategy.shares:
        raise ConfigError(
            f"{given}: {strategy.label} averages nothing; use model.head=local, in which each "
            "client keeps its own, or model.head=frozen"
        )
    if mode == LOCAL and parts.evaluate.every and set(parts.evaluate.adapters) != {"own"}:
        raise ConfigError(
            f"{given}: only a client's own model has its head, and "
            f"evaluate.adapters={list(parts.evaluate.adapters)} evaluates the global one; use "
            "evaluate.adapters=[own]"
        )


def _check_strategy(parts: Parts, postprocess: list[str]) -> None:
    """Check that the strategy can be combined with the other groups.

    Args:
        parts: all groups.
        postprocess: the names of the postprocessors.

    Raises:
        ConfigError: one sentence that says why not and what to use instead.
    """
    quantization = str(getattr(parts.model, "quantization", "none"))
    try:
        wire, feedback = parts.federation.wire, parts.federation.error_feedback
        classifies, faults = parts.model.classifies, parts.engine.faults is not None
        setup = Setup(parts.client, wire, quantization, feedback, classifies, faults)
        parts.strategy.check(setup)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if parts.postprocess and parts.strategy.needs_updates:
        raise ConfigError(f"postprocess={postprocess}: {parts.strategy.needs_updates}")
    if parts.robust.acts and parts.strategy.needs_updates:
        named = type(parts.robust).__name__.lower()
        raise ConfigError(f"robust={named}: {parts.strategy.needs_updates}")
