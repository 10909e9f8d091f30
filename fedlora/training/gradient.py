"""The gradient of one step's loss, however the step is cut into forward passes."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from fedlora.core.types import LocalPlan
from fedlora.data.batches import Batch
from fedlora.models.language_model import LanguageModel


def add_gradient(
    model: LanguageModel,
    batches: Sequence[Batch],
    seeds: Iterator[int],
    tokens: int,
    plan: LocalPlan,
) -> Tensor:
    """Add the gradient of the mean cross-entropy to the parameters.

    Args:
        model: the parameters are mounted on it.
        batches: the step's micro-batches.
        seeds: the next seed of the dropout masks, one per micro-batch.
        tokens: supervised tokens of the whole step.
        plan: autocast.

    Returns:
        The mean cross-entropy of the step, a detached scalar.
    """
    # Each micro-batch contributes its sum of losses divided by the tokens of the whole step.
    total: Tensor | None = None
    for batch in batches:
        batch = batch.to(model.device)
        model.seed_dropout(next(seeds), batch.inputs.numel(), batch.real)
        with torch.autocast(
            model.device.type, dtype=torch.bfloat16, enabled=plan.autocast == "bf16"
        ):
            logits = model.logits(batch)
        loss = functional.cross_entropy(logits, batch.targets, reduction="sum") / tokens
        loss.backward()
        total = loss.detach() if total is None else total + loss.detach()
    assert total is not None
    return total
