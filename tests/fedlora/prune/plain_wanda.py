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
        norms = _norms(network, {path: layers[path] for path in stage}, batches)
        for path, norm in norms.items():
            layer = layers[path]
            weight = layer.weight.data.t() if isinstance(layer, Conv1D) else layer.weight.data
            found[path] = _kept(weight.abs() * norm, fraction, group)
            weight.mul_(found[path])
    return found


def _norms(
    network: nn.Module, layers: dict[str, nn.Module], batches: Sequence[Tensor]
) -> dict[str, Tensor]:
    """``‖X_j‖₂`` of each input of each layer, ``[d_in]`` by path."""
    inputs: dict[str, list[Tensor]] = {path: [] for path in layers}
    hooks = [
        layer.register_forward_hook(lambda _, x, y, path=path: inputs[path].append(x[0]))
        for path, layer in layers.items()
    ]
    with torch.no_grad():
        for batch in batches:
            network(input_ids=batch)
    for hook in hooks:
        hook.remove()
    return {
        path: torch.cat([x.flatten(0, -2) for x in seen]).norm(dim=0)
        for path, seen in inputs.items()
    }


def _kept(score: Tensor, fraction: float, group: tuple[int, int] | None) -> Tensor:
    """The lowest scores of each row go, or of each group of a row. ``[d_out, d_in]`` bool."""
    stay = torch.ones_like(score, dtype=torch.bool)
    if group is None:
        lowest = score.argsort(dim=1)[:, : int(score.shape[1] * fraction)]
        return stay.scatter(1, lowest, False)
    n, m = group
    for at in range(0, score.shape[1], m):
        lowest = at + score[:, at : at + m].argsort(dim=1)[:, : m - n]
        stay.scatter_(1, lowest, False)
    return stay
