"""The sides that train the clients: our engines, a plain PEFT loop, and one Trainer per client.

Every side takes the same jobs and gives, client by client, its losses and the adapter it ended
with as one row of numbers, so that they can be held against each other before anything is timed.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import peft
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from fedlora.core.payload import plain_factors
from fedlora.core.types import (
    Adapter,
    LocalPlan,
    Ranks,
    TrainJob,
    Update,
)
from fedlora.data.batches import supervised_tokens, targets_of
from fedlora.data.store import Example
from fedlora.engine.base import EngineSpec
from fedlora.engine.fused import Fused
from fedlora.engine.sequential import Sequential
from fedlora.wire.codec import encode_payload
from simulations.bench.engine.cases import World, steps

ENGINES: Mapping[str, EngineSpec] = {
    "sequential": Sequential(),
    "padded": Fused(layout="padded", policy="length_match"),
    "ragged": Fused(layout="ragged", policy="refill"),
}


@dataclass(frozen=True)
class Outcome:
    """One trained client."""

    client: int
    losses: Mapping[str, float]
    """``loss`` (mean over tokens), ``loss_first``, ``loss_last`` and ``loss_mean`` (over steps), as
    far as the side knows them."""
    row: NDArray[np.float32]
    """The trained adapter: A and B of each module, flat."""


class Side(Protocol):
    """Trains clients one way."""

    network: Any
    """The base model that it runs."""

    def train(self, jobs: Sequence[TrainJob]) -> Iterator[Outcome]:
        """One outcome per job, as they finish.

        Raises:
            RuntimeError: if a client fails.
        """

    def work(self, jobs: Sequence[TrainJob]) -> None:
        """The same without anything that only the comparison needs."""

    def notes(self) -> tuple[str, ...]:
        """What it says of itself."""


class EngineSide:
    """One of our engines."""

    def __init__(self, world: World, spec: EngineSpec) -> None:
        store: Any = world.store
        self.network = world.network
        self.engine = spec.open(world.model, store)

    def work(self, jobs: Sequence[TrainJob]) -> None:
        """All clients through the engine; what comes out is let go."""
        deque(self.engine.train(jobs), maxlen=0)

    def train(self, jobs: Sequence[TrainJob]) -> Iterator[Outcome]:
        """All clients through the engine."""
        for result in self.engine.train(jobs):
            if not isinstance(result, Update):
                raise RuntimeError(f"client {result.client.id} failed: {result.traceback}")
            losses = {k: result.metrics[k] for k in ("loss", "loss_first", "loss_last")}
            yield Outcome(result.client.id, losses, encode_payload(result.payload)[0])

    def notes(self) -> tuple[str, ...]:
        """The engine's."""
        return self.engine.notes()


class PeftLoop:
    """What one would write by hand around PEFT, with the model built once.

    Clients of different ranks need different PEFT adapters; there is one for each rank pattern,
    made up front, and a client's start values are written into it.
    """

    def __init__(self, world: World) -> None:
        self.store = world.store
        self.network = world.network
        patterns: dict[Ranks, TrainJob] = {}
        for job in world.jobs:
            patterns.setdefault(job.client.ranks, job)
        first, *others = (lora_config(job) for job in patterns.values())
        self.model: Any = peft.get_peft_model(self.network, first, adapter_name="pattern0")
        for i, config in enumerate(others, 1):
            self.model.add_adapter(f"pattern{i}", config)
        self.model.config.use_cache = False
        self.model.train()
        self._active = ""
        self._trained = {
            ranks: (f"pattern{i}", self._weights(job, f"pattern{i}"))
            for i, (ranks, job) in enumerate(patterns.items())
        }

    def _weights(self, job: TrainJob, name: str) -> list[Tensor]:
        """A and B of each module of a PEFT adapter, in a row's order."""
        layers = [self.model.base_model.model.get_submodule(path) for path in adapter_of(job)]
        return [w for x in layers for w in (x.lora_A[name].weight, x.lora_B[name].weight)]

    def reset(self, job: TrainJob) -> list[Any]:
        """Make the job's adapter the active one and give it its start values."""
        name, trained = self._trained[job.client.ranks]
        if name != self._active:
            self.model.set_adapter(name)
            self._active = name
        values = [t for f in adapter_of(job).values() for t in (f.a, f.b)]
        with torch.no_grad():
            for parameter, value in zip(trained, values, strict=True):
                parameter.copy_(value)
        return trained

    def work(self, jobs: Sequence[TrainJob]) -> None:
        """One client after another."""
        deque(self.train(jobs), maxlen=0)

    def train(self, jobs: Sequence[TrainJob]) -> Iterator[Outcome]:
        """One client after another."""
        for job in jobs:
            trained = self.reset(job)
            losses = self.optimise(job, trained)
            yield Outcome(job.client.id, losses, row(trained))

    def notes(self) -> tuple[str, ...]:
        """None."""
        return ()

    def optimise(self, job: TrainJob, trained: list[Any]) -> dict[str, float]:
        """One client's steps; its losses."""
        plan, batches = job.plan, steps(job, self.store)
        optimizer = torch.optim.AdamW(trained, plan.lr, plan.betas, plan.eps, plan.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 - i / len(batches))
        losses, counts = [], []
        for batch in batches:
            optimizer.zero_grad()
            rows = self.rows(batch, plan.loss)
            loss = self.model(**{k: v.to(self.network.device) for k, v in rows.items()}).loss
            loss.backward()
            if plan.max_grad_norm > 0:
                torch.nn.utils.clip_grad_norm_(trained, plan.max_grad_norm)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            counts.append(sum(supervised_tokens(e, plan.loss) for e in batch))
        return summary(losses, counts)

    def rows(self, batch: Sequence[Example], loss: str) -> dict[str, Tensor]:
        """A batch as the network takes it."""
        return collate(batch, loss)


