"""Gradient checkpointing of a frozen network that stays in evaluation mode."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


def check_recomputable(network: Any) -> None:
    """Raise a ValueError that names the architecture if it cannot be checkpointed."""
    if not network.supports_gradient_checkpointing or not _blocks(network):
        raise ValueError(
            f"engine.checkpoint=true: {type(network).__name__} does not support gradient "
            "checkpointing; leave it false"
        )


@contextmanager
def recomputing(network: Any) -> Iterator[None]:
    """Let a ``PreTrainedModel`` keep only its blocks' inputs and compute the rest again.

    transformers recomputes blocks in training mode alone, in which some apply dropout (OPT), and
    leaves hooks on the embeddings. Here the blocks' own ``forward`` is replaced for a while. Not
    for generation: a block that is computed again would add to the cache twice.
    """
    blocks = _blocks(network)
    before = [vars(block).get("forward") for block in blocks]  # of accelerate, or none
    for block in blocks:
        block.forward = partial(  # masks of dropout are given, so no generator needs to be kept
            checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
        )
    try:
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward


def _blocks(network: Any) -> list[nn.Module]:
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [m for m in network.modules() if isinstance(m, GradientCheckpointingLayer)]
