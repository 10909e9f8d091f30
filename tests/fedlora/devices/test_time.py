"""A client's time is the hand calculation, grows with its work, and what it is charged adds up."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.core.types import LocalPlan, Ranks
from fedlora.data.batches import sample_examples, step_indices
from fedlora.devices.table import Device
from fedlora.devices.time import Visit, Work, charge, drawn_lengths
from fedlora.models.spec import Tiny
from fedlora.split.cost import client_part
from fedlora.split.protocol import Cut
from fedlora.split.whole import WholeModel
from tests.fedlora.devices.worlds import visit

HAND = 0.02 + 78_848 * 4 / 12.5e6 + 5_021_696 * 2000 / 1e10 + 0.02 + 78_848 * 4 / 1.25e6


@pytest.fixture(scope="module")
def tiny():
    model = Tiny()
    info = model.describe()
    cost = WholeModel(model.skeleton(), info.blocks, dropout=False)
    return info, cost, lambda r: Ranks({m.path: r for m in info.modules})


def check_hand() -> None:
    """Law: the specification's example, tiny at rank 8, 2,000 tokens in sequences of 64."""
    device = Device(1e10, 4e9, up=1.25e6, down=12.5e6, latency=0.02)
    sent = 78_848 * 4
    found = Visit(0, device, sent, sent, 5_021_696 * 2000.0)
    assert found.seconds == pytest.approx(HAND, rel=1e-12)
    assert found.seconds == pytest.approx(1.321884, abs=5e-7)


def test_time_is_the_hand_calculation(tiny):
    _, cost, ranks = tiny
    work = cost.work(ranks(8))
    assert work.a + 64 * work.b == 5_021_696
    assert cost.adapter(ranks(8)) == 78_848
    assert work.of(np.full(1000, 64)) / 32 == 5_021_696 * 2000
    check_hand()


def test_operations_are_those_of_the_split_formulas_at_every_length(tiny):
    info, cost, ranks = tiny
    network = Tiny().skeleton()
    part = client_part(network, ranks(3), Cut(info.blocks, 0))
    for t in (1, 7, 200):
        work, whole = cost.work(ranks(3)), part.flops(t)
        assert work.a + t * work.b == pytest.approx(whole.forward + whole.backward, rel=1e-12)


def test_blocks_before_the_first_adapter_have_no_backward_pass(tiny):
    info, cost, _ = tiny
    last = Ranks({m.path: 4 for m in info.modules if ".layers.3." in m.path})
    every = Ranks({m.path: 4 for m in info.modules})
    assert cost.work(last).a < 0.7 * cost.work(every).a
    assert cost.memory(last, 256) < cost.memory(every, 256)


def test_memory_is_that_of_the_specification(tiny):
    _, cost, ranks = tiny
    assert cost.memory(ranks(8), 256) / 1e6 == pytest.approx(17.8, abs=0.1)
    assert cost.memory(ranks(8), 1024) / 1e6 == pytest.approx(54.8, abs=0.1)


@given(st.integers(1, 60), st.lists(st.integers(1, 300), min_size=1, max_size=8))
def test_time_grows_with_rank_tokens_and_bytes(rank, lengths):
    device = Device(1e9, 1e9, 1e5, 2e5, latency=0.1)
    less = np.array(lengths[:-1], dtype=np.int64)

    def seconds(a=1000.0 * rank, held=lengths, down=100, up=100) -> float:
        work = Work(a, 2.0).of(np.asarray(held, dtype=np.int64))
        return Visit(0, device, down, up, work).seconds

    assert seconds(a=1000.0 * (rank + 1)) > seconds()
    assert seconds(held=less) < seconds()
    assert seconds(down=101) > seconds()
    assert seconds(up=101) > seconds()
    assert seconds(up=101) - seconds() == pytest.approx(1e-5), "up is sent at the rate of up"
    loop = sum(t * (1000.0 + 2.0 * t) for t in lengths)
    assert Work(1000.0, 2.0).of(np.array(lengths)) == pytest.approx(loop, rel=1e-12)


# --- what a client is charged --------------------------------------------------------------------


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.floats(0, 4), st.booleans())
def test_a_charge_never_exceeds_the_time_until_the_cut(down, compute, up, after, away):
    one = visit(0, down, compute, up)
    spent = charge(one, min(after, one.seconds), away=away)
    assert spent.compute + spent.transfer == pytest.approx(min(after, one.seconds))
    assert spent.energy == pytest.approx(3.0 * spent.compute + 2.0 * spent.transfer)
    assert spent.bytes_down <= down
    assert spent.bytes_up <= up
    whole = charge(one)
    assert (whole.bytes_down, whole.bytes_up) == (down, up)
    assert whole.compute + whole.transfer == pytest.approx(one.seconds)


def test_a_late_client_is_charged_for_what_is_on_its_way_and_one_that_leaves_for_what_has_passed():
    one = visit(0, 8, 8, 8)  # a second each
    assert charge(one, 0.5)[:2] == (8, 0)
    assert charge(one, 1.75)[:2] == (8, 0)
    assert charge(one, 2.0)[:2] == (8, 8)
    assert charge(one, 0.5, away=True)[:2] == (4, 0)
    assert charge(one, 2.25, away=True)[:2] == (8, 2)


# --- which tokens ---------------------------------------------------------------------------------


@dataclass
class Text:
    """An example of so many tokens, all of which but the first have a loss."""

    input_ids: np.ndarray
    prompt_tokens: int = 0
    responses: None = None
    label: int = -1


class Store:
    """Clients whose examples have these lengths."""

    labels = ()

    def __init__(self, lengths):
        self._lengths = np.array(lengths)

    def sizes(self, client, split):
        return np.stack([self._lengths, 0 * self._lengths, 0 * self._lengths - 1], axis=1)

    def supervised(self, client, split, loss):
        return np.maximum(0, self._lengths - 1)


def check_tokens(plan: LocalPlan) -> None:
    """Law: the sequences are those that an engine draws, and each has its own length."""
    lengths = [5, 1, 9, 3, 12, 4, 8, 2, 7, 6]
    texts = [Text(np.zeros(n, dtype=np.int64)) for n in lengths]
    where = {"seed": 3, "round": 2, "client": 5}
    chosen = sample_examples(texts, plan, **where)
    held = [len(t.input_ids) for t in chosen]
    want = [
        len(chosen[i].input_ids) - 1
        for step in step_indices(len(chosen), plan, lengths=held, **where)
        for i in step
    ]
    assert drawn_lengths(Store(lengths), plan, **where).tolist() == want


@pytest.mark.parametrize("plan", [
    LocalPlan(batch_size=2), LocalPlan(batch_size=2, steps=7), LocalPlan(batch_size=3, epochs=2),
    LocalPlan(batch_size=2, max_examples=4), LocalPlan(batch_size=1, group_by_length=True),
])  # fmt: skip
def test_tokens_are_those_that_an_engine_draws(plan):
    check_tokens(plan)
