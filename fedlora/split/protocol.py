"""The messages between the server and the clients of a split, as values.

Each step has one exchange: the gradient of the previous step goes down, the activations of the next
one come up. With a U-shape a second exchange follows: the server's hidden states go down to the
client's tail, their gradient comes up. Between two exchanges a client keeps only its adapters, its
optimizer state and a count of steps.
"""

from dataclasses import dataclass, field

from fedlora.core.checks import at_least
from fedlora.core.types import (
    Adapter,
    Client,
    LocalPlan,
)
from fedlora.split.batches import Labels, Shape
from fedlora.split.noise import Noise
from fedlora.split.trainable import OptimizerState
from fedlora.wire.rows import Parts, Wire


@dataclass(frozen=True)
class Cut:
    """Which blocks a client holds."""

    first: int
    """The client holds blocks ``0..first-1``."""
    tail: int = -1
    """With a U-shape the client also holds the last ``tail`` blocks, final norm and output
    embedding, and sends no labels; -1: no U-shape."""

    def __post_init__(self) -> None:
        at_least("cut", self.first, 0)
        at_least("tail", self.tail, -1)

    @property
    def u_shaped(self) -> bool:
        """Whether labels stay with the client."""
        return self.tail >= 0

    def owns(self, block: int, blocks: int) -> bool:
        """Whether the client holds block ``block`` of a model with ``blocks`` blocks."""
        return block < self.first or (self.u_shaped and block >= blocks - self.tail)


@dataclass(frozen=True)
class Terms:
    """Settings that are the same for all clients of a run."""

    seed: int
    activations: Wire = field(default_factory=Wire)
    """Number format of hidden states: they go up, with a U-shape down again."""
    gradients: Wire = field(default_factory=Wire)
    """Number format of gradients: they go down, with a U-shape up before."""
    noise: Noise = field(default_factory=Noise)
    smoothing: float = 0.0
    """Label smoothing in the training loss."""
    keep_graphs: bool = False
    """Keep a client's forward pass in its process between two messages, and use it if the next
    message reaches the same process, instead of computing it again. Results are bitwise
    identical."""

    def __post_init__(self) -> None:
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing={self.smoothing!r} must lie in [0, 1)")


@dataclass(frozen=True)
class InitMessage:
    """Everything that a client needs to begin a round."""

    client: Client
    plan: LocalPlan
    cut: Cut
    terms: Terms
    adapter: Adapter
    """Adapters of the blocks that it holds."""
    optimizer_state: OptimizerState
    """Empty: a new optimizer."""
    round: int
    """Counted from 1."""


@dataclass(frozen=True)
class Down:
    """The server's message to a client in one exchange.

    A part that is missing is not done. The order is fixed: gradient, optimizer step, new adapter,
    forward pass; or the tail alone.
    """

    step: int
    """The step of the forward pass or the tail, counted from the client's first step."""
    gradient: Parts | None = None
    """Gradient with respect to the activations of step ``of``."""
    of: int = -1
    rate: float = 0.0
    """Learning rate of the step that ``gradient`` belongs to."""
    adapter: Adapter | None = None
    """The average that replaces the client's own adapters."""
    forward: bool = False
    """Whether the client computes activations."""
    middle: Parts | None = None
    """U-shape: hidden states, the input of the client's tail."""
    upload: bool = False
    """Whether the client sends adapters and optimizer state back."""


@dataclass(frozen=True)
class Up:
    """A client's answer."""

    step: int
    hidden: Parts | None = None
    """Activations at the cut; from a tail: the gradient of the loss with respect to ``middle``."""
    shape: Shape | None = None
    labels: Labels | None = None
    """Never with a U-shape."""
    loss: float = 0.0
    """U-shape: mean negative log-likelihood of the step's supervised tokens."""
    tokens: int = 0
    """Supervised tokens of the step. With a U-shape the server learns nothing else of the
    labels."""
    grad_norm: float = 0.0
    """Gradient norm of the optimizer step in this exchange, before clipping."""
    adapter: Adapter | None = None
    optimizer_state: OptimizerState | None = None


def parts_bytes(parts: Parts | None) -> int:
    """Bytes of activations or gradients on the wire, without headers."""
    return 0 if parts is None else sum(int(p.nbytes) for p in parts.values())


def label_bytes(up: Up) -> int:
    """Bytes of a step's row lengths, first supervised positions, gaps and labels: all int32."""
    if up.shape is None:
        return 0
    rows = len(up.shape.lengths)
    if up.labels is None:
        return 4 * rows
    return 4 * (2 * rows + len(up.labels.gaps) + int(up.labels.targets.numel()))
