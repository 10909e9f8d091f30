"""A virtual client: the unit of work of the simulation, and a Flower client on its own.

Engines call it with values (`LoRAClient.train`, `LoRAClient.evaluate_job`); Flower calls it with
arrays and scalars (`fit`, `evaluate`): ``client.to_client()`` is what a ``client_fn`` returns.
"""

import json
import math
import time
from collections.abc import Mapping
from typing import Any, TypeAlias, cast

from flwr.client import NumPyClient
from numpy.typing import NDArray

from fedlora.core.payload import Payload
from fedlora.core.rates import LR_SUM, lr_sum
from fedlora.core.types import (
    Client,
    EvaluateJob,
    EvaluatePlan,
    Evaluation,
    LocalPlan,
    TrainJob,
    Update,
)
from fedlora.data.batches import sample_examples
from fedlora.data.store import Example, TokenStore
from fedlora.engine.choice import decided, is_undecided, probe_of, with_probe
from fedlora.evaluation import metrics as evaluate
from fedlora.models.language_model import LanguageModel
from fedlora.wire.codec import decode_payload, encode_payload, plan_from_json

Scalars: TypeAlias = dict[str, Any]
"""Flower's config and metrics: str, int, float, bool or bytes by name."""


class LoRAClient(NumPyClient):
    """One client's data and ranks on a resident model. Nothing stays mounted on the model."""

    def __init__(self, model: LanguageModel, store: TokenStore, client: Client, seed: int) -> None:
        self.model = model
        self.store = store
        self.client = client
        self.seed = seed

    def train(self, job: TrainJob) -> Update:
        """Train the job's start payload on this client's examples.

        The result is a function of the job, the model and the data: it is bitwise identical
        whatever ran before in this process. The global random generators are not used.

        Raises:
            ValueError: if the client has nothing to train on, or the adapter has no module.
            FloatingPointError: if a loss is not finite.
        """
        self._check_identity(job.client)
        if is_undecided(job):
            first = probe_of(job)
            job = decided(job, None if first is None else self._train(first))
        return self._train(job)

    def _train(self, job: TrainJob) -> Update:
        """One pass of training, with what the job has chosen."""
        wall, cpu = time.perf_counter(), time.process_time()
        examples = training_examples(self.store, job)
        try:
            payload, trace = job.plan.technique.train(self.model, job, examples)
        finally:
            self.model.unmount()
        spent = {
            "examples": float(len(examples)),
            "seconds": time.perf_counter() - wall,
            "cpu_seconds": time.process_time() - cpu,
        }
        return completed(
            job, payload, trace.metrics() | spent, self.store.count(job.client.id, "train")
        )

    def evaluate_job(self, job: EvaluateJob) -> Evaluation:
        """Measure the job's adapter, or the bare base model, on this client's examples.

        Raises:
            ValueError: if the client has no examples in the plan's split.
        """
        self._check_identity(job.client)
        plan, who = job.plan, self.client.id
        if self.store.count(who, plan.split) == 0:
            raise ValueError(f"client {who} has no examples in split {plan.split!r}")
        examples = self.store.examples(who, plan.split)
        references = self.store.references(who, plan.split) if plan.generate else None
        try:
            self.model.mount(job.adapter)
            metrics = evaluate.measure(
                self.model, examples, references, plan, seed=job.seed, client=who
            )
        finally:
            self.model.unmount()
        return Evaluation(self.client, metrics)

    def fit(
        self, parameters: list[NDArray[Any]], config: Scalars
    ) -> tuple[list[NDArray[Any]], int, Scalars]:
        """`train` for Flower.

        Args:
            parameters: one flat array, as `fedlora.wire.codec.encode_payload` makes it.
            config: ``header`` (its JSON), ``plan`` (a `LocalPlan` by
                `fedlora.wire.codec.plan_to_json`), ``round``, and optionally ``seed``.

        Returns:
            The update as one flat array, the number of training examples, and metrics that
            include the update's own ``header`` (ranks may have shrunk).
        """
        header = str(config["header"])
        update = self.train(
            TrainJob(
                seed=int(config.get("seed", self.seed)),
                round=int(config["round"]),
                client=self.client,
                start=decode_payload(parameters[0], header),
                plan=cast(LocalPlan, _expect(plan_from_json(str(config["plan"])), LocalPlan)),
            )
        )
        flat, own_header = encode_payload(update.payload, json.loads(header)["dtype"])
        return [flat], update.num_examples, {**update.metrics, "header": own_header}

    def evaluate(
        self, parameters: list[NDArray[Any]], config: Scalars
    ) -> tuple[float, int, Scalars]:
        """`evaluate_job` for Flower.

        Args:
            parameters: one flat array, or none to evaluate the base model.
            config: ``header`` unless there are no parameters, ``plan`` (an `EvaluatePlan`),
                ``round``, and optionally ``seed``.

        Returns:
            The loss per response token (per token where no response is left, per label of a
            classifier; NaN if the plan's metrics have no loss), the number of examples, and all
            metrics.
        """
        adapter = decode_payload(parameters[0], str(config["header"])) if parameters else None
        plan = cast(EvaluatePlan, _expect(plan_from_json(str(config["plan"])), EvaluatePlan))
        seed = int(config.get("seed", self.seed))
        job = EvaluateJob(seed, int(config["round"]), self.client, adapter, plan)
        scalars = self.evaluate_job(job).scalars
        found = (scalars[k] for k in ("loss_response", "loss_full", "loss") if k in scalars)
        loss = next(found, math.nan)
        return loss, int(scalars["examples"]), {**scalars}

    def _check_identity(self, client: Client) -> None:
        if client.id != self.client.id:
            raise ValueError(f"client {self.client.id} was given a job of client {client.id}")


def training_examples(store: TokenStore, job: TrainJob) -> list[Example]:
    """The examples that a job's client trains on in its round.

    Raises:
        ValueError: if there are none, or the adapter has no module.
    """
    plan, who = job.plan, job.client.id
    if next(job.start.tensors(), None) is None:
        raise ValueError(f"client {who} was sent an empty adapter: there is nothing to train")
    return examples_for(store, plan, seed=job.seed, round=job.round, client=who)


def examples_for(
    store: TokenStore, plan: LocalPlan, *, seed: int, round: int, client: int
) -> list[Example]:
    """The training examples that a client draws in one round.

    Raises:
        ValueError: if none of them has a supervised token.
    """
    held = store.examples(client, "train")
    examples = sample_examples(held, plan, seed=seed, round=round, client=client)
    if not examples:
        raise ValueError(
            f"client {client} has nothing to train on: {len(held)} training examples, none with a "
            f"token that has a loss (client.loss={plan.loss})"
        )
    return examples


def completed(
    job: TrainJob, payload: Payload, metrics: Mapping[str, float], num_examples: int
) -> Update:
    """The update of a job: the part of the trained payload that the technique sends, with the rank
    indices that the client has chosen and the cost of their choice."""
    client, payload = job.plan.technique.completed(job, payload)
    if job.plan.term is not None:
        metrics = {**metrics, LR_SUM: lr_sum(int(metrics["steps"]), job.plan)}
    if job.chosen is not None:
        payload = payload.with_indices(job.chosen.indices)
        metrics = with_probe(metrics, job.chosen.probe)
    return Update(client, payload, num_examples, metrics)


def _expect(plan: object, kind: type) -> object:
    if not isinstance(plan, kind):
        raise TypeError(f"config['plan'] is a {type(plan).__name__}, not a {kind.__name__}")
    return plan
