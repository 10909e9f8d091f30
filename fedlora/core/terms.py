"""A term of the local objective that refers to the start of a round: an open base class.

Every engine calls it once per optimizer step, after the gradient of the loss and before clipping.
A method adds its term as one subclass with one YAML file in conf/client/term and edits no engine.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class TrainedBuffer:
    """Trained scalars in one flat buffer."""

    now: Tensor
    """``[p]``: present values."""
    start: Tensor
    """``[p]``: values that the client received."""
    grad: Tensor
    """``[p]``: gradient of the loss; a term adds its own in place."""


@dataclass(frozen=True, eq=False)
class TrainedLayer:
    """One layer's factors of ``ΔW = scale B A``: views of the buffers, not copies."""

    a: Tensor
    """``[r, d_in]``"""
    b: Tensor
    """``[d_out, r]``"""
    start_a: Tensor
    """``[r, d_in]``, as received."""
    start_b: Tensor
    """``[d_out, r]``, as received."""
    grad_a: Tensor | None
    """``[r, d_in]``; None: A is not trained."""
    grad_b: Tensor | None
    """``[d_out, r]``; None: B is not trained."""
    scale: float
    """``alpha / r``."""
    linear_a: Tensor | None = None
    """``[r, d_in]``: gradient of a linear term that came with the start (`Payload.linear`)."""
    linear_b: Tensor | None = None
    """``[d_out, r]``: the same for B."""


@dataclass(frozen=True, eq=False)
class TrainedState:
    """What one client trains of the federated model, as tensors that follow the training.

    A head that a client keeps (``model.head=local``) is no part of it: it starts where this client
    left it, not where the others are.
    """

    buffers: Sequence[TrainedBuffer]
    """All trained scalars, each once."""
    layers: Sequence[TrainedLayer]
    """The same by layer; empty where what is trained is not a pair of low-rank factors."""
    rest: Sequence[TrainedBuffer] = ()
    """Those that belong to no layer: an averaged head. Views of the same numbers."""


@dataclass(frozen=True)
class LocalTerm(ABC):
    """A term of the local objective. Its fields are the schema of its YAML."""

    @property
    def needs_factors(self) -> bool:
        """Whether it is defined for pairs of low-rank factors only (`TrainedState.layers`)."""
        return False

    @abstractmethod
    def add_gradient(self, state: TrainedState) -> None:
        """Add the gradient of the term to that of the loss, in place; called without autograd."""
