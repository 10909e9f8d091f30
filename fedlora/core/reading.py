"""Files that others wrote, and disks, whose faults are told in one sentence: which file, what it is
for, what is wrong and what to do.

Libraries say "header too large", "Expecting value" or "No space left on device" and leave out the
file. Readers of safetensors and JSON go through `tensors_in` and `json_in`; a program's main part
stands in `disk_faults`.
"""

import errno
import json
import os
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from fedlora.core import variables
from fedlora.core.cache import cache_root
from fedlora.core.errors import DiskError, ModelError

_POINTER = b"version https://git-lfs.github.com/spec/"


def pointer(path: Path) -> bool:
    """Whether a file is what Git LFS leaves in the place of a large one that was not fetched."""
    with path.open("rb") as file:
        return file.read(len(_POINTER)) == _POINTER


@contextmanager
def tensors_in(path: Path, what: str) -> Iterator[Any]:
    """A safetensors file, open for PyTorch.

    Args:
        path: of the file.
        what: it is, for the message.

    Raises:
        ModelError: if it cannot be opened or a tensor cannot be read from it.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{what} {path} cannot be read: {fault(path, error)}") from error


def json_in(
    path: Path, what: str, kind: type[Exception] = ModelError, *, text: str | None = None
) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        path: of the file.
        what: it is, for the message.
        kind: of the exception.
        text: JSON that was found in the file, such as metadata of a safetensors file; None: the
            whole file.

    Raises:
        Exception: of this kind, if there is no object that can be read.
    """
    try:
        found = json.loads(path.read_bytes() if text is None else text)
    except (OSError, ValueError) as error:
        raise kind(f"{what} {path} cannot be read: {fault(path, error)}") from error
    if not isinstance(found, dict):
        raise kind(f"{what} {path} holds a {type(found).__name__} instead of an object")
    return found


def fault(path: Path, error: Exception) -> str:
    """What is wrong with a file that a library could not read, and what to do about it."""
    if not path.is_file():
        return "there is no such file" if not path.exists() else "it is no file"
    try:
        if pointer(path):
            return "it is a Git LFS pointer, not the file: run `git lfs pull` where it came from"
    except OSError as unreadable:
        return unreadable.strerror or str(unreadable)
    said = str(error).strip().splitlines()
    reason = said[0] if said else type(error).__name__
    return f"{reason} ({path.stat().st_size:,} bytes: cut short or damaged? Fetch it again)"


SEAL = "checksum"
_CHUNK = 2**20


def checksum(path: Path) -> int:
    """CRC-32 of a file, at gigabytes per second: against damage, not against an adversary."""
    found = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            found = zlib.crc32(chunk, found)
    return found


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values for a JSON file with a checksum of all of them."""
    return {**values, SEAL: _seal(values)}


def is_intact(values: Mapping[str, Any]) -> bool:
    """Whether values that were read are those that `sealed` was given."""
    return values.get(SEAL) == _seal({k: v for k, v in values.items() if k != SEAL})


def _seal(values: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())


@contextmanager
def disk_faults(output: Path | None = None) -> Iterator[None]:
    """Turn what a disk refuses into one sentence with the variable that chooses another place.

    Args:
        output: where the block's results go, if it has a place for them.

    Raises:
        DiskError: for an OSError, or a safetensors file that cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise DiskError(sentence(error, output)) from error
    except SafetensorError as error:
        where = f" in {output}" if output is not None else ""
        raise DiskError(f"a safetensors file{where} cannot be read or written: {error}") from error


def sentence(error: OSError, output: Path | None = None) -> str:
    """The file, what is wrong with it, and the variable that chooses another place."""
    if error.filename is None:
        return f"{error.strerror or error}{_remedy(None, error, output)}"
    path = Path(os.fsdecode(error.filename))
    return f"{path}: {error.strerror or error}{_remedy(path, error, output)}"


def _remedy(path: Path | None, error: OSError, output: Path | None) -> str:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    do = "free some space there, or set" if full else "set"
    cache = cache_root()
    if path is not None and (path.is_relative_to(cache) or cache.is_relative_to(path)):
        return (
            f". The cache of token stores and models, which can be made again, is there: {do} "
            f"{variables.CACHE} to a folder that can be written"
        )
    if output is not None and (path is None or path.is_relative_to(output.parent)):
        return (
            f". Results are written to {output}: {do} output_dir=... or {variables.OUTPUT} to a "
            "folder that can be written"
        )
    if path is not None and path.is_relative_to(tempfile.gettempdir()):
        return f". The folder of temporary files is there: {do} TMPDIR to another one"
    return ""
