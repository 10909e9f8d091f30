"""Attention over sequences laid end to end, without padding anywhere else in the model.

All tokens of a step form one row ``[1, N]``; every layer of a transformer but attention works on
tokens alone and does not notice. Attention gathers the sequences into a few padded stacks of
similar length, computes them, and puts the tokens back. No token attends to a pad: causality hides
pads in a decoder, a mask in an encoder. A pad repeats its own sequence's last token, so that
nothing of one sequence can reach another, not even a NaN through 0 * NaN.

An example of four sequences of 2, 8, 7 and 2 tokens: rows 0-1, 2-9, 10-16 and 17-18. The long ones
make one stack ``[2, 8]`` with one pad, the short ones another, ``[2, 2]``:

>>> geometry = Geometry.of([2, 8, 7, 2])
>>> geometry.shapes
((2, 8), (2, 2))
>>> geometry.gather[:16].view(2, 8).tolist()
[[2, 3, 4, 5, 6, 7, 8, 9], [10, 11, 12, 13, 14, 15, 16, 16]]
>>> geometry.gather[16:].view(2, 2).tolist()
[[0, 1], [17, 18]]
>>> geometry.pads.tolist()
[15]
>>> geometry.scatter.tolist()  # of rows 0-1, 2-9, 10-16 and 17-18
[16, 17, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 18, 19]
"""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

STACKS = 4
"""The most stacks. Sequences up to a quarter as long as the longest one share a stack, those up to
half as long the next, and so on."""

WIDE = 256
"""Sequences of up to so many tokens attend in float32 on a CPU, whatever the model is in. There the
backward pass of torch's attention takes longer in bfloat16: 8 times at 20 to 40 tokens, 1.3 times
at 256; at 512 it takes 0.6 times as long (torch 2.13, one thread, timed by hand)."""

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
"""Arguments that models give their attention function and that change nothing here."""

_names = itertools.count()


class RaggedUnsupported(ValueError):
    """This model's attention needs something that ragged sequences do not offer."""


