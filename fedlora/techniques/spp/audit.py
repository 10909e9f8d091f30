"""Whether a pruned model keeps its zeros when an update is merged into it."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from fedlora.core.errors import ModelError, RunError
from fedlora.core.payload import Payload
from fedlora.core.reading import tensors_in
from fedlora.models.folder import weight_files
from fedlora.models.masks import (
    Masks,
    as_stored,
    density,
    identity,
    load_masks,
)
from fedlora.techniques.spp.payload import MaskedScale, merged_weight


class ZeroAudit:
    """Merges an update into a pruned model, on the CPU and module by module, and looks at zeros.

    Args:
        folder: the pruned model.
        dtype: the type that the model is held in, whatever its files say; None: that of the files.

    Raises:
        ModelError: if the folder holds no masks.
    """

    def __init__(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        self._masks: Masks = load_masks(folder)
        self._where = _files(folder)
        self._dtype = dtype

    def __call__(self, payload: Payload) -> Mapping[str, float | int | str]:
        """The identity of the merged model's zeros, how many moved, and its density.

        Other payloads than a `MaskedScale` give an empty mapping.

        Raises:
            RunError: if a zero would move or a weight would not be finite, with how many.
            ModelError: if the base's own zeros have moved, or a scaled module has no mask.
        """
        if not isinstance(payload, MaskedScale):
            return {}
        zeros, moved, lost = dict(self._masks), 0, 0
        for path in payload.beta:
            weight = merged_weight(self._weight(path), payload, path)
            zeros[path] = weight != 0
            moved += int((zeros[path] != self._masks[path]).sum())
            lost += int((~weight.isfinite()).sum())
        if moved or lost:
            raise RunError(
                f"merged into the pruned model, the global update would move {moved} zeros and "
                f"make {lost} weights infinite or NaN: alpha or beta have become too large. Rounds "
                "with a checkpoint are safe; lower client.lr or client.max_grad_norm"
            )
        return {
            "spp/zero_pattern": identity(zeros),
            "spp/zeros_moved": moved,
            "spp/density": density(zeros),
        }

    def _weight(self, path: str) -> Tensor:
        """``[d_out, d_in]``, as the model holds it."""
        where = f"{path}.weight"
        if path not in self._masks or where not in self._where:
            raise ModelError(
                f"{path} is scaled, and has no mask in the pruned model: what is trained must be "
                f"among what was pruned (model.targets); pruned: {sorted(self._masks)[:3]}, ..."
            )
        mask, weight = self._masks[path], self._where[where]()
        weight = weight.to(self._dtype or weight.dtype)
        turned = as_stored(mask, weight, path, "the pruned model") is not mask
        return weight.T if turned else weight


def _files(folder: Path) -> dict[str, Callable[[], Tensor]]:
    """Name of a stored tensor -> how to read it."""
    found: dict[str, Callable[[], Tensor]] = {}
    for path in weight_files(folder):
        if path.suffix != ".safetensors":
            raise ModelError(f"{path} is no safetensors file: convert the model first")
        with tensors_in(path, "the weights of the base model") as file:
            found |= {key: _reader(path, key) for key in file.keys()}  # noqa: SIM118
    return found


def _reader(path: Path, key: str) -> Callable[[], Tensor]:
    def read() -> Tensor:
        with tensors_in(path, "the weights of the base model") as file:
            tensor: Tensor = file.get_tensor(key)
            return tensor

    return read
