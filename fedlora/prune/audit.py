"""Whether a pruned model keeps its zeros when an update is merged into it."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from fedlora.models.folder import ModelError, weight_files
from fedlora.prune.masks import FILE, Masks, density, identity, load_masks
from fedlora.spp import gain
from fedlora.types import MaskedScale, Payload


class ZeroAudit:
    """Merges an update into a pruned model, on the CPU and module by module, and looks at zeros.

    Args:
        folder: of the pruned model.

    Raises:
        ModelError: if it holds no masks.
    """

    def __init__(self, folder: Path) -> None:
        self._masks: Masks = load_masks(folder)
        self._where = _files(folder)

    def __call__(self, payload: Payload) -> Mapping[str, float | int | str]:
        """The identity of the merged model's zeros, how many moved, and its density.

        Nothing is said of other payloads than a `MaskedScale`.
        """
        if not isinstance(payload, MaskedScale):
            return {}
        merged = {path: self._merged(payload, path) != 0 for path in payload.beta}
        moved = sum(int((m != self._masks[p]).sum()) for p, m in merged.items())
        whole = {**self._masks, **merged}
        return {
            "spp/zero_pattern": identity(whole),
            "spp/zeros_moved": moved,
            "spp/density": density(whole),
        }

    def _merged(self, payload: MaskedScale, path: str) -> Tensor:
        """``[d_out, d_in]`` in the type in which the base is stored."""
        weight = self._weight(path)
        factors = gain(payload, path)
        wide = torch.promote_types(weight.dtype, factors.dtype)
        return (weight.to(wide) * factors.to(wide)).to(weight.dtype)

    def _weight(self, path: str) -> Tensor:
        """As stored, turned if need be: ``Conv1D`` stores ``[d_in, d_out]``."""
        mask, read = self._masks[path], self._where[f"{path}.weight"]
        weight = read()
        for turned in (weight, weight.T):
            if turned.shape == mask.shape and torch.equal(turned != 0, mask):
                return turned
        raise ModelError(f"the zeros of {path} are not where its mask says")


def _files(folder: Path) -> dict[str, Callable[[], Tensor]]:
    """Name of a stored tensor -> how to read it."""
    found: dict[str, Callable[[], Tensor]] = {}
    for path in weight_files(folder):
        if path.name == FILE:
            continue
        if path.suffix != ".safetensors":
            raise ModelError(f"{path} is no safetensors file: convert the model first")
        with safe_open(path, framework="pt") as file:
            found |= {key: _reader(path, key) for key in file.keys()}  # noqa: SIM118
    return found


def _reader(path: Path, key: str) -> Callable[[], Tensor]:
    def read() -> Tensor:
        with safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(key)
            return tensor

    return read
