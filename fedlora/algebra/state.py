"""A server's state is a flat mapping of named tensors; here values enter it and come out again.

Keys are ``<prefix><module path>/<name>``: ``model.layers.0.mlp.up_proj/a``. Because nothing else is
ever in a state, writing it to safetensors and reading it back is a complete checkpoint. Such a file
keeps no order, so the order of the model's modules is itself a tensor, named ``order``.
"""

from collections.abc import Iterable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from fedlora.core.types import Adapter, Factors

State: TypeAlias = Mapping[str, Tensor]
"""What a server remembers between rounds. Never mutated."""
Kept: TypeAlias = Mapping[str, Tensor]
"""What one client remembers between the rounds in which it takes part. Never mutated."""


def pack(adapter: Adapter, prefix: str = "") -> dict[str, Tensor]:
    """The factors as ``{"<prefix><path>/a": [r, d_in], "<prefix><path>/b": [d_out, r]}``."""
    out: dict[str, Tensor] = {}
    for path, f in adapter.items():
        out[f"{prefix}{path}/a"] = f.a
        out[f"{prefix}{path}/b"] = f.b
    return out


def unpack(state: State, alpha: float, prefix: str = "") -> dict[str, Factors]:
    """The inverse of `pack`: one `Factors` per module that has an ``a`` under the prefix."""
    return {
        path: Factors(a=state[f"{prefix}{path}/a"], b=state[f"{prefix}{path}/b"], alpha=alpha)
        for path in paths(state, "a", prefix)
    }


def paths(state: State, name: str, prefix: str = "") -> list[str]:
    """The module paths with a tensor of this name under the prefix.

    In the order of the model's modules if the state holds ``order``, else sorted.
    """
    end = f"/{name}"
    found = sorted(
        key[len(prefix) : -len(end)]
        for key in state
        if key.startswith(prefix) and key.endswith(end)
    )
    positions = state.get(f"{prefix}order")
    if positions is None:
        return found
    return [path for _, path in sorted(zip(positions.tolist(), found, strict=True))]


def order(module_paths: Iterable[str]) -> Tensor:
    """``[modules]`` int64: for each path in sorted order, its position in the model's order."""
    position = {path: i for i, path in enumerate(module_paths)}
    return integers(position[path] for path in sorted(position))


def scalar(value: float) -> Tensor:
    """A number as a 0-d float64 tensor: a Python float survives the round trip exactly."""
    return torch.tensor(value, dtype=torch.float64)


def integers(values: int | Iterable[int]) -> Tensor:
    """Whole numbers as int64: 0-d for one, 1-d for many."""
    plain = values if isinstance(values, int) else list(values)
    return torch.tensor(plain, dtype=torch.int64)


def under(state: State, prefix: str) -> dict[str, Tensor]:
    """The part of a state below a prefix, with the prefix cut off."""
    return {key[len(prefix) :]: t for key, t in state.items() if key.startswith(prefix)}


def prefixed(state: State, prefix: str) -> dict[str, Tensor]:
    """The inverse of `under`."""
    return {f"{prefix}{key}": t for key, t in state.items()}
