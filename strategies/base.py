"""What every strategy inherits: the hooks of a federated method, and Flower's name for it.

To add a method, write one file beside this one: pure functions of tensors, and below them a frozen
dataclass that inherits `LoRAStrategy`. Its fields are the method's hyperparameters and the schema
of its YAML; its hooks are pure functions of an explicit state and never see Flower, Ray or a path.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.serverapp.strategy import Result, Strategy

from fedlora.core.errors import RunError
from fedlora.core.technique import Technique
from fedlora.server.method import Method
from fedlora.techniques.lora.technique import LoRA


@dataclass(frozen=True, eq=False)
class LoRAStrategy(Method, Strategy):
    """A Flower strategy over virtual clients of unequal rank.

    Flower's own loop sends one model to nodes that are clients. Here a node is a slot that serves
    many virtual clients, each with a start of its own rank: a `FederatedRun`
    (`fedlora.server.flower`) drives the hooks of `Method` instead. The methods below are Flower's
    and refuse to go on without one.
    """

    technique: ClassVar[type[Technique]] = LoRA

    def start(self, *args: Any, **kwargs: Any) -> Result:
        """Flower's loop over nodes that are clients.

        Raises:
            RunError: always; a run drives a strategy.
        """
        self._refuse()

    def summary(self) -> None:
        """Flower's line for its log."""
        self._refuse()

    def configure_train(self, *args: Any, **kwargs: Any) -> Iterable[Message]:
        """Messages of Flower's loop."""
        self._refuse()

    def aggregate_train(
        self, *args: Any, **kwargs: Any
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Replies of Flower's loop."""
        self._refuse()

    def configure_evaluate(self, *args: Any, **kwargs: Any) -> Iterable[Message]:
        """Messages of Flower's loop."""
        self._refuse()

    def aggregate_evaluate(self, *args: Any, **kwargs: Any) -> MetricRecord | None:
        """Replies of Flower's loop."""
        self._refuse()

    def _refuse(self) -> NoReturn:
        name = type(self).__name__
        raise RunError(
            f"{name} serves virtual clients, which Flower's own loop does not know: build a "
            f"Session with method={name}(...) and call fedlora.server.flower.FederatedRun("
            "session, worker=..., source=...).start(grid)"
        )
