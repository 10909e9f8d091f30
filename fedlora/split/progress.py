"""The progress of one client in a round of a split, and its losses on the way."""

from dataclasses import dataclass, field
from enum import Enum

from fedlora.core.types import Adapter, Client, Failure
from fedlora.split.protocol import Down, Up, label_bytes, parts_bytes
from fedlora.training.loop import Trace
from fedlora.wire.rows import Parts

MOST_MISSES = 2
"""After this number of missing or wrong answers in a row a client is out for the round."""


class Phase(Enum):
    """What the server still expects from a client."""

    TRAINING = "training"
    """Steps, and its adapters after the last one or for an average."""
    RETURNED = "returned"
    """Nothing: its adapters have arrived."""
    LOST = "lost"
    """Nothing: it is out for the round."""


class Loss(Enum):
    """What a client loses when its answer is missing or wrong."""

    STEP = "loses step {step}"
    GRADIENT = "loses the gradient of step {of}"
    ADAPTERS = "sends no adapters"
    """Nothing is lost yet: it is asked again."""

    @staticmethod
    def of(down: Down) -> "Loss":
        """What a client loses if it does not answer the message of one exchange."""
        if down.forward or down.middle is not None:
            return Loss.STEP
        return Loss.ADAPTERS if down.gradient is None else Loss.GRADIENT

    def describe(self, down: Down) -> str:
        """Words for a message."""
        return self.value.format(step=down.step, of=down.of)


@dataclass
class ClientStats:
    """Counts and losses of one client in the round."""

    losses: list[float] = field(default_factory=list)
    """Mean loss of each step that reached the server."""
    tokens: list[int] = field(default_factory=list)
    """Supervised tokens of each of these steps."""
    norms: list[float] = field(default_factory=list)
    """Gradient norm of each optimizer step of the client, before clipping."""
    up: int = 0
    """Bytes of activations, labels and gradients that it sent, and of adapters within the round."""
    down: int = 0
    """Bytes of gradients and hidden states that it was sent, and of averages within the round."""
    dropped: int = 0
    """Steps that it lost, or whose gradient did not reach it."""
    rows: int = 0
    """Tokens whose activations it sent."""
    widest: int = 0
    """Tokens of its largest step, padding included."""

    def metrics(self, moved: float) -> dict[str, float]:
        """The metrics of any client (`Trace.metrics`), with bytes and lost steps.

        Args:
            moved: Euclidean norm of the change of the client's adapters in the round.
        """
        norms = tuple(self.norms) or (0.0,)  # its only gradient may have been lost
        trace = Trace(tuple(self.losses), tuple(self.tokens), norms, moved)
        return trace.metrics() | {
            "exchanged_up": float(self.up),
            "exchanged_down": float(self.down),
            "exchanged_tokens": float(self.rows),
            "step_tokens": float(self.widest),
            "dropped_steps": float(self.dropped),
        }


@dataclass(frozen=True)
class Gradient:
    """A gradient that the server sends with a client's next exchange."""

    step: int
    """The step whose activations it belongs to."""
    parts: Parts
    rate: float
    """Learning rate of the client's optimizer step."""


@dataclass
class ClientProgress:
    """One client in one round: a small state machine.

    TRAINING --its adapters arrive--> RETURNED --an average, and it has steps left--> TRAINING
    TRAINING --`MOST_MISSES` in a row--> LOST
    """

    client: Client
    done: int
    """Steps before this round: the first step of the round has this number."""
    steps: int
    """Steps in this round."""
    u_shaped: bool
    phase: Phase = Phase.TRAINING
    stats: ClientStats = field(default_factory=ClientStats)
    misses: int = 0
    """Missing or wrong answers in a row."""
    gradient: Gradient | None = None
    """Sent with the next exchange only, whether that is answered or not."""
    average: Adapter | None = None
    """Sent with every exchange until one is answered."""
    answer: Up | None = None
    """Its last answer with adapters, once it has `RETURNED`."""
    failure: Failure | None = None
    """Why it is `LOST`."""

    @property
    def adapter(self) -> Adapter:
        """The adapters that it has returned."""
        assert self.answer is not None
        assert self.answer.adapter is not None
        return self.answer.adapter

    def ask(self, k: int, *, forward: bool) -> Down:
        """The next message to the client.

        Args:
            k: steps of the round so far.
            forward: whether to ask for another step; else for its adapters.
        """
        gradient, self.gradient = self.gradient, None
        return Down(
            step=self.done + k,
            gradient=None if gradient is None else gradient.parts,
            of=-1 if gradient is None else gradient.step,
            rate=0.0 if gradient is None else gradient.rate,
            adapter=self.average,
            forward=forward,
            upload=not forward,
        )

    def on_answer(self, down: Down, up: Up) -> None:
        """Record an answer that has been checked."""
        self._count(down, up)
        self.average = None
        # With a U-shape a step is done only when the tail has answered too.
        if not (down.forward and self.u_shaped):
            self.misses = 0
        if down.upload:
            self.phase, self.answer = Phase.RETURNED, up

    def _count(self, down: Down, up: Up) -> None:
        stats = self.stats
        stats.up += parts_bytes(up.hidden) + label_bytes(up)
        if up.shape is not None:
            stats.rows += up.shape.tokens
            stats.widest = max(stats.widest, len(up.shape.lengths) * up.shape.width)
        if down.gradient is not None:
            stats.norms.append(up.grad_norm)

    def on_miss(self, down: Down, failure: Failure) -> str:
        """Record that an answer is missing or wrong; a log line that says what follows."""
        loss = Loss.of(down)
        self.stats.dropped += loss is not Loss.ADAPTERS
        self.misses += 1
        line = f"client {self.client.id} {loss.describe(down)}"
        if self.misses >= MOST_MISSES:
            self.phase, self.failure = Phase.LOST, failure
            line += " and is out for the round"
        return f"{line}: {failure.kind}: {failure.message}"

    def refuse(self, reason: str) -> str:
        """Take the client out of the round for what it answered; a log line."""
        self.phase = Phase.LOST
        self.failure = Failure(self.client, "RejectedUpdate", reason)
        return f"client {self.client.id} is out for the round: {reason}"

    def on_step(self, gradient: Gradient, loss: float, tokens: int) -> None:
        """Record a step that the server has trained on."""
        self.gradient = gradient
        self.stats.losses.append(loss)
        self.stats.tokens.append(tokens)

    def resume(self, average: Adapter) -> None:
        """Continue with the average in place of the adapters that it has returned."""
        self.phase, self.answer, self.average = Phase.TRAINING, None, average
