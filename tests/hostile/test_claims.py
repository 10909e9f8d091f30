"""What a client says of its own data is held against what the server knows: honest replies of every
plan pass, and no lie weighs more in an average, or changes the record."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch

from fedlora.core.confusion import Confusion
from fedlora.core.metric import Metric, Scorer, count, macro_f1
from fedlora.core.rates import LR_SUM
from fedlora.core.types import (
    Client,
    EvaluateJob,
    EvaluatePlan,
    Evaluation,
    Failure,
    LocalPlan,
    Ranks,
    TrainJob,
    Update,
)
from fedlora.data import Record
from fedlora.data.store import TokenStore, prepare
from fedlora.engine.sequential import Sequential
from fedlora.evaluation.scorers import DEFAULT, TeacherForcedRouge
from fedlora.models.language_model import LanguageModel
from fedlora.models.spec import Tiny
from fedlora.server.claims import checked, held_by
from fedlora.server.evaluation_round import evaluation_record, validate_evaluations
from fedlora.training.terms import FedProx
from fedlora.wire.messages import decode_results, encode_results
from tests.fedlora.data.conftest import Listed
from tests.fedlora.data.test_labels import Labelled
from tests.fedlora.evaluation.toy_metric import ResponseLength
from tests.fedlora.models.networks import adapter

HELD = (5, 3, 7)
BAD = 2
NAMES = ("blue", "green", "red")


def records(labelled: bool) -> tuple[Record, ...]:
    """Texts of unequal length, some without an answer; client 1 has no example of one label."""
    found = []
    for client, n in enumerate(HELD):
        for split, i in ((s, i) for s in ("train", "test") for i in range(n)):
            label = NAMES[(i + client) % (2 if client == 1 else 3)] if labelled else ""
            text = f"{'what is it ' * (1 + i)}{client}?"
            answer = label or "it is " * (i % 4)
            found.append(Record(client, split, "", text, "", answer, label=label))
    return tuple(found)


@dataclass(frozen=True)
class Place:
    """A real model and a real store."""

    model: LanguageModel
    store: TokenStore

    @property
    def clients(self) -> list[Client]:
        ranks = Ranks({m.path: 2 for m in self.model.info.modules})
        return [Client(i, ranks, n) for i, n in enumerate(HELD)]

    def evaluations(self, plan: EvaluatePlan) -> list[tuple[EvaluateJob, Evaluation]]:
        jobs = [EvaluateJob(4, 1, client, None, plan) for client in self.clients]
        done = Sequential().open(self.model, self.store).evaluate(jobs)
        return [(j, r) for j, r in zip(jobs, done, strict=True) if isinstance(r, Evaluation)]

    def updates(self, plan: LocalPlan) -> list[tuple[TrainJob, Update]]:
        start = adapter(self.model.info.modules, 2, dtype=torch.float32)
        jobs = [TrainJob(4, 1, client, start, plan) for client in self.clients]
        done = Sequential().open(self.model, self.store).train(jobs)
        return [(j, r) for j, r in zip(jobs, done, strict=True) if isinstance(r, Update)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    @cache
    def make(labelled: bool) -> Place:
        spec: Any = Tiny(task="classification" if labelled else "causal_lm")
        tokenizer, kind = spec.tokenizer(), Labelled if labelled else Listed
        source = kind(rows=records(labelled), max_length=32)
        folder = prepare(source, tokenizer, "tiny", tmp_path_factory.mktemp("cache"))
        store = TokenStore(folder)
        if labelled:
            spec = spec.with_labels(store.labels, 4)
        return Place(spec.load(torch.device("cpu")), store)

    return make


METRICS: tuple[Scorer, ...] = (*DEFAULT, TeacherForcedRouge(), ResponseLength())
PLANS = {
    "all": EvaluatePlan(generate=False),
    "some": EvaluatePlan(generate=False, max_examples=4),
    "texts": EvaluatePlan(max_new_tokens=2, metrics=METRICS, max_examples=4),
    "training split": EvaluatePlan(generate=False, split="train", max_examples=2),
}


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("plan", PLANS)
def test_honest_evaluations_pass(place, plan, labelled):
    plan = replace(PLANS[plan], generate=PLANS[plan].generate and not labelled)
    here = place(labelled)
    found = here.evaluations(plan)
    assert [j.client.id for j, _ in found] == [0, 1, 2]
    for job, evaluation in found:
        sent = encode_results([evaluation], wire="float32")
        (received,) = decode_results(sent, {job.client.id: job.client})
        assert checked(job, received, here.store) == evaluation
        held = held_by(job, here.store)
        assert held.examples == evaluation.metrics["examples"].value
        assert sum(held.labels.values()) == (held.examples if labelled else 0)


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("loss", ["full", "response"])
@pytest.mark.parametrize(
    "more", [{}, {"epochs": 2}, {"max_examples": 2}, {"steps": 5}, {"steps": 1, "max_examples": 3}]
)
def test_honest_updates_pass(place, labelled, loss, more):
    """What the server computes bounds them, exactly where all examples are trained on."""
    here = place(labelled)
    for job, update in here.updates(LocalPlan(batch_size=2, loss=loss, **more)):
        assert checked(job, update, here.store) is update
        if set(more) <= {"epochs"}:
            tokens = {"tokens": update.metrics["tokens"] + 1}
            heavier = replace(update, metrics={**update.metrics, **tokens})
            assert isinstance(checked(job, heavier, here.store), Failure)


def table(entries: list[tuple[int, int, int]], classes: int = 3) -> dict[str, Metric]:
    """A whole lie: counts with the accuracy and the macro F1 that they give."""
    made = Confusion(classes, tuple(entries))
    mean = {"interval": True, "worst": "lowest"}
    n = made.examples
    return {
        "examples": count(n),
        "loss": Metric(1.0, n, worst="highest"),
        "accuracy": Metric(made.accuracy, n, **mean),  # type: ignore[arg-type]
        "macro_f1": macro_f1(made),
    }


LIES: Mapping[str, Mapping[str, Metric | None]] = {
    "a billion examples": {"examples": count(10**9)},
    "no count of examples": {"examples": None},
    "half an example": {"examples": count(6.5)},
    "a negative count": {"examples": count(-7)},
    "a count that is no number": {"examples": count(math.nan)},
    "a heavy loss": {"loss": Metric(9.0, 10**6, worst="highest")},
    "a weightless loss": {"loss": Metric(9.0, 0, worst="highest")},
    "a negative loss": {"loss": Metric(-1.0, 7, worst="highest")},
    "no loss": {"loss": None},
    "no counts": {"macro_f1": None},
    "an accuracy above one": {"accuracy": Metric(1.5, 7, interval=True, worst="lowest")},
    "an accuracy that its counts do not give": {
        "accuracy": Metric(1.0, 7, interval=True, worst="lowest")
    },
    "a heavy accuracy": {"accuracy": Metric(5 / 7, 700, interval=True, worst="lowest")},
    "counts of a thousand copies": table([(0, 0, 3000), (1, 1, 2000), (2, 2, 2000)]),
    "counts of fewer examples": table([(0, 0, 1)]),
    "counts of other labels": table([(0, 0, 7)]),
    "labels that nobody has": table([(0, 0, 3), (1, 1, 2), (2, 3, 2)], classes=4),
    "fewer classes": table([(0, 0, 3), (1, 1, 4)], classes=2),
    "macro F1 without its counts": {"macro_f1": Metric(1.0, 7, worst="lowest")},
    "a metric that was not asked for": {"happiness": Metric(1.0, 7)},
    "tokens of a classifier": {"tokens_full": count(10**9)},
}


def told(evaluation: Evaluation, lie: Mapping[str, Metric | None]) -> Evaluation:
    metrics = dict(evaluation.metrics) | lie
    return replace(evaluation, metrics={k: m for k, m in metrics.items() if m is not None})


def judged(here: Place, plan: EvaluatePlan, lie: Mapping[str, Metric | None] | None):
    """The results of a round in which one client lies, or fails, and the culprit's."""
    found: list[Evaluation | Failure] = []
    for job, evaluation in here.evaluations(plan):
        result: Evaluation | Failure = evaluation
        if job.client.id == BAD:
            result = Failure(job.client, "PlantedFault", "it gave up")
            if lie is not None:
                result = checked(job, told(evaluation, lie), here.store)  # type: ignore[assignment]
        found.append(result)
    return validate_evaluations(found)


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_about_labels_is_refused(place, lie):
    here = place(True)
    found, failed = (judged(here, PLANS["all"], x) for x in (LIES[lie], None))
    assert isinstance(found[BAD], Failure)
    assert found[BAD].kind == "RejectedEvaluation"
    assert found[BAD].message
    records = [evaluation_record("seen:full", r, round=1, seconds=0.0) for r in (found, failed)]
    assert records[0] == records[1]