@dataclass(frozen=True, eq=False)
class Geometry:
    """Where the sequences of one ``[1, N]`` row lie in stacks of ``M`` places."""

    shapes: tuple[tuple[int, int], ...]
    """``(sequences, width)`` of each stack, the widest first; their products add up to ``M``."""
    gather: Tensor | None
    """``[M]``: the row of every place, one stack after another; None: all sequences have one
    length, so place and row are the same."""
    scatter: Tensor | None
    """``[N]``: the place of every row."""
    pads: Tensor | None
    """``[M - N]``: places that repeat a token; None: there are none."""
    order: Tensor | None
    """``[S]``: the sequences, one stack after another; None: as they lie."""

    @staticmethod
    def of(lengths: Sequence[int]) -> "Geometry":
        """The geometry of sequences of ``lengths`` tokens, at least one each, end to end."""
        length = np.asarray(lengths, np.int64)  # [S]
        start, longest = np.cumsum(length) - length, int(length.max())  # [S]: each one's first row
        if len(set(lengths)) == 1:
            return Geometry(((len(lengths), longest),), None, None, None, None)

        # Which stack each sequence is in, 1..STACKS: its length in quarters of the longest, up.
        stack = -(-STACKS * length // longest)  # [S]

        shapes, gather, pads, order = [], [], [], []
        scatter, at = np.zeros(int(length.sum()), np.int64), 0  # [N], places before this stack
        for s in np.unique(stack)[::-1]:
            # Its sequences: how long they are, their first rows, and the width that holds them.
            chosen = np.flatnonzero(stack == s)  # [s]
            n, first = length[chosen, None], start[chosen, None]  # [s, 1]
            width = int(n.max())

            # The row that each of its places holds; after a sequence's end the last one again.
            steps = np.arange(width)  # [width]
            real = steps < n  # [s, width]
            source = first + np.minimum(steps, n - 1)  # [s, width]
            gather.append(source.reshape(-1))
            shapes.append((len(chosen), width))
            order.append(chosen)

            # And back: the places of its rows, without the repeated ones.
            place = at + np.arange(source.size).reshape(source.shape)  # [s, width]
            scatter[source[real]] = place[real]
            pads.append(place[~real])
            at += source.size
        return Geometry(
            tuple(shapes),
            torch.from_numpy(np.concatenate(gather)),
            torch.from_numpy(scatter),
            indices(np.concatenate(pads)),
            torch.from_numpy(np.concatenate(order)),
        )

    @cached_property
    def real(self) -> list[Tensor | None]:
        """The places ``[sequences, width]`` of each stack that are no pads, bool; None: all.

        >>> Geometry.of([2, 8, 7, 2]).real[0].int().tolist()
        [[1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 0]]
        """
        if self.pads is None:
            return [None] * len(self.shapes)
        sizes = [s * t for s, t in self.shapes]
        real = torch.ones(sum(sizes), dtype=torch.bool, device=self.pads.device)
        parts = real.index_fill_(0, self.pads, False).split(sizes)
        return [p.view(shape) for p, shape in zip(parts, self.shapes, strict=True)]

    def to(self, device: torch.device) -> "Geometry":
        """The same on another device."""
        tensors = (self.gather, self.scatter, self.pads, self.order)
        return Geometry(self.shapes, *(None if t is None else t.to(device) for t in tensors))


def indices(found: NDArray[np.int64]) -> Tensor | None:
    """``[p]`` as a tensor; None if there are none."""
    return torch.from_numpy(found) if len(found) else None


def gather_rows(x: Tensor, index: Tensor, empty: Tensor | None) -> Tensor:
    """The rows ``[M, d]`` of ``x [N, d]`` that ``index [M]`` names; zero in the rows ``empty [p]``.

    >>> x, index = torch.tensor([[1.0], [2.0]]), torch.tensor([0, 1, 1])
    >>> gather_rows(x, index, empty=torch.tensor([2])).tolist()
    [[1.0], [2.0], [0.0]]
    """
    rows = x.index_select(0, index)
    return rows if empty is None else rows.index_fill_(0, empty, 0)


class _Stack(torch.autograd.Function):
    """Rows ``[N, d]`` to places ``[M, d]``. A place that repeats a token passes no gradient: its
    output is not used, and its key and value are hidden from all real tokens."""

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
        return gather_rows(grad, ctx.geometry.gather, ctx.geometry.pads), None


class RaggedAttention:
    """An attention function of transformers for the `Geometry` it currently has.

    One per model, under a name of its own: a geometry must still be there when a backward pass
    computes a forward again, in whichever thread that happens.
    """

    def __init__(self) -> None:
        self.geometry: Geometry | None = None
        self.calls = 0
        """Calls so far: zero after a forward pass means that the model uses its own attention."""
        self.aside: dict[str, Tensor] = {}
        """``key`` and ``value``, ``[1, N, kv heads d]``: of all tokens where there is one query of
        each sequence; empty: the call's own are all (`fedlora.models.last_block`)."""
        self.windowed = False
        """Whether any layer has a sliding window."""
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
        ``[1, N, heads, d]``. With keys and values `aside`, all of ``S`` rows: one query of each
        sequence, which sees all tokens of it.

        Raises:
            RaggedUnsupported: if the model needs more than scaled attention, causal or to all
                tokens of the sequence, within a window.
        """
        # Refuse what stacks could not do.
        self.calls += 1
        self.windowed |= sliding_window is not None
        asked = [k for k, v in kwargs.items() if v is not None and k not in _HARMLESS]
        asked += ["dropout"] * (dropout > 0) + ["a mask"] * (attention_mask is not None)
        if asked:
            raise RaggedUnsupported(f"{type(module).__name__} attends with {', '.join(asked)}")
        assert self.geometry is not None
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal

        if self.aside:
            if causal or sliding_window is not None:
                raise RaggedUnsupported("one query of a sequence sees all its tokens")
            key, value = (_heads(self.aside[x], key.shape[1]) for x in ("key", "value"))
            return self._one_each(query, key, value, scaling), None

        # Stack, attend stack by stack, [sequences, heads, width, d] each.
        heads, groups = query.shape[1], query.shape[1] // key.shape[1]
        stacked = [self._stacks(x) for x in (query, key, value)]
        reals = [None] * len(self.geometry.shapes) if causal else self.geometry.real
        outs = [
            _attend(q, k, v, scaling, _visible(q, real, causal, sliding_window), causal, groups)
            for q, k, v, real in zip(*stacked, reals, strict=True)
        ]

        # Back to rows: heads side by side, [M, heads d], then [N, heads d].
        flat = [o.transpose(1, 2).reshape(-1, heads * o.shape[-1]) for o in outs]
        places = flat[0] if len(flat) == 1 else torch.cat(flat)
        rows = places
        if self.geometry.gather is not None:
            rows = _Unstack.apply(places, self.geometry)  # type: ignore[no-untyped-call]
        return rows.view(1, rows.shape[0], heads, -1), None

    def _one_each(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """One query of each sequence ``[1, heads, S, d]``, all keys and values -> ``[1, S, heads,
        d]``."""
        geometry, heads = self.geometry, query.shape[1]
        assert geometry is not None
        rows = query[0].transpose(0, 1)  # [S, heads, d]
        if geometry.order is not None:
            rows = rows.index_select(0, geometry.order)
        queries = rows[:, :, None].split([s for s, _ in geometry.shapes])  # [s, heads, 1, d] each
        stacks = zip(queries, self._stacks(key), self._stacks(value), geometry.real, strict=True)
        groups = heads // key.shape[1]
        outs = [
            _attend(q, k, v, scaling, _visible(k, real, False, None), False, groups)
            for q, k, v, real in stacks
        ]
        found = torch.cat(outs)[:, :, 0]  # [S, heads, d]
        if geometry.order is not None:
            found = found.index_select(0, geometry.order.argsort())
        return found[None]

    def _stacks(self, x: Tensor) -> list[Tensor]:
        """``[1, heads, N, d]`` as stacks ``[sequences, heads, width, d]``."""
        geometry = self.geometry
        assert geometry is not None
        _, heads, rows, d = x.shape
        places = x.transpose(1, 2).reshape(rows, heads * d)  # [N, heads d], stacked [M, heads d]
        if geometry.gather is not None:
            places = _Stack.apply(places, geometry.gather, geometry.scatter)  # type: ignore[no-untyped-call]
        parts = places.split([s * t for s, t in geometry.shapes])
        return [
            p.view(s, t, heads, d).transpose(1, 2)
            for p, (s, t) in zip(parts, geometry.shapes, strict=True)
        ]


def _heads(x: Tensor, heads: int) -> Tensor:
    """``[1, N, heads d]`` -> ``[1, heads, N, d]``."""
    return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)


def _visible(q: Tensor, real: Tensor | None, causal: bool, window: int | None) -> Tensor | None:
    """Which keys each query of a stack sees.

    Args:
        q: ``[sequences, heads, width, d]``.
        real: ``[sequences, width]``: which places are no pads; None: all, or it is causal.
        causal: whether a token sees nothing after itself; pads come after all tokens.
        window: a token sees keys less than so many places away; None: at any distance.

    Returns:
        Bool, broadcastable to ``[sequences, 1, width, width]``; None: all keys, or of causal
        attention all up to the query.
    """
    width = q.shape[-2]
    if window is None or window >= width:
        return None if causal or real is None else real[:, None, None]
    at = torch.arange(width, device=q.device)
    away = at[:, None] - at  # [width, width], positive: the key is before the query
    if causal:
        return (away >= 0) & (away < window)
    # A pad may be too far from all tokens: it sees itself, for a softmax over nothing is NaN.
    near = away.abs() < window
    return near if real is None else near & (real[:, None, None] | (away == 0))


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scaling: float | None,
    visible: Tensor | None,
    causal: bool,
    groups: int,
) -> Tensor:
    """Attention of one stack, ``[sequences, heads, width, d]``; ``groups`` query heads share a key
    head. ``visible`` is that of `_visible`."""
    if q.device.type == "cpu" and q.element_size() == 2 and k.shape[-2] <= WIDE:
        wide = _attend(q.float(), k.float(), v.float(), scaling, visible, causal, groups)
        return wide.to(q.dtype)
    if visible is None:
        return functional.scaled_dot_product_attention(
            q, k, v, is_causal=causal and q.shape[-2] > 1, scale=scaling, enable_gqa=groups > 1
        )
    if groups > 1:
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scaling)


def is_exchangeable(network: Any) -> bool:
    """Whether transformers can replace a ``PreTrainedModel``'s attention function. Older
    architectures have it built in; replacing it there only gives a warning."""
    return bool(network._can_set_attn_implementation())


@contextmanager
def ragged(network: Any, attention: RaggedAttention) -> Iterator[None]:
    """While the context is open, a ``PreTrainedModel`` attends through ``attention``."""
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
