"""Apple's pfl as a side of the benchmark: its FedAvg trains one user after another.

``pfl`` (https://github.com/apple/pfl-research) is imported by this module alone and is needed by
nothing else (extra ``pfl``).
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.common_types import Population
from pfl.context import CentralContext
from pfl.hyperparam import NNTrainHyperParams
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn

from fedlora.core.types import LocalPlan, TrainJob
from simulations.bench.engine.cases import World, steps
from simulations.bench.engine.sides import Outcome, PeftLoop, collate, row, summary


class Network(nn.Module):
    """The PEFT model as pfl wants it: with ``loss`` and ``metrics``. It notes every loss."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.losses: list[float] = []
        self.counts: list[int] = []

    def loss(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        """The mean loss of a batch's supervised tokens."""
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        loss: Tensor = self.model(**batch).loss
        self.losses.append(loss.item())
        self.counts.append(int((labels[:, 1:] != -100).sum()))
        return loss

    def metrics(self) -> dict[str, float]:
        """None."""
        return {}


class User:
    """The chosen batches of one client, in their order, as a pfl dataset."""

    def __init__(self, batches: Sequence[dict[str, Tensor]]) -> None:
        self.batches = batches
        self.train_kwargs: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self.batches)

    def iter(self, batch_size: int | None) -> Iterator[tuple[Tensor, ...]]:
        """All batches; ``batch_size`` is theirs already."""
        return (tuple(batch.values()) for batch in self.batches)


class DecayingAdamW(torch.optim.AdamW):
    """AdamW whose rate falls linearly to zero within ``count`` steps: pfl has constant rates."""

    def __init__(self, trained: Sequence[Tensor], plan: LocalPlan, count: int) -> None:
        super().__init__(trained, plan.lr, plan.betas, plan.eps, plan.weight_decay)
        self.plan, self.count, self.done = plan, count, 0

    def step(self, closure: Any = None) -> Any:
        """One step at the rate of the schedule."""
        for group in self.param_groups:
            group["lr"] = self.plan.lr * (1 - self.done / self.count)
        self.done += 1
        return super().step(closure)


class PflSide(PeftLoop):
    """pfl's `FederatedAveraging.simulate_one_user` on the PEFT model of the plain loop.

    Raises:
        ValueError: if clients differ in ranks, which one pfl model cannot.
    """

    def __init__(self, world: World) -> None:
        super().__init__(world)
        if len(self._trained) > 1:
            raise ValueError("pfl trains one model: all clients must have the same ranks")
        self.wrapped = Network(self.model)
        self._job: TrainJob | None = None
        self._batches = 0
        self._model = PyTorchModel(self.wrapped, self._optimizer, None)
        self._algorithm = FederatedAveraging()

    def _optimizer(self, parameters: Any, lr: float) -> DecayingAdamW:
        assert self._job is not None
        trained = [p for p in parameters if p.requires_grad]
        return DecayingAdamW(trained, self._job.plan, self._batches)

    def train(self, jobs: Sequence[TrainJob]) -> Iterator[Outcome]:
        """One user after another. What is aggregated is the model difference, as in pfl."""
        names = {id(v): name for name, v in self._model.variable_map.items()}
        for job in jobs:
            trained, self._job = self.reset(job), job
            self.wrapped.losses, self.wrapped.counts = [], []
            user = User([collate(b, job.plan.loss) for b in steps(job, self.store)])
            self._batches = len(user)
            change, _ = self._algorithm.simulate_one_user(self._model, user, _context(job))
            ended = [p.detach() + change[names[id(p)]] for p in trained]
            losses = summary(self.wrapped.losses, self.wrapped.counts)
            yield Outcome(job.client.id, losses, row(ended))


def _context(job: TrainJob) -> Any:
    plan = job.plan
    train = NNTrainHyperParams(
        local_batch_size=plan.batch_size,
        local_num_epochs=1,
        local_learning_rate=plan.lr,
        local_max_grad_norm=plan.max_grad_norm or None,
    )
    return CentralContext(
        current_central_iteration=job.round,
        do_evaluation=False,
        cohort_size=1,
        population=Population.TRAIN,
        model_train_params=train,
        model_eval_params=None,
        algorithm_params=NNAlgorithmParams(1, 1, 1, None),
        seed=job.seed,
    )
