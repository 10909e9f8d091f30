"""SwitchLoRA on PEFT's own LoRA layers: a controller edits their tensors and replaces no layer.

``merge_and_unload`` gives the plain network with the trained update. PEFT's adapter files hold
neither the weights that switches have moved nor the candidate vectors:
`SwitchController.state_dict` holds them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer

from fedlora.models.layers import dense_weight, stored_transposed
from fedlora.models.modules import find_modules
from fedlora.techniques.switchlora.controller import SwitchController
from fedlora.techniques.switchlora.init import check_rank
from fedlora.techniques.switchlora.layer import (
    SwitchLayer,
    begin,
    check_type,
)
from fedlora.techniques.switchlora.schedule import Switching

NAME = "default"


@dataclass(frozen=True)
class Adapted:
    """A network whose linear layers carry PEFT's LoRA layers."""

    network: PeftModel
    layers: dict[str, Any]
    """Module path -> PEFT's layer, in module order."""


def adapt(network: Any, rank: int, targets: str | Sequence[str], alpha: float) -> Adapted:
    """Wrap linear layers in place. Factors are PEFT's random ones: the caller overwrites them.

    Raises:
        ModelError: for a target that is not a linear layer, naming those that are.
    """
    modules = find_modules(network, targets)
    base = [network.get_submodule(m.path) for m in modules]
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=0.0,
        target_modules=[m.path for m in modules],
        init_lora_weights=False,
        fan_in_fan_out=any(stored_transposed(layer) for layer in base),
        task_type="CAUSAL_LM",
    )
    peft = get_peft_model(network, config)
    assert isinstance(peft, PeftModel)
    found = {m.path: peft.get_base_model().get_submodule(m.path) for m in modules}
    assert all(isinstance(layer, LoraLayer) for layer in found.values())
    return Adapted(peft, found)


def wrap_network(
    network: Any,
    rank: int,
    targets: str | Sequence[str] = "all-linear",
    *,
    switching: Switching,
    total: int,
    seed: int,
    alpha: float = 1.0,
    pools: Path | None = None,
) -> tuple[PeftModel, SwitchController]:
    """Wrap a network for SwitchLoRA; its outputs stay the same up to rounding.

    Args:
        network: a causal language model in float32, wrapped in place.
        rank: slots of every layer.
        targets: as in `fedlora.models.modules.find_modules`.
        switching: how vectors are switched.
        total: steps of the run.
        seed: of all draws.
        alpha: the scale is ``alpha / rank``; the paper's is 1.
        pools: folder for candidate vectors in files mapped into memory; None: they are in memory,
            twice as large as the adapted layers.

    Raises:
        ValueError: for a rank that cannot switch, or a base in half precision; the network is not
            changed.
        ModelError: for a target that is not a linear layer.
    """
    for m in find_modules(network, targets):
        check_rank(m.path, m.d_out, m.d_in, rank)
        check_type(m.path, network.get_submodule(m.path).weight.dtype)
    adapted = adapt(network, rank, targets, alpha)
    layers: dict[str, SwitchLayer] = {}
    for path, layer in adapted.layers.items():
        a, b = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
        weight = dense_weight(layer.base_layer).detach()
        layers[path] = begin(path, weight, a, b, alpha=alpha, seed=seed, folder=pools)
    parameters = {p: {"a": layer.a, "b": layer.b} for p, layer in layers.items()}
    return adapted.network, SwitchController(layers, parameters, switching, total, seed)  # type: ignore[arg-type]


def pretraining(network: PeftModel) -> None:
    """Train all parameters except the adapted layers' own weights: also their biases, embeddings,
    norms and the head."""
    for name, p in network.named_parameters():
        p.requires_grad_(not name.endswith("base_layer.weight"))
