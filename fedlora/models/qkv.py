"""GPT-2's fused projection as three linear layers, so that q, k and v can be adapted apart.

``c_attn`` gives queries, keys and values in one product ``d -> 3d``. One adapter on it has one A
for all three and adapts k as well. The code released with SplitLoRA gives q and v factors of their
own and leaves k alone, which is plain LoRA on two of the layers that `split_qkv` makes. These hold
views of the same weights, and whatever leaves the process has the fused layer's name and shape.

An adapter of parts of ranks r_q and r_v is one of rank r_q + r_v on the fused layer, exactly: the A
are stacked, and every B has its own rows and columns, with zeros elsewhere.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedlora.core.errors import ModelError
from fedlora.core.types import (
    Adapter,
    Factors,
    Module,
)

FUSED: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "gpt2": ("attn.c_attn", ("q_attn", "k_attn", "v_attn"))
}
"""Model type -> end of the fused layer's path, and its parts in the order of their outputs."""


@dataclass(frozen=True)
class Split:
    """A layer that the model's files hold as one and the network computes as several."""

    path: str
    """Path of the fused layer, which is also the parent of its parts."""
    parts: tuple[Module, ...]
    """The parts, in the order of their outputs."""

    @property
    def d_out(self) -> int:
        """Output width of the fused layer."""
        return sum(part.d_out for part in self.parts)

    def rows(self) -> dict[str, slice]:
        """Path of a part -> its rows of the fused layer's output."""
        found, at = {}, 0
        for part in self.parts:
            found[part.path] = slice(at, at + part.d_out)
            at += part.d_out
        return found


class SplitLinear(nn.Module):
    """Several ``Conv1D`` side by side, over views of one: their outputs in a row are its output.

    Args:
        fused: a ``Conv1D``, which stores ``[d_in, d_out]``; on any device.
        names: names of the parts, which have equally many of its outputs.
    """

    def __init__(self, fused: Any, names: Sequence[str]) -> None:
        super().__init__()
        weights = fused.weight.detach().chunk(len(names), dim=1)
        biases = fused.bias.detach().chunk(len(names))
        for name, weight, bias in zip(names, weights, biases, strict=True):
            with torch.device("meta"):  # allocates and draws nothing
                part = type(fused)(weight.shape[1], weight.shape[0])
            part.weight = nn.Parameter(weight, requires_grad=fused.weight.requires_grad)
            part.bias = nn.Parameter(bias, requires_grad=fused.bias.requires_grad)
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        """Any leading shape: ``x [..., d_in]`` to ``[..., d_out]``."""
        return torch.cat([part(x) for part in self.children()], dim=-1)


def split_qkv(network: Any) -> tuple[Split, ...]:
    """Replace each fused projection of a ``PreTrainedModel`` by its parts, in place.

    Args:
        network: with or without weights (``meta``), not yet wrapped.

    Returns:
        What was split, in module order.

    Raises:
        ModelError: if the model has no fused projection that is known here.
    """
    kind = network.config.model_type
    if kind not in FUSED:
        raise ModelError(
            f"model.split_qkv=true: a model of type {kind!r} has no fused projection that can be "
            f"split; allowed for types {sorted(FUSED)}. Use model.split_qkv=false, and "
            "model.targets to choose among the layers it has"
        )
    end, names = FUSED[kind]
    found = [path for path, _ in network.named_modules() if path.endswith(f".{end}")]
    splits = []
    for path in found:
        parent, _, name = path.rpartition(".")
        layer = SplitLinear(network.get_submodule(path), names)
        setattr(network.get_submodule(parent), name, layer)
        d_in, d_out = network.get_submodule(f"{path}.{names[0]}").weight.shape
        parts = tuple(Module(f"{path}.{part}", "attention", d_out, d_in) for part in names)
        splits.append(Split(path, parts))
    return tuple(splits)


def join_state(state: Mapping[str, Tensor], splits: Sequence[Split]) -> dict[str, Tensor]:
    """A network's tensors under the names and in the shapes that the model's files have.

    Tensors of split layers are copied; all others are those of ``state``.
    """
    joined = dict(state)
    for split in splits:
        for name in ("weight", "bias"):
            parts = [joined.pop(f"{part.path}.{name}") for part in split.parts]
            joined[f"{split.path}.{name}"] = torch.cat(parts, dim=-1)
    return joined


def join_adapter(adapter: Adapter, splits: Sequence[Split]) -> Adapter:
    """An adapter of the model as its files have it, of the same function.

    Parts without factors have zeros in their rows of B. Where the parts' scales alpha / r differ,
    the joint scale is sum(alpha) / sum(r) and each B takes the rest; where they agree, nothing is
    rounded.
    """
    joined = dict(adapter)
    for split in splits:
        held = {p.path: joined.pop(p.path) for p in split.parts if p.path in joined}
        if held:
            joined[split.path] = _joined(split, held)
    return joined


def _joined(split: Split, held: Mapping[str, Factors]) -> Factors:
    rank, alpha = sum(f.rank for f in held.values()), sum(f.alpha for f in held.values())
    rows, at = split.rows(), 0
    a = torch.cat([f.a for f in held.values()])
    b = a.new_zeros(split.d_out, rank)
    for path, f in held.items():
        b[rows[path], at : at + f.rank] = f.b * (f.scale / (alpha / rank))
        at += f.rank
    return Factors(a, b, alpha)


def split_adapter(adapter: Adapter, splits: Sequence[Split]) -> Adapter:
    """The inverse of `join_adapter`: factors of a fused layer as factors of its parts.

    A part gets those components whose B is not zero in its rows, at the same scale; a part without
    any gets no factors. So a joint adapter comes apart as it was, but for components that add
    nothing, and one that was trained on the fused layer has its full rank in every part.
    """
    parted = dict(adapter)
    for split in splits:
        if split.path not in parted:
            continue
        joint = parted.pop(split.path)
        for path, rows in split.rows().items():
            b = joint.b[rows]
            live = (b != 0).any(dim=0)
            rank = int(live.sum())
            if rank:
                alpha = joint.alpha * rank / joint.rank
                parted[path] = Factors(joint.a[live], b[:, live].contiguous(), alpha)
    return parted
