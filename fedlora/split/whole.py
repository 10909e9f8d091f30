"""What training costs a client that holds the whole model, by its ranks.

The formulas are those of `fedlora.split.cost` for a client with all blocks. Blocks before the first
one with an adapter need no backward pass, and the output embedding counts ``2 V d`` operations in
each direction. Norms, softmax, rotations and activation functions count nothing. Whatever a client
trains counts as factors of its ranks.
"""

from typing import Any

from fedlora.core.types import Ranks
from fedlora.devices.time import Work
from fedlora.split.cost import FLOAT_BYTES, ClientPart, client_part
from fedlora.split.protocol import Cut


class WholeModel:
    """The cost of one base model.

    Args:
        network: a ``PreTrainedModel`` on any device, ``meta`` too.
        blocks: how many it has.
        head: whether a token's logits are computed; a classifier has none.
        dropout: whether adapters have dropout.
        base_bytes: bytes of a frozen scalar.

    Raises:
        ValueError: if no formula covers its blocks.
    """

    def __init__(
        self, network: Any, blocks: int, *, head: bool = True, dropout: bool, base_bytes: int = 4
    ) -> None:
        self._network, self._dropout, self._base = network, dropout, base_bytes
        self._cut = Cut(blocks, 0 if head else -1)
        self._parts: dict[Ranks, ClientPart] = {}
        client_part(network, {}, self._cut).flops(1)

    def work(self, ranks: Ranks) -> Work:
        """Operations of a token, forward and backward."""
        one, two = (self._operations(ranks, t) for t in (1, 2))
        return Work(2 * one - two, two - one)

    def memory(self, ranks: Ranks, tokens: int) -> float:
        """Bytes during a step of so many tokens, all of which have a loss."""
        part, first = self._part(ranks)
        saved = sum(
            b.saved(first=i == first, dropout=self._dropout)
            for i, b in enumerate(part.blocks)
            if i >= first
        )
        held = part.memory(0, dropout=self._dropout)
        logits = part.hidden + part.vocabulary if self._cut.u_shaped else 0
        base = held.base // FLOAT_BYTES * self._base
        return float(base + held.adapter + tokens * (saved + logits) * FLOAT_BYTES)

    def adapter(self, ranks: Ranks) -> int:
        """Scalars of the adapters."""
        return self._part(ranks)[0].adapter

    def _operations(self, ranks: Ranks, length: int) -> float:
        part, first = self._part(ranks)
        total = 4.0 * part.hidden * part.vocabulary if self._cut.u_shaped else 0.0
        for i, block in enumerate(part.blocks):
            work = block.flops(length, first=i == first)
            total += work.forward + (work.backward if i >= first else 0.0)
        return total

    def _part(self, ranks: Ranks) -> tuple[ClientPart, int]:
        """The client's part, and the index of the first block with an adapter."""
        if ranks not in self._parts:
            self._parts[ranks] = client_part(self._network, ranks, self._cut)
        part = self._parts[ranks]
        return part, next((i for i, b in enumerate(part.blocks) if b.adapter), len(part.blocks))
