"""LoRA's local training: gradient steps on A and B, and rank self-pruning if it is planned."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from fedlora.core.payload import Payload
from fedlora.core.technique import Technique
from fedlora.core.types import Adapter, Client, LocalPlan, TrainJob
from fedlora.data.batches import TokenExample
from fedlora.models.language_model import LanguageModel
from fedlora.techniques.lora.payload import LowRankPayload
from fedlora.techniques.lora.self_pruning import SelfPrune, penalty, prune_client
from fedlora.training.local import train_mounted
from fedlora.training.loop import Trace


@dataclass(frozen=True)
class LoRA(Technique):
    """A client trains the factors that it starts from."""

    self_prune: SelfPrune | None = None
    """Regularise the last ranks and remove them if that made them smaller; ``heterolora`` sets
    it."""

    key = "client/technique=lora"
    does = "trains LoRA's A and B without switches"
    averaged = "LoRA's A and B, over a base that all clients hold alike"
    client = "client=adamw"
    strategy = "strategy=flexlora"
    fuses = True

    def train(
        self, model: LanguageModel, job: TrainJob, examples: Sequence[TokenExample]
    ) -> tuple[Payload, Trace]:
        """Gradient steps on the factors, over any base."""
        return train_mounted(model, job, examples)

    @classmethod
    def payload(cls, value: Payload | Adapter) -> Payload:
        """Strategies may give factors as plain mappings."""
        return value if isinstance(value, Payload) else LowRankPayload(value)

    def completed(self, job: TrainJob, trained: Payload) -> tuple[Client, Payload]:
        """HeteroLoRA's local decision, if it is planned.

        Raises:
            TypeError: for payloads without ranks.
        """
        if self.self_prune is None:
            return job.client, trained
        start, end = job.start.low_rank(), trained.low_rank()
        if start is None or end is None:
            kind = type(trained).__name__
            raise TypeError(f"client.technique.self_prune needs low-rank factors, not a {kind}")
        client, kept = prune_client(job.client, start, end, self.self_prune)
        return client, trained.trained(kept)

    @property
    def shrinks(self) -> bool:
        """Whether ranks may shrink: those of clients that prune."""
        return self.self_prune is not None

    @property
    def penalises(self) -> bool:
        """Whether the loss has a penalty: clients prune, and the regulariser has a weight."""
        return self.self_prune is not None and self.self_prune.weight > 0

    def penalty(self, parameters: Sequence[Sequence[Tensor]]) -> Tensor:
        """HeteroLoRA's regulariser of the last ranks."""
        assert self.self_prune is not None
        return self.self_prune.weight * penalty(parameters, self.self_prune)


def with_pruning(plan: LocalPlan, prune: SelfPrune) -> LocalPlan:
    """A plan of LoRA whose clients prune themselves.

    Raises:
        TypeError: for a plan of another technique.
    """
    if not isinstance(plan.technique, LoRA):
        raise TypeError(f"{plan.technique.key} has no ranks that a client could give up")
    return replace(plan, technique=replace(plan.technique, self_prune=prune))
