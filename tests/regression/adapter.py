"""The project as the regression runs see it: the one file of this folder that imports from it."""

import contextlib
import io
import json
import logging
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

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
from simulations.centralized import finetune
from simulations.pretraining import pretrain, tokens
from simulations.pretraining.corpus import SOURCES, Document
from simulations.tools import generate
from simulations.tools.merge import merge_run
from tests.regression.cases import OUTPUT, RESUME, ROUNDS, Case
from tests.regression.outcome import Outcome, columns, digest, kept, nameless, old_names
from tests.regression.texts import documents, write_records

STATE_HASH = "state/hash"
GIVEN = ("recipe.", "method.", "decoding.", "threads")
"""What commands repeat of what they were told."""


def prepare(folder: Path) -> None:
    """One thread, no logs, and everything that is kept between runs in a folder of this process."""
    os.environ["FEDLORA_CACHE"] = str(folder / "fedlora")
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)


def outcome(case: Case) -> Outcome:
    """Do a case in a folder that is gone afterwards; what is to be compared of it."""
    with tempfile.TemporaryDirectory(prefix="regression-") as name:
        texts = Path(name) / "texts.jsonl"
        write_records(texts)
        words = [word.replace("{texts}", str(texts)) for word in case.all_words]
        silent = io.StringIO()
        with contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
            return KINDS[case.kind](words, Path(name), case.cut)


def federated(words: Sequence[str], where: Path, cut: int) -> Outcome:
    """A whole run, or its two halves."""
    return _of_folder(_federate(words, where, cut))


def merged(words: Sequence[str], where: Path, cut: int) -> Outcome:
    """A run, and the base model with its update."""
    folder = _federate(words, where, cut)
    merge_run(folder, where / "merged")
    found = _of_folder(folder)
    found["exports"] |= _tensors(where / "merged", "merged/")
    return found


def scored(words: Sequence[str], where: Path, cut: int) -> Outcome:
    """A run, and what it answers by beam search, compared with what is wanted."""
    folder = _federate(words, where, cut)
    _done(generate.main([str(folder), "--max-new-tokens", "5", "--beams", "2", "--device", "cpu"]))
    found = _of_folder(folder)
    found["exports"]["nlg.jsonl"] = digest(
        [json.loads(line) for line in (folder / "nlg.jsonl").read_text().splitlines()]
    )
    score = _flat(_read(folder / "nlg.json")) | {"kind": "scores"}
    found["metrics"] |= columns([score])
    return found


def tuned(words: Sequence[str], where: Path, cut: int) -> Outcome:
    """A baseline of one machine."""
    _done(finetune.main([str(where / "out"), *words]))
    return _of_command(where / "out", _read(where / "out" / "finetune.json"))


def pretrained(words: Sequence[str], where: Path, cut: int) -> Outcome:
    """A network from nothing, on a few documents in place of the corpus."""

    def few(*of: object) -> list[Document]:
        return [Document(*document) for document in documents(SOURCES)]

    # The samples of a full run are longer than such a network reads.
    brief = mock.patch.object(pretrain, "SAMPLES", ("the senate",))
    with mock.patch.object(tokens, "corpus", few), brief:
        pretrain.main([*words, "--output", str(where / "out")])
    return _of_command(where / "out", _read(where / "out" / "training.json"))


KINDS = {
    "federated": federated,
    "merged": merged,
    "scored": scored,
    "finetune": tuned,
    "pretrain": pretrained,
}


def _done(code: int) -> None:
    if code:
        raise RuntimeError(f"the command ended with {code}")


def _federate(words: Sequence[str], where: Path, cut: int) -> Path:
    words = [*words, f"{OUTPUT}={where / 'out'}"]
    if cut:
        _run([*words, f"{ROUNDS}={cut}"])
        words = [*words, RESUME]
    return _run(words)


def _run(words: Sequence[str]) -> Path:
    return run(load(list(words)), lambda p: InProcessGrid(app, p.runtime.nodes), lambda line: None)


def _of_folder(folder: Path) -> Outcome:
    records = read_jsonl(folder / "metrics.jsonl")
    people = _read(folder / "population.json")
    return {
        "states": _states(folder, records),
        "metrics": columns(records),
        "records": digest([kept(r) for r in records]),
        "clients": digest([kept(r) for r in read_jsonl(folder / "clients.jsonl")]),
        "population": digest([people[name] for name in ("tiers", "ranks", "groups")]),
        "exports": _tensors(folder),
    }


def _of_command(folder: Path, said: object) -> Outcome:
    record = _flat(said) | {"kind": "command"}
    found = {"states": [], "metrics": columns([record]), "records": digest(kept(record))}
    return found | {"exports": _tensors(folder)}


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """The numbers of nested plain values by path."""
    if isinstance(value, Mapping | list):
        pairs = value.items() if isinstance(value, Mapping) else enumerate(value)
        parts = [_flat(v, f"{prefix}{'.' if prefix else ''}{k}") for k, v in pairs]
        return {name: number for part in parts for name, number in part.items()}
    given = prefix.startswith(GIVEN) or not isinstance(value, int | float)
    return {} if given else {prefix: value}


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


def _tensors(folder: Path, prefix: str = "") -> dict[str, str]:
    """Of every file of tensors that is no checkpoint, by path."""
    files = sorted(p for p in folder.rglob("*.safetensors") if "checkpoints" not in p.parts)
    return {f"{prefix}{p.relative_to(folder)}": _file_hash(p) for p in files}


def _file_hash(file: Path) -> str:
    """Of a file's tensors and their names."""
    with safe_open(file, framework="pt") as stored:
        return state_hash({name: stored.get_tensor(name) for name in stored.keys()})  # noqa: SIM118


def _bytes_hash(tensor: Tensor) -> str:
    return state_hash({"": tensor})


def _read(file: Path) -> Any:
    """What a JSON file holds."""
    return json.loads(file.read_text(encoding="utf-8"))
