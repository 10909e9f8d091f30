"""Local training in which a client switches vectors by itself (SwitchLoRA's dense mode)."""

from collections.abc import Sequence
from dataclasses import dataclass

from fedlora.core.payload import Payload
from fedlora.core.technique import Technique
from fedlora.core.types import TrainJob
from fedlora.data.batches import TokenExample
from fedlora.models.language_model import LanguageModel
from fedlora.techniques.rebased.payload import Rebased
from fedlora.techniques.switchlora.local import train_switching
from fedlora.techniques.switchlora.schedule import Switching
from fedlora.training.loop import Trace


@dataclass(frozen=True)
class SwitchTraining(Switching, Technique):
    """A client trains factors over a base that may move, and switches their vectors."""

    key = "client/technique=switchlora"
    does = (
        "lets clients switch vectors by themselves, so that each one's frozen weights move their "
        "own way"
    )
    averaged = "switched vectors, over a base that moves for all clients alike"
    client = "client=switchlora"
    strategy = "strategy=switchlora"
    alone = "switches of vectors one by one: every client's base moves its own way"

    def train(
        self, model: LanguageModel, job: TrainJob, examples: Sequence[TokenExample]
    ) -> tuple[Payload, Trace]:
        """Gradient steps on the factors, with switches between them."""
        return train_switching(model, job, examples, self)

    def sends(self, start: Payload) -> type[Payload]:
        """The change of the weights: factors have no meaning over another client's base."""
        return Rebased
