"""The frozen blocks next to the input, and forward passes that begin behind them.

With adapters only from block ``k`` on, what enters block ``k`` is a function of the base and the
example alone: neither training nor another client changes it, and the base has no dropout. Computed
once, these hidden states stand for blocks ``0..k-1`` in every later forward pass.

Layers that read what enters block ``k`` begin with a product of it and a frozen weight, which never
changes either. It may stand beside the states, and is put in where such a layer runs.

The network does the rest itself: token ids are still embedded (a look-up), so that positions, masks
and rotary angles are those of the whole model; blocks below ``k`` hand on what they are given; and
the states are put in where block ``k`` begins.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fedlora.core.errors import ModelError
from fedlora.models.blocks import entering, find_blocks, forward_replaced, with_entering
from fedlora.models.layers import AdaptedLinear, dense_weight


class _Reached(Exception):
    """Hidden states that have come to block ``k``."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states


class Prefix:
    """The first blocks of a network.

    Args:
        network: a ``PreTrainedModel``; unchanged outside of the methods' calls.
        blocks: ``k``, how many; at least one, fewer than it has.
        readers: adapted layers whose input is what enters block ``k``, and whose frozen products
            are to stand beside it.

    Raises:
        ModelError: if the network's blocks cannot be found, or are not run one after another.
    """

    def __init__(self, network: Any, blocks: int, readers: Sequence[AdaptedLinear] = ()) -> None:
        found = find_blocks(network)[1]
        if not 0 < blocks < len(found):
            raise ModelError(f"a prefix of {blocks} blocks is not in 1..{len(found) - 1}")
        self.blocks, self.readers = blocks, tuple(readers)
        self._network = network
        self._below: Sequence[nn.Module] = list(found[:blocks])
        self._first: nn.Module = found[blocks]
        self._outputs = self._count_outputs()

    def capture(self, forward: Callable[[], object]) -> Tensor:
        """What enters block ``k`` in a forward pass, ``[b, t, d]``, and the products of the
        readers beside it, ``[b, t, d + Σ d_out]``; blocks behind it do not run.

        Args:
            forward: calls the network once.

        Raises:
            ModelError: if it does not reach the block.
        """

        def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            raise _Reached(entering(args, kwargs))

        handle = self._first.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            with torch.no_grad():
                forward()
        except _Reached as reached:
            with torch.no_grad():
                products = [reader.base(reached.states) for reader in self.readers]
            return torch.cat([reached.states, *products], -1) if products else reached.states
        finally:
            handle.remove()
        raise ModelError(f"{type(self._network).__name__} does not run its block {self.blocks}")

    @contextmanager
    def replaced(self, states: Tensor) -> Iterator[None]:
        """Let forward passes begin at block ``k``.

        Args:
            states: as of `capture`, at every place of the network's input; padded places may hold
                anything finite.
        """
        widths = [dense_weight(reader.base).shape[0] for reader in self.readers]
        given = states.to(self._network.device, self._network.dtype)
        states, *products = given.split([given.shape[-1] - sum(widths), *widths], -1)
        states = states.contiguous()

        def enter(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return with_entering(args, kwargs, states)

        with ExitStack() as stack:
            hook = self._first.register_forward_pre_hook(enter, with_kwargs=True)
            stack.callback(hook.remove)
            for block in self._below:
                stack.enter_context(forward_replaced(block, self._hand_on))
            for reader, product in zip(self.readers, products, strict=True):
                stack.callback(setattr, reader, "product", None)
                reader.product = product
            yield

    def _hand_on(self, *args: Any, **kwargs: Any) -> Any:
        """The forward pass of a block that does nothing, in the form that its network expects."""
        states = entering(args, kwargs)
        return states if not self._outputs else (states, *[None] * (self._outputs - 1))

    def _count_outputs(self) -> int:
        """How long a tuple a block returns; 0: it returns the hidden states alone."""
        lengths: list[int] = []

        def look(_: nn.Module, __: object, output: object) -> None:
            lengths.append(len(output) if isinstance(output, tuple) else 0)

        handle = self._below[0].register_forward_hook(look)
        ids = torch.zeros(1, 1, dtype=torch.int64, device=self._network.device)
        try:
            self.capture(lambda: self._network(input_ids=ids, use_cache=False))
        finally:
            handle.remove()
        return lengths[0]
