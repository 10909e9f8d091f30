"""The parameters that a client trains, in one flat buffer.

Clearing gradients, measuring norms, clipping and optimizer steps take one operation each instead of
one per tensor: a LoRA client has hundreds of small tensors.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from fedlora.core.choice import Indices
from fedlora.core.terms import TrainedBuffer, TrainedLayer, TrainedState
from fedlora.core.types import Factors
from fedlora.models.language_model import LanguageModel


class FlatParameters:
    """Parameters moved into one buffer per dtype and device, with gradients laid out alike.

    Each parameter's storage becomes a view of the buffer and its gradient a view of the buffer's
    gradient: autograd accumulates in place, the optimizer sees one tensor. An elementwise optimizer
    gives bitwise identical results either way.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        groups: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
        for p in self.parameters:
            groups.setdefault((p.dtype, p.device), []).append(p)
        self._groups = list(groups.values())
        self.buffers = [self._join(group) for group in self._groups]
        self.starts = [b.detach().clone() for b in self.buffers]
        """The values of each buffer before its first step."""

    @staticmethod
    def _join(group: list[nn.Parameter]) -> nn.Parameter:
        # All values one after another, [n], and as many gradients; then every parameter becomes a
        # view of its own section of both.
        data = torch.cat([p.detach().reshape(-1) for p in group])
        grad = torch.zeros_like(data)
        sizes = [p.numel() for p in group]
        for p, values, slot in zip(group, data.split(sizes), grad.split(sizes), strict=True):
            p.data = values.view(p.shape)
            p.grad = slot.view(p.shape)
        buffer = nn.Parameter(data)
        buffer.grad = grad
        return buffer

    @property
    def grads(self) -> list[Tensor]:
        """The gradient of each buffer."""
        return [b.grad for b in self.buffers if b.grad is not None]

    def zero_grad(self) -> None:
        """Clear gradients in place: the views must survive."""
        for grad in self.grads:
            grad.zero_()

    def change(self) -> Tensor:
        """Euclidean norm of the difference from the start, a scalar."""
        return get_total_norm(
            [b.detach() - s for b, s in zip(self.buffers, self.starts, strict=True)]
        )

    def start_of(self) -> dict[int, Tensor]:
        """Views of `starts` in the shape of each parameter, by the parameter's ``id``."""
        return {
            id(p): values.view(p.shape)
            for start, group in zip(self.starts, self._groups, strict=True)
            for p, values in zip(group, start.split([p.numel() for p in group]), strict=True)
        }

    def masks(self, model: LanguageModel, indices: Indices) -> list[Tensor]:
        """Which scalars of each buffer, ``[n]`` bool, belong to these rank indices of the pairs of
        factors that are mounted on a model, or to no pair (a head)."""
        marked = {id(p): torch.ones_like(p, dtype=torch.bool) for p in self.parameters}
        for path, layer in model.layers.items():
            update: object = layer.update
            if isinstance(update, LowRankLayer):
                for factor, dim in ((update.a, 0), (update.b, 1)):  # A [r, d_in], B [d_out, r]
                    if id(factor) in marked:
                        at = torch.tensor(indices[path], dtype=torch.int64, device=factor.device)
                        marked[id(factor)].zero_().index_fill_(dim, at, True)
        return [torch.cat([marked[id(p)].reshape(-1) for p in group]) for group in self._groups]

    def release(self) -> None:
        """Forget the gradients; the parameters keep their values."""
        for p in self.parameters:
            p.grad = None


class ChosenScalars:
    """Some scalars of flat buffers, gathered into buffers of their own, in which they train.

    An optimizer of these buffers knows of no others: the rest has no state, no decay and no part in
    a norm, and keeps every bit.

    Args:
        buffers: with gradients.
        masks: ``[n]`` bool of each: its scalars that train.
    """

    def __init__(self, buffers: Sequence[nn.Parameter], masks: Sequence[Tensor]) -> None:
        pairs = [(b, mask.nonzero()[:, 0]) for b, mask in zip(buffers, masks, strict=True)]
        self._parts = [(b, at) for b, at in pairs if len(at)]
        self.buffers = [nn.Parameter(b.detach()[at]) for b, at in self._parts]
        for part in self.buffers:
            part.grad = torch.zeros_like(part)

    def gather(self) -> None:
        """Copy the present gradients of the whole buffers."""
        for part, (whole, at) in zip(self.buffers, self._parts, strict=True):
            assert part.grad is not None
            assert whole.grad is not None
            torch.index_select(whole.grad, 0, at, out=part.grad)

    @torch.no_grad()
    def scatter(self) -> None:
        """Copy the trained values back."""
        for part, (whole, at) in zip(self.buffers, self._parts, strict=True):
            whole.index_copy_(0, at, part)


@runtime_checkable
class LowRankLayer(Protocol):
    """A mounted update that is a pair of factors; any class with these attributes is one."""

    a: Tensor
    b: Tensor
    scale: float


def trained_state(model: LanguageModel, flat: FlatParameters) -> TrainedState:
    """The parameters that are mounted on a model and trained in flat buffers, before the first
    step, as a local term sees them."""
    buffers = [
        TrainedBuffer(b.detach(), start, grad)
        for b, start, grad in zip(flat.buffers, flat.starts, flat.grads, strict=True)
    ]
    starts, layers, factors = flat.start_of(), [], set[int]()
    linear = model.linear() or {}
    for path, layer in model.layers.items():
        update: object = layer.update
        if isinstance(update, LowRankLayer) and {id(update.a), id(update.b)} & starts.keys():
            layers.append(_layer(update, starts, linear.get(path)))
            factors |= {id(update.a), id(update.b)}
    own = {id(p) for p in model.own_parameters()}
    shared = [p for p in flat.parameters if id(p) not in own]
    if own:  # buffers hold what is not shared too
        buffers = [_buffer(p, starts) for p in shared]
    rest = [_buffer(p, starts) for p in shared if id(p) not in factors]
    return TrainedState(buffers, layers, rest)


def _buffer(p: nn.Parameter, starts: Mapping[int, Tensor]) -> TrainedBuffer:
    """One parameter as part of its buffer, ``[n]``."""
    assert p.grad is not None
    return TrainedBuffer(p.detach().view(-1), starts[id(p)].reshape(-1), p.grad.view(-1))


def _layer(
    update: LowRankLayer, starts: Mapping[int, Tensor], linear: Factors | None
) -> TrainedLayer:
    """One layer's factors. A factor that is not trained keeps its value, so it is its own start."""
    return TrainedLayer(
        a=update.a.detach(),
        b=update.b.detach(),
        start_a=starts.get(id(update.a), update.a.detach()),
        start_b=starts.get(id(update.b), update.b.detach()),
        grad_a=update.a.grad if id(update.a) in starts else None,
        grad_b=update.b.grad if id(update.b) in starts else None,
        scale=update.scale,
        linear_a=None if linear is None else linear.a.to(update.a),
        linear_b=None if linear is None else linear.b.to(update.b),
    )
