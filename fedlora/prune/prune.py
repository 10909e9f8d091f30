"""Pruning the linear layers of a model in place."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedlora.core.checks import one_of
from fedlora.core.errors import ModelError
from fedlora.models.layers import dense_weight
from fedlora.models.modules import linear_layers
from fedlora.prune.methods import magnitude, sparsegpt, wanda
from fedlora.prune.pattern import Pattern
from fedlora.prune.statistics import Activations, measure

METHODS = ("wanda", "magnitude", "sparsegpt")
_BLOCK = re.compile(r"^(?:.*?\.)?\d+(?=\.)")


@dataclass(frozen=True)
class Pruning:
    """Which weights of a base model become zero."""

    method: str = "wanda"
    """``wanda``, ``magnitude`` (needs no text) or ``sparsegpt`` (changes the weights that stay)."""
    pattern: str = "0.5"
    """Fraction that becomes zero, or N:M, which keeps N of M (`Pattern.parse`)."""
    sequential: bool = True
    """Block after block: each is measured with all earlier blocks pruned, as Wanda's authors do.
    False: all at once from the dense model, which takes one pass and, federated, one message per
    client."""

    def __post_init__(self) -> None:
        one_of("pruning.method", self.method, METHODS)
        Pattern.parse(self.pattern)


def prune(
    network: nn.Module, paths: Sequence[str], pruning: Pruning, batches: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Zero weights of linear layers in place.

    Args:
        network: a ``PreTrainedModel``, wrapped for adapters or not.
        paths: module paths of the layers, in the order of the forward pass.
        pruning: method and pattern.
        batches: token ids ``[rows, tokens]`` of the calibration text; unused by ``magnitude``.

    Returns:
        Module path -> mask ``[d_out, d_in]``, true where a weight is not zero.

    Raises:
        ModelError: if a layer cannot have the pattern, is not linear, is quantised or is reached
            by no token. In the first three cases nothing has changed.
    """
    grams = pruning.method == "sparsegpt"

    def statistics(block: str, group: Sequence[str]) -> Activations:
        return measure(network, group, batches, grams=grams, until=block)

    return prune_by(network, paths, pruning, statistics)


def prune_by(
    network: nn.Module,
    paths: Sequence[str],
    pruning: Pruning,
    statistics: Callable[[str, Sequence[str]], Activations],
) -> dict[str, Tensor]:
    """`prune`, with input statistics that a function measures when they are needed.

    Args:
        network: as `prune`.
        paths: as `prune`.
        pruning: as `prune`.
        statistics: maps the path of a block (empty: no block) and the paths of its layers to their
            input statistics in the network as pruned so far. Never called for ``magnitude``.
    """
    check_layers(network, paths, pruning)
    if pruning.method == "magnitude":
        return prune_from(network, paths, pruning, Activations({}, {}))
    groups = by_block(paths) if pruning.sequential else {"": list(paths)}
    masks: dict[str, Tensor] = {}
    for block, group in groups.items():
        masks |= prune_from(network, group, pruning, statistics(block, group))
    return masks


@torch.no_grad()
def prune_from(
    network: nn.Module, paths: Sequence[str], pruning: Pruning, seen: Activations
) -> dict[str, Tensor]:
    """`prune` from what has been measured, for example the sum over clients.

    Raises:
        ModelError: as `prune`; nothing has changed then.
    """
    check_layers(network, paths, pruning)
    if pruning.method != "magnitude":
        _require_tokens(paths, seen)
    pattern = Pattern.parse(pruning.pattern)
    masks = {}
    for path, layer in linear_layers(network, paths).items():
        weight = dense_weight(layer)
        if pruning.method == "magnitude":
            kept = magnitude(weight, pattern)
        elif pruning.method == "wanda":
            kept = wanda(weight, seen.squares[path], pattern)
        else:
            kept, new = sparsegpt(weight, seen.grams[path], seen.tokens[path], pattern)
            weight.copy_(new)
        weight.masked_fill_(~kept, 0)
        masks[path] = (weight != 0).cpu()  # a kept weight may have been zero before
    return masks


def check_layers(network: nn.Module, paths: Sequence[str], pruning: Pruning) -> None:
    """Raise a ModelError unless all of these layers can be pruned in this way."""
    pattern = Pattern.parse(pruning.pattern)
    for path, layer in linear_layers(network, paths).items():
        pattern.check(path, dense_weight(layer).shape[1])


def _require_tokens(paths: Sequence[str], seen: Activations) -> None:
    missing = [p for p in paths if not seen.tokens.get(p)]
    if missing:
        raise ModelError(
            f"no token of the calibration text reached {missing[0]} ({len(missing)} of "
            f"{len(paths)} layers): give text, other model.targets, or prune by "
            "model.method=magnitude"
        )


def by_block(paths: Sequence[str]) -> Mapping[str, list[str]]:
    """Path of a decoder block -> the paths of its layers, in order.

    Layers outside of blocks come last, under the empty key.
    """
    groups: dict[str, list[str]] = {}
    for path in paths:
        found = _BLOCK.match(path)
        groups.setdefault(found.group() if found else "", []).append(path)
    outside = groups.pop("", [])
    return groups | ({"": outside} if outside else {})


def sparsity(network: nn.Module, paths: Sequence[str]) -> float:
    """Fraction of zeros among the weights of these layers."""
    weights = [dense_weight(layer) for layer in linear_layers(network, paths).values()]
    zeros = sum(int((w == 0).sum()) for w in weights)
    return zeros / sum(w.numel() for w in weights)
