"""Factors over a base that has moved, and such a move alone.

It belongs to no technique: every method that merges updates into the base (SwitchLoRA, FLoRA,
FedEx) sends it. Clients on one base share its mounted weights and train together.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from safetensors.torch import save_file
from torch import Tensor

from fedlora.core.checks import wrong_names
from fedlora.core.errors import ModelError
from fedlora.core.payload import MovedBase, Payload
from fedlora.core.reading import tensors_in
from fedlora.core.types import Adapter, Client, Expected, Factors
from fedlora.models.language_model import LanguageModel
from fedlora.models.layers import LinearUpdate
from fedlora.models.modules import ModelInfo, check_adapter, check_paths
from fedlora.run.checkpoint import state_hash
from fedlora.techniques.lora.payload import (
    LowRankPayload,
    factor_tensors,
    factors_from,
    live_factors,
)
from fedlora.techniques.rebased.layer import Rebuilt

UPDATE = "update.safetensors"


@dataclass(frozen=True)
class Rebased(Payload):
    """``W + shift + (alpha / r) B A``."""

    noun = "a dense update"
    chooses = True
    folder = "update"
    alone = "moved bases one by one: without factors, or in half precision"

    shift: Mapping[str, Tensor]
    """Module path -> ``[d_out, d_in]``, the sum of what was added to the frozen weight."""
    factors: Adapter = field(default_factory=dict)
    """Factors of modules that are in ``shift``; empty: a dense update without factors to train."""
    version: str = ""
    """Identity of the shift; empty: the hash of its tensors. Equal versions hold equal tensors."""

    def __post_init__(self) -> None:
        for path, f in self.factors.items():
            shape = (f.b.shape[0], f.a.shape[1])
            if path not in self.shift or tuple(self.shift[path].shape) != shape:
                found = tuple(self.shift[path].shape) if path in self.shift else "none"
                raise ValueError(f"{path}: factors of a layer {shape} over the shift {found}")

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """``<path>/shift`` of every module, then ``<path>/a`` and ``<path>/b``."""
        for path, shift in self.shift.items():
            yield f"{path}/shift", shift
        yield from factor_tensors(self.factors)

    def header(self) -> dict[str, Any]:
        """Modules, scales and the version, if it has a name."""
        alpha = {path: f.alpha for path, f in self.factors.items()}
        return {"shift": list(self.shift), "alpha": alpha, "version": self.version}

    @classmethod
    def from_header(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """The inverse of `header` and `tensors`."""
        shift = {path: tensors[f"{path}/shift"] for path in header["shift"]}
        return cls(shift, factors_from(header["alpha"], tensors), str(header["version"]))

    def copy(self) -> "Rebased":
        """Factors of its own over the same base: a copy of that for each client would not fit."""
        factors = {p: Factors(f.a.clone(), f.b.clone(), f.alpha) for p, f in self.factors.items()}
        return Rebased(self.shift, factors, self.base().version)

    def check(self, sender: Client, expected: Expected) -> str:
        """Require a dense update of every module that the start has moved."""
        start = expected.start.base()
        if start is None or self.factors:
            return "it holds factors where a dense update is required"
        wrong = wrong_names(self.shift.keys(), start.shift.keys())
        if wrong:
            return wrong
        for path, shift in self.shift.items():
            if shift.shape != start.shift[path].shape:
                due = tuple(start.shift[path].shape)
                return f"{path}: an update {tuple(shift.shape)}, the layer is {due}"
        return ""

    def change_norm(self, start: Payload) -> float:
        """Norm of the difference between a dense update and what its client started from."""
        before, factors = start.base(), start.low_rank()
        if before is None or factors is None:
            raise TypeError("a dense update and factors over the base itself have no common change")
        squares = []
        for path, shift in self.shift.items():
            moved = shift.double() - before.shift[path].double()
            if path in factors:
                moved -= factors[path].delta().double()
            squares.append(float(moved.square().sum()))
        return math.sqrt(math.fsum(squares))

    def answer(self) -> type[Payload]:
        """Factors: the base has not moved since."""
        return LowRankPayload

    def updates(self, model: LanguageModel, dropout: float = 0.0) -> dict[str, LinearUpdate]:
        """A `Rebuilt` on every module, over the mounted base of this version."""
        check_paths(self.shift, model.info)
        check_adapter(self.factors, model.info)
        for m in model.info.modules:
            shift = self.shift.get(m.path)
            if shift is not None and tuple(shift.shape) != (m.d_out, m.d_in):
                raise ValueError(
                    f"{m.path}: a shift {tuple(shift.shape)} does not fit a layer with "
                    f"d_out={m.d_out}, d_in={m.d_in}"
                )
        moved = model.moved(self.base())
        return {p: Rebuilt(w, self.factors.get(p), dropout) for p, w in moved.items()}

    def read(self, updates: Mapping[str, LinearUpdate]) -> LowRankPayload:
        """The factors alone: the base has not moved since."""
        return live_factors(updates)

    def low_rank(self) -> Adapter:
        """The factors, which are trained."""
        return self.factors

    def base(self) -> MovedBase:
        """The moved base under the factors."""
        return self._base

    @cached_property
    def _base(self) -> MovedBase:
        return MovedBase(self.version or state_hash(dict(self.shift)), self.shift)

    def trained(self, factors: Adapter) -> LowRankPayload:
        """The factors alone."""
        return LowRankPayload(factors)

    def export(
        self, folder: Path, info: ModelInfo, base_name: str = "", dropout: float = 0.0
    ) -> str:
        """The dense change of every adapted layer, ``<path>: [d_out, d_in]``, as safetensors."""
        tensors = {}
        for path, shift in self.shift.items():
            f = self.factors.get(path)
            tensors[path] = (shift if f is None else shift + f.delta()).detach().cpu().contiguous()
        save_file(tensors, folder / UPDATE, metadata={"base": info.fingerprint})
        return (
            "update/ instead of adapter/: the update is of full rank; fedlora merge adds it to "
            "the model"
        )

    @classmethod
    def load(cls, folder: Path, info: ModelInfo) -> "Rebased":
        """A dense update."""
        file = folder / UPDATE
        if not file.is_file():
            raise ModelError(f"{folder} lacks {UPDATE}")
        with tensors_in(file, "the update") as stored:
            made_for = (stored.metadata() or {}).get("base", "")
            if made_for != info.fingerprint:
                raise ModelError(f"{file} is of another base model ({made_for[:12]})")
            return cls({m.path: stored.get_tensor(m.path) for m in info.modules})
