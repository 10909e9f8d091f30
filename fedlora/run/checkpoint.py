"""Checkpoints of the server's state that a kill at any instant cannot spoil.

``<folder>/round_00012/`` holds ``state.safetensors`` and ``meta.json``. It is written beside its
final name, flushed to the disk and renamed, so a folder with that name is complete or damaged from
outside, and the hash in ``meta.json`` tells which. Nothing is pickled.
"""

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from fedlora.core.checks import at_least
from fedlora.core.errors import CheckpointError
from fedlora.core.files import remove_drafts, whole_folder
from fedlora.core.reading import is_intact, json_in, sealed

log = logging.getLogger(__name__)

FORMAT = 3
STRUCTURE = "structure"
BESIDE = "beside:"
"""What names of tensors begin with that are no part of the state."""
_NAME = re.compile(r"round_(\d{5,})")


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs to go on after a round."""

    round: int
    """The last complete round."""
    state: Mapping[str, Tensor]
    """Named tensors on the CPU, in the order in which they were saved."""
    config_hash: str = ""
    """`config_hash` of the run that wrote it; empty if it named none."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Plain values that belong to the state, such as the index of what clients keep."""
    beside: Mapping[str, Tensor] = field(default_factory=dict)
    """Named tensors that are no part of the state, such as results that are under way."""


