"""Gradient checkpointing of a frozen network that stays in evaluation mode."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def recomputing(network: Any) -> Iterator[None]:
    """Let a ``PreTrainedModel`` keep only its blocks' inputs and compute the rest again.

    transformers recomputes blocks in training mode alone; here the blocks are told that they train,
    and nothing inside them, so that the base's own dropout stays off.

    Raises:
        ValueError: if the architecture cannot.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    if not network.supports_gradient_checkpointing:
        raise ValueError(
            f"engine.checkpoint=true: {type(network).__name__} does not support gradient "
            "checkpointing; leave it false"
        )
    blocks = [m for m in network.modules() if isinstance(m, GradientCheckpointingLayer)]
    network.gradient_checkpointing_enable({"use_reentrant": False})
    for block in blocks:
        block.training = True
    try:
        yield
    finally:
        network.gradient_checkpointing_disable()
        for block in blocks:
            block.training = False
