"""A frozen linear layer with room for one update, and what such an update is.

A base model is wrapped once; mounting another client's update is an assignment. Updates are plain
objects (`LinearUpdate`), because registering an ``nn.Module`` per layer and client doubles the cost
of mounting. Every technique has its own (`fedlora.techniques`).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


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


class LinearUpdate(ABC):
    """What stands between a frozen linear layer and its output."""

    p: float = 0.0
    """Dropout rate of the input of a branch beside the layer."""
    bits: Tensor | None = None
    """Random bits of the next forward's mask (`dropout_bits`); set by training with dropout."""

    @abstractmethod
    def __call__(self, x: Tensor, base: nn.Module) -> Tensor:
        """Any leading shape: ``x [..., d_in]`` to ``[..., d_out]``."""

    @abstractmethod
    def parameters(self) -> list[nn.Parameter]:
        """Whatever could be trained."""

    @abstractmethod
    def weight(self, base: nn.Module) -> Tensor:
        """The effective weight ``[d_out, d_in]``, without dropout."""

    def restrict(self, train_a: bool, train_b: bool) -> None:  # noqa: B027
        """Freeze one of two factors, where there are two."""

    def check_stored(self, path: str, base: nn.Module, stored: Tensor) -> None:  # noqa: B027
        """Look at a merged weight before it is written.

        Args:
            path: of the module, for messages.
            base: the layer.
            stored: the effective weight, rounded and as the layer stores it.

        Raises:
            ModelError: if it has lost what it must keep.
        """


def dropped_share(p: float) -> int:
    """A dropout rate in units of 2^-16, as `survivors` counts it."""
    return round(p * 2**16)


def dropout_bits(rows: int, widths: Sequence[int], seed: int, device: torch.device) -> list[Tensor]:
    """Sixteen random bits for every element that goes into the adapters of one forward pass.

    They are drawn at once, in 64-bit words: drawing bits one element at a time, as torch's own
    dropout does on a CPU, takes a quarter of a small model's training step. On a CPU numpy's
    PCG64DXSM draws them, which takes a third of the time of torch's generator.

    Args:
        rows: tokens of the forward pass; padding has no bits (`padded_bits`).
        widths: ``d_in`` of each module.
        seed: what the bits are a function of, beside the kind of device.
        device: where the bits are.

    Returns:
        ``[rows, d_in]`` int16 for each module.
    """
    words = [-(-rows * width // 4) for width in widths]
    if device.type == "cpu":
        raw = np.random.PCG64DXSM(seed).random_raw(sum(words))
        drawn = torch.from_numpy(raw.view(np.int64))
    else:
        drawn = torch.empty(sum(words), dtype=torch.int64, device=device)
        drawn.random_(-(2**63), None, generator=torch.Generator(device).manual_seed(seed))
    parts = drawn.view(torch.int16).split([4 * n for n in words])
    return [
        part[: rows * width].view(rows, width) for part, width in zip(parts, widths, strict=True)
    ]


def padded_bits(bits: Tensor, places: Tensor | None) -> Tensor:
    """The bits of a forward pass's tokens as those of all its rows.

    Args:
        bits: ``[tokens, d_in]``.
        places: `places_of`; None: there is no padding.

    Returns:
        ``[rows, d_in]``; a pad repeats the first token's, which are of no consequence.
    """
    return bits if places is None else bits.index_select(0, places)


def places_of(real: Tensor, rows: int) -> Tensor:
    """The number of the token that is in each row of a forward pass, ``[rows]``; 0 in a pad.

    Args:
        real: ``[tokens]`` int64: the row of each token, ascending.
        rows: tokens and pads.

    >>> places_of(torch.tensor([0, 1, 3]), 6).tolist()
    [0, 1, 0, 2, 0, 0]
    """
    places = real.new_zeros(rows)
    places[real] = torch.arange(len(real), device=real.device)
    return places


def survivors(bits: Tensor, thresholds: Tensor | int, dtype: torch.dtype) -> Tensor:
    """1 where an element survives a dropout, 0 elsewhere, in the shape of ``bits``.

    Numbers rather than booleans, which torch compares and multiplies four times slower on a CPU.

    Args:
        bits: int16.
        thresholds: `threshold` of the rate, or an int16 tensor of them for every row ``[rows, 1]``.
        dtype: of the result.
    """
    kept = torch.empty(bits.shape, dtype=dtype, device=bits.device)
    return torch.ge(bits, thresholds, out=kept)


def threshold(dropped: int) -> int:
    """Below it sixteen bits, as an int16, drop an element: for a `dropped_share` below 2^16."""
    return dropped - 2**15


def bits_of(bits: Tensor, x: Tensor) -> Tensor:
    """The random bits of an input, in its shape.

    Args:
        bits: int16, uniform, as many elements as the layer's input of all tokens has. An input of
            another size is given them from the beginning, over and over: DeBERTa sends its relative
            positions through the same layers.
        x: the input.
    """
    if bits.numel() != x.numel():
        bits = bits.flatten().repeat(-(-x.numel() // bits.numel()))[: x.numel()]
    return bits.view(x.shape)


def dropout(x: Tensor, p: float, bits: Tensor) -> Tensor:
    """Zero each number with probability ``p`` and divide the rest by ``1 - p``.

    The probability is a multiple of 2^-16, and the division is by exactly its complement.

    Args:
        x: any shape.
        p: the rate.
        bits: of the layer's input (`bits_of`).
    """
    dropped = dropped_share(p)
    if dropped == 0:
        return x
    if dropped == 2**16:
        return torch.zeros_like(x)
    kept = survivors(bits_of(bits, x), threshold(dropped), x.dtype)
    return x * kept.mul_(2**16 / (2**16 - dropped))


class AdaptedLinear(nn.Module):
    """One linear layer of the frozen base with a place for one update."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.update: LinearUpdate | None = None
        self.product: Tensor | None = None
        """``[..., d_out]``: what the base gives for the whole input of the next forward pass, where
        that has been computed before (`fedlora.models.prefix`)."""

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
