"""What all clients of a round and its server know of a secure sum: how a change becomes codes."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from fedlora.algebra.summand import Summand, Summands
from fedlora.secagg.config import SecAgg
from fedlora.secagg.fixed import Codes, FixedPoint, Reals, uniform
from fedlora.secagg.limit import MARGIN, Limit
from fedlora.secagg.sketch import Sketch, sketch_of
from fedlora.secagg.vector import Layout


@dataclass(frozen=True)
class Form:
    """Numbers and sketches of a round."""

    fixed: FixedPoint
    sketch: Sketch
    bounded: bool = False
    """Whether a client shortens its numbers to a norm of at most the range."""
    counts: bool = False
    """Whether one more number, at either end of the range, says if they were not shortened."""

    @staticmethod
    def of(
        config: SecAgg,
        template: Summands,
        ranks: Mapping[str, int],
        seed: int,
        round: int,
        limit: Limit | None = None,
    ) -> "Form":
        """That of a round; the other arguments are those of `fedlora.secagg.sketch.sketch_of`.

        Args:
            limit: of privacy, whose clip gives the range; None: there is none.

        Raises:
            ValueError: if the numbers are too coarse for the limit.
        """
        sketch = sketch_of(config, template, ranks, seed, round)
        fixed = FixedPoint(config.bits, config.levels, config.range)
        if limit is None or math.isinf(limit.clip):
            return Form(fixed, sketch)
        numbers = Layout.of(sketch.tensors(template)).size
        fixed = replace(fixed, range=limit.radius(config.levels, numbers))
        return Form(fixed, sketch, True, limit.counts)

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    @staticmethod
    def from_json(raw: Mapping[str, Any]) -> "Form":
        """The inverse of `to_json`."""
        parts = {"fixed": FixedPoint(**raw["fixed"]), "sketch": Sketch(**raw["sketch"])}
        return Form(**{**raw, **parts})

    def codes(
        self,
        summands: Summands,
        weight: float,
        client: int,
        exchange: int,
        bases: Mapping[str, Tensor],
    ) -> tuple[Codes, int]:
        """A client's codes ``[D]``, and how many of its numbers were cut.

        Args:
            summands: its change.
            weight: of the client, at most 1.
            client: its id.
            exchange: of the round, counted from 0.
            bases: of the second exchange.

        Raises:
            FloatingPointError: if a number is not finite.
        """
        tensors = self.sketch.tensors(summands, exchange, bases)
        x = self._bounded(weight * Layout.of(tensors).flat(tensors))
        who = (self.sketch.seed, self.sketch.round, client, exchange)
        return self.fixed.encode(x, uniform(*who, x.size))

    def _bounded(self, x: Reals) -> Reals:
        """The numbers at a norm of at most the range, with the one that counts, if the form asks
        for them."""
        if not self.bounded:
            return x
        length, most = math.sqrt(float(np.square(x).sum())), self.fixed.range
        short = length <= most
        x = x if short else x * (MARGIN * most / length)
        return np.append(x, most if short else -most) if self.counts else x

    def size(self, template: Summands, exchange: int, bases: Mapping[str, Tensor]) -> int:
        """Numbers of a client's vector in an exchange."""
        return self.layout(template, exchange, bases).size + self.counts

    def layout(self, template: Summands, exchange: int, bases: Mapping[str, Tensor]) -> Layout:
        """Names and shapes of an exchange's vector, without the number that counts."""
        return Layout.of(self.sketch.tensors(template, exchange, bases))

    def decoded(self, total: Codes, layout: Layout, clients: int) -> dict[str, Tensor]:
        """The sums of an exchange, float64.

        Args:
            total: of the codes of all clients in the sum.
            layout: of the exchange.
            clients: in the sum.
        """
        return layout.tensors(self.fixed.decode(total, clients)[: layout.size])

    def short(self, total: Codes, clients: int) -> float | None:
        """``Σ_k (b_k - 1/2)``, where ``b_k`` is 1 if client ``k`` did not shorten its numbers and 0
        if it did; None: nothing was counted. The arguments are those of `decoded`."""
        if not self.counts:
            return None
        top = (1 << self.fixed.levels) - 1
        return float(total[-1]) / top - clients / 2

    def summed(self, sums: Mapping[str, Tensor], template: Summands) -> dict[str, Summand]:
        """``Σ_k w_k x_k`` from the sums of all exchanges."""
        return self.sketch.summed(sums, template)
