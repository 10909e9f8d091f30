"""What flows into linear layers, as sums that can be added up over texts and over clients."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fedlora.models.folder import ModelError
from fedlora.models.layers import AdaptedLinear, stored_transposed
from fedlora.models.modules import is_linear


@dataclass(frozen=True)
class Activations:
    """Sums over tokens of the inputs of linear layers, by module path, in float64.

    Sums of several texts are the sum of theirs: clients that send theirs let a server prune as if
    it had seen all their texts.
    """

    squares: Mapping[str, Tensor]
    """``[d_in]``: ``Σ_t x_tj²``."""
    tokens: Mapping[str, int]
    """Tokens that each layer has seen."""
    grams: Mapping[str, Tensor] = field(default_factory=dict)
    """``[d_in, d_in]``: ``Σ_t x_t x_tᵀ``, where it was asked for."""

    def __add__(self, other: "Activations") -> "Activations":
        if self.squares.keys() != other.squares.keys() or self.grams.keys() != other.grams.keys():
            raise ValueError("activations of different layers cannot be added")
        return Activations(
            {p: x + other.squares[p] for p, x in self.squares.items()},
            {p: n + other.tokens[p] for p, n in self.tokens.items()},
            {p: g + other.grams[p] for p, g in self.grams.items()},
        )

    @property
    def floats(self) -> int:
        """How many numbers a client sends that shares them, a token count per layer included."""
        sums = [*self.squares.values(), *self.grams.values()]
        return sum(t.numel() for t in sums) + len(self.tokens)


def linear_layers(network: nn.Module, paths: Iterable[str]) -> dict[str, nn.Module]:
    """The linear layers at these paths, without whatever adapters are around them.

    Raises:
        ModelError: naming a path where there is nothing, no linear layer, or a quantised one.
    """
    found = {}
    for path in paths:
        try:
            layer = network.get_submodule(path)
        except AttributeError as error:
            raise ModelError(f"{type(network).__name__} has no module {path!r}") from error
        base = layer.base if isinstance(layer, AdaptedLinear) else layer
        if not is_linear(base):
            raise ModelError(
                f"{path} is a {type(base).__name__}; only linear layers (nn.Linear, Conv1D) can be "
                "pruned: choose other model.targets"
            )
        weight: Any = base.weight
        if not weight.is_floating_point():
            raise ModelError(
                f"{path} stores {weight.dtype} weights: a quantised base cannot be pruned; use "
                "model.quantization=none"
            )
        found[path] = base
    return found


class _Reached(Exception):
    """The last layer that is listened to has been heard."""


@torch.no_grad()
def measure(
    network: nn.Module,
    paths: Sequence[str],
    batches: Iterable[Tensor],
    *,
    grams: bool = False,
    until: str = "",
) -> Activations:
    """Run text through a network and listen to what enters its linear layers.

    Args:
        network: a ``PreTrainedModel``; its adapters, if any, act.
        paths: of the layers.
        batches: token ids ``[rows, tokens]`` without padding.
        grams: whether to sum outer products too (SparseGPT).
        until: path of a submodule after which a forward pass may end; empty: none.

    Raises:
        ModelError: as `linear_layers`.
    """
    layers = linear_layers(network, paths)
    squares = {p: torch.zeros(_inputs(x), dtype=torch.float64) for p, x in layers.items()}
    products = {p: torch.zeros(len(s), len(s), dtype=torch.float64) for p, s in squares.items()}
    tokens = dict.fromkeys(layers, 0)

    def listener(path: str) -> Any:
        def listen(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().reshape(-1, _inputs(layer))
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            squares[path] += x.square().sum(0).double().cpu()
            tokens[path] += len(x)
            if grams:
                products[path] += (x.T @ x).double().cpu()

        return listen

    hooks = [layer.register_forward_pre_hook(listener(p)) for p, layer in layers.items()]
    if until:
        hooks.append(network.get_submodule(until).register_forward_hook(_stop))
    try:
        for batch in batches:
            _forward(network, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return Activations(squares, tokens, products if grams else {})


def _stop(*_: Any) -> None:
    raise _Reached


def _forward(network: Any, batch: Tensor) -> None:
    device = next(network.parameters()).device
    try:
        network(input_ids=batch.to(device), use_cache=False)
    except _Reached:
        return


def _inputs(layer: nn.Module) -> int:
    weight: Any = layer.weight
    return int(weight.shape[0] if stored_transposed(layer) else weight.shape[1])


def windows(texts: Iterable[Sequence[int]], samples: int, length: int) -> list[Tensor]:
    """Text end to end, cut into sequences of equal length.

    Args:
        texts: token ids.
        samples: how many sequences.
        length: tokens of each.

    Returns:
        ``[1, length]`` int64 each.

    Raises:
        ModelError: if there is less text than asked for.
    """
    joined: list[int] = []
    for text in texts:
        joined += [int(t) for t in text]
        if len(joined) >= samples * length:
            break
    if len(joined) < samples * length:
        raise ModelError(
            f"calibration asks for {samples} sequences of {length} tokens = {samples * length}, "
            f"and its text has {len(joined)}: ask for fewer or shorter ones, or give more text"
        )
    ids = torch.tensor(joined[: samples * length], dtype=torch.int64)
    return list(ids.view(samples, 1, length))
