"""What an optimizer remembers is all that its next step depends on."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from fedlora.core.types import (
    Adapter,
    Factors,
    LocalPlan,
)
from fedlora.split.trainable import OptimizerState, TrainableStage
from fedlora.techniques.lora.payload import LowRankPayload
from tests.fedlora.split.world import MODELS, assert_same, start

PLANS = {
    "adamw": LocalPlan(weight_decay=0.1),
    "sgd": LocalPlan(optimizer="sgd", momentum=0.9),
    "b alone": LocalPlan(train_a=False),
}


def trainable(
    adapter: Adapter, plan: LocalPlan, state: OptimizerState | None = None
) -> TrainableStage:
    updates: Any = LowRankPayload(adapter).updates(MODELS["llama"](double=False))
    return TrainableStage(updates, plan, state)


def step(who: TrainableStage, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    for grad in who.flat.grads:
        grad.copy_(torch.randn(grad.shape, generator=g))
    who.step(0.1)


@pytest.mark.parametrize("name", PLANS)
def test_adapter_and_optimizer_state_are_all_there_is(name: str) -> None:
    plan = PLANS[name]
    whole = start(MODELS["llama"](double=False))
    one = trainable(whole, plan)
    assert one.optimizer_state() == {}
    step(one, 1)
    kept, memory = one.adapter(), one.optimizer_state()
    other = trainable(kept, plan, memory)
    for who in (one, other):
        step(who, 2)
    assert_same(one.adapter(), other.adapter())
    if not plan.train_a:
        assert all(torch.equal(f.a, whole[p].a) for p, f in one.adapter().items())
    forgetful = trainable(kept, plan)
    step(forgetful, 2)
    assert any(not torch.equal(f.b, forgetful.adapter()[p].b) for p, f in one.adapter().items())


def test_copies_are_copies() -> None:
    one = trainable(start(MODELS["llama"](double=False)), PLANS["adamw"])
    step(one, 1)
    adapter, memory = one.adapter(), one.optimizer_state()
    before = {p: f.b.clone() for p, f in adapter.items()}, dict(memory)
    moments = {name: t.clone() for name, t in memory.items()}
    step(one, 2)
    assert all(torch.equal(f.b, before[0][p]) for p, f in adapter.items())
    assert all(torch.equal(t, moments[name]) for name, t in memory.items())


def test_an_average_of_another_rank_is_refused() -> None:
    whole = start(MODELS["llama"](double=False))
    one = trainable(whole, PLANS["adamw"])
    path, f = next(iter(whole.items()))
    with pytest.raises(ValueError, match=rf"{path}: rank 1 arrived where rank 2 trains"):
        one.load({**whole, path: Factors(f.a[:1], f.b[:, :1], f.alpha)})


def test_state_of_another_stage_is_refused() -> None:
    whole = start(MODELS["llama"](double=False))
    one = trainable(whole, PLANS["adamw"])
    step(one, 1)
    fewer = dict(list(whole.items())[:3])
    with pytest.raises(ValueError, match=r"the optimizer's exp_avg holds \d+ scalars"):
        trainable(fewer, replace(PLANS["adamw"]), one.optimizer_state())
