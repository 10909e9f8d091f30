"""The base class of every strategy: the hooks of a federated method in a Flower ``Strategy``.

To add a method, write one file beside this one: pure functions of tensors, and below them a frozen
dataclass that inherits `LoRAStrategy`. Its fields are the method's hyperparameters and the schema
of its YAML; its hooks are pure functions of an explicit state and never see Flower, Ray or a path.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from fedlora.core.errors import RunError
from fedlora.core.technique import Technique
from fedlora.server.method import Method
from fedlora.server.plain_flower import PlainFlower
from fedlora.techniques.lora.technique import LoRA


@dataclass(frozen=True, eq=False)
class LoRAStrategy(Method, Strategy):
    """A Flower strategy that averages as the hooks of `Method` say.

    Two drivers ask the hooks. `start` is Flower's own: every node is a client with an adapter of
    its own rank (`fedlora.server.plain_flower`). A simulation's is
    `fedlora.server.flower.FederatedRun`, where a node is a slot that serves many virtual clients.
    A strategy holds nothing between rounds, so Flower's other methods belong to the drivers.
    """

    technique: ClassVar[type[Technique]] = LoRA

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Federate Flower nodes that each train an adapter of their own.

        Args:
            grid: of the ServerApp.
            initial_arrays: an adapter under PEFT's names; its modules are adapted, its ranks are
                the largest that a node may send, and its product is where the run begins.
            num_rounds: of training, each followed by an evaluation.
            timeout: seconds to wait for replies.
            train_config: sent to nodes; ``lora_alpha`` is needed.
            evaluate_config: sent to nodes.
            evaluate_fn: evaluates the arrays on the server.

        Raises:
            RunError: if the method sends what is no adapter, or too few nodes answer.
        """
        return PlainFlower(self).start(
            grid=grid,
            initial_arrays=initial_arrays,
            num_rounds=num_rounds,
            timeout=timeout,
            train_config=train_config,
            evaluate_config=evaluate_config,
            evaluate_fn=evaluate_fn,
        )

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
            f"{name} holds nothing between rounds: call {name}(...).start(grid, initial_arrays), "
            f"fedlora.server.plain_flower.PlainFlower({name}(...)) for other settings, or "
            "fedlora.server.flower.FederatedRun(session, ...).start(grid) for virtual clients"
        )
