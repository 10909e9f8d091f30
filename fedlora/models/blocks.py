"""The blocks of a transformer: where they are, and which of them carry adapters."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from fedlora.core.errors import ConfigError, ModelError

_TOP = re.compile(r"top:0*([1-9]\d*)")


def check_layers(layers: Any) -> None:
    """Raise a ValueError unless this is a value of ``model.layers``: ``all``, ``top:k`` or a list
    of different indices."""
    if layers == "all" or (isinstance(layers, str) and _TOP.fullmatch(layers)):
        return
    listed = isinstance(layers, Sequence) and not isinstance(layers, str) and len(layers) > 0
    if listed and all(type(i) is int and i >= 0 for i in layers):
        twice = sorted({i for i in layers if list(layers).count(i) > 1})
        if not twice:
            return
        raise ValueError(f"model.layers={list(layers)} names block {twice[0]} twice")
    raise ValueError(
        f"model.layers={layers!r} must be all, top:k (the k blocks next to the output, k >= 1) or "
        "a list of indices of blocks such as [10, 11], counted from 0 at the input"
    )


def find_blocks(network: Any) -> tuple[str, nn.ModuleList]:
    """The path of the list of a network's blocks, and the list.

    Of a network that also takes images or sounds, the blocks of its language model (`text_part`).

    Raises:
        ModelError: if there is no list of ``config.num_hidden_layers`` modules.
    """
    count = getattr(network.config.get_text_config(), "num_hidden_layers", None)
    inside = text_part(network)
    for path, module in network.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and path.startswith(inside):
            return path, module
    raise ModelError(f"{type(network).__name__} has no list of num_hidden_layers={count} blocks")


def text_part(network: Any) -> str:
    """The path of the language model within a network that also takes images or sounds, with a dot
    at its end; empty: the whole network is one.

    Clients train on text, which never passes through the other parts.
    """
    if network.config.get_text_config() is network.config:
        return ""
    decoder = network.get_decoder()
    paths = [path for path, module in network.named_modules() if module is decoder]
    return f"{paths[0]}." if paths and paths[0] else ""


def adaptable_parts(network: Any, layers: Any) -> tuple[str, ...]:
    """What the paths of modules with an adapter begin with, for a value of ``model.layers``.

    Returns:
        One empty text for ``all``: modules outside the blocks too.

    Raises:
        ConfigError: if the network has no such block.
        ModelError: if its blocks cannot be found.
    """
    if layers == "all":
        return ("",)
    try:
        path, blocks = find_blocks(network)
    except ModelError as error:
        raise ModelError(f"model.layers={_text(layers)}: {error}; use model.layers=all") from error
    count = len(blocks)
    if isinstance(layers, str):
        top = int(layers.removeprefix("top:"))
        if top > count:
            raise ConfigError(
                f"model.layers={layers}: {type(network).__name__} has {count} blocks; k is in "
                f"1..{count}"
            )
        chosen: Iterable[int] = range(count - top, count)
    else:
        chosen = layers
        if max(layers) >= count:
            raise ConfigError(
                f"model.layers={_text(layers)}: {type(network).__name__} has no block "
                f"{max(layers)}; its {count} blocks are 0..{count - 1}"
            )
    return tuple(f"{path}.{i}." for i in sorted(chosen))


def adapted_blocks(network: Any, paths: Sequence[str]) -> tuple[int, tuple[int, ...]]:
    """The number of blocks, and the indices of those that hold modules at these paths.

    Returns:
        ``(0, ())`` if the blocks cannot be found, and no indices if a module lies outside them.
    """
    try:
        path, blocks = find_blocks(network)
    except ModelError:
        return 0, ()
    if not all(p.startswith(f"{path}.") for p in paths):
        return len(blocks), ()
    return len(blocks), tuple(sorted({int(p[len(path) + 1 :].split(".")[0]) for p in paths}))


def entering(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """The hidden states among a block's arguments."""
    states = args[0] if args else kwargs["hidden_states"]
    assert isinstance(states, Tensor)
    return states


def with_entering(
    args: tuple[Any, ...], kwargs: dict[str, Any], states: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A block's arguments with other hidden states."""
    if args:
        return (states, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": states}


@contextmanager
def forward_replaced(module: nn.Module, forward: Any) -> Iterator[None]:
    """While the context is open, a module computes something else."""
    before = vars(module).get("forward")  # of accelerate, or none
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def _text(layers: Any) -> str:
    """A value of ``model.layers`` as it is written."""
    return layers if isinstance(layers, str) else f"[{', '.join(map(str, layers))}]"
