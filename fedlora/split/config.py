"""How a round of split training runs, as one value."""

from dataclasses import dataclass, field

from fedlora.core.checks import at_least, one_of
from fedlora.split.noise import Noise
from fedlora.split.server import Rule
from fedlora.wire.rows import Wire


@dataclass(frozen=True, eq=False, kw_only=True)
class SplitConfig:
    """The method's options for a round of exchanges.

    The strategy inherits them, so they are keys of its YAML.
    """

    tail: int = -1
    """U-shape: clients also hold the last ``tail`` blocks, final norm and output embedding, and
    send no labels; -1: no U-shape, labels go to the server."""
    rule: Rule = field(default_factory=Rule)
    """How the server learns from several clients."""
    average_every: int = 0
    """Steps between averages of clients' adapters; 0: at the end of each round. Divides a round's
    steps."""
    transport: str = "local"
    """``local``: both stages in the server's process; ``messages``: all tensors are sent through
    Flower. Results are bitwise identical."""
    keep_graphs: bool = False
    """With ``messages``: `fedlora.split.protocol.Terms.keep_graphs`."""
    activations: Wire = field(default_factory=Wire)
    """Number format of activations, in both directions."""
    gradients: Wire = field(default_factory=Wire)
    """Number format of gradients."""
    noise: Noise = field(default_factory=Noise)
    """Clipping and noise of activations."""
    label_smoothing: float = 0.0
    """Label smoothing, in the training loss only."""
    server_lr: float = 0.0
    """Peak learning rate of the server; 0: the client's."""
    client_schedule: str = "same"
    """``same`` as the server's, or ``constant`` (as in the released code)."""
    horizon: int = 0
    """Steps over which ``client.schedule`` runs, from the first of the run; 0: within each round,
    as with other methods."""
    memory: str = "keep"
    """Optimizer state at averages and from round to round: ``keep`` it, as the paper does, or begin
    each round with a ``fresh`` one."""

    def __post_init__(self) -> None:
        at_least("strategy.tail", self.tail, -1)
        at_least("strategy.average_every", self.average_every, 0)
        at_least("strategy.server_lr", self.server_lr, 0)
        at_least("strategy.horizon", self.horizon, 0)
        one_of("strategy.transport", self.transport, ("local", "messages"))
        one_of("strategy.client_schedule", self.client_schedule, ("same", "constant"))
        one_of("strategy.memory", self.memory, ("keep", "fresh"))
        if self.rule.gradient == "joint" and self.tail > 0:
            raise ValueError(
                f"strategy.rule.gradient='joint' with strategy.tail={self.tail}: a tail learns "
                "from its client's own mean loss; choose own_mean, or tail <= 0"
            )
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"strategy.label_smoothing={self.label_smoothing!r} must be in [0, 1)")
