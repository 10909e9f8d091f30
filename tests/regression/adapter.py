"""The project as the regression runs see it: the one file of this folder that imports from it."""

import json
import logging
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from fedlora.run import checkpoint
from fedlora.run.checkpoint import state_hash
from fedlora.run.tracking import read_jsonl
from simulations.app.client_app import app
from simulations.app.compose import load
from simulations.app.federate import run
from simulations.app.grid import InProcessGrid
from tests.regression.cases import OUTPUT, RESUME, ROUNDS, SMALL, Case
from tests.regression.outcome import Outcome, columns, digest, kept, nameless, old_names

STATE_HASH = "state/hash"


def prepare(cache: Path) -> None:
    """One thread, no logs, and a cache of its own for this process."""
    os.environ["FEDLORA_CACHE"] = str(cache)
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)


def outcome(case: Case) -> Outcome:
    """Do a case in a folder that is gone afterwards; what is to be compared of it."""
    with tempfile.TemporaryDirectory(prefix="regression-") as name:
        return _federated(case, Path(name))


def _federated(case: Case, where: Path) -> Outcome:
    words = [*SMALL, *case.words, f"{OUTPUT}={where / 'out'}"]
    if case.cut:
        _run([*words, f"{ROUNDS}={case.cut}"])
        words.append(RESUME)
    return _of_folder(_run(words))


def _run(words: Iterable[str]) -> Path:
    return run(load(list(words)), lambda p: InProcessGrid(app, p.runtime.nodes), lambda line: None)


def _of_folder(folder: Path) -> Outcome:
    records = read_jsonl(folder / "metrics.jsonl")
    return {
        "states": _states(folder, records),
        "metrics": columns(records),
        "records": digest([kept(r) for r in records]),
        "clients": digest([kept(r) for r in read_jsonl(folder / "clients.jsonl")]),
        "exports": _exports(folder),
    }


def _states(folder: Path, records: Iterable[Mapping[str, Any]]) -> list[list[str]]:
    """After every round: the state's hash, and that of its tensors under whatever names.

    Raises:
        ValueError: if a round's record names another state than its checkpoint holds.
    """
    found = []
    said = [str(r[STATE_HASH]) for r in records if STATE_HASH in r]
    for i, path in enumerate(sorted((folder / "checkpoints").glob("round_*"))):
        state = checkpoint.load(path).state
        if state_hash(state)[:12] != said[i]:
            raise ValueError(f"round {i + 1} recorded {said[i]}, not the checkpoint's state")
        found.append([state_hash(old_names(state)), nameless(map(_bytes_hash, state.values()))])
    if len(found) != len(said):
        raise ValueError(f"{len(said)} rounds left {len(found)} checkpoints: raise federation.keep")
    return found


def _exports(folder: Path) -> dict[str, str]:
    """Of every file of tensors that a run leaves beside its checkpoints."""
    files = sorted(p for p in folder.rglob("*.safetensors") if "checkpoints" not in p.parts)
    return {str(p.relative_to(folder)): file_hash(p) for p in files}


def file_hash(file: Path) -> str:
    """Of a file's tensors and their names."""
    with safe_open(file, framework="pt") as stored:
        return state_hash({name: stored.get_tensor(name) for name in stored.keys()})  # noqa: SIM118


def _bytes_hash(tensor: Tensor) -> str:
    return state_hash({"": tensor})


def read_json(file: Path) -> Any:
    """What a JSON file holds."""
    return json.loads(file.read_text(encoding="utf-8"))
