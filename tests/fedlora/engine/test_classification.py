"""Classification clients, one by one: equal to plain PEFT, whatever labels a client lacks."""

import math

import pytest
import torch

from fedlora.core.types import EvaluateJob, EvaluatePlan, LocalPlan
from fedlora.engine.sequential import Sequential
from fedlora.models.head import head_parameters
from fedlora.models.headed import WithHead
from tests.fedlora.engine.labelled import factors_of, peft_loop, peft_model
from tests.fedlora.engine.world import SEED, FakeStore, client, distance, job
from tests.fedlora.models.classifiers import (
    CONFIGS,
    classifier,
    examples,
    logits,
    network,
)
from tests.fedlora.models.networks import adapter
from tests.planted import planted

PLAN = LocalPlan(steps=4, batch_size=3, lr=1e-2, dropout=0.0, weight_decay=0.1)


def trained(on, held, plan=PLAN, start=None, spec=None):
    start = start or adapter(on.info.modules, 3)
    (update,) = (spec or Sequential()).open(on, FakeStore({0: held})).train([job(start, plan)])
    return update


def with_head(on, update):
    """An update with the model's own head, which then trains."""
    return WithHead(update, {n: p.detach().clone() for n, p in head_parameters(on.network).items()})


@pytest.mark.parametrize("family", CONFIGS)
def test_training_is_that_of_a_plain_peft_loop(family):
    on, held = classifier(family), examples(7)
    start = adapter(on.info.modules, 3)
    theirs = peft_model(network(family), start, on.info.head_modules)
    losses = peft_loop(theirs, held, PLAN, round=3, client=0, heads=False)
    update = trained(on, held, start=start)
    assert distance(update.payload, start) > 1e-3
    assert distance(update.payload, factors_of(theirs, start)) < 1e-12
    assert update.metrics["loss_last"] == pytest.approx(losses[-1], rel=1e-12)


@pytest.mark.parametrize("family", CONFIGS)
def test_training_with_the_head_is_that_of_peft_with_modules_to_save(family):
    on, held = classifier(family), examples(7)
    start = with_head(on, adapter(on.info.modules, 3))
    theirs = peft_model(network(family), start.update, on.info.head_modules)
    peft_loop(theirs, held, PLAN, round=3, client=0, heads=True)
    own = {n: p.detach().clone() for n, p in head_parameters(on.network).items()}
    payload = trained(on, held, start=start).payload
    assert isinstance(payload, WithHead)
    assert distance(payload.update, factors_of(theirs, start.update)) < 1e-12
    saved = theirs.base_model.model
    for name, value in payload.values.items():
        path, _, leaf = name.rpartition(".")
        top = next(m for m in on.info.head_modules if f"{path}.".startswith(f"{m}."))
        module = saved.get_submodule(f"{top}.modules_to_save.default{path[len(top) :]}")
        torch.testing.assert_close(value, getattr(module, leaf).detach(), rtol=0, atol=1e-12)
        assert not torch.equal(value, own[name])
    now = head_parameters(on.network)
    assert all(torch.equal(now[n], x) for n, x in own.items())  # the model's own is back


@pytest.mark.parametrize("family", CONFIGS)
def test_a_frozen_head_is_bitwise_the_same_after_training(family):
    on = classifier(family)
    before = {n: p.detach().clone() for n, p in head_parameters(on.network).items()}
    trained(on, examples(7), start=adapter(on.info.modules, 2))
    after = head_parameters(on.network)
    assert all(torch.equal(after[n], x) and after[n].grad is None for n, x in before.items())


def test_a_head_trained_although_frozen_is_noticed():
    on = classifier("bert")
    before = {n: p.detach().clone() for n, p in head_parameters(on.network).items()}
    start = adapter(on.info.modules, 2)
    for parameter in head_parameters(on.network).values():
        parameter.requires_grad_(True)
    with planted(type(on)._trained_head, "[] if head is None else ", ""):
        trained(on, examples(7), start=start)
    after = head_parameters(on.network)
    assert not any(torch.equal(after[n], x) for n, x in before.items())


def test_a_client_without_a_class_trains_without_nan():
    for lacking in (examples(7, classes=4), examples(5, classes=1)):
        update = trained(classifier("bert"), lacking)
        assert all(math.isfinite(x) for x in update.metrics.values())
        assert all(t.isfinite().all() for _, t in update.payload.tensors())


def test_micro_batches_do_not_change_the_result():
    on, held = classifier("modernbert_mean"), examples(7)
    start = adapter(on.info.modules, 3)
    whole = trained(on, held, start=start)
    parts = trained(on, held, LocalPlan(**{**vars(PLAN), "micro_batch_size": 1}), start)
    assert distance(whole.payload, parts.payload) < 1e-12


def test_a_mean_over_padding_would_be_noticed():
    on, held = classifier("modernbert_mean"), examples(7)
    start = adapter(on.info.modules, 3)
    wanted = trained(on, held, start=start)
    with planted(type(on).logits, "batch.mask.to(torch.int64)", "torch.ones_like(batch.inputs)"):
        assert distance(trained(on, held, start=start).payload, wanted.payload) > 1e-6


def test_dropout_is_a_function_of_the_job():
    on, held = classifier("bert"), examples(7)
    plan = LocalPlan(**{**vars(PLAN), "dropout": 0.2})
    start = adapter(on.info.modules, 3)
    one, other = trained(on, held, plan, start), trained(on, held, plan, start)
    assert distance(one.payload, other.payload) == 0
    assert distance(one.payload, trained(on, held, start=start).payload) > 1e-6


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_accuracy_and_loss_are_those_of_a_hand_computation(family):
    on, held = classifier(family), examples(9)
    payload = adapter(on.info.modules, 3)
    engine = Sequential().open(on, FakeStore({0: held}))
    plan = EvaluatePlan(generate=False, batch_size=4)
    (found,) = engine.evaluate([EvaluateJob(SEED, 1, client(payload), payload, plan)])
    on.mount(payload)
    chances = logits(on, held).softmax(-1)
    labels = [e.label for e in held]
    hits = sum(int(row.argmax()) == label for row, label in zip(chances, labels, strict=True))
    loss = -sum(math.log(row[label]) for row, label in zip(chances, labels, strict=True)) / 9
    assert set(found.metrics) == {"examples", "loss", "accuracy", "macro_f1"}
    assert found.scalars["accuracy"] == hits / 9
    assert found.scalars["loss"] == pytest.approx(loss, rel=1e-12)
    assert found.scalars["examples"] == 9
