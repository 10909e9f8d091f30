"""An update of chosen coordinates of the base weights."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from fedlora.core.checks import fraction, real, wrong_names
from fedlora.core.errors import ModelError
from fedlora.core.payload import Payload, mismatch
from fedlora.core.seeding import mask_noise
from fedlora.core.types import Client, Expected
from fedlora.models.language_model import LanguageModel
from fedlora.models.layers import LinearUpdate
from fedlora.models.modules import ModelInfo, check_paths
from fedlora.techniques.sparse.layer import SparseValues, mask_index

MASKS_KEPT = 4  # distinct (seed, density) pairs whose coordinates a model keeps in memory


@dataclass(frozen=True)
class SparseDelta(Payload):
    """Values at the coordinates of a mask (SLoRA's first stage).

    Coordinate ``(i, j)`` of a module belongs to the mask when ``u[i, j] < density``, where ``u`` is
    uniform noise that `fedlora.core.seeding.mask_noise` draws from ``(seed, path)``: masks of a
    smaller density are subsets of masks of a larger one, and only the values have to travel.
    """

    noun = "a SparseDelta"
    folder = ""
    alone = "sparse updates one by one"

    seed: int
    density: float
    values: Mapping[str, Tensor]
    """Module path -> ``[nnz]``, the update at the mask's coordinates in row-major order."""

    def __post_init__(self) -> None:
        fraction("density", self.density)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """``<path>/values`` of every module."""
        for path, values in self.values.items():
            yield f"{path}/values", values

    def header(self) -> dict[str, Any]:
        """The mask, and modules in order."""
        return {"seed": self.seed, "density": self.density, "order": list(self.values)}

    @classmethod
    def from_header(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """The inverse of `header` and `tensors`."""
        values = {path: tensors[f"{path}/values"] for path in header["order"]}
        return cls(header["seed"], real("density", header["density"]), values)

    def check(self, sender: Client, expected: Expected) -> str:
        """Require the mask, the modules and the lengths of values of the start."""
        start = expected.start
        if not isinstance(start, SparseDelta):
            return mismatch(type(self), type(start))
        if (self.seed, self.density) != (start.seed, start.density):
            return (
                f"its mask has seed {self.seed} and density {self.density:g}, "
                f"expected {start.seed} and {start.density:g}"
            )
        wrong = wrong_names(self.values.keys(), start.values.keys())
        if wrong:
            return wrong
        for path, values in self.values.items():
            due = start.values[path].shape
            if values.shape != due:
                return f"{path}: values {tuple(values.shape)}, the mask has {tuple(due)}"
        return ""

    def change_norm(self, start: Payload) -> float:
        """Norm of the change of the values."""
        if not isinstance(start, SparseDelta):
            raise TypeError(f"{start.noun} and {self.noun} have no common change")
        squares = [
            float((self.values[p].double() - v.double()).square().sum())
            for p, v in start.values.items()
        ]
        return math.sqrt(math.fsum(squares))

    def updates(self, model: LanguageModel, dropout: float = 0.0) -> dict[str, LinearUpdate]:
        """`SparseValues` on every module."""
        check_paths(self.values, model.info)
        masks = self._masks(model)
        found: dict[str, LinearUpdate] = {}
        for path, index in masks.items():
            if path not in self.values:
                continue
            values = self.values[path]
            if values.shape != index.shape:
                raise ValueError(
                    f"{path}: {tuple(values.shape)} values, but the mask of seed {self.seed} "
                    f"and density {self.density} has {tuple(index.shape)} coordinates"
                )
            found[path] = SparseValues(values, index, model.dtype)
        return found

    def _masks(self, model: LanguageModel) -> dict[str, Tensor]:
        """Where each module stores the mask's coordinates; drawn once per model and mask."""

        def drawn() -> dict[str, Tensor]:
            return {
                m.path: mask_index(
                    mask_noise(self.seed, m.path, m.d_out, m.d_in) < self.density,
                    model.layers[m.path].base,
                ).to(model.device)
                for m in model.info.modules
            }

        return model.kept("masks", (self.seed, self.density), drawn, MASKS_KEPT)

    def read(self, updates: Mapping[str, LinearUpdate]) -> "SparseDelta":
        """The present values."""
        values = {
            path: u.values.detach().clone()
            for path, u in updates.items()
            if isinstance(u, SparseValues)
        }
        return replace(self, values=values)

    def export(
        self, folder: Path, info: ModelInfo, base_name: str = "", dropout: float = 0.0
    ) -> str:
        """Write nothing: no standard format can hold a sparse update."""
        return "adapter/ is not written: the run ended in a sparse stage, before any LoRA"

    @classmethod
    def load(cls, folder: Path, info: ModelInfo) -> "SparseDelta":
        """Raise a ModelError: a sparse update is never exported."""
        raise ModelError(f"{folder} holds no sparse update: none is ever written")
