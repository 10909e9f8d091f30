"""Batches of examples of like length: transformers' order, each example once, less padding."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.trainer_pt_utils import get_length_grouped_indices

from fedlora.core.types import LocalPlan
from fedlora.data.batches import epoch_order, lengths_of, num_steps, step_indices
from fedlora.training.loop import optimise
from tests.fedlora.engine.fused.harness import alone, assert_equal, trained
from tests.fedlora.engine.world import FakeStore, example, job, model, start
from tests.planted import planted

LAWS = settings(derandomize=True, deadline=None, max_examples=60)
STREAM = {"seed": 3, "round": 2, "client": 5}
LENGTHS = st.lists(st.integers(1, 9) | st.integers(1, 500), min_size=1, max_size=90)
GROUPED = LocalPlan(batch_size=2, group_by_length=True)


@LAWS
@given(LENGTHS, st.integers(1, 5), st.integers(0, 2**31))
def test_the_order_is_that_of_transformers(lengths, size, seed):
    """The order is transformers' own, for the same permutation."""
    drawn = np.random.default_rng(seed).permutation(len(lengths))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randperm", lambda n, generator=None: torch.from_numpy(drawn))
        due = get_length_grouped_indices(lengths, size)
    assert epoch_order(drawn, replace(GROUPED, batch_size=size), lengths).tolist() == due


@LAWS
@given(LENGTHS, st.integers(1, 5), st.integers(1, 3))
def test_every_epoch_visits_every_example_once_in_batches_of_the_same_sizes(lengths, size, epochs):
    plan = replace(GROUPED, batch_size=size, epochs=epochs)
    found = [list(step_indices(len(lengths), p, **STREAM, lengths=lengths))
             for p in (plan, replace(plan, group_by_length=False))]  # fmt: skip
    assert [len(s) for s in found[0]] == [len(s) for s in found[1]]
    assert len(found[0]) == num_steps(len(lengths), plan)
    per_epoch = len(found[0]) // epochs
    for e in range(epochs):
        epoch = np.concatenate(found[0][e * per_epoch : (e + 1) * per_epoch])
        assert sorted(epoch.tolist()) == list(range(len(lengths)))


@LAWS
@given(LENGTHS, st.integers(1, 5))
def test_without_the_option_lengths_change_nothing(lengths, size):
    n, plan = len(lengths), LocalPlan(batch_size=size, epochs=2)
    with_lengths = step_indices(n, plan, **STREAM, lengths=lengths)
    without = step_indices(n, plan, **STREAM)
    assert all(np.array_equal(a, b) for a, b in zip(with_lengths, without, strict=True))


def test_rounds_clients_seeds_and_epochs_are_grouped_differently():
    lengths = list(range(1, 41))
    plan = replace(GROUPED, epochs=2)
    orders = set()
    for change in ({}, {"seed": 4}, {"round": 3}, {"client": 6}):
        steps = list(step_indices(40, plan, **{**STREAM, **change}, lengths=lengths))
        orders |= {tuple(np.concatenate(half).tolist()) for half in (steps[:20], steps[20:])}
    assert len(orders) == 8


def padding(steps, lengths) -> int:
    return sum(len(s) * max(lengths[i] for i in s) - sum(lengths[i] for i in s) for s in steps)


@LAWS
@given(st.integers(8, 30), st.integers(2, 5), st.integers(0, 2**31))
def test_there_is_less_padding_on_average(count, size, seed):
    """Clients with at least eight batches pad less, over draws of the order."""
    lengths = (5 + np.random.default_rng(seed).lognormal(3, 1, count * size)).astype(int).tolist()
    plain = replace(GROUPED, group_by_length=False, batch_size=size)
    grouped, apart = (
        [padding(step_indices(len(lengths), plan, seed=s, round=1, client=0, lengths=lengths),
                 lengths) for s in range(20)]
        for plan in (replace(plain, group_by_length=True), plain)
    )  # fmt: skip
    assert sum(grouped) <= sum(apart)


@LAWS
@given(LENGTHS, st.integers(1, 5), st.integers(0, 2**31))
def test_with_less_than_eight_batches_two_examples_change_places_at_most(lengths, size, seed):
    lengths = lengths[: 8 * size - 1]
    drawn = np.random.default_rng(seed).permutation(len(lengths))
    order = epoch_order(drawn, replace(GROUPED, batch_size=size), lengths)
    moved = Counter()
    for i in range(0, len(lengths), size):
        moved += Counter(order[i : i + size].tolist()) - Counter(drawn[i : i + size].tolist())
    assert sum(moved.values()) <= 2


def test_lengths_that_are_not_given_are_asked_for():
    with pytest.raises(ValueError, match=r"client\.group_by_length=true: the lengths"):
        next(step_indices(9, GROUPED, **STREAM))


def test_the_longest_text_is_in_the_first_step_and_engines_agree():
    """In float64, over clients of more than eight batches."""
    random = np.random.default_rng(0)
    on = model("llama")
    held = {
        k: [example(random.integers(0, 20, t).tolist()) for t in random.integers(2, 12, 19 + k)]
        for k in range(3)
    }
    plan = replace(GROUPED, lr=3e-4, eps=1e-4, max_grad_norm=0.05, dropout=0.25, steps=10)
    jobs = [job(start(on, 2, k), plan, id=k) for k in held]
    got, due = trained(jobs, FakeStore(held)), alone(jobs, FakeStore(held))
    for k, wanted in due.items():
        assert_equal(got[k], wanted)
        first = next(step_indices(len(held[k]), plan, seed=1, round=3, client=k,
                                  lengths=lengths_of(held[k])))  # fmt: skip
        assert max(lengths_of(held[k])) == max(len(held[k][i].input_ids) for i in first)


FAULTS = [
    (epoch_order, 'np.argsort(-length[span], kind="stable")',
     'np.argsort(length[span], kind="stable")[::-1]', test_the_order_is_that_of_transformers),
    (epoch_order, "-length[span]", "0 * length[span]", test_there_is_less_padding_on_average),
    (epoch_order, "order[[longest, 0]]", "order[[longest, longest]]",
     test_every_epoch_visits_every_example_once_in_batches_of_the_same_sizes),
    (epoch_order, "min(len(permutation) // (4 * plan.batch_size), MOST_BATCHES)", "MOST_BATCHES",
     test_with_less_than_eight_batches_two_examples_change_places_at_most),
    (epoch_order, "if not plan.group_by_length", "if lengths is None",
     test_without_the_option_lengths_change_nothing),
    (optimise, "lengths=lengths_of(examples)", "lengths=[1] * len(examples)",
     test_the_longest_text_is_in_the_first_step_and_engines_agree),
]  # fmt: skip


@pytest.mark.parametrize("fault", range(len(FAULTS)))
def test_faults_are_noticed(fault):
    function, right, wrong, notices = FAULTS[fault]
    with planted(function, right, wrong), pytest.raises((AssertionError, ExceptionGroup)):
        notices()
