"""The last block of an encoder, computed for the rows alone that a classifier's head reads.

Where the head reads one token of each sequence, the last block needs keys and values of all tokens,
but queries, what attention gives and the feed-forward layers of these tokens only. So the block is
given their rows ``[1, S, d]``, and its projections to keys and values are given all ``[1, N, d]``.
What these give goes to attention past the block, whose own code expects ``S`` rows of it.

No architecture is named. The two projections are found by trial: their input is the block's own,
and attention is called with what they give. That is so where a block norms its sums (BERT, RoBERTa,
DistilBERT), not where it norms what it reads, nor where one layer makes queries, keys and values.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fedlora.models.blocks import entering, find_blocks, forward_replaced, with_entering
from fedlora.models.language_model import LanguageModel
from fedlora.models.layers import AdaptedLinear
from fedlora.models.ragged import Geometry, RaggedAttention, ragged


class LastBlock:
    """The last block of a network whose sequences lie end to end.

    Args:
        block: the module.
        projections: its module that makes keys of the block's input, and that which makes values.
        pooled: paths of the adapted layers that are given the pooled rows alone.
    """

    def __init__(
        self, block: nn.Module, projections: Sequence[nn.Module], pooled: frozenset[str]
    ) -> None:
        self.pooled = pooled
        self.rows: Tensor | None = None
        """``[S]``: the rows that the head reads, to be set before a forward pass; they must still
        be there when a backward pass computes it again."""
        self.is_narrowed = False
        self._block, self._projections = block, projections

    @property
    def readers(self) -> tuple[AdaptedLinear, ...]:
        """The projections that carry an adapter: they are given all tokens."""
        return tuple(m for m in self._projections if isinstance(m, AdaptedLinear))

    @contextmanager
    def narrowed(self, attention: RaggedAttention) -> Iterator[None]:
        """While the context is open, the block returns ``[1, S, d]`` of the `rows`.

        Args:
            attention: that the network attends through.
        """
        forward = partial(self._forward, self._block.forward, attention)
        self.is_narrowed = True
        try:
            with forward_replaced(self._block, forward):
                yield
        finally:
            self.is_narrowed, self.rows = False, None

    def _forward(
        self, forward: Callable[..., Any], attention: RaggedAttention, *args: Any, **kwargs: Any
    ) -> Any:
        assert self.rows is not None
        states, count = entering(args, kwargs), len(self.rows)  # [1, N, d]
        args, kwargs = with_entering(args, kwargs, states.index_select(1, self.rows))

        def put_aside(name: str, _: nn.Module, __: object, output: Tensor) -> Tensor:
            attention.aside[name] = output
            return output[:, :count]

        with ExitStack() as stack:
            stack.callback(attention.aside.clear)
            for name, module in zip(("key", "value"), self._projections, strict=True):
                stack.callback(module.register_forward_pre_hook(lambda *_: (states,)).remove)
                stack.callback(module.register_forward_hook(partial(put_aside, name)).remove)
            return forward(*args, **kwargs)


class _Watched(RaggedAttention):
    """Keeps the tensors that the last block attends with."""

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        self.seen = (query, key, value)
        return super().__call__(module, query, key, value, *args, **kwargs)


def find_last_block(
    model: LanguageModel, lengths: Sequence[int], rows: Tensor, encode: Callable[[], Tensor]
) -> LastBlock | None:
    """The last block if it can be narrowed, by trial.

    Args:
        model: with nothing mounted.
        lengths: of the sequences that are tried, in tokens; more than one in some.
        rows: ``[S]``, those that the head reads.
        encode: runs the base model on the sequences end to end: its last hidden states, ``[1, N,
            d]``.

    Returns:
        None if the block is of another kind, or gives something else when narrowed.
    """
    attention = _Watched()
    try:
        with torch.no_grad(), ragged(model.network, attention):
            attention.geometry = Geometry.of(lengths).to(model.device)
            return _try(model, attention, rows, encode)
    except Exception:  # of the architecture's own code, which expects a row of every token
        return None


def _try(
    model: LanguageModel, attention: _Watched, rows: Tensor, encode: Callable[[], Tensor]
) -> LastBlock | None:
    block = find_blocks(model.network)[1][-1]
    projections, states = _projections(block, attention, encode)
    if not projections:
        return None

    # Narrowed: the same states, and each adapted layer is given all tokens or pooled rows, once.
    given: list[tuple[str, int]] = []
    last = LastBlock(block, projections, frozenset())
    with ExitStack() as stack:
        for path, layer in model.layers.items():
            see = partial(lambda path, _, args, __: given.append((path, args[0].shape[1])), path)
            stack.callback(layer.register_forward_hook(see).remove)
        stack.enter_context(last.narrowed(attention))
        last.rows = rows
        found, wanted = encode(), states[:, rows]
    counts = dict(given)
    if len(counts) < len(given) or not set(counts.values()) <= {states.shape[1], len(rows)}:
        return None
    rounding = 2**-4 if wanted.dtype in (torch.bfloat16, torch.float16) else 1e-4
    most = max(1.0, float(wanted.abs().max()))
    if found.shape != wanted.shape or not float((found - wanted).abs().max()) <= rounding * most:
        return None
    return LastBlock(block, projections, frozenset(p for p, n in given if n == len(rows)))


def _projections(
    block: nn.Module, attention: _Watched, encode: Callable[[], Tensor]
) -> tuple[list[nn.Module], Tensor]:
    """The two modules of a block that make keys and values of its input, none if there are no such,
    and the last hidden states ``[1, N, d]``."""
    entered: list[Tensor] = []
    given: dict[int, tuple[nn.Module, Tensor]] = {}  # by the memory of what they give

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entered.append(entering(args, kwargs))

    def look(module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        if isinstance(output, Tensor) and args and args[0] is entered[-1]:
            given[_memory(output)] = module, output  # of a module and one within it, the outer

    with ExitStack() as stack:
        stack.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
        for module in block.modules():
            stack.callback(module.register_forward_hook(look).remove)
        states = encode()
    query, key, value = map(_memory, attention.seen)
    if query in (key, value) or key == value or not {key, value} <= given.keys():
        return [], states
    return [given[key][0], given[value][0]], states


def _memory(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()
