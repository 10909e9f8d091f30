r"""Gaussian noise of a round, a function of (seed, "privacy", round).

``gaussian``: rounds are independent. ``banded``: with ``Z_t`` independent and a Toeplitz matrix
``C`` of ``b`` bands and columns of norm one, round ``t`` is given ``(C⁻¹ Z)_t``:

    y_t = (Z_t - Σ_{k=1}^{b-1} c_k y_{t-k}) / c_0        c_k ∝ c_{k-1} (1 - 1/(2k)),  c_0 ∝ 1

``c`` begins as the square root of the matrix of prefix sums (Denisov et al., arXiv:2202.08312;
cut to bands as in McKenna, arXiv:2405.15913), whose noise cancels in sums of successive rounds. One
band is ``gaussian``, bit for bit. Columns at the end of a run are cut and shorter than one, so that
``C`` does not depend on the number of rounds.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedlora.algebra.summand import Summands, dense
from fedlora.core.errors import RunError
from fedlora.core.seeding import torch_generator

PURPOSE = "privacy"
Shapes = tuple[tuple[str, tuple[int, ...]], ...]


def shapes_of(summands: Summands) -> Shapes:
    """Names and shapes in the order in which noise is drawn."""
    return tuple((name, tuple(summands[name].shape)) for name in sorted(summands))


def scalars(shapes: Shapes) -> int:
    """How many numbers are noised."""
    return sum(math.prod(shape) for _, shape in shapes)


def coefficients(bands: int) -> list[float]:
    """``c_0 .. c_{b-1}``, of Euclidean norm one."""
    c = [1.0]
    for k in range(1, bands):
        c.append(c[-1] * (1 - 1 / (2 * k)))
    length = math.hypot(*c)
    return [x / length for x in c]


def standard(seed: int, round: int, shapes: Shapes) -> Iterator[tuple[str, Tensor]]:
    """``Z_t``, name by name: independent standard normal numbers, float64."""
    generator = torch_generator(seed, PURPOSE, round)
    for name, shape in shapes:
        yield name, torch.randn(shape, generator=generator, dtype=torch.float64)


@dataclass
class Noise:
    """The noise of successive rounds. It keeps the last ``b - 1`` of them, drawn anew after a
    resume."""

    seed: int
    bands: int = 1

    _last: dict[int, dict[str, Tensor]] = field(default_factory=dict, init=False)
    _shapes: Shapes | None = field(default=None, init=False)

    def of(self, round: int, shapes: Shapes) -> Iterator[tuple[str, Tensor]]:
        """``y_t``, name by name; its entries have variance one for one band.

        Args:
            round: counted from 1.
            shapes: of the round's summands.

        Raises:
            RunError: with several bands, if the summands are not those of earlier rounds.
        """
        if self.bands == 1:
            yield from standard(self.seed, round, shapes)
            return
        if self._shapes not in (None, shapes):
            raise RunError(
                "privacy.noise=banded: the clients' changes have other names or shapes than in "
                "earlier rounds, so their noise cannot cancel; use privacy.noise=gaussian"
            )
        self._shapes = shapes
        for t in range(max([r for r in self._last if r < round], default=0) + 1, round + 1):
            if t not in self._last:
                self._last[t] = self._step(t, shapes)
            for old in [r for r in self._last if r <= t - self.bands]:
                del self._last[old]
        yield from self._last[round].items()

    def _step(self, t: int, shapes: Shapes) -> dict[str, Tensor]:
        """``y_t`` from the rounds before it."""
        c, found = coefficients(self.bands), dict[str, Tensor]()
        for name, z in standard(self.seed, t, shapes):
            for k in range(1, min(self.bands, t)):
                z -= c[k] * self._last[t - k][name]
            found[name] = z / c[0]
        return found


def noised(
    total: Summands, noise: Mapping[str, Tensor] | Iterator[tuple[str, Tensor]], std: float
) -> dict[str, Tensor]:
    """``total + std · noise``, dense, in the total's own precision.

    Args:
        total: the sum of a round.
        noise: by name, of the shapes of ``total``.
        std: standard deviation of an entry.
    """
    pairs = noise.items() if isinstance(noise, Mapping) else noise
    found = {}
    for name, y in pairs:
        t = dense(total[name])
        found[name] = (t.double() + std * y).to(t.dtype)
    return {name: found[name] for name in total}
