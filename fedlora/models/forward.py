"""Logits of the supervised positions alone.

The vocabulary is the widest layer of a small model, so padded positions, and prompts when only
the response has a loss, should not pass through it.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fedlora.data.batches import Batch


def supervised_logits(network: Any, batch: Batch, **inputs: Tensor) -> Tensor:
    """Logits ``[n, vocabulary]`` of ``batch.positions``, on the batch's device.

    ``inputs`` are given to the network in place of the batch's token ids, as ``inputs_embeds``.

    Positions are selected in front of the output embedding, inside the model's own forward, so
    that what an architecture does to its logits afterwards (scaling, soft capping) still happens.
    Where a model has no such layer, or feeds it something else, all logits are computed first.
    """
    shape = batch.inputs.shape

    def select(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if not args or args[0].shape[:-1] != shape:
            return None
        return (_rows(args[0], batch.positions), *args[1:])

    head = network.get_output_embeddings()
    handle = None if head is None else head.register_forward_pre_hook(select)
    try:
        places = {} if batch.position_ids is None else {"position_ids": batch.position_ids}
        inputs = inputs or {"input_ids": batch.inputs}
        logits: Tensor = network(**inputs, use_cache=False, **places).logits
    finally:
        if handle is not None:
            handle.remove()
    if logits.shape[:-1] == shape:
        logits = _rows(logits, batch.positions)
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


def supervised_hidden(network: Any, batch: Batch) -> Tensor:
    """What the output embedding is given at ``batch.positions``, ``[n, d]``.

    The output embedding itself is computed for one position alone. Only for a network whose logits
    are those of its output embedding and nothing more (`fedlora.engine.fused.head.is_plain`).
    """
    taken: list[Tensor] = []

    def take(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        taken.append(_rows(args[0], batch.positions))
        return (args[0][:, :1], *args[1:])

    handle = network.get_output_embeddings().register_forward_pre_hook(take)
    try:
        places = {} if batch.position_ids is None else {"position_ids": batch.position_ids}
        network(input_ids=batch.inputs, use_cache=False, **places)
    finally:
        handle.remove()
    return taken[0]


def _rows(x: Tensor, positions: Tensor) -> Tensor:
    """``x [b, t, d]`` at flat positions ``[n]`` -> ``[n, d]``."""
    flat = x.flatten(0, 1)
    return flat if positions.shape[0] == flat.shape[0] else flat.index_select(0, positions)
