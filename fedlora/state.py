"""A server's state is a flat mapping of named tensors; here values enter it and come out again.

Keys are ``<prefix><module path>/<name>``: ``model.layers.0.mlp.up_proj/a``. Because nothing else is
ever in a state, writing it to safetensors and reading it back is a complete checkpoint.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from fedlora.types import Adapter, Factors


def pack(adapter: Adapter, prefix: str = "") -> dict[str, Tensor]:
    """The factors as ``{"<prefix><path>/a": [r, d_in], "<prefix><path>/b": [d_out, r]}``."""
    out: dict[str, Tensor] = {}
    for path, f in adapter.items():
        out[f"{prefix}{path}/a"] = f.a
        out[f"{prefix}{path}/b"] = f.b
    return out


def unpack(state: Mapping[str, Tensor], alpha: float, prefix: str = "") -> dict[str, Factors]:
    """The inverse of `pack`: one `Factors` per module that has an ``a`` under the prefix."""
    return {
        path: Factors(a=state[f"{prefix}{path}/a"], b=state[f"{prefix}{path}/b"], alpha=alpha)
        for path in paths(state, "a", prefix)
    }


def paths(state: Mapping[str, Tensor], name: str, prefix: str = "") -> list[str]:
    """The module paths that have a tensor of this name under the prefix, in the state's order."""
    end = f"/{name}"
    return [k[len(prefix) : -len(end)] for k in state if k.startswith(prefix) and k.endswith(end)]


def scalar(value: float) -> Tensor:
    """A number as a 0-d float64 tensor: a Python float survives the round trip exactly."""
    return torch.tensor(value, dtype=torch.float64)


def integers(values: int | Iterable[int]) -> Tensor:
    """Whole numbers as int64: 0-d for one, 1-d for many."""
    plain = values if isinstance(values, int) else list(values)
    return torch.tensor(plain, dtype=torch.int64)


def under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The part of a state below a prefix, with the prefix cut off."""
    return {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}


def prefixed(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The inverse of `under`."""
    return {f"{prefix}{k}": v for k, v in state.items()}


def in_order(state: Mapping[str, Tensor], names: Sequence[str]) -> list[Tensor]:
    """The tensors of these names, in this order."""
    return [state[n] for n in names]