def state_hash(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names (sorted), dtypes, shapes and bytes; logs show its first 12 digits."""
    digest = hashlib.sha256()
    for name in sorted(state):
        t = state[name]
        digest.update(f"{name}\0{t.dtype}\0{tuple(t.shape)}\0".encode())
        digest.update(_bytes(t))
    return digest.hexdigest()


def pack(value: Any) -> dict[str, Tensor]:
    """Nested dictionaries and lists of tensors and JSON values as named tensors.

    Tensors are numbered in the order in which they are met; `STRUCTURE` holds the rest as JSON text
    in bytes. Tuples come back as lists.

    Raises:
        TypeError: for a value that is neither a tensor nor JSON.
    """
    tensors: dict[str, Tensor] = {}

    def plain(x: Any) -> Any:
        if isinstance(x, Tensor):
            name = f"{len(tensors):05d}"
            tensors[name] = x
            return {"tensor": name}
        if isinstance(x, Mapping):  # pairs: JSON would turn integer keys into text
            return {"pairs": [[plain(k), plain(v)] for k, v in x.items()]}
        if isinstance(x, list | tuple):
            return [plain(v) for v in x]
        return x

    text = json.dumps(plain(value)).encode()
    return tensors | {STRUCTURE: torch.frombuffer(bytearray(text), dtype=torch.uint8)}


def unpack(state: Mapping[str, Tensor]) -> Any:
    """The inverse of `pack`."""

    def nested(x: Any) -> Any:
        if isinstance(x, dict):
            if "tensor" in x:
                return state[x["tensor"]]
            return {nested(k): nested(v) for k, v in x["pairs"]}
        return [nested(v) for v in x] if isinstance(x, list) else x

    return nested(json.loads(bytes(state[STRUCTURE].numpy())))


def config_hash(config: Mapping[str, Any]) -> str:
    """SHA-256 of a plain configuration, whatever the order of its keys."""
    text = json.dumps(config, sort_keys=True, default=str, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def save(
    folder: Path,
    round: int,
    state: Mapping[str, Tensor],
    keep: int,
    *,
    config_hash: str = "",
    extra: Mapping[str, Any] | None = None,
    beside: Mapping[str, Tensor] | None = None,
    also: Collection[int] = (),
) -> Path:
    """Write the state after a round, then remove what is no longer kept.

    Checkpoints of later rounds belong to a future that a resumed run has abandoned and are removed
    too. Until the new checkpoint is complete, the older ones stay.

    Args:
        folder: holds the checkpoints of one run; created if missing.
        round: the last complete round.
        state: named tensors of any dtype and shape.
        keep: how many checkpoints to keep; 0: all.
        config_hash: hash of the run's configuration; a resumed run must have the same.
        extra: plain values for JSON that belong to the state.
        beside: tensors that belong to the run and not to the state.
        also: earlier rounds whose checkpoints are kept beside the last ones.

    Returns:
        ``<folder>/round_<round>``.
    """
    at_least("round", round, 0)
    at_least("checkpoints.keep", keep, 0)
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"round_{round:05d}"
    named = {**state, **{BESIDE + name: t for name, t in (beside or {}).items()}}
    blob = safetensors.torch.save({name: _standalone(t) for name, t in named.items()})
    meta = {
        "format": FORMAT,
        "round": round,
        "sha256": hashlib.sha256(blob).hexdigest(),
        "config_hash": config_hash,
        "names": list(state),
        "extra": dict(extra or {}),
    }
    with whole_folder(target) as draft:
        (draft / "state.safetensors").write_bytes(blob)
        (draft / "meta.json").write_bytes(json.dumps(sealed(meta), indent=1).encode())
    _forget(folder, round, keep, also)
    return target


def load(path: Path) -> Checkpoint:
    """Read one checkpoint.

    Raises:
        CheckpointError: naming the file and what is wrong with it.
    """
    meta = _meta(path)
    file = path / "state.safetensors"
    try:
        blob = file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from error
    found = hashlib.sha256(blob).hexdigest()
    if found != meta["sha256"]:
        raise CheckpointError(
            f"{file} ({len(blob)} bytes) is damaged: its SHA-256 is {found[:12]}…, "
            f"meta.json says {meta['sha256'][:12]}…"
        )
    try:
        tensors = safetensors.torch.load(blob)
        state = {name: tensors[name] for name in meta["names"]}
        others = [name for name in tensors if name.startswith(BESIDE) and name not in state]
    except (SafetensorError, KeyError) as error:
        raise CheckpointError(f"{file} does not hold what meta.json lists: {error}") from error
    beside = {name.removeprefix(BESIDE): tensors[name] for name in others}
    return Checkpoint(meta["round"], state, meta["config_hash"], meta["extra"], beside)


def latest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that can be read, or None if there never was one.

    Damaged ones are logged and passed over; what a killed run left unfinished is removed.

    Raises:
        CheckpointError: if there are checkpoints and none can be read: starting over would throw
            away what a person may still rescue.
    """
    remove_drafts(folder)
    failures = []
    for _, path in sorted(_saved(folder), reverse=True):
        try:
            return load(path)
        except CheckpointError as error:
            log.warning("checkpoint passed over: %s", error)
            failures.append(str(error))
    if failures:
        raise CheckpointError(
            f"none of the {len(failures)} checkpoints in {folder} can be read; the newest: "
            f"{failures[0]}"
        )
    return None


def of_round(folder: Path, round: int) -> Checkpoint | None:
    """The checkpoint of one round; None if it is not kept.

    Raises:
        CheckpointError: if it cannot be read.
    """
    path = dict(_saved(folder)).get(round)
    return load(path) if path else None


def saved_rounds(folder: Path) -> list[int]:
    """Rounds of which there is a checkpoint, ascending; whether it can be read is not looked at."""
    return sorted(number for number, _ in _saved(folder))


def _saved(folder: Path) -> Iterator[tuple[int, Path]]:
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _NAME.fullmatch(path.name)
        if match:
            yield int(match[1]), path


def _forget(folder: Path, newest: int, keep: int, also: Collection[int]) -> None:
    """Remove all but the last ``keep`` checkpoints up to ``newest`` and those named, and all later
    ones."""
    saved = sorted(_saved(folder))
    past = [(number, path) for number, path in saved if number <= newest]
    old = [path for number, path in (past[:-keep] if keep else ()) if number not in also]
    for path in [*(p for n, p in saved if n > newest), *old]:
        shutil.rmtree(path, ignore_errors=True)


def _meta(path: Path) -> dict[str, Any]:
    file = path / "meta.json"
    kinds = {"round": int, "sha256": str, "config_hash": str, "names": list, "extra": dict}
    meta = json_in(file, "the description of a checkpoint,", CheckpointError)
    written = meta.get("format")
    if written != FORMAT:
        raise CheckpointError(f"{file} has format {written!r}; this version reads {FORMAT}")
    wrong = [key for key, kind in kinds.items() if type(meta.get(key)) is not kind]
    if wrong:
        raise CheckpointError(f"{file} lacks {', '.join(wrong)} or has them in another type")
    if (named := _NAME.fullmatch(path.name)) and int(named[1]) != meta["round"]:
        raise CheckpointError(f"{file} is of round {meta['round']}, its folder is {path.name}")
    if not is_intact(meta):
        raise CheckpointError(f"{file} is damaged: it does not match its checksum")
    return meta


def _standalone(t: Tensor) -> Tensor:
    """A CPU copy whose storage is its own: safetensors refuses tensors that share memory."""
    return t.detach().to("cpu", copy=True).contiguous()


def _bytes(t: Tensor) -> memoryview:
    flat = t.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
