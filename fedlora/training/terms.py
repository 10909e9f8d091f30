"""Terms of the local objective: the proximal term of FedProx, and corrections of client drift.

Li et al., "Federated Optimization in Heterogeneous Networks", arXiv:1812.06127; SCAFFOLD,
arXiv:1910.06378; FedDyn, arXiv:2111.04263.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from fedlora.core.checks import at_least, one_of
from fedlora.core.terms import LocalTerm, TrainedBuffer, TrainedLayer, TrainedState

METRICS = ("factor", "product")


@dataclass(frozen=True)
class FedProx(LocalTerm):
    """``mu / 2`` times the squared distance from the start of the round.

    ``factor``: ``mu/2 ‖θ - θ_0‖²`` over all trained scalars, as in the paper. It is not a function
    of the update ``ΔW``: factors ``A c, B / c`` are the same update at another distance, so the
    best ``mu`` depends on alpha and on how the server splits its factors.

    ``product``: ``mu/2 Σ_layers ‖s B A - s B_0 A_0‖_F²``, which is a function of the update. With
    ``B A - B_0 A_0 = (B - B_0) A + B_0 (A - A_0)`` its gradient takes four products ``r x r`` and
    no matrix ``d_out x d_in``:

        dA = mu s² ((Bᵀ (B - B_0)) A + (Bᵀ B_0) (A - A_0))
        dB = mu s² ((B - B_0) (A Aᵀ) + B_0 ((A - A_0) Aᵀ))

    The distance is that of what is federated. An averaged head ``h`` of a classifier adds
    ``mu/2 ‖h - h_0‖²`` under both metrics, a head that the client keeps adds nothing.

    Under both metrics the first step of a round equals that of the plain loss.
    """

    mu: float = 0.01
    """Weight of the term; 0: no term."""
    metric: str = "factor"
    """``factor`` or ``product``."""

    def __post_init__(self) -> None:
        at_least("client.term.mu", self.mu, 0)
        one_of("client.term.metric", self.metric, METRICS)

    @property
    def needs_factors(self) -> bool:
        """Whether the term needs low-rank factors: the product metric does."""
        return self.metric == "product"

    def add_gradient(self, state: TrainedState) -> None:
        """Add the gradient of the term to the gradients of the loss.

        Raises:
            ValueError: for ``product`` if the client does not train low-rank factors.
        """
        if self.mu == 0:
            return
        if self.metric == "factor":
            self._pull_scalars(state.buffers)
            return
        if not state.layers:
            raise ValueError(
                "client.term.metric=product compares products B A, and this client trains no "
                "low-rank factors: use client.term.metric=factor"
            )
        for layer in state.layers:
            self._pull(layer)
        self._pull_scalars(state.rest)

    def _pull_scalars(self, buffers: Sequence[TrainedBuffer]) -> None:
        for buffer in buffers:
            buffer.grad.add_(buffer.now - buffer.start, alpha=self.mu)

    def _pull(self, layer: TrainedLayer) -> None:
        """Add the gradient of the product metric of one layer (see the class)."""
        # Factors are A [r, d_in] and B [d_out, r]; the inner products are r x r.
        a, b, weight = layer.a, layer.b, self.mu * layer.scale**2
        moved_a, moved_b = a - layer.start_a, b - layer.start_b
        if layer.grad_a is not None:
            grad = (b.t() @ moved_b) @ a + (b.t() @ layer.start_b) @ moved_a  # [r, d_in]
            layer.grad_a.add_(grad, alpha=weight)
        if layer.grad_b is not None:
            grad = moved_b @ (a @ a.t()) + layer.start_b @ (moved_a @ a.t())  # [d_out, r]
            layer.grad_b.add_(grad, alpha=weight)


@dataclass(frozen=True)
class Correction(LocalTerm):
    """``⟨d, θ⟩ + proximal / 2 ‖θ - θ_0‖²`` over the factors ``θ``, of gradient
    ``d + proximal (θ - θ_0)``; ``d`` came with the start (`Payload.linear`).

    A head that trains beside the factors has neither.
    """

    proximal: float = 0.0
    """Weight of the squared distance from the start."""

    def __post_init__(self) -> None:
        at_least("proximal", self.proximal, 0)

    @property
    def needs_factors(self) -> bool:
        """Corrections are of factors."""
        return True

    def add_gradient(self, state: TrainedState) -> None:
        """Add the gradient of the term to the gradients of the loss.

        Raises:
            ValueError: if the start brought no correction.
        """
        if not state.layers or any(x.linear_a is None for x in state.layers):
            raise ValueError("the start brought no correction of the gradient of its factors")
        for layer in state.layers:
            sides = (
                (layer.grad_a, layer.linear_a, layer.a, layer.start_a),
                (layer.grad_b, layer.linear_b, layer.b, layer.start_b),
            )
            for grad, linear, now, start in sides:
                if grad is None or linear is None:
                    continue
                grad.add_(linear)
                if self.proximal:
                    grad.add_(now - start, alpha=self.proximal)
