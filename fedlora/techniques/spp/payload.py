"""SPP's factors as they travel: a multiplicative update of a pruned base that keeps its zeros."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from fedlora.algebra.init import initial_a
from fedlora.core.checks import one_of, wrong_names
from fedlora.core.payload import Payload, mismatch
from fedlora.core.types import Client, Expected
from fedlora.models.language_model import LanguageModel
from fedlora.models.layers import LinearUpdate
from fedlora.models.modules import ModelInfo, check_paths
from fedlora.techniques.spp.layer import BlockScaled
from fedlora.techniques.spp.scale import factor, repeat_rows, scaled_weight, sum_factors

_PARTS = ("alpha", "beta", "change")
_PLAIN = ("mask", "lora_alpha", "trains", "seed")


@dataclass(frozen=True)
class MaskedScale(Payload):
    """A multiplicative update of a pruned base, which keeps every zero (SPP).

    With ``r = blocks[path]``, ``s = lora_alpha / r`` and ``g(i) = floor(i r / d_out)`` a module's
    weight becomes ``W ∘ (1 + s F)``, ``F[i, j] = beta[i] alpha[g(i), j]``, after the factors of
    `merges` have been multiplied into ``W``. The mappings leave out what a client does not need or
    does not change. `fedlora.techniques.spp.scale` has the arithmetic.
    """

    noun = "a MaskedScale"
    keeps_zeros = True
    alone = "SPP one by one"

    mask: str
    """Identity of the base's zeros (`fedlora.models.masks`). On a base with other zeros the payload
    has no meaning."""
    lora_alpha: float
    blocks: Mapping[str, int]
    """Module path -> rank ``r`` of the common factors."""
    alpha: Mapping[str, Tensor] = field(default_factory=dict)
    """Module path -> ``[r, d_in]``, or fewer rows, of a number that divides ``r``."""
    beta: Mapping[str, Tensor] = field(default_factory=dict)
    """Module path -> ``[d_out]``."""
    tied: Mapping[str, int] = field(default_factory=dict)
    """Module path -> rank of a change of ``alpha`` that a client trains in place of ``alpha``:
    neighbouring rows of ``alpha`` change alike."""
    change: Mapping[str, Tensor] = field(default_factory=dict)
    """Module path -> ``[tied, d_in]``, that change; a missing module: zero."""
    merges: tuple[Mapping[str, tuple[Tensor, Tensor]], ...] = ()
    """The factors ``1 + s Σ_k F_k`` that have been multiplied into ``W``, in order: module path ->
    ``alpha [k, r, d_in]`` and ``beta [k, d_out]``."""
    trains: str = "both"
    """``alpha``, ``beta`` or ``both``: what a client changes and sends back."""
    seed: int = -1
    """Seed of ``alpha`` if clients draw it (`algebra.init.initial_a`); -1: ``alpha`` is sent."""

    def __post_init__(self) -> None:
        one_of("trains", self.trains, ("alpha", "beta", "both"))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """``<path>/alpha``, ``<path>/beta``, ``<path>/change``, then the merges in their order."""
        for name in _PARTS:
            for path, t in getattr(self, name).items():
                yield f"{path}/{name}", t
        for i, merge in enumerate(self.merges):
            for path, (alpha, beta) in merge.items():
                yield f"{path}/merges/{i}/alpha", alpha
                yield f"{path}/merges/{i}/beta", beta

    def header(self) -> dict[str, Any]:
        """Everything except the tensors."""
        header: dict[str, Any] = {name: getattr(self, name) for name in _PLAIN}
        header |= {name: dict(getattr(self, name)) for name in ("blocks", "tied")}
        header |= {f"{name}s": list(getattr(self, name)) for name in _PARTS}
        return header | {"merges": [list(merge) for merge in self.merges]}

    @classmethod
    def from_header(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """The inverse of `header` and `tensors`."""
        parts: dict[str, Any] = {
            name: {p: tensors[f"{p}/{name}"] for p in header[f"{name}s"]} for name in _PARTS
        }
        merges = tuple(
            {p: (tensors[f"{p}/merges/{i}/alpha"], tensors[f"{p}/merges/{i}/beta"]) for p in merge}
            for i, merge in enumerate(header["merges"])
        )
        plain = {name: header[name] for name in (*_PLAIN, "blocks", "tied")}
        return cls(**plain, **parts, merges=merges)

    def check(self, sender: Client, expected: Expected) -> str:
        """Require the server's mask, and exactly those tensors that the start says are trained."""
        start = expected.start
        if not isinstance(start, MaskedScale):
            return mismatch(type(self), type(start))
        if self.mask != start.mask:
            kept = expected.density
            return (
                f"it was trained on a base pruned with the mask {self.mask}, the server's is "
                f"{start.mask}: one mask for all, since weights averaged under two independent "
                f"masks of density {kept:.4g} would have density {1 - (1 - kept) ** 2:.4g}"
            )
        return _wrong_scale(self, start)

    def change_norm(self, start: Payload) -> float:
        """Norm of the change of ``s F``, which is relative to the weights: those are not known."""
        if not isinstance(start, MaskedScale):
            raise TypeError("a MaskedScale and another payload have no common change")
        squares = []
        for path, beta in start.beta.items():
            alpha, change = start.alpha.get(path), self.change.get(path)
            # Clients draw alpha and do not change it: its rows are no longer than 1, so one
            # column of ones [r, 1] gives an upper bound.
            if alpha is None:
                alpha = torch.ones(start.blocks[path], 1)
            new = self.alpha.get(path, alpha).double()
            if change is not None:
                new = new + repeat_rows(change.double(), len(new))
            moved = factor(new, self.beta.get(path, beta).double()) - factor(
                alpha.double(), beta.double()
            )
            squares.append((scale(start, path) * float(moved.norm())) ** 2)
        return math.sqrt(math.fsum(squares))

    def updates(self, model: LanguageModel, dropout: float = 0.0) -> dict[str, LinearUpdate]:
        """A `BlockScaled` on every module."""
        check_scale(self, model.info)
        drawn = {
            m.path: initial_a(self.seed, m, self.blocks[m.path])
            for m in model.info.modules
            if self.seed >= 0 and m.path in self.beta
        }
        alpha = {**drawn, **self.alpha}
        return {
            path: BlockScaled(
                alpha[path],
                self.beta[path],
                scale(self, path),
                dropout,
                layer.base,
                dtype=model.dtype,
                tied=self.tied.get(path, 0),
                change=self.change.get(path),
                gain=merged_gain(self, path),
                trains=self.trains,
            )
            for path, layer in model.layers.items()
            if path in self.beta
        }

    def read(self, updates: Mapping[str, LinearUpdate]) -> "MaskedScale":
        """The present values of alpha, beta and changes."""
        live = {p: u for p, u in updates.items() if isinstance(u, BlockScaled)}
        return replace(
            self,
            alpha={p: u.alpha.detach().clone() for p, u in live.items() if p in self.alpha},
            beta={p: u.beta.detach().clone() for p, u in live.items()},
            change={p: u.change.detach().clone() for p, u in live.items() if u.change is not None},
        )

    def export(
        self, folder: Path, info: ModelInfo, base_name: str = "", dropout: float = 0.0
    ) -> str:
        """Write the whole payload, and PEFT's files if they can hold it
        (`fedlora.techniques.spp.peft`)."""
        from fedlora.techniques.spp.peft import write_spp  # importing PEFT takes seconds

        write_spp(self, info, folder, base_name, dropout)
        return ""

    def reader(self, folder: Path) -> str | None:
        """PEFT with our layer, where PEFT's files could be written."""
        from fedlora.techniques.lora.peft import CONFIG

        return f"PEFT {metadata.version('peft')}" if (folder / CONFIG).is_file() else None

    def read_elsewhere(self, folder: Path, network: Any) -> Any:
        """A ``PeftModel`` with `fedlora.techniques.spp.peft.SppLinear`."""
        from fedlora.techniques.spp.peft import mount_spp

        return mount_spp(network, folder)

    @classmethod
    def load(cls, folder: Path, info: ModelInfo) -> "MaskedScale":
        """Read what `export` wrote."""
        from fedlora.techniques.spp.peft import load_spp

        return load_spp(folder)