TOKEN_LIES: Mapping[str, Mapping[str, Metric | None]] = {
    "a token more": {"tokens_full": count(10**6)},
    "answers of all tokens": {"tokens_response": count(10**6)},
    "a heavy loss": {"loss_full": Metric(9.0, 10**6)},
    "a loss of its answers over all tokens": {"loss_response": Metric(9.0, 10**3)},
    "no perplexity": {"perplexity": None},
    "a negative loss": {"loss_full": Metric(-1.0, 10)},
    "an accuracy above one": {"accuracy": Metric(1e9, 10)},
    "ROUGE-L above one": {"rouge_l": Metric(2.0, 4, interval=True)},
    "texts over tokens": {"exact_match": Metric(0.0, 60)},
    "more cut prompts than it has": {"truncated_prompts": count(5)},
    "a heavy metric of one's own": {"response_length": Metric(1.0, 10**4, interval=True)},
}


@pytest.mark.parametrize("lie", TOKEN_LIES)
def test_a_lie_about_tokens_is_refused(place, lie):
    here = place(False)
    found, failed = (judged(here, PLANS["texts"], x) for x in (TOKEN_LIES[lie], None))
    assert isinstance(found[BAD], Failure)
    records = [evaluation_record("seen:full", r, round=1, seconds=0.0) for r in (found, failed)]
    assert records[0] == records[1]


