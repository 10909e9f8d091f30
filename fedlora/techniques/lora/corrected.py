"""Factors that come with a correction of their client's gradient."""

from collections.abc import Iterator, Mapping
from typing import Any, Self

from torch import Tensor

from fedlora.core.payload import Payload
from fedlora.core.types import Adapter
from fedlora.techniques.lora.payload import LowRankPayload, factor_tensors, factors_from

_END = "/linear"  # of the module paths under which a correction travels


class CorrectedPayload(LowRankPayload):
    """Factors, and the gradient of a linear term of the objective by which they are trained.

    What a client sends back is the factors alone.

    Args:
        factors: of every module that is updated.
        correction: of the same modules and shapes: what is added to the gradient of each factor.

    Raises:
        ValueError: if a correction has no factors, or others' shapes.
    """

    noun = "factors with a correction"

    def __init__(self, factors: Adapter, correction: Adapter) -> None:
        super().__init__(factors)
        if correction.keys() != self.keys():
            raise ValueError("factors and their correction are of different modules")
        for path, f in self.items():
            g = correction[path]
            if (g.a.shape, g.b.shape) != (f.a.shape, f.b.shape):
                raise ValueError(
                    f"{path}: a correction {tuple(g.a.shape)}, {tuple(g.b.shape)} of factors "
                    f"{tuple(f.a.shape)}, {tuple(f.b.shape)}"
                )
        self._correction = dict(correction)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Those of the factors, then ``<path>/linear/a`` and ``/b`` of every module."""
        yield from super().tensors()
        yield from factor_tensors({f"{path}{_END}": g for path, g in self._correction.items()})

    @classmethod
    def from_header(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """The inverse of `header` and `tensors`."""
        alphas = header["alpha"]
        found = factors_from({f"{path}{_END}": alpha for path, alpha in alphas.items()}, tensors)
        return cls(factors_from(alphas, tensors), {path: found[f"{path}{_END}"] for path in alphas})

    def linear(self) -> Adapter:
        """The correction."""
        return self._correction

    def answer(self) -> type[Payload]:
        """Factors."""
        return LowRankPayload
