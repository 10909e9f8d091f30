"""Input statistics of linear layers: sums that can be added over texts and over clients."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fedlora.core.errors import ModelError
from fedlora.models.layers import stored_transposed
from fedlora.models.modules import linear_layers


@dataclass(frozen=True)
class Activations:
    """Sums over tokens of the inputs of linear layers, by module path, in float64.

    The statistics of several texts are the sum of the statistics of each. A server that adds the
    statistics of its clients prunes as if it held all their texts.
    """

    squares: Mapping[str, Tensor]
    """``[d_in]``: ``Σ_t x_tj²``."""
    tokens: Mapping[str, int]
    """Number of tokens that reached each layer."""
    grams: Mapping[str, Tensor] = field(default_factory=dict)
    """``[d_in, d_in]``: ``Σ_t x_t x_tᵀ``, where it was asked for."""
    shared: Mapping[str, str] = field(default_factory=dict)
    """Layer -> the first layer with the same input (q, k and v; gate and up). Their sums are equal
    and are sent once."""

    def __add__(self, other: "Activations") -> "Activations":
        if self.squares.keys() != other.squares.keys() or self.grams.keys() != other.grams.keys():
            raise ValueError("activations of different layers cannot be added")
        if self.shared != other.shared:
            raise ValueError(
                "activations whose layers share inputs in different ways cannot be added"
            )
        own = [p for p in self.squares if p not in self.shared]
        return _spread(
            {p: self.squares[p] + other.squares[p] for p in own},
            {p: self.tokens[p] + other.tokens[p] for p in own},
            {p: self.grams[p] + other.grams[p] for p in own if p in self.grams},
            self.shared,
            list(self.squares),
        )

    @property
    def floats(self) -> int:
        """Scalars that a client sends: each distinct sum once, and a token count for each."""
        sums = [*self.squares.items(), *self.grams.items()]
        own = [t for p, t in sums if p not in self.shared]
        return sum(t.numel() for t in own) + len(self.tokens) - len(self.shared)


def _spread(
    squares: Mapping[str, Tensor],
    tokens: Mapping[str, int],
    grams: Mapping[str, Tensor],
    shared: Mapping[str, str],
    paths: Iterable[str],
) -> Activations:
    """Sums of the layers that have their own, listed under the name of every layer."""
    of = {p: shared.get(p, p) for p in paths}
    return Activations(
        {p: squares[o] for p, o in of.items()},
        {p: tokens[o] for p, o in of.items()},
        {p: grams[o] for p, o in of.items()} if grams else {},
        shared,
    )


class _Reached(Exception):
    """Ends a forward pass after the last measured layer."""


@torch.no_grad()
def measure(
    network: nn.Module,
    paths: Sequence[str],
    batches: Iterable[Tensor],
    *,
    grams: bool = False,
    until: str = "",
) -> Activations:
    """Run text through a network and sum what enters its linear layers.

    Args:
        network: a ``PreTrainedModel``; mounted adapters take part in the forward pass.
        paths: module paths of the layers.
        batches: token ids ``[rows, tokens]`` without padding.
        grams: whether to sum outer products too (SparseGPT).
        until: path of a submodule after which a forward pass may end; empty: none.

    Raises:
        ModelError: as `linear_layers`.
    """
    layers = linear_layers(network, paths)
    sums = _InputSums(layers, grams)
    hooks = [layer.register_forward_pre_hook(sums.hook(p)) for p, layer in layers.items()]
    if until:
        hooks.append(network.get_submodule(until).register_forward_hook(_stop))
    try:
        for batch in batches:
            sums.current = {}
            _forward(network, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return sums.activations()


class _InputSums:
    """Sums over the inputs of layers. A tensor that enters several layers is summed once."""

    def __init__(self, layers: Mapping[str, nn.Module], grams: bool) -> None:
        self.layers, self.with_grams = layers, grams
        self.squares: dict[str, Tensor] = {}
        self.grams: dict[str, Tensor] = {}
        self.tokens: dict[str, int] = {}
        self.first: dict[str, str] = {}
        """Layer -> the first layer with the same input, in every forward pass so far."""
        self.current: dict[int, tuple[str, Tensor]] = {}
        """Inputs of the current forward pass: ``id`` -> (first layer, tensor). Holding the tensor
        keeps its id unique."""

    def hook(self, path: str) -> Any:
        """A forward pre-hook that adds the input of the layer at this path."""

        def add_input(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            first, _ = self.current.setdefault(id(inputs[0]), (path, inputs[0]))
            if self.first.setdefault(path, first) != first:
                raise ModelError(
                    f"{path} has the same input as {first} in one forward pass and not in another: "
                    "which layers share an input does not follow from the model's structure"
                )
            if first == path:
                self._sum(path, inputs[0].detach().reshape(-1, _inputs(layer)))

        return add_input

    def _sum(self, path: str, x: Tensor) -> None:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        _add(self.squares, path, x.square().sum(0).double().cpu())
        self.tokens[path] = self.tokens.get(path, 0) + len(x)
        if self.with_grams:
            _add(self.grams, path, (x.T @ x).double().cpu())

    def activations(self) -> Activations:
        """The statistics of all layers; zeros for a layer that no token reached."""
        for path, layer in self.layers.items():
            if path not in self.first:
                self.squares[path], self.tokens[path] = _zeros(_inputs(layer)), 0
                if self.with_grams:
                    self.grams[path] = _zeros(_inputs(layer), _inputs(layer))
        shared = {p: f for p, f in self.first.items() if p != f}
        return _spread(self.squares, self.tokens, self.grams, shared, self.layers)


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)


def _add(sums: dict[str, Tensor], path: str, more: Tensor) -> None:
    sums[path] = sums[path] + more if path in sums else more


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