@pytest.mark.parametrize("name", ["tokens", "examples", "exchanged_up", "exchanged_down"])
def test_an_update_does_not_weigh_more_than_its_data(place, name):
    here = place(False)
    job, update = here.updates(LocalPlan())[BAD]
    lie = replace(update, metrics={**update.metrics, name: 1e9})
    refused = checked(job, lie, here.store)
    assert isinstance(refused, Failure)
    assert refused.kind == "RejectedUpdate"
    assert f"its metric {name} is" in refused.message


@pytest.mark.parametrize("wrong", [None, 0.0, 0.5, 1e9])
@pytest.mark.parametrize(
    "plan", [LocalPlan(term=FedProx(), epochs=2), LocalPlan(term=FedProx(), steps=5, warmup=0.4)]
)
def test_the_sum_of_learning_rates_is_that_of_the_plan(place, plan, wrong):
    """SCAFFOLD divides by it; without a local term nobody asks."""
    here = place(False)
    for job, update in here.updates(plan):
        assert checked(job, update, here.store) is update
        said = dict(update.metrics)
        due = said.pop(LR_SUM)
        if wrong is not None:
            said[LR_SUM] = wrong * due
        found = checked(job, replace(update, metrics=said), here.store)
        assert isinstance(found, Failure)
        assert f"sum of its learning rates, which is {due:g}" in found.message
        assert LR_SUM not in next(iter(here.updates(replace(plan, term=None))))[1].metrics