def select_sent(payload: MaskedScale) -> MaskedScale:
    """The part of a trained payload that a client sends back: only what it has trained."""
    alpha = payload.alpha if payload.trains != "beta" else {}
    return replace(
        payload,
        alpha={p: t for p, t in alpha.items() if p not in payload.tied},
        beta=payload.beta if payload.trains != "alpha" else {},
        merges=(),
    )


def alpha_of(payload: MaskedScale, path: str) -> Tensor:
    """A module's ``alpha [r, d_in]`` with its tied change, if any, applied."""
    alpha = payload.alpha[path]
    change = payload.change.get(path)
    return alpha if change is None else alpha + repeat_rows(change, len(alpha))


def scale(payload: MaskedScale, path: str) -> float:
    """``s = lora_alpha / r`` of a module."""
    return payload.lora_alpha / payload.blocks[path]


def merged_gain(payload: MaskedScale, path: str) -> Tensor | None:
    """``[d_out, d_in]``: what `merges` have multiplied a module's weight by; None: nothing."""
    gain: Tensor | None = None
    for merge in payload.merges:
        step = 1 + scale(payload, path) * sum_factors(*merge[path])
        gain = step if gain is None else gain * step
    return gain


def merged_weight(weight: Tensor, payload: MaskedScale, path: str) -> Tensor:
    """A module's ``W`` times all factors of a payload, rounded once to the type of ``W``: bitwise
    identical to what is mounted and written."""
    alpha, before = alpha_of(payload, path), merged_gain(payload, path)
    wide = scaled_weight(weight, alpha, payload.beta[path], scale(payload, path), before)
    return wide.to(weight.dtype)


