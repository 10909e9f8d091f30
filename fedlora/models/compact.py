"""A pruned model's folder without its zeros, and back: for disks and wires, not for loading.

A compact folder holds `FILE` where the model's weights would be: of every masked weight the values
that are not zero and a bit per position. Whoever loads one gets the whole model from the cache.
"""

import shutil
import tempfile
from pathlib import Path

from safetensors.torch import save_file

from fedlora.core.cache import cache_root, locked
from fedlora.core.errors import ModelError
from fedlora.models import masks
from fedlora.models.folder import fingerprint, weight_files
from fedlora.models.stored import inspect, tensors

FILE = "sparse.safetensors"
_INDEX = "model.safetensors.index.json"


def is_compact(folder: Path) -> bool:
    """Whether a folder holds a model without its zeros."""
    return (folder / FILE).is_file()


def compact(folder: Path) -> int:
    """Put a pruned model's weights without their zeros in place of its weights.

    Returns:
        Bytes of all tensors.

    Raises:
        ModelError: if the folder has no masks, or zeros are not where they say.
    """
    found = masks.load_masks(folder)
    dense = weight_files(folder)
    size = masks.save_sparse(dict(tensors(folder)), found, folder / FILE)
    for path in dense:
        path.unlink()
    (folder / _INDEX).unlink(missing_ok=True)
    return size


def expanded(folder: Path) -> Path:
    """The whole model of a compact folder, made once in the cache; another folder as it is.

    Raises:
        ModelError: if its zeros are not those of its masks.
    """
    if not is_compact(folder):
        return folder
    target = cache_root() / "models" / f"{folder.name}-{fingerprint(folder)[:12]}"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target.with_name(f"{target.name}.lock")):
        if not target.is_dir():
            _expand(folder, target)
    return target


def _expand(folder: Path, target: Path) -> None:
    building = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        ignore = shutil.ignore_patterns(FILE)
        shutil.copytree(folder, building, ignore=ignore, dirs_exist_ok=True)
        state = masks.load_sparse(folder / FILE)
        save_file(state, building / "model.safetensors", metadata={"format": "pt"})
        _check(building, folder)
        building.chmod(0o755)
        building.rename(target)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _check(building: Path, folder: Path) -> None:
    """Whether what came out of a compact folder is what its masks say."""
    try:
        inspect(building)
    except ModelError as error:
        said = str(error).removeprefix(f"{building}: ")
        raise ModelError(f"{folder / FILE}, expanded: {said}") from error
