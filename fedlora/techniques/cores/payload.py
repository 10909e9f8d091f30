"""The trained cores of a client, as they travel; what is fixed is sent once, or follows from the
seed."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self, TypeAlias

import torch
from torch import Tensor

from fedlora.algebra.init import orthonormal_rows
from fedlora.core.checks import real, wrong_names
from fedlora.core.errors import ModelError
from fedlora.core.payload import Parametrisation, Payload
from fedlora.core.types import Adapter, Client, Expected, Factors, LocalPlan
from fedlora.models.language_model import LanguageModel
from fedlora.models.layers import LinearUpdate
from fedlora.models.modules import ModelInfo, check_adapter
from fedlora.techniques.cores.layer import CoreLayer, core_of, gained
from fedlora.techniques.lora.payload import LowRankPayload

GAINS = "gains"
Bases: TypeAlias = tuple[Tensor, Tensor]
"""``U [d_out, r]`` and ``V [r, d_in]``."""


@dataclass(frozen=True, eq=False)
class Core:
    """One layer's ``ΔW = (alpha / r) U R V``, where ``R = diag(R_1, R_2, ...)``."""

    d_out: int
    d_in: int
    blocks: tuple[Tensor, ...]
    """``R_i [b_i, b_i]``, at least one."""

    def __post_init__(self) -> None:
        if not self.blocks:
            raise ValueError("a core has at least one block")
        for block in self.blocks:
            if block.ndim != 2 or block.shape[0] != block.shape[1]:
                raise ValueError(f"a block {tuple(block.shape)} of a core must be square")

    @property
    def sizes(self) -> list[int]:
        """``b_i`` of every block."""
        return [len(block) for block in self.blocks]

    @property
    def rank(self) -> int:
        """``r``, the sum of the ``b_i``."""
        return sum(self.sizes)


