"""The gradient of one private step, one example after another: the specification of every engine.

A forward and a backward pass by example gives the gradient of that example, whatever the technique
and its layers. `fedlora.engine.fused` computes many at once.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from fedlora.core.types import LocalPlan
from fedlora.data.batches import TokenExample, supervised_tokens
from fedlora.models.language_model import LanguageModel
from fedlora.training.flat import FlatParameters
from fedlora.training.gradient import add_gradient


def add_private_gradient(
    model: LanguageModel,
    flat: FlatParameters,
    examples: Sequence[TokenExample],
    plan: LocalPlan,
    seeds: Iterator[int],
    *,
    step: int,
    stream: Mapping[str, int],
) -> tuple[Tensor, int]:
    """Put the noised mean of the examples' clipped gradients in place of the gradients.

    Args:
        model: the parameters are mounted on it.
        flat: the parameters, in the order of the model's modules.
        examples: those of the step, perhaps none.
        plan: with ``privacy``.
        seeds: the next seed of the dropout masks, one per example.
        step: counted from 0.
        stream: ``seed``, ``round`` and ``client``.

    Returns:
        The mean cross-entropy of the step's supervised tokens, a detached scalar, 0 of none; and
        their number.
    """
    privacy = plan.privacy
    assert privacy is not None
    sums = [torch.zeros_like(g) for g in flat.grads]
    loss = torch.zeros((), dtype=sums[0].dtype, device=model.device)
    tokens = [supervised_tokens(e, plan.loss) for e in examples]

    # Each example by itself: its loss is the mean over its own tokens, its gradient is clipped.
    for example, own in zip(examples, tokens, strict=True):
        flat.zero_grad()
        mean = add_gradient(model, [model.collate([example], plan.loss)], seeds, own, plan)
        factor = privacy.factors(get_total_norm(flat.grads))
        for total, grad in zip(sums, flat.grads, strict=True):
            total += factor * grad
        loss = loss + mean * own

    # Noise is drawn by parameter and laid out as they are; L is the expected size of a batch.
    for total, grad in zip(sums, flat.grads, strict=True):
        grad.copy_(total)
    shapes = [p.shape for p in flat.parameters]
    for p, noise in zip(flat.parameters, privacy.noise(shapes, step, **stream), strict=True):
        assert p.grad is not None
        p.grad += noise.to(p.grad)
    for grad in flat.grads:
        grad /= plan.batch_size
    return loss / max(1, sum(tokens)), sum(tokens)
