"""A pruned model's folder without its zeros, and back: for disks and wires, not for loading.

A compact folder holds `FILE` where the model's weights would be: of every masked weight the values
that are not zero and a bit per position. Loading one gives the whole model from the cache.
"""

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from fedlora.core.cache import cache_root
from fedlora.core.errors import ModelError
from fedlora.core.files import made_once
from fedlora.models import masks
from fedlora.models.folder import fingerprint, tokenizer_id, weight_files
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
        ModelError: if the folder has no masks, zeros are not where they say, or the file does not
            read back bit by bit.
    """
    found = masks.load_masks(folder)
    dense = weight_files(folder)
    state = dict(tensors(folder))
    size = masks.save_sparse(state, found, folder / FILE)
    kept = masks.load_sparse(folder / FILE)
    if lost := [n for n, t in state.items() if n not in kept or not torch.equal(kept[n], t)]:
        raise ModelError(f"{folder / FILE} reads back with another {lost[0]} than was written")
    for path in dense:
        path.unlink()
    (folder / _INDEX).unlink(missing_ok=True)
    return size


def expand(folder: Path) -> Path:
    """The whole model of a compact folder, made once in the cache; another folder as it is.

    Raises:
        ModelError: if its zeros are not those of its masks, or it holds whole weights too.
    """
    if not is_compact(folder):
        return folder
    if whole := [p.name for p in weight_files(folder) if p.name != FILE]:
        raise ModelError(
            f"{folder} holds two models, {FILE} and {whole[0]}: remove the one that is not meant"
        )
    identity = f"{fingerprint(folder)[:12]}-{tokenizer_id(folder)[:8]}"
    target = cache_root() / "models" / f"{folder.name}-{identity}"
    return made_once(target, lambda draft: _expand(folder, draft))


def _expand(folder: Path, draft: Path) -> None:
    shutil.copytree(folder, draft, ignore=shutil.ignore_patterns(FILE), dirs_exist_ok=True)
    state = masks.load_sparse(folder / FILE)
    save_file(state, draft / "model.safetensors", metadata={"format": "pt"})
    try:
        inspect(draft)
    except ModelError as error:
        said = str(error).removeprefix(f"{draft}: ")
        raise ModelError(f"{folder / FILE}, expanded: {said}") from error