@dataclass(frozen=True, eq=False)
class CorePayload(Payload):
    """Module path -> core, in the order of the model's modules."""

    noun = "cores between fixed factors"

    cores: Mapping[str, Core]
    alpha: float
    seed: int
    """The run's: the fixed factors follow from it (`fixed`), so that they are not sent."""
    gains: bool = False
    """Whether clients train a gain beside each block (RAVAN); what they send are the products."""
    bases: Mapping[str, Bases] | None = None
    """``U [d_out, r]`` and ``V [r, d_in]`` of every module, orthonormal, where they do not follow
    from the seed. Clients that have them are not sent them again."""

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """``<path>/core0``, ``<path>/core1``, ...: the blocks of every module; then ``<path>/u``
        and ``<path>/v``, if they do not follow from the seed."""
        for path, core in self.cores.items():
            yield from named(path, core.blocks).items()
        for path, (u, v) in (self.bases or {}).items():
            yield f"{path}/u", u
            yield f"{path}/v", v

    def header(self) -> dict[str, Any]:
        """The scale, and what the fixed factors follow from."""
        return {
            "alpha": self.alpha,
            "seed": self.seed,
            "gains": self.gains,
            "bases": self.bases is not None,
            "cores": {p: [c.d_out, c.d_in] for p, c in self.cores.items()},
        }

    @classmethod
    def from_header(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """The inverse of `header` and `tensors`."""
        cores = {
            path: Core(_whole(path, d_out), _whole(path, d_in), blocks_in(tensors, path))
            for path, (d_out, d_in) in header["cores"].items()
        }
        bases = {p: (tensors[f"{p}/u"], tensors[f"{p}/v"]) for p in cores if header["bases"]}
        alpha, gains = real("alpha", header["alpha"]), bool(header["gains"])
        seed = _whole("seed", header["seed"])
        return cls(cores, alpha, seed, gains, bases if header["bases"] else None)

    def sent_floats(self, plan: LocalPlan) -> int:
        """Those of the cores alone: what is fixed comes from the server."""
        return sum(b.numel() for core in self.cores.values() for b in core.blocks)

    def check(self, sender: Client, expected: Expected) -> str:
        """Everything but the numbers is that of the start."""
        start, client = expected.start, expected.client
        assert isinstance(start, CorePayload)
        wrong = wrong_names(self.cores, start.cores)
        if wrong:
            return wrong
        mine, due = self.header(), start.header()
        for name in ("alpha", "seed", "gains", "bases"):
            if mine[name] != due[name]:
                return f"{name} {mine[name]!r:.80}, expected {due[name]!r}"
        for path, core in self.cores.items():
            found, wanted = mine["cores"][path], due["cores"][path]
            if found != wanted:
                return f"{path}: outputs and inputs {found!r:.80}, expected {wanted}"
            sizes, wanted = core.sizes, start.cores[path].sizes
            if sizes != wanted:
                return f"{path}: a core of blocks {sizes!r:.80}, expected {wanted}"
            if not sender.ranks.get(path) == client.ranks[path] == core.rank:
                stated, rank = sender.ranks.get(path), client.ranks[path]
                return f"{path}: it states rank {stated}, and has {core.rank} of {rank}"
        return self._wrong_bases(start)

    def _wrong_bases(self, start: "CorePayload") -> str:
        """Which fixed factor has changed that came with the start; empty: none."""
        for path, own in (self.bases or {}).items():
            for name, t, sent in zip("UV", own, (start.bases or {})[path], strict=True):
                if t.shape != sent.shape or not torch.equal(t.float(), sent.float()):
                    return f"{path}: its {name} has changed, which no round trains"
        return ""

    def change_norm(self, start: Payload) -> float:
        """Norm of the change of ``(alpha / r) U R V``: that of R, as U and V are orthonormal.

        Raises:
            TypeError: if the start is of another kind.
        """
        if not isinstance(start, CorePayload):
            raise TypeError(f"{self.noun} and {start.noun} have no common change")
        squares = [
            (self.alpha / core.rank) ** 2 * float((now.double() - before.double()).square().sum())
            for path, core in self.cores.items()
            for now, before in zip(core.blocks, start.cores[path].blocks, strict=True)
        ]
        return math.sqrt(math.fsum(squares))

    # --- on a model ---------------------------------------------------------------------------

    def updates(self, model: LanguageModel, dropout: float = 0.0) -> dict[str, LinearUpdate]:
        """A `CoreLayer` on every module."""
        check_adapter(self.low_rank(), model.info)
        found: dict[str, LinearUpdate] = {}
        for path in model.layers:
            if path in self.cores:
                core = self.cores[path]
                u, v = self.fixed(path, model.dtype, model.device)
                scale = self.alpha / core.rank
                found[path] = CoreLayer(u, core.blocks, v, scale, self.gains, dropout)
        return found

    def read(self, updates: Mapping[str, LinearUpdate]) -> "CorePayload":
        """The present values, gains multiplied in."""
        return self._with(
            {
                path: [block.detach().clone() for block in update.gained()]
                for path, update in updates.items()
                if isinstance(update, CoreLayer)
            }
        )

    def fixed(self, path: str, dtype: torch.dtype, device: torch.device) -> Bases:
        """``U [d_out, r]`` and ``V [r, d_in]`` of a module, not to be written to."""
        if self.bases is None:
            return fixed(self.seed, path, self.cores[path], dtype, device)
        u, v = self.bases[path]
        return u.to(device, dtype), v.to(device, dtype)

    def low_rank(self) -> Adapter:
        """``A = V`` and ``B = U R``: what the cores are to those who do not train them."""
        return self._factors

    @cached_property
    def _factors(self) -> dict[str, Factors]:
        found = {}
        for path, core in self.cores.items():
            block = core.blocks[0]
            u, v = self.fixed(path, block.dtype, block.device)
            found[path] = Factors(v.clone(), u @ core_of(core.blocks), self.alpha)
        return found

    def parametrisation(self, dtype: torch.dtype, device: torch.device) -> Parametrisation:
        """The blocks and the gains, and the factors that they make."""
        bases = {path: self.fixed(path, dtype, device) for path in self.cores}
        start: dict[str, Tensor] = {}
        for path, core in self.cores.items():
            start |= named(path, [b.to(device, dtype) for b in core.blocks])
            if self.gains:
                start[f"{path}/{GAINS}"] = torch.ones(len(core.blocks), dtype=dtype, device=device)

        def factors(values: Mapping[str, Tensor]) -> dict[str, Factors]:
            return {
                path: Factors(v, u @ core_of(self._product(path, values)), self.alpha)
                for path, (u, v) in bases.items()
            }

        return Parametrisation(start, factors)

    def retrained(self, values: Mapping[str, Tensor]) -> "CorePayload":
        """The values of the blocks, gains multiplied in."""
        return self._with({path: self._product(path, values) for path in self.cores})

    def _product(self, path: str, values: Mapping[str, Tensor]) -> list[Tensor]:
        """``g_i R_i`` of a module, of the values of `parametrisation`."""
        blocks = [values[_name(path, i)] for i in range(len(self.cores[path].blocks))]
        return gained(blocks, values[f"{path}/{GAINS}"] if self.gains else None)

    def _with(self, blocks: Mapping[str, Sequence[Tensor]]) -> "CorePayload":
        cores = {p: replace(core, blocks=tuple(blocks[p])) for p, core in self.cores.items()}
        return replace(self, cores=cores)

    # --- on disk ------------------------------------------------------------------------------

    def export(
        self, folder: Path, info: ModelInfo, base_name: str = "", dropout: float = 0.0
    ) -> str:
        """The factors ``A = V`` and ``B = U R`` in PEFT's format."""
        return LowRankPayload(self.low_rank()).export(folder, info, base_name, dropout)

    def reader(self, folder: Path) -> str | None:
        """PEFT."""
        return LowRankPayload(self.low_rank()).reader(folder)

    def read_elsewhere(self, folder: Path, network: Any) -> Any:
        """A ``PeftModel``."""
        return LowRankPayload(self.low_rank()).read_elsewhere(folder, network)

    @classmethod
    def load(cls, folder: Path, info: ModelInfo) -> "CorePayload":
        """Raise a ModelError: what is exported are the factors that the cores make."""
        raise ModelError(
            f"{folder} cannot be read as {cls.noun}: they are exported as LoRA's factors, read it "
            "as those"
        )


def fixed(seed: int, path: str, core: Core, dtype: torch.dtype, device: torch.device) -> Bases:
    """The fixed factors ``U [d_out, r]`` and ``V [r, d_in]`` of a module, not to be written to.

    Columns of U and rows of V are orthonormal, and those of a smaller rank are the first ones of a
    larger rank.
    """
    ut = orthonormal_rows(seed, f"{path}/u", core.rank, core.d_out, dtype, device)
    return ut.t(), orthonormal_rows(seed, f"{path}/v", core.rank, core.d_in, dtype, device)


def named(path: str, blocks: Sequence[Tensor]) -> dict[str, Tensor]:
    """The blocks of a module's core as named tensors."""
    return {_name(path, i): block for i, block in enumerate(blocks)}


def blocks_in(tensors: Mapping[str, Tensor], path: str) -> tuple[Tensor, ...]:
    """The inverse of `named`, among other tensors."""
    names = (_name(path, i) for i in itertools.count())
    return tuple(tensors[n] for n in itertools.takewhile(tensors.__contains__, names))


def _whole(name: str, value: object) -> int:
    """A whole number of a header, which a client may have written. 7.0 equals 7, but no stream can
    be drawn from it."""
    if type(value) is not int:
        raise ValueError(f"{name:.80} is {value!r:.80}, expected a whole number")
    return value


def _name(path: str, i: int) -> str:
    return f"{path}/core{i}"
