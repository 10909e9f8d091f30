"""A frozen linear layer with room for one update, and the updates that fit there.

A base model is wrapped once; mounting another client's update is an assignment. Updates are plain
objects (`LinearUpdate`), because registering an ``nn.Module`` per layer and client doubles the cost
of mounting; the engine of another method may put its own there.

PEFT's LoRA layers compute the same values and gradients, and test_language_model.py holds ours to
them. They are not used here because re-mounting them writes into their private dictionaries, and
because nothing but low-rank factors fits into them.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedlora.core.types import Factors


def stored_transposed(base: nn.Module) -> bool:
    """Whether the layer stores ``[d_in, d_out]``, as GPT-2's ``Conv1D`` does."""
    return not isinstance(base, nn.Linear)


def dense_weight(base: nn.Module) -> Tensor:
    """The layer's own weight as ``[d_out, d_in]``: a view, not a copy.

    Raises:
        TypeError: if the layer stores quantised weights.
    """
    weight = base.weight
    assert isinstance(weight, Tensor)
    if not weight.is_floating_point():
        raise TypeError(f"{type(base).__name__} stores {weight.dtype} weights: no dense view")
    return weight.t() if stored_transposed(base) else weight


class LinearUpdate(Protocol):
    """What stands between a frozen linear layer and its output."""

    def __call__(self, x: Tensor, base: nn.Module) -> Tensor:
        """Any leading shape: ``x [..., d_in]`` to ``[..., d_out]``."""

    def parameters(self) -> list[nn.Parameter]:
        """Whatever could be trained."""

    def weight(self, base: nn.Module) -> Tensor:
        """The effective weight ``[d_out, d_in]``, without dropout."""


def dropped_share(p: float) -> int:
    """A dropout rate in units of 2^-16, as `survivors` counts it."""
    return round(p * 2**16)


