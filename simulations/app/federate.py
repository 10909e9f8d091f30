"""Executes a run from its composed configuration; the same code serves Flower's ServerApp, the
launcher's in-process runs, tests and notebooks.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from flwr.serverapp import Grid
from omegaconf import DictConfig

from fedlora.attack.base import NOBODY
from fedlora.core.errors import ConfigError, RunError
from fedlora.core.files import claim
from fedlora.core.reading import disk_faults
from fedlora.core.source_hash import source_hash
from fedlora.models.export import remove_exports
from fedlora.models.spec import ModelSpec
from fedlora.models.stored import PrunedBase
from fedlora.prune.spec import calibration_traffic
from fedlora.run.environment import environment
from fedlora.run.tracking import Trackers, kept_id, missing_rounds, track
from fedlora.server.buffered import check_averages
from fedlora.server.flower import FederatedRun
from fedlora.server.homes import Homes
from fedlora.server.protection import PlannedRun
from fedlora.server.session import Session
from simulations.app.alone import UNDER_WAY
from simulations.app.export import BEST, export
from simulations.app.identity import changed
from simulations.app.inputs import (
    RunInputs,
    as_it_began,
    headline,
    method_of,
    prepare_inputs,
    prepare_silos,
)
from simulations.app.parts import Parts, build_parts
from simulations.app.run_folder import run_folder, status_file, write_start
from simulations.app.silo_runtime import SiloRuntime
from simulations.app.words import absolute


def run(
    cfg: DictConfig,
    grid_of: Callable[[Parts], Grid],
    emit: Callable[[str], None],
    *,
    watched: bool = False,
) -> Path:
    """Execute the whole run and write a run folder.

    Args:
        cfg: a composed configuration.
        grid_of: gives the Flower grid once the parts are known.
        emit: shows one line to the user.
        watched: whether to write down what clients are at work, for a process that watches this one
            (`simulations.app.alone`).

    Returns:
        The absolute run folder.

    Raises:
        ConfigError, DataError, ModelError, RunError: one sentence each; completed rounds are on
        disk.
    """
    parts = build_parts(cfg)
    # The server's linear algebra: its last bits must not depend on the number of cores.
    torch.set_num_threads(parts.federation.threads)
    emit("starting model and data")
    with disk_faults(place := absolute(parts.output_dir) / parts.name):
        if isinstance(parts.runtime, SiloRuntime):
            inputs = prepare_silos(parts, grid_of(parts), emit)
        else:
            inputs = prepare_inputs(parts, emit)
        folder = run_folder(parts)
    session = new_session(parts, inputs, folder, emit)
    emit(headline(inputs, parts.data.name, session))
    for note in inputs.notes:
        emit(note)
    with disk_faults(place), claim(folder):
        emit(f"run folder: {folder}")
        resume(session, parts, inputs)
        for line in session.claims():
            emit(line)
        if session.done:
            inputs = as_it_began(inputs, parts, folder, emit)
        with status_file(folder, session), disk_faults(folder):
            with closing_tracker(session):
                trackers = open_session(session, parts, inputs)
                federated = FederatedRun(
                    session,
                    worker=inputs.worker.to_json(),
                    source=source_hash(),
                    journal=folder / UNDER_WAY if watched else None,
                    homes=homes_of(parts, inputs, folder),
                )
                if session.evaluation_missing() or not over(session):
                    emit("starting rounds: workers load the model")
                    federated.start(grid_of(parts))
                if end := session.stopped():
                    emit(end)
                export_end(session, inputs.worker.model, parts.client.dropout)
            if trackers.lost:
                raise RunError(
                    f"all {session.done} rounds are complete in {folder}, and tracking missed some "
                    f"of them ({trackers.lost}). metrics.jsonl and clients.jsonl hold everything"
                )
    if parts.report:
        _report(folder, emit)
    emit(f"run folder: {folder}")
    return folder


def new_session(
    parts: Parts, inputs: RunInputs, folder: Path, emit: Callable[[str], None]
) -> Session:
    """The run before its first round. Writes nothing yet.

    Raises:
        ConfigError: for ranks, cuts or a model that the method cannot do with.
    """
    info, roster = inputs.info, inputs.roster
    model = inputs.worker.model
    planned = PlannedRun(
        roster=roster,
        plan=parts.client,
        seed=parts.seed,
        rounds=parts.federation.rounds,
        folder=folder,
        seeded=inputs.silos is None,
    )
    audit = parts.client.technique.audit(model.folder(), getattr(torch, model.dtype))
    try:
        method, setting = method_of(parts, inputs), inputs.setting(parts)
        if parts.buffered is not None:
            check_averages(method, setting)
        return Session(
            method=method,
            setting=setting,
            roster=roster,
            plan=parts.client,
            schedule=parts.evaluate,
            rounds=parts.federation,
            workers=parts.runtime.expected_workers,
            messages_per_worker=parts.engine.messages_per_worker,
            folder=folder,
            tracker=Trackers([]),
            config_hash=parts.hash(inputs.data, info.fingerprint),
            audit=audit,
            postprocess=parts.postprocess,
            privacy=parts.privacy.begin(planned),
            robust=parts.robust,
            compression=parts.compression,
            squad=inputs.worker.attack or NOBODY,
            secagg=parts.secagg,
            analyses=parts.analyses,
            store=inputs.store,
            watch=parts.watch,
            virtual=inputs.virtual,
            at_home=inputs.silos is not None,
            emit=emit,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


def homes_of(parts: Parts, inputs: RunInputs, folder: Path) -> Homes | None:
    """Where the clients of the run live; None: they are virtual.

    Args:
        parts: of the run.
        inputs: of the run.
        folder: of the run; keeps the name by which silos know it, however often it is continued.
    """
    if inputs.silos is None:
        return None
    assert isinstance(parts.runtime, SiloRuntime)
    return inputs.silos.homes(parts.runtime, inputs.worker, kept_id(folder / "silo_run_id"))


def over(session: Session) -> bool:
    """Whether no round is left to do."""
    return session.done >= session.rounds.rounds or bool(session.stopped())


def export_end(session: Session, model: ModelSpec, dropout: float) -> None:
    """Export the state after the last round and, where evaluations decide, after the best one."""
    ranks, folder = session.setting.max_ranks, session.folder
    export(session.global_payload(ranks), folder, model, dropout, session.emit)
    if best := session.best(ranks):
        round, payload = best
        export(payload, folder, model, dropout, session.emit, best=round)


def resume(session: Session, parts: Parts, inputs: RunInputs) -> None:
    """Continue from the run's checkpoint if there is one and the configuration asks for it.

    Raises:
        RunError: if the checkpoint was written under another configuration, naming what differs.
    """
    try:
        if parts.resume != "never" and session.resume():
            session.emit(f"resuming after round {session.done} of {session.rounds.rounds}")
    except RunError as error:
        data, model = inputs.data, inputs.info.fingerprint
        differs = changed(session.folder, parts.resolved, data, model)
        raise RunError(f"{error}{differs}") from error


def open_session(session: Session, parts: Parts, inputs: RunInputs) -> Trackers:
    """Write the first files of the run, and open its trackers and return them."""
    folder, roster = session.folder, session.roster
    if session.done < session.rounds.rounds:
        for place in (folder, folder / BEST):  # of the end that a continued run had before
            remove_exports(place)
    write_start(parts, inputs, folder)
    session.tracker = trackers = track(parts.tracking, folder, parts.name, session.done or -1)
    if lost := missing_rounds(folder / "metrics.jsonl", session.done):
        session.emit(
            f"metrics.jsonl has no record of {_listed(lost)}: reports lack them; the state of the "
            f"run, from the checkpoint of round {session.done}, does not depend on records"
        )
        if session.watch:
            session.emit("early stopping counts the evaluations that metrics.jsonl still has")
    about = {"environment": environment(), "clients_by_rank": roster.rank_counts()}
    trackers.config(parts.resolved | about)
    if inputs.pruned is not None and not session.done:
        trackers.round(_base_record(inputs.pruned, inputs.worker.model.folder()))
    return trackers


def _listed(rounds: Sequence[int]) -> str:
    """``round 3``, or ``rounds 2, 5, 6 and 9 more``."""
    shown = ", ".join(map(str, rounds[:8]))
    more = f" and {len(rounds) - 8} more" if len(rounds) > 8 else ""
    return f"round{'s' if len(rounds) > 1 else ''} {shown}{more}"


@contextmanager
def closing_tracker(session: Session) -> Iterator[None]:
    """Close the run's tracker at the end, whatever happens."""
    try:
        yield
    finally:
        session.tracker.close()


def _base_record(pruned: PrunedBase, folder: Path) -> dict[str, float | int | str]:
    """The record of the work before round 1: how clients received a pruned model."""
    record: dict[str, float | int | str] = {"kind": "model", "round": 0}
    record |= {"model/density": pruned.density, "model/down_bytes": pruned.bytes}
    return record | calibration_traffic(folder)


def _report(folder: Path, emit: Callable[[str], None]) -> None:
    """Write the report; an error in it does not fail a finished run."""
    # matplotlib takes seconds that a start need not wait for
    from simulations.reporting.report import write_report

    try:
        emit(f"report: {write_report(folder)}")
    except Exception as error:
        emit(f"report.html was not written: {type(error).__name__}: {error}")