class ClientTrainer(Trainer):
    """A Trainer on batches that are already chosen, so that all sides see the same ones."""

    def get_train_dataloader(self) -> Any:
        """The steps in their order."""
        steps: Any = self.train_dataset
        loader = DataLoader(steps, batch_size=None, collate_fn=self.data_collator)
        return self.accelerator.prepare(loader)


class TrainerSide(PeftLoop):
    """One `transformers.Trainer` per client on the same PEFT model."""

    def optimise(self, job: TrainJob, trained: list[Any]) -> dict[str, float]:
        """One client through a Trainer of its own; the only loss it tells is the steps' mean."""
        batches: Any = steps(job, self.store)
        trainer = ClientTrainer(
            model=self.model,
            args=arguments(job.plan, len(batches)),
            train_dataset=batches,
            data_collator=lambda batch: collate(batch, job.plan.loss),
        )
        trainer.remove_callback(transformers.PrinterCallback)
        return {"loss_mean": float(trainer.train().training_loss)}


def arguments(plan: LocalPlan, count: int) -> TrainingArguments:
    """A plan of ``count`` steps in the words of transformers."""
    return TrainingArguments(
        output_dir="unused",
        use_cpu=True,
        per_device_train_batch_size=plan.batch_size,
        max_steps=count,
        learning_rate=plan.lr,
        adam_beta1=plan.betas[0],
        adam_beta2=plan.betas[1],
        adam_epsilon=plan.eps,
        weight_decay=plan.weight_decay,
        lr_scheduler_type="linear",
        max_grad_norm=plan.max_grad_norm,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )


def _pfl(world: World) -> Side:
    # an optional package
    from simulations.bench.engine.pfl_side import PflSide

    return PflSide(world)


REFERENCES: Mapping[str, Callable[[World], Side]] = {
    "peft loop": PeftLoop,
    "trainer": TrainerSide,
    "pfl": _pfl,
}


def open_side(side: str | EngineSpec, world: World) -> Side:
    """A side by its name, or any of our engines."""
    if isinstance(side, EngineSpec):
        return EngineSide(world, side)
    return REFERENCES[side](world) if side in REFERENCES else EngineSide(world, ENGINES[side])


def lora_config(job: TrainJob) -> peft.LoraConfig:
    """PEFT's description of an adapter with this job's ranks."""
    start = adapter_of(job)
    return peft.LoraConfig(
        r=max(job.client.ranks.values()),
        rank_pattern=dict(job.client.ranks),
        lora_alpha=int(next(iter(start.values())).alpha),
        lora_dropout=job.plan.dropout,
        target_modules=list(start),
    )


def adapter_of(job: TrainJob) -> Adapter:
    """The job's start, which must be low-rank factors."""
    factors = plain_factors(job.start)
    if factors is None:
        kind = type(job.start).__name__
        raise TypeError(f"client {job.client.id} starts from a {kind}, not from factors")
    return factors


def collate(batch: Sequence[Example], loss: str) -> dict[str, Tensor]:
    """Right-padded ids, attention mask and labels, as a Hugging Face model takes them."""
    width = max(len(e.input_ids) for e in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, -100)
    for i, example in enumerate(batch):
        tokens = torch.from_numpy(example.input_ids)
        ids[i, : len(tokens)] = tokens
        mask[i, : len(tokens)] = 1
        chosen = torch.from_numpy(targets_of(example, loss))
        labels[i, chosen] = tokens[chosen].long()
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def summary(losses: Sequence[float], counts: Sequence[int]) -> dict[str, float]:
    """What our engines report, and the plain mean that a Trainer reports."""
    total = sum(x * n for x, n in zip(losses, counts, strict=True))
    return {
        "loss": total / sum(counts),
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "loss_mean": sum(losses) / len(losses),
    }


def row(trained: Sequence[Tensor]) -> NDArray[np.float32]:
    """Parameters as one row of numbers."""
    flat = torch.cat([p.detach().reshape(-1) for p in trained])
    return np.asarray(flat.float().cpu().numpy(), dtype=np.float32)