def dropout_bits(rows: int, widths: Sequence[int], seed: int, device: torch.device) -> list[Tensor]:
    """Sixteen random bits for every number that goes into the adapters of one forward pass.

    They are drawn at once, in 64-bit words: drawing bits one number at a time, as torch's own
    dropout does on a CPU, takes a quarter of a small model's training step.

    Args:
        rows: tokens of the forward pass, padding included.
        widths: ``d_in`` of each module.
        seed: what the bits are a function of.
        device: where the generator and the bits are.

    Returns:
        ``[rows, d_in]`` int16 for each module.
    """
    words = [-(-rows * width // 4) for width in widths]
    drawn = torch.empty(sum(words), dtype=torch.int64, device=device)
    drawn.random_(-(2**63), None, generator=torch.Generator(device).manual_seed(seed))
    parts = drawn.view(torch.int16).split([4 * n for n in words])
    return [
        part[: rows * width].view(rows, width) for part, width in zip(parts, widths, strict=True)
    ]


def survivors(bits: Tensor, thresholds: Tensor | int, dtype: torch.dtype) -> Tensor:
    """1 where a number survives a dropout, 0 elsewhere, in the shape of ``bits``.

    Numbers rather than booleans, which torch compares and multiplies four times slower on a CPU.

    Args:
        bits: int16.
        thresholds: `threshold` of the rate, or an int16 tensor of them for every row ``[rows, 1]``.
        dtype: of the result.
    """
    kept = torch.empty(bits.shape, dtype=dtype, device=bits.device)
    return torch.ge(bits, thresholds, out=kept)


def threshold(dropped: int) -> int:
    """Below it sixteen bits, as an int16, drop a number: for a `dropped_share` below 2^16."""
    return dropped - 2**15


def dropout(x: Tensor, p: float, bits: Tensor) -> Tensor:
    """Zero each number with probability ``p`` and divide the rest by ``1 - p``.

    The probability is a multiple of 2^-16, and the division is by exactly its complement.

    Args:
        x: any shape.
        p: the rate.
        bits: int16, as many numbers as ``x`` has, uniform.
    """
    dropped = dropped_share(p)
    if dropped == 0:
        return x
    if dropped == 2**16:
        return torch.zeros_like(x)
    kept = survivors(bits.view(x.shape), threshold(dropped), x.dtype)
    return x * kept.mul_(2**16 / (2**16 - dropped))


class LowRank:
    """``y = W x + (alpha / r) B (A dropout(x))``.

    Dropout acts whenever its rate is positive, whatever ``training`` says (the base stays in
    evaluation mode); its mask is a function of ``bits``.
    """

    def __init__(
        self, factors: Factors, p: float, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.a = nn.Parameter(factors.a.detach().to(device, dtype, copy=True))
        self.b = nn.Parameter(factors.b.detach().to(device, dtype, copy=True))
        self.alpha = factors.alpha
        self.scale = factors.scale
        self.p = p
        """Dropout rate."""
        self.bits: Tensor | None = None
        """Of the next forward's mask (`dropout_bits`)."""

    def __call__(self, x: Tensor, base: nn.Module) -> Tensor:
        """Any leading shape: ``x [..., d_in]`` to ``[..., d_out]``."""
        y: Tensor = base(x)
        return self.added(y, x).to(y.dtype)

    def added(self, y: Tensor, x: Tensor) -> Tensor:
        """``y + (alpha / r) B (A dropout(x))``, ``[..., d_out]``."""
        x = x.to(self.a.dtype)
        if self.p > 0:
            if self.bits is None:
                raise RuntimeError(
                    f"dropout={self.p} without a seed: LanguageModel.seed_dropout before a forward"
                )
            x = dropout(x, self.p, self.bits)
        low = functional.linear(functional.linear(x, self.a), self.b)
        return torch.add(y, low, alpha=self.scale)

    def parameters(self) -> list[nn.Parameter]:
        """A and B."""
        return [self.a, self.b]

    def weight(self, base: nn.Module) -> Tensor:
        """The effective weight ``W + (alpha / r) B A``, ``[d_out, d_in]``, in the factors' type."""
        return dense_weight(base).to(self.a.dtype) + self.scale * (self.b @ self.a)

    def factors(self) -> Factors:
        """A detached copy of what is trained."""
        return Factors(self.a.detach().clone(), self.b.detach().clone(), self.alpha)


class Rebuilt(LowRank):
    """`LowRank` over ``W' = W + shift`` in the factors' type; the base itself is left alone."""

    def __init__(
        self, shift: Tensor, factors: Factors | None, p: float, base: nn.Module, dtype: torch.dtype
    ) -> None:
        weight = dense_weight(base).detach()
        self.moved = weight.to(dtype) + shift.detach().to(weight.device, dtype)
        """``W'``, ``[d_out, d_in]``."""
        self.trains = factors is not None
        """Whether there are factors at all."""
        d_out, d_in = shift.shape
        nothing = Factors(torch.zeros(1, d_in), torch.zeros(d_out, 1), 1.0)
        super().__init__(factors or nothing, p, weight.device, dtype)

    def __call__(self, x: Tensor, base: nn.Module) -> Tensor:
        """Any leading shape: ``x [..., d_in]`` to ``[..., d_out]``."""
        bias: Any = base.bias
        moved = functional.linear(
            x.to(self.moved.dtype), self.moved, None if bias is None else bias.to(self.moved.dtype)
        )
        y = self.added(moved, x) if self.trains else moved
        return y.to(x.dtype)

    def parameters(self) -> list[nn.Parameter]:
        """A and B, if there are any."""
        return super().parameters() if self.trains else []

    def weight(self, base: nn.Module) -> Tensor:
        """The effective weight ``W' + (alpha / r) B A``, ``[d_out, d_in]``."""
        return self.moved + self.scale * (self.b @ self.a)

    def change(self, base: nn.Module) -> Tensor:
        """What the effective weight differs from the base's, detached."""
        with torch.no_grad():
            return self.weight(base) - dense_weight(base).to(self.moved.dtype)


class SparseValues:
    """``y = W' x`` with ``W' = W + values`` at the mask and ``W' = W``, bit for bit, elsewhere."""

    def __init__(self, values: Tensor, index: Tensor, dtype: torch.dtype) -> None:
        self.values = nn.Parameter(values.detach().to(index.device, dtype, copy=True))
        self.index = index
        """Of the mask's coordinates (row-major over ``[d_out, d_in]``) in the stored weight."""

    def __call__(self, x: Tensor, base: nn.Module) -> Tensor:
        """Any leading shape: ``x [..., d_in]`` to ``[..., d_out]``."""
        bias: Any = base.bias
        return functional.linear(x, self.weight(base), bias)

    def parameters(self) -> list[nn.Parameter]:
        """The values."""
        return [self.values]

    def weight(self, base: nn.Module) -> Tensor:
        """The effective weight, ``[d_out, d_in]``, in the base's type."""
        stored = dense_weight(base).t() if stored_transposed(base) else dense_weight(base)
        flat = stored.reshape(-1)
        moved = (flat[self.index].to(self.values.dtype) + self.values).to(flat.dtype)
        weight = flat.index_put((self.index,), moved).view(stored.shape)
        return weight.t() if stored_transposed(base) else weight


def mask_index(mask: Tensor, base: nn.Module) -> Tensor:
    """Where the true coordinates of ``mask [d_out, d_in]``, in row-major order, are stored."""
    rows, columns = mask.nonzero(as_tuple=True)
    d_out, d_in = mask.shape
    return columns * d_out + rows if stored_transposed(base) else rows * d_in + columns


class AdaptedLinear(nn.Module):
    """One linear layer of the frozen base with a place for one update."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.update: LinearUpdate | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Any leading shape: ``x [..., d_in]`` to ``[..., d_out]``."""
        if self.update is not None:
            return self.update(x, self.base)
        y: Tensor = self.base(x)
        return y

    def effective_weight(self, update: LinearUpdate | None) -> Tensor:
        """A detached copy of the weight ``[d_out, d_in]`` under an update, mounted here or not.

        Raises:
            TypeError: if the base is quantised.
        """
        with torch.no_grad():
            return dense_weight(self.base).clone() if update is None else update.weight(self.base)

    def stored_weight(self, update: LinearUpdate) -> Tensor:
        """The same in the base's type and as the base stores it, contiguous."""
        weight = self.effective_weight(update).to(self.weight.dtype)
        return (weight.t() if stored_transposed(self.base) else weight).contiguous()

    @property
    def weight(self) -> Tensor:
        """The base's own stored weight, for model code that asks for its type or device."""
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The base's bias, if it has one."""
        bias: Any = self.base.bias
        return bias if isinstance(bias, Tensor) else None
