"""Laws of the cost model and of what is decided by it."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.core.types import Module
from fedlora.engine.fused import cost
from fedlora.engine.fused.cost import CostModel, slots_for
from fedlora.engine.fused.schedule import POLICIES, Forward, Schedule, Work
from fedlora.models.modules import CLASSIFICATION, ModelInfo

LAWS = settings(derandomize=True, deadline=None, max_examples=100)
CPU, GPU = torch.device("cpu"), torch.device("cuda")
WORKS = [Work((Forward(2, 40, 60),) * n) for n in (1, 3, 9, 4, 4)]


def llama(width: int, layers: int, targets: int = 7) -> ModelInfo:
    """The shapes of a Llama without embeddings; ``targets`` of its seven kinds are adapted."""
    inner = width * 11 // 4
    shapes = [(width, width)] * 4 + [(width, inner)] * 2 + [(inner, width)]
    modules = [
        Module(f"layers.{i}.{k}", "mlp", d_out, d_in)
        for i in range(layers)
        for k, (d_in, d_out) in enumerate(shapes[:targets])
    ]
    parameters = layers * sum(a * b for a, b in shapes)
    return ModelInfo("llama", tuple(modules), parameters, 512, "")


def of(width: int, layers: int = 4) -> CostModel:
    return CostModel.of(llama(width, layers), torch.float32)


@LAWS
@given(width=st.integers(8, 8192), layers=st.integers(1, 80))
def test_wider_models_have_smaller_budgets_and_depth_does_not_matter(width, layers):
    budget = of(width, layers).budget(CPU)
    assert budget & (budget - 1) == 0
    assert cost.CPU_TOKENS[0] <= budget <= cost.CPU_TOKENS[1]
    assert of(2 * width, layers).budget(CPU) <= budget == of(width, 1).budget(CPU)


@LAWS
@given(width=st.integers(8, 8192))
def test_the_fixed_cost_of_a_step_is_about_a_twentieth_unless_bounded(width):
    model = of(width)
    budget = model.budget(CPU)
    if cost.CPU_TOKENS[0] < budget < cost.CPU_TOKENS[1]:
        fraction = model.step_flop / (budget * model.token_flop)
        assert cost.OVERHEAD / math.sqrt(2) <= fraction <= cost.OVERHEAD * math.sqrt(2)


def test_a_classifier_does_not_multiply_by_its_vocabulary():
    body = llama(64, 4)
    embedded = dataclasses.replace(
        body, parameters=body.parameters + 1000 * 64, vocabulary=1000, task=CLASSIFICATION
    )
    assert CostModel.of(embedded, torch.float32) == CostModel.of(body, torch.float32)


@LAWS
@given(width=st.integers(8, 8192))
def test_a_classifier_has_larger_steps(width):
    low, high = cost.CLASSIFIER_TOKENS
    budget = of(width).budget(CPU, classifies=True)
    assert low <= budget <= high
    assert budget >= of(width).budget(CPU)
    assert budget & (budget - 1) == 0


def test_layers_without_an_adapter_cost_too():
    some, every = (CostModel.of(llama(64, 4, n), torch.float32) for n in (4, 7))
    assert some.token_flop == pytest.approx(every.token_flop, rel=0.2)
    assert some.token_bytes == pytest.approx(every.token_bytes, rel=0.5)


def test_an_accelerator_gets_one_large_budget():
    assert of(64).budget(GPU) == of(4096).budget(GPU) == cost.ACCELERATOR_TOKENS


@LAWS
@given(budget=st.integers(1, 8192), memory=st.floats(0, 1e10))
def test_a_budget_is_halved_until_a_step_fits(budget, memory):
    model = of(256)
    fitting = model.fitting(budget, memory)
    assert 1 <= fitting <= budget
    assert fitting == 1 or model.memory(fitting) <= memory
    assert fitting == budget or model.memory(2 * fitting) > memory


def test_half_the_bytes_in_bfloat16():
    info = llama(256, 4)
    whole, half = (CostModel.of(info, t) for t in (torch.float32, torch.bfloat16))
    assert half == dataclasses.replace(whole, token_bytes=whole.token_bytes / 2)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", POLICIES)
def test_a_round_costs_the_sum_of_its_steps(name, padded):
    model = CostModel(1000.0, 1.0, 0.0)
    expected = sum(
        1000 + cost.cost([WORKS[k].forwards[i] for k, _, i in step.active], padded)
        for step in Schedule(WORKS, POLICIES[name], 200, 3, padded)
    )
    assert model.predict(Schedule(WORKS, POLICIES[name], 200, 3, padded)) == expected
    assert model.one_by_one(WORKS) == sum(len(w.forwards) for w in WORKS) * 1080


def test_slots_by_hand():
    works = [Work((Forward(2, 50, 80), Forward(2, 50, 80)))] * 40
    assert slots_for(800, works, math.inf, 1.0) == 15
    assert slots_for(800, works, math.inf, 1.0, padded=True) == 12
    assert slots_for(10, works, math.inf, 1.0) == 1
    assert slots_for(10**6, works, 1e9, 1.0) == 40


@LAWS
@given(budget=st.integers(1, 5000), memory=st.floats(-1e6, 1e8), row=st.floats(1, 1e7))
def test_slots_fit_the_memory_or_are_one(budget, memory, row):
    slots = slots_for(budget, WORKS, memory, row)
    assert 1 <= slots <= len(WORKS)
    assert slots == 1 or slots * row <= memory
