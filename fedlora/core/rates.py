"""The learning rate of each optimizer step of a client's round."""

import math

from fedlora.core.types import LocalPlan

LR_SUM = "lr_sum"
"""Metric of an update whose plan has a local term: the sum of the learning rates of its steps."""


def learning_rates(steps: int, plan: LocalPlan) -> list[float]:
    """The learning rate of each optimizer step.

    With ``w = round(warmup * steps)``: ``(i + 1) / (w + 1)`` of the peak for step ``i < w``, then
    ``1 - p`` (linear), ``(1 + cos(pi p)) / 2`` (cosine) or 1, where ``p = (i - w) / (steps - w)``.
    No step has rate zero. Without warm-up these are the schedules of ``transformers``.
    """
    warm = round(plan.warmup * steps)
    return [plan.lr * _factor(i, warm, steps, plan.schedule) for i in range(steps)]


def _factor(step: int, warm: int, steps: int, schedule: str) -> float:
    if step < warm:
        return (step + 1) / (warm + 1)
    progress = (step - warm) / (steps - warm)
    if schedule == "linear":
        return 1 - progress
    return (1 + math.cos(math.pi * progress)) / 2 if schedule == "cosine" else 1.0


def lr_sum(steps: int, plan: LocalPlan) -> float:
    """The sum of the learning rates of so many steps."""
    return math.fsum(learning_rates(steps, plan))
