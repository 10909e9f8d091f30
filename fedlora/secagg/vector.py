"""Summands as one vector of numbers, and back."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedlora.secagg.fixed import Reals


@dataclass(frozen=True)
class Layout:
    """Names and shapes of the tensors of a vector, the same for all clients of a round."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @staticmethod
    def of(tensors: Mapping[str, Tensor]) -> "Layout":
        """That of these tensors, in the order of their names."""
        names = sorted(tensors)
        return Layout(tuple(names), tuple(tuple(tensors[n].shape) for n in names))

    @property
    def sizes(self) -> list[int]:
        """Numbers of each tensor."""
        return [math.prod(shape) for shape in self.shapes]

    @property
    def size(self) -> int:
        """``D``: numbers of all of them."""
        return sum(self.sizes)

    def flat(self, tensors: Mapping[str, Tensor]) -> Reals:
        """``[D]``, float64.

        Raises:
            ValueError: if names or shapes are others.
        """
        if set(tensors) != set(self.names):
            odd = sorted(set(tensors) ^ set(self.names))[0]
            raise ValueError(f"{odd} is not in all summands: they must have the same names")
        for name, shape in zip(self.names, self.shapes, strict=True):
            if tuple(tensors[name].shape) != shape:
                found = tuple(tensors[name].shape)
                raise ValueError(f"{name}: a summand has shape {found}, {shape} is due")
        parts = [tensors[n].detach().cpu().double().reshape(-1).numpy() for n in self.names]
        return np.concatenate(parts) if parts else np.zeros(0)

    def tensors(self, flat: Reals) -> dict[str, Tensor]:
        """The inverse of `flat`; the tensors are float64."""
        parts = torch.from_numpy(flat).split(self.sizes)
        named = zip(self.names, self.shapes, parts, strict=True)
        return {name: part.reshape(shape) for name, shape, part in named}