def check_scale(payload: MaskedScale, info: ModelInfo) -> None:
    """Raise a ValueError that says why a scale cannot act on this model: its zeros, a module."""
    if payload.mask != info.mask:
        base = f"{info.name} has the mask {info.mask}" if info.mask else f"{info.name} is dense"
        raise ValueError(
            f"the payload scales a base pruned with the mask {payload.mask}, and {base}: alpha and "
            "beta mean nothing there (model=pruned, one mask for all)"
        )
    check_paths(payload.beta, info)
    for module in info.modules:
        path = module.path
        if path in payload.beta:
            r = payload.blocks[path]
            _check_shape(f"{path}: beta", payload.beta[path], (module.d_out,))
            if not 1 <= r <= module.d_out:
                raise ValueError(f"{path}: rank {r} is not in 1..{module.d_out} = d_out")
            if payload.seed < 0 or path in payload.alpha:
                _check_rows(f"{path}: alpha", payload.alpha.get(path), r, module.d_in)
            if path in payload.change:
                tied = payload.tied.get(path, 0)
                _check_shape(f"{path}: change", payload.change[path], (tied, module.d_in))


def _check_shape(what: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{what} {tuple(tensor.shape)} does not fit: expected {shape}")


def _check_rows(what: str, alpha: Tensor | None, r: int, d_in: int) -> None:
    if alpha is None or alpha.ndim != 2 or alpha.shape[1] != d_in or not len(alpha):
        shape = None if alpha is None else tuple(alpha.shape)
        raise ValueError(f"{what} {shape} does not fit: expected ({r}, {d_in})")
    if r % len(alpha):
        raise ValueError(f"{what} has rank {len(alpha)}, which does not divide {r}")


def _wrong_scale(update: MaskedScale, start: MaskedScale) -> str:
    if update.merges:
        return (
            f"it holds {len(update.merges)} merges; the server has them and clients never send them"
        )
    for name in ("lora_alpha", "blocks", "tied", "trains", "seed"):
        got, due = getattr(update, name), getattr(start, name)
        if got != due:
            return f"{name} {got!r}, expected {due!r}"
    rows = start.alpha if start.trains != "beta" else {}
    shapes: dict[str, dict[str, tuple[int, ...]]] = {
        "alpha": {p: tuple(t.shape) for p, t in rows.items() if p not in start.tied},
        "beta": {p: tuple(t.shape) for p, t in start.beta.items() if start.trains != "alpha"},
        "change": {p: (k, rows[p].shape[1]) for p, k in start.tied.items() if p in rows},
    }
    for name, wanted in shapes.items():
        found = getattr(update, name)
        wrong = wrong_names(found.keys(), wanted.keys())
        if wrong:
            return f"{name}: {wrong}"
        for path, shape in wanted.items():
            if tuple(found[path].shape) != shape:
                return f"{path}: {name} {tuple(found[path].shape)}, expected {shape}"
    return ""
