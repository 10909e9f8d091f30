"""What the files of a pruned model hold, read without building the model."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from fedlora.core.errors import ModelError
from fedlora.core.reading import tensors_in
from fedlora.models.folder import weight_files
from fedlora.models.masks import (
    Masks,
    as_stored,
    density,
    load_masks,
)


@dataclass(frozen=True)
class PrunedBase:
    """A pruned model as a server hands it out."""

    density: float
    """Fraction of the masked layers' weights that are not zero."""
    bytes: int
    """Bytes of all tensors without their zeros: what `fedlora.models.masks.save_sparse` writes."""


def inspect(folder: Path) -> PrunedBase:
    """Read a pruned model once and look at its zeros.

    Raises:
        ModelError: if there are no masks, a masked layer is not stored, or zeros are not where its
            mask says.
    """
    masks = load_masks(folder)
    sent, missing = 0, set(masks)
    for name, tensor in tensors(folder):
        path = name.removesuffix(".weight")
        if path == name or path not in masks:
            sent += tensor.numel() * tensor.element_size()
            continue
        mask = as_stored(masks[path], tensor, path, str(folder))
        sent += int(mask.sum()) * tensor.element_size() + math.ceil(mask.numel() / 8)
        missing.discard(path)
    if missing:
        raise ModelError(
            f"{folder} has a mask for {min(missing)}, and stores no such weight ({len(missing)} of "
            f"{len(masks)} masked layers): the masks are of another model"
        )
    return PrunedBase(density(masks), sent)


def require_masked(paths: Iterable[str], masks: Masks, name: str) -> None:
    """Refuse layers that are to be scaled and were not pruned.

    Raises:
        ModelError: naming the first of them, and the targets that were pruned.
    """
    wanted = list(paths)
    dense = [p for p in wanted if p not in masks]
    if dense:
        pruned = ", ".join(sorted({p.rpartition(".")[2] for p in masks}))
        raise ModelError(
            f"model.targets adapts {dense[0]}, which {name} has no mask for ({len(dense)} of "
            f"{len(wanted)} adapted layers): SPP scales what was pruned; use "
            f"model.targets=[{pruned}]"
        )


def tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a model's files, one after another."""
    for path in weight_files(folder):
        if path.suffix != ".safetensors":
            raise ModelError(f"{path} is no safetensors file: convert the model first")
        with tensors_in(path, "the weights of the base model") as file:
            for key in file.keys():  # noqa: SIM118
                yield key, file.get_tensor(key)
