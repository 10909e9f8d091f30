"""Sparse training: gradient steps on chosen coordinates of the base weights."""

from collections.abc import Sequence
from dataclasses import dataclass

from fedlora.core.payload import Payload
from fedlora.core.technique import Technique
from fedlora.core.types import TrainJob
from fedlora.data.batches import TokenExample
from fedlora.models.language_model import LanguageModel
from fedlora.training.local import train_mounted
from fedlora.training.loop import Trace


@dataclass(frozen=True)
class Sparse(Technique):
    """A client trains the values of the mask that it starts from. A stage of ``slora``, which plans
    it itself."""

    key = "strategy=slora"
    does = "trains chosen coordinates of the base weights"
    averaged = "sparse updates under nested masks"
    client = "client=adamw"
    strategy = "strategy=slora"

    def train(
        self, model: LanguageModel, job: TrainJob, examples: Sequence[TokenExample]
    ) -> tuple[Payload, Trace]:
        """Gradient steps on the values."""
        return train_mounted(model, job, examples)
