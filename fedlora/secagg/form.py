"""What all clients of a round and its server know of a secure sum: how a change becomes codes."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from fedlora.algebra.summand import Summand, Summands
from fedlora.secagg.config import SecAgg
from fedlora.secagg.fixed import Codes, FixedPoint, uniform
from fedlora.secagg.sketch import Sketch, sketch_of
from fedlora.secagg.vector import Layout


@dataclass(frozen=True)
class Form:
    """Numbers and sketches of a round."""

    fixed: FixedPoint
    sketch: Sketch

    @staticmethod
    def of(
        config: SecAgg, template: Summands, ranks: Mapping[str, int], seed: int, round: int
    ) -> "Form":
        """That of a round; the arguments are those of `fedlora.secagg.sketch.sketch_of`."""
        fixed = FixedPoint(config.bits, config.levels, config.range)
        return Form(fixed, sketch_of(config, template, ranks, seed, round))

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {"fixed": asdict(self.fixed), "sketch": asdict(self.sketch)}

    @staticmethod
    def from_json(raw: Mapping[str, Any]) -> "Form":
        """The inverse of `to_json`."""
        return Form(FixedPoint(**raw["fixed"]), Sketch(**raw["sketch"]))

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
        x = weight * Layout.of(tensors).flat(tensors)
        who = (self.sketch.seed, self.sketch.round, client, exchange)
        return self.fixed.encode(x, uniform(*who, x.size))

    def layout(self, template: Summands, exchange: int, bases: Mapping[str, Tensor]) -> Layout:
        """Names and shapes of an exchange's vector."""
        return Layout.of(self.sketch.tensors(template, exchange, bases))

    def decoded(self, total: Codes, layout: Layout, clients: int) -> dict[str, Tensor]:
        """The sums of an exchange, float64.

        Args:
            total: of the codes of all clients in the sum.
            layout: of the exchange.
            clients: in the sum.
        """
        return layout.tensors(self.fixed.decode(total, clients))

    def summed(self, sums: Mapping[str, Tensor], template: Summands) -> dict[str, Summand]:
        """``Σ_k w_k x_k`` from the sums of all exchanges."""
        return self.sketch.summed(sums, template)
