"""SPP's local training: gradient steps on alpha, beta or both."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fedlora.core.payload import Payload
from fedlora.core.technique import Audit, Technique
from fedlora.core.types import Client, TrainJob
from fedlora.data.batches import TokenExample
from fedlora.models.language_model import LanguageModel
from fedlora.techniques.spp.audit import ZeroAudit
from fedlora.techniques.spp.payload import MaskedScale, select_sent
from fedlora.training.local import train_mounted
from fedlora.training.loop import Trace


@dataclass(frozen=True)
class Scaling(Technique):
    """A client scales the weights of a pruned base."""

    key = "client/technique=spp"
    does = "scales the weights of a pruned model by alpha and beta"
    averaged = "SPP's alpha and beta"
    client = "client=spp"
    strategy = "strategy=spp"
    keeps_zeros = True

    def train(
        self, model: LanguageModel, job: TrainJob, examples: Sequence[TokenExample]
    ) -> tuple[Payload, Trace]:
        """Gradient steps on what the start says."""
        return train_mounted(model, job, examples)

    def completed(self, job: TrainJob, trained: Payload) -> tuple[Client, Payload]:
        """What the client has trained, not what it was told.

        Raises:
            TypeError: for another payload.
        """
        if not isinstance(trained, MaskedScale):
            raise TypeError(f"{self.key} trains a MaskedScale, not {trained.noun}")
        return job.client, select_sent(trained)

    def audit(self, folder: Path, dtype: torch.dtype | None) -> Audit:
        """Whether the merged model keeps its zeros."""
        return ZeroAudit(folder, dtype)
