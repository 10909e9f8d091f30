"""The physical limit's FLOP count, against a count by hand and against what torch multiplies."""

from itertools import pairwise

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fedlora.core.types import LocalPlan
from simulations.bench import peak
from simulations.bench.engine.cases import (
    Case,
    Draw,
    Fed,
    World,
)
from simulations.bench.engine.sides import open_side
from simulations.bench.peak import flop, gemm_peak, measure_shape

PLAN = LocalPlan(lr=2e-3, batch_size=2, dropout=0.0)
CASE = Case("test", "llama32x2", 3, PLAN, Draw(9, 9), Draw(2, 2), ranks=(3,))
D, F, V = 32, 88, 256
"""Width, inner width and vocabulary of that network."""


def ranks(r):
    return {m.path: r for m in World(CASE).modules}


def test_a_two_layer_model_by_hand():
    shape = measure_shape(World(CASE).model)
    attention, mlp = 4 * D * D, 3 * D * F
    dense = 4 * 2 * (attention + mlp) - 2 * 3 * D * D  # no gradient into the first q, k, v
    lora = 6 * 3 * 2 * (4 * (D + D) + 3 * (D + F)) - 3 * 2 * 3 * D
    head = 4 * D * V
    seen = 12 * 2 * D * sum(range(1, 6))  # five tokens see 1, 2, 3, 4, 5 of them
    assert (shape.frozen, shape.adapters(ranks(3))) == (dense, lora)
    assert shape.step([Fed(5, 2)], ranks(3)) == 5 * (dense + lora) + 2 * head + seen


def test_frozen_layers_cost_two_thirds_of_full_training():
    shape = measure_shape(World(CASE).model)
    forward = sum(2 * x.d_in * x.d_out for x in shape.layers)
    assert forward < shape.frozen < 2 * forward
    assert shape.adapters({}) == 0
    costs = [shape.adapters(ranks(r)) for r in (1, 2, 3)]
    assert len({b - a for a, b in pairwise([0, *costs])}) == 1


def test_nothing_needs_fewer_multiplications_than_the_limit():
    """What torch counts in the PEFT loop is the limit, and the padding and attention it adds."""
    world = World(CASE)
    least = flop(measure_shape(World(CASE).model), world.jobs, world.store)
    side = open_side("peft loop", world)
    with FlopCounterMode(display=False) as counter:
        list(side.train(world.jobs))
    assert least <= counter.get_total_flops() <= 1.3 * least


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_peak_leaves_threads_as_they_were(dtype, monkeypatch):
    monkeypatch.setattr(peak, "SIZES", (64, 128))  # not every processor multiplies bfloat16 itself
    threads = torch.get_num_threads()
    assert gemm_peak(dtype, repeats=1) > 0
    assert torch.get_num_threads() == threads
