"""Attention over sequences laid end to end, without padding anywhere else in the model.

All tokens of a step form one row ``[1, N]``; every layer of a transformer but attention works on
tokens alone and does not notice. Attention gathers the sequences into a few padded stacks of
similar length, computes them causally, and puts the tokens back. A pad repeats its own sequence's
last token, so that nothing of one sequence can reach another, not even a NaN through 0 * NaN.
"""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

STACKS = 4
"""Sequences are stacked with those whose length is within a quarter of the longest."""

_HARMLESS = frozenset(
    [
        "cache_position",
        "deterministic",
        "head_mask",
        "labels",
        "layer_idx",
        "logits_to_keep",
        "num_items_in_batch",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "past_key_value",
        "past_key_values",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "use_cache",
    ]
)
"""What models hand their attention function and what changes nothing here."""

_names = itertools.count()


class RaggedUnsupported(ValueError):
    """This model's attention asks for something that ragged sequences do not get here."""


@dataclass(frozen=True, eq=False)
class Geometry:
    """Where the sequences of one ``[1, N]`` row lie."""

    shapes: tuple[tuple[int, int], ...]
    """``(sequences, width)`` of each stack."""
    gather: Tensor | None
    """``[M]``: row of every place of the stacks, one stack after another; None: rows are stacked as
    they are."""
    scatter: Tensor | None
    """``[N]``: place of every row."""
    pads: Tensor | None
    """``[p]``: places that hold a repeated token."""

    @staticmethod
    def of(lengths: Sequence[int]) -> "Geometry":
        """Of sequences of so many tokens, at least one each, one after another."""
        length = np.asarray(lengths, np.int64)
        start, longest = np.cumsum(length) - length, int(length.max())
        if len(set(lengths)) == 1:
            return Geometry(((len(lengths), longest),), None, None, None)
        stack = -(-STACKS * length // longest)
        shapes, gather, pads = [], [], []
        scatter, at = np.zeros(int(length.sum()), np.int64), 0
        for s in np.unique(stack)[::-1]:
            chosen = np.flatnonzero(stack == s)
            n, first = length[chosen], start[chosen]
            width = int(n.max())
            steps = np.arange(width)
            real = steps < n[:, None]
            source = first[:, None] + np.minimum(steps, n[:, None] - 1)
            place = at + np.arange(source.size).reshape(source.shape)
            scatter[source[real]] = place[real]
            gather.append(source.reshape(-1))
            pads.append(place[~real])
            shapes.append((len(chosen), width))
            at += source.size
        return Geometry(
            tuple(shapes),
            torch.from_numpy(np.concatenate(gather)),
            torch.from_numpy(scatter),
            indices(np.concatenate(pads)),
        )

    def to(self, device: torch.device) -> "Geometry":
        """The same on another device."""
        tensors = (self.gather, self.scatter, self.pads)
        return Geometry(self.shapes, *(None if t is None else t.to(device) for t in tensors))


def indices(found: NDArray[np.int64]) -> Tensor | None:
    """As a tensor; None without any."""
    return torch.from_numpy(found) if len(found) else None


def gathered(x: Tensor, index: Tensor, empty: Tensor | None) -> Tensor:
    """The rows ``[M, d]`` of ``x`` that ``index [M]`` names, but zero in the rows of ``empty``."""
    rows = x.index_select(0, index)
    return rows if empty is None else rows.index_fill_(0, empty, 0)


class _Stack(torch.autograd.Function):
    """Rows ``[N, d]`` to places ``[M, d]``. A place that repeats a token passes no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gather: Tensor, scatter: Tensor) -> Tensor:
        ctx.scatter = scatter
        return x.index_select(0, gather)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, ctx.scatter), None, None


class _Unstack(torch.autograd.Function):
    """Places ``[M, d]`` back to rows ``[N, d]``."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, geometry: Geometry) -> Tensor:
        assert geometry.scatter is not None
        ctx.geometry = geometry
        return y.index_select(0, geometry.scatter)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return gathered(grad, ctx.geometry.gather, ctx.geometry.pads), None


class RaggedAttention:
    """An attention function of transformers for the `Geometry` it currently has.

    One per model, under a name of its own: a geometry must still be there when a backward pass
    computes a forward again, in whichever thread that happens.
    """

    def __init__(self) -> None:
        self.geometry: Geometry | None = None
        self.calls = 0
        """How often a model has asked: zero after a forward means that it has its own attention."""
        self.windowed = False
        """Whether any layer has asked for a window."""
        self.name = f"fedlora_ragged_{next(_names)}"

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        is_causal: bool | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """``query [1, heads, N, d]``, ``key`` and ``value [1, kv heads, N, d]`` ->
        ``[1, N, heads, d]``.

        Raises:
            RaggedUnsupported: if the model asks for more than scaled causal attention within a
                window.
        """
        self.calls += 1
        self.windowed |= sliding_window is not None
        asked = [k for k, v in kwargs.items() if v is not None and k not in _HARMLESS]
        asked += ["dropout"] * (dropout > 0) + ["a mask"] * (attention_mask is not None)
        asked += ["no causality"] * (is_causal is False)
        if asked:
            raise RaggedUnsupported(f"{type(module).__name__} attends with {', '.join(asked)}")
        assert self.geometry is not None
        heads, groups = query.shape[1], query.shape[1] // key.shape[1]
        stacked = [self._stacks(x) for x in (query, key, value)]
        outs = [
            _attend(q, k, v, scaling, sliding_window, groups)
            for q, k, v in zip(*stacked, strict=True)
        ]
        flat = [o.transpose(1, 2).reshape(-1, heads * o.shape[-1]) for o in outs]
        places = flat[0] if len(flat) == 1 else torch.cat(flat)
        rows = places
        if self.geometry.gather is not None:
            rows = _Unstack.apply(places, self.geometry)  # type: ignore[no-untyped-call]
        return rows.view(1, rows.shape[0], heads, -1), None

    def _stacks(self, x: Tensor) -> list[Tensor]:
        """``[1, heads, N, d]`` as stacks ``[sequences, heads, width, d]``."""
        geometry = self.geometry
        assert geometry is not None
        _, heads, rows, d = x.shape
        places = x.transpose(1, 2).reshape(rows, heads * d)
        if geometry.gather is not None:
            places = _Stack.apply(places, geometry.gather, geometry.scatter)  # type: ignore[no-untyped-call]
        parts = places.split([s * t for s, t in geometry.shapes])
        return [
            p.view(s, t, heads, d).transpose(1, 2)
            for p, (s, t) in zip(parts, geometry.shapes, strict=True)
        ]


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scaling: float | None, window: int | None, groups: int
) -> Tensor:
    """Causal attention of one stack, ``[sequences, heads, width, d]``."""
    width = q.shape[-2]
    if window is None or window >= width:
        return functional.scaled_dot_product_attention(
            q, k, v, is_causal=width > 1, scale=scaling, enable_gqa=groups > 1
        )
    at = torch.arange(width, device=q.device)
    near = (at[:, None] >= at) & (at[:, None] - at < window)
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=near, scale=scaling)


def is_exchangeable(network: Any) -> bool:
    """Whether transformers can exchange a ``PreTrainedModel``'s attention function. Older
    architectures have their attention built in, and asking them for another is a warning."""
    return bool(network._can_set_attn_implementation())


@contextmanager
def ragged(network: Any, attention: RaggedAttention) -> Iterator[None]:
    """Let a ``PreTrainedModel`` attend through ``attention`` for a while."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before = network.config._attn_implementation
    ALL_ATTENTION_FUNCTIONS[attention.name] = attention
    try:
        network.set_attn_implementation(attention.name)
        yield
    finally:
        network.set_attn_implementation(before)
        del ALL_ATTENTION_FUNCTIONS[attention.name]
        attention.geometry = None
