"""Clipping and Gaussian noise of a client's activations at the cut, and their privacy guarantee.

    h ← h min(1, C / ||h||₂)  for each row (token)        sent = h + N(0, (σ C)² I)

Clipping is part of the client's graph: gradients pass through it. The noise is a constant.

Two values of one clipped row differ by at most ``2 C``, so one release of one row is a Gaussian
mechanism of noise multiplier ``σ / 2``; a row that is released ``n`` times is ``n`` of them. An
example of ``T`` tokens is ``n T``: at a cut above the embeddings a row depends on all tokens before
it, so a single row's guarantee is not one for a token of the text. No subsampling amplifies this:
the server sees which client sends, and each example is released in the clear as often as it is
trained on. An ε is stated only where the library ``dp-accounting`` has computed it.
"""

from dataclasses import dataclass
from importlib.metadata import version

import torch
from torch import Tensor

from fedlora.core.checks import at_least
from fedlora.privacy.account import LIBRARY, gaussian_epsilon, library

NOT_COVERED = (
    "Not covered: labels that are sent, sequence lengths, gradients, adapters, and what a trained "
    "client stage carries from one example into the releases of others; arithmetic in floating "
    "point; and observers who know the seed of the noise, as the server of a simulation does."
)


@dataclass(frozen=True)
class Privacy:
    """The guarantee of the noise for the releases that were made, and its wording."""

    clip: float
    sigma: float
    releases: int
    """How often each example crossed the cut."""
    rows: int
    """Tokens of an example."""
    delta: float
    row_epsilon: float | None
    """ε of one row (a token's activations) in all its releases, at ``delta``; ``None``: no
    claim."""
    example_epsilon: float | None
    """ε of all rows of an example in all their releases, at ``delta``; ``None``: no claim."""
    accountant: str
    """The library that computed ε, with its version; empty: none."""

    @property
    def text(self) -> str:
        """A few sentences for a report. They claim only what was computed."""
        if self.sigma == 0:
            return f"No noise on activations (clip {self.clip:g}): no privacy guarantee."
        what = (
            f"Gaussian noise on activations: sigma={self.sigma:g}, rows clipped to {self.clip:g}, "
            f"standard deviation {self.sigma * self.clip:g} per number. "
        )
        if not self.releases:
            return f"{what}Nothing was released."
        if self.row_epsilon is None or self.example_epsilon is None:
            claim = f"No epsilon is stated: it needs {LIBRARY} (pip install '{LIBRARY}>=0.6')."
        else:
            claim = (
                f"Releases of each row: {self.releases}. Unit row (the activations of one token "
                f"position, replaced by any others): epsilon <= {self.row_epsilon:.4g} at "
                f"delta={self.delta:g}. Unit example ({self.rows} rows): epsilon <= "
                f"{self.example_epsilon:.4g} at delta={self.delta:g}. Computed by "
                f"{self.accountant}, without amplification by sampling."
            )
        return f"{what}{claim} {NOT_COVERED}"


@dataclass(frozen=True)
class Noise:
    """Clip and noise of a client's activations, as configuration."""

    clip: float = 0.0
    """``C``: largest L2 norm of a row; 0: neither clip nor noise."""
    sigma: float = 0.0
    """``σ``: standard deviation of the noise in units of ``clip``; 0: clip alone."""
    delta: float = 1e-5
    """The δ at which an ε is stated."""

    def __post_init__(self) -> None:
        at_least("noise.clip", self.clip, 0)
        at_least("noise.sigma", self.sigma, 0)
        if self.sigma > 0 and self.clip == 0:
            raise ValueError(
                f"noise.clip=0 with noise.sigma={self.sigma!r}: noise is measured in clips, so "
                "noise.clip must be > 0"
            )
        if not 0 < self.delta < 1:
            raise ValueError(f"noise.delta={self.delta!r} must lie in (0, 1)")

    def __call__(self, h: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Clip rows and add noise.

        Args:
            h: ``[..., d]``, each row the activations of one token, within the client's graph.
            generator: of the noise; its seed belongs to this client and step only. It draws on its
                own device, so a CPU generator gives the same noise on every machine.

        Raises:
            ValueError: if noise is due and there is no generator.
        """
        if self.clip == 0:
            return h
        h = clip_rows(h, self.clip)
        if self.sigma == 0:
            return h
        if generator is None:
            raise ValueError(f"noise.sigma={self.sigma!r} needs a seeded generator")
        drawn = torch.randn(h.shape, generator=generator, dtype=h.dtype, device=generator.device)
        return h + (self.sigma * self.clip) * drawn.to(h.device)

    def privacy(self, releases: int, rows: int) -> Privacy:
        """The guarantee after training.

        Args:
            releases: how often the example that was used most crossed the cut: once for each step
                it was in. Recomputing a forward without sending it is no release.
            rows: tokens of the longest example.
        """
        at_least("releases", releases, 0)
        at_least("rows", rows, 1)
        known = self.sigma > 0 and library() is not None
        return Privacy(
            clip=self.clip,
            sigma=self.sigma,
            releases=releases,
            rows=rows,
            delta=self.delta,
            row_epsilon=self._epsilon(releases) if known else None,
            example_epsilon=self._epsilon(releases * rows) if known else None,
            accountant=f"{LIBRARY} {version(LIBRARY)} (Rényi)" if known else "",
        )

    def _epsilon(self, count: int) -> float:
        """An upper bound of ε after ``count`` adaptive releases of rows of sensitivity ``2 C``."""
        return gaussian_epsilon(self.sigma / 2, count, self.delta) if count else 0.0


def clip_rows(h: Tensor, clip: float) -> Tensor:
    """Each row ``[..., d]`` shortened to the L2 norm ``clip`` if it is longer. Differentiable."""
    norm = torch.linalg.vector_norm(h, dim=-1, keepdim=True)
    clipped: Tensor = h * (clip / norm.clamp_min(clip))
    return clipped
