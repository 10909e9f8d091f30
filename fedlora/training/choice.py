r"""The choice of LoRA-A²: the rank indices that move the model most in one epoch of trial.

    score of index i of module M     s_M ‖b_i a_i - b_i⁰ a_i⁰‖_F        b_i = B[:, i],  a_i = A[i]

With one factor frozen that is ``s_M ‖Δb_i‖ ‖a_i‖`` or ``s_M ‖b_i‖ ‖Δa_i‖``, the score of Koo et
al., arXiv:2410.22815: the product of a column and a row has the product of their norms, so that no
outer product is formed.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedlora.core.checks import at_least
from fedlora.core.choice import IndexChoice, Indices
from fedlora.core.types import Adapter, Factors, LocalPlan, TrainJob


@dataclass(frozen=True)
class LargestChange(IndexChoice):
    """The indices of the largest scores among those of all modules; of equal ones the first."""

    budget: int
    """How many, of all modules together; all, if there are fewer."""

    def __post_init__(self) -> None:
        at_least("budget", self.budget, 1)

    def probe(self, plan: LocalPlan) -> LocalPlan:
        """One epoch of everything that the round may train."""
        return replace(plan, epochs=1, steps=0, choice=None)

    def count(self, start: Adapter) -> int:
        """The budget, or all indices."""
        return min(self.budget, sum(f.rank for f in start.values()))

    def choose(self, job: TrainJob, probed: Adapter | None) -> Indices:
        """The best by their scores after the probe.

        Raises:
            ValueError: if there was no probe, or the start holds no factors.
        """
        start = job.start.low_rank()
        if start is None or probed is None:
            raise ValueError("rank indices are chosen by what a probe has trained; there was none")
        # Scores of all modules in one row, best first; the sort is stable.
        scores = torch.cat([index_scores(f, probed[path]) for path, f in start.items()])
        best = torch.sort(scores, descending=True, stable=True).indices[: self.count(start)]
        marks = torch.zeros(len(scores), dtype=torch.bool)
        marks[best] = True
        parts = marks.split([f.rank for f in start.values()])
        return {
            path: tuple(part.nonzero()[:, 0].tolist())
            for path, part in zip(start, parts, strict=True)
        }


def index_scores(start: Factors, end: Factors) -> Tensor:
    """``[r]`` float64: how far the product of each rank index has moved, a Frobenius norm."""
    # b a - b⁰ a⁰ = Δb a + b⁰ Δa, and the squared norm of a sum of two products takes norms and
    # inner products of rows alone, each [r].
    a0, a, b0, b = (t.detach().to("cpu", torch.float64) for t in (start.a, end.a, start.b, end.b))
    of_a, of_b = a - a0, b - b0
    squared = (
        of_b.square().sum(0) * a.square().sum(1)
        + b0.square().sum(0) * of_a.square().sum(1)
        + 2 * (of_b * b0).sum(0) * (a * of_a).sum(1)
    )
    return start.scale * squared.clamp(min=0).sqrt()
