"""What a federated LoRA method is, and the one place where it meets Flower on the server.

To add a method, write one file beside this one: pure functions of tensors, and below them a frozen
dataclass that inherits `LoRAStrategy`. Its fields are the method's hyperparameters and the schema
of its YAML; its hooks are pure functions of an explicit state and never see Flower, Ray or a path.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fedlora.types import Client, LocalPlan, Payload, Ranks, Setting, Update

State: TypeAlias = Mapping[str, Tensor]
"""What the server remembers between rounds: named tensors, never mutated. A checkpoint holds
exactly this, so everything that matters to the next round must be in it."""


@dataclass(frozen=True, eq=False)
class LoRAStrategy(Strategy):
    """A Flower strategy over virtual clients of unequal rank.

    Subclasses override the hooks below; each is a pure function. `aggregate` receives updates
    sorted by client id, already validated, never empty; its result must not depend on their order
    beyond floating-point rounding, and must not alias or change its inputs.
    """

    @abstractmethod
    def init_state(self, setting: Setting) -> State:
        """The state before round 1."""

    def enlist(self, state: State, client: Client) -> Client:
        """The client as it stands now; methods that change a client's ranks override this."""
        return client

    @abstractmethod
    def start_adapter(self, state: State, client: Client) -> Payload:
        """What an enlisted client starts the round from. Equal ranks must give equal payloads."""

    def plan(self, state: State, client: Client, base: LocalPlan) -> LocalPlan:
        """What an enlisted client does this round, given the configured plan."""
        return base

    @abstractmethod
    def aggregate(self, state: State, updates: Sequence[Update]) -> State:
        """The next state."""

    @abstractmethod
    def global_adapter(self, state: State, ranks: Ranks | None = None) -> Payload:
        """The global model's update at the given ranks; ``None``: as exactly as it is known."""
