"""The folder of a run, and its files with configuration, environment and final status."""

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from fedlora.core.errors import ConfigError
from fedlora.core.files import write_file
from fedlora.data.store import TokenStore
from fedlora.run.environment import environment
from fedlora.server.session import Session
from simulations.app.identity import LABELS, MODEL
from simulations.app.inputs import RunInputs, unseen_of
from simulations.app.parts import Parts
from simulations.app.status import COMPLETED, FAILED, FILE, RUNNING, close_status, write_status
from simulations.app.words import absolute


def run_folder(parts: Parts) -> Path:
    """The absolute folder of this run. A new run never writes into an old run's folder.

    Raises:
        ConfigError: if ``resume`` names a folder that no run has left.
    """
    if parts.resume not in ("never", "auto"):
        folder = absolute(parts.resume)
        if not (folder / FILE).is_file():
            raise ConfigError(
                f"resume={parts.resume!r} is neither never, auto nor a run folder: there is no "
                f"{folder / FILE}"
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


def write_start(parts: Parts, inputs: RunInputs, folder: Path) -> None:
    """The files that say what the run is: its configuration, environment, model, population, and
    what its workers are told."""
    info, roster = inputs.info, inputs.roster
    write_file(folder / "config.yaml", OmegaConf.to_yaml(parts.resolved))
    _write_json(folder / "environment.json", environment())
    spec = inputs.worker.model
    model: dict[str, Any] = {"name": info.name, "fingerprint": info.fingerprint, "mask": info.mask}
    model |= {"folder": str(spec.folder()), "hub_id": spec.hub_id, "dtype": spec.dtype}
    if spec.classifies:
        model |= {"task": spec.task, "labels": list(spec.labels), "head_seed": spec.head_seed}
    _write_json(folder / MODEL, model)
    write_file(folder / "worker.json", inputs.worker.to_json() + "\n")
    population = {
        "fingerprint": inputs.data,
        "clients": len(roster.clients),
        "per_round": roster.per_round,
        "tiers": roster.tier_counts(),
        "ranks": roster.rank_counts(),
        "groups": {name: len(ids) for name, ids in roster.groups.items()},
        "unseen_model": unseen_of(parts),
    }
    if inputs.silos is not None:
        population["silos"] = [
            {"client": client, "node": inputs.silos.nodes[client]} | dataclasses.asdict(one)
            for client, one in enumerate(inputs.silos.infos)
        ]
    _write_json(folder / "population.json", population)
    store = inputs.store
    if store is not None and store.labels:
        write_file(folder / LABELS, json.dumps(label_record(store)) + "\n")


def label_record(store: TokenStore) -> dict[str, Any]:
    """The names of the labels and, for each client by id, which of them its training examples have:
    ``[label, examples]``."""
    counts = store.label_counts("train")
    held = [[[int(i), int(row[i])] for i in row.nonzero()[0]] for row in counts]
    return {"labels": list(store.labels), "train": held}


@contextmanager
def failing(parts: Parts) -> Iterator[None]:
    """A run that fails in the block, before anything of it is written, leaves a status.json."""
    try:
        yield
    except Exception as error:
        folder = run_folder(parts)
        folder.mkdir(parents=True, exist_ok=True)
        close_status(folder, error)
        raise


@contextmanager
def status_file(folder: Path, session: Session) -> Iterator[None]:
    """Keep status.json up to date with how the run ends (``running`` if the process is killed)."""
    write_status(folder, RUNNING, session.done)
    try:
        yield
    except BaseException as error:
        with suppress(OSError):  # a full disk is told by the error itself
            write_status(folder, FAILED, session.done, error)
        raise
    write_status(folder, COMPLETED, session.done, said=session.stopped())


def _write_json(path: Path, value: object) -> None:
    write_file(path, json.dumps(value, indent=1, default=str) + "\n")
