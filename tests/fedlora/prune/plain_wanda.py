"""Wanda as its paper says it, with hooks and loops, on a plain model: the judge of `prune`.

arXiv:2306.11695, section 3 and algorithm 1. Imports nothing of ``fedlora``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def masks(
    network: nn.Module,
    batches: Sequence[Tensor],
    *,
    fraction: float = 0.5,
    group: tuple[int, int] | None = None,
    blocks: Sequence[str] = (),
) -> dict[str, Tensor]:
    """Prune all linear layers but the output embedding, in place.

    Args:
        network: a causal language model.
        batches: token ids ``[rows, tokens]``.
        fraction: zeros of every row.
        group: (n, m): n of each m inputs stay, instead of a fraction.
        blocks: paths of blocks that are pruned one after another, each measured behind the pruned
            ones before it; empty: all at once from the dense model.

    Returns:
        Layer's path -> ``[d_out, d_in]`` bool, true where a weight stays.
    """
    layers = {
        path: layer
        for path, layer in network.named_modules()
        if isinstance(layer, (nn.Linear, Conv1D)) and "lm_head" not in path
    }
    stages = [[p for p in layers if p.startswith(f"{b}.")] for b in blocks] or [list(layers)]
    found: dict[str, Tensor] = {}
    for stage in stages:
        norms = {path: _norms(network, layers[path], batches) for path in stage}
        for path, norm in norms.items():
            layer = layers[path]
            weight = layer.weight.data.t() if isinstance(layer, Conv1D) else layer.weight.data
            found[path] = torch.stack([_kept(row, norm, fraction, group) for row in weight])
            weight.mul_(found[path])
    return found


def _norms(network: nn.Module, layer: nn.Module, batches: Sequence[Tensor]) -> Tensor:
    """``‖X_j‖₂`` of each input of one layer, ``[d_in]``, from forward passes of its own."""
    inputs: list[Tensor] = []
    hook = layer.register_forward_hook(lambda _, x, y: inputs.append(x[0].flatten(0, -2)))
    with torch.no_grad():
        for batch in batches:
            network(input_ids=batch)
    hook.remove()
    return torch.cat(inputs).norm(dim=0)


def _kept(row: Tensor, norm: Tensor, fraction: float, group: tuple[int, int] | None) -> Tensor:
    score = row.abs() * norm
    stay = torch.ones_like(score, dtype=torch.bool)
    if group is None:
        stay[score.argsort()[: int(len(row) * fraction)]] = False
        return stay
    n, m = group
    for at in range(0, len(row), m):
        stay[at + score[at : at + m].argsort()[: m - n]] = False
    return stay
