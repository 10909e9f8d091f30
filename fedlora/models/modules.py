"""Which linear layers of a causal language model carry an adapter, and what they are."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fedlora.models.folder import ModelError
from fedlora.types import Module


@dataclass(frozen=True)
class ModelInfo:
    """What can be known of a base model without its weights."""

    name: str
    modules: tuple[Module, ...]
    """The layers that carry an adapter, in the order of ``named_modules()``."""
    parameters: int
    """Of the base model; tied weights count once."""
    context: int
    """Longest sequence, in tokens."""
    fingerprint: str
    """Identity of configuration and weights, wherever they are stored."""


def is_linear(layer: nn.Module) -> bool:
    """Whether the layer is ``nn.Linear``, a quantised subclass of it, or GPT-2's ``Conv1D``."""
    return isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D"


def shape(layer: nn.Module) -> tuple[int, int]:
    """``(d_out, d_in)``. ``Conv1D`` stores its weight as ``[d_in, d_out]``; quantised layers pack
    theirs."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return int(weight.shape[1]), int(weight.shape[0])


def _kind(path: str) -> Any:
    parts = path.lower().split(".")
    return "attention" if any("attn" in p or "attention" in p for p in parts) else "mlp"


def find_modules(network: Any, targets: str | Sequence[str]) -> tuple[Module, ...]:
    """The linear layers that ``targets`` names, in the order of ``named_modules()``.

    Args:
        network: a ``PreTrainedModel``, on any device (``meta`` too).
        targets: ``all-linear`` (every linear layer except the output embedding, as in PEFT), or
            ends of module paths such as ``q_proj`` or ``layers.0.mlp.up_proj``.

    Raises:
        ModelError: if a target matches no linear layer.
    """
    head = network.get_output_embeddings()
    linear = {
        path: layer
        for path, layer in network.named_modules()
        if is_linear(layer) and layer is not head
    }
    if targets == "all-linear":
        chosen = set(linear)
    else:
        wanted = [targets] if isinstance(targets, str) else list(targets)
        chosen = set()
        for target in wanted:
            matches = {p for p in linear if p == target or p.endswith(f".{target}")}
            if not matches:
                ends = list(dict.fromkeys(p.rpartition(".")[2] for p in linear))
                raise ModelError(
                    f"model.targets: {target!r} is the end of no adaptable linear layer of "
                    f"{type(network).__name__}; allowed: 'all-linear' or ends such as {ends}"
                )
            chosen |= matches
    found = tuple(Module(p, _kind(p), *shape(layer)) for p, layer in linear.items() if p in chosen)
    if not found:
        raise ModelError(f"{type(network).__name__} has no linear layer that could be adapted")
    return found
