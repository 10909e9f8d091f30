"""Order, subsets and padding as functions of the seed."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.core.types import LocalPlan
from fedlora.data.batches import (
    collate,
    micro_batches,
    num_steps,
    sample_examples,
    step_indices,
    subset,
    supervised_tokens,
    trainable,
)
from tests.fedlora.engine.world import example, examples

LAWS = settings(derandomize=True, deadline=None, max_examples=50)
STREAM = {"seed": 3, "round": 2, "client": 5}


@LAWS
@given(n=st.integers(1, 20), batch=st.integers(1, 6), epochs=st.integers(1, 4))
def test_every_epoch_visits_every_example_once(n, batch, epochs):
    plan = LocalPlan(batch_size=batch, epochs=epochs)
    steps = [s.tolist() for s in step_indices(n, plan, **STREAM)]
    per_epoch = math.ceil(n / batch)
    assert len(steps) == num_steps(n, plan) == epochs * per_epoch
    for e in range(epochs):
        epoch = steps[e * per_epoch : (e + 1) * per_epoch]
        assert sorted(i for s in epoch for i in s) == list(range(n))
        assert all(len(s) == batch for s in epoch[:-1])


@LAWS
@given(n=st.integers(1, 20), batch=st.integers(1, 6), steps=st.integers(1, 30))
def test_a_number_of_steps_cycles_or_cuts_the_same_epochs(n, batch, steps):
    given_steps = LocalPlan(batch_size=batch, steps=steps, epochs=2)
    long = LocalPlan(batch_size=batch, epochs=math.ceil(steps / math.ceil(n / batch)))
    found = [s.tolist() for s in step_indices(n, given_steps, **STREAM)]
    epochs = [s.tolist() for s in step_indices(n, long, **STREAM)]
    assert len(found) == steps
    assert found == epochs[:steps]


def test_epochs_rounds_clients_and_seeds_are_ordered_differently():
    plan = LocalPlan(batch_size=20, epochs=2)
    orders = [
        tuple(s.tolist())
        for change in ({}, {"seed": 4}, {"round": 3}, {"client": 6})
        for s in step_indices(20, plan, **{**STREAM, **change})
    ]
    assert len(set(orders)) == 8


@LAWS
@given(n=st.integers(0, 30), limit=st.integers(0, 35), seed=st.integers(0, 9))
def test_a_subset_is_drawn_without_replacement(n, limit, seed):
    chosen = subset(n, limit, seed, "subset", 1, 2)
    assert chosen == sorted(set(chosen))
    assert len(chosen) == (min(n, limit) if limit else n)
    assert set(chosen) <= set(range(n))
    assert chosen == subset(n, limit, seed, "subset", 1, 2)


def test_subsets_are_fair():
    counts = Counter(i for seed in range(600) for i in subset(6, 2, seed, "subset", 1, 2))
    assert all(abs(counts[i] - 200) < 60 for i in range(6))  # five standard deviations


def test_what_is_drawn_has_something_to_learn():
    held = [example([1, 2, 3], 3), example([1, 2, 3], 2), example([1], 1), example([1, 2, 3], 5)]
    assert trainable(held, "response") == [held[1]]
    assert trainable(held, "full") == [held[0], held[1], held[3]]
    plan = LocalPlan(loss="full", max_examples=2)
    assert len(sample_examples(held, plan, **STREAM)) == 2
    assert sample_examples(held, LocalPlan(loss="response"), **STREAM) == [held[1]]


def test_a_batch_by_hand():
    held = [example([1, 5, 6, 7, 0], 3), example([1, 8, 0], 2)]
    full = collate(held, "full")
    assert full.inputs.tolist() == [[1, 5, 6, 7], [1, 8, 0, 0]]
    assert full.positions.tolist() == [0, 1, 2, 3, 4, 5]
    assert full.targets.tolist() == [5, 6, 7, 0, 8, 0]
    response = collate(held, "response")
    assert response.positions.tolist() == [2, 3, 5]
    assert response.targets.tolist() == [7, 0, 0]
    assert (full.tokens, response.tokens) == (6, 3)


@LAWS
@given(n=st.integers(1, 8), seed=st.integers(0, 99), loss=st.sampled_from(["full", "response"]))
def test_supervised_pairs_are_the_neighbours_in_the_text_and_no_padding(n, seed, loss):
    held = examples(n, seed)
    batch = collate(held, loss)
    width = batch.inputs.shape[1]
    assert width == max(len(e.input_ids) for e in held) - 1
    assert batch.tokens == sum(supervised_tokens(e, loss) for e in held)
    for position, target in zip(batch.positions.tolist(), batch.targets.tolist(), strict=True):
        row, column = divmod(position, width)
        ids = held[row].input_ids
        assert column + 1 < len(ids)
        assert batch.inputs[row, column] == ids[column]
        assert target == ids[column + 1]
        assert loss == "full" or column + 1 >= held[row].prompt_tokens


@pytest.mark.parametrize("micro", [0, 1, 2, 9])
def test_micro_batches_are_the_step_cut_in_order(micro):
    held = examples(6)
    plan = LocalPlan(batch_size=5, micro_batch_size=micro)
    rows = np.array([4, 0, 3, 1, 5])
    parts = micro_batches(held, rows, plan)
    assert len(parts) == math.ceil(5 / (micro or 5))
    targets = [t for part in parts for t in part.targets.tolist()]
    assert targets == collate([held[i] for i in rows], plan.loss).targets.tolist()
