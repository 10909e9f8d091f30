"""Laws of the check at the door: honest updates pass, a planted fault is found and named."""

import math
import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.core.errors import RejectedUpdate
from fedlora.core.types import Client, Expected, Factors, LocalPlan, Ranks, Update
from fedlora.server.validation import check_update, not_finite
from fedlora.techniques.lora.payload import LowRankPayload
from fedlora.techniques.lora.self_pruning import SelfPrune
from fedlora.techniques.lora.technique import LoRA
from fedlora.techniques.rebased.payload import Rebased
from fedlora.techniques.sparse.payload import SparseDelta
from fedlora.techniques.switchlora.technique import SwitchTraining

ALPHA = 12.0
PATHS = ("layers.0.q", "layers.0.k", "layers.1.up")
LAWS = settings(derandomize=True, deadline=None, max_examples=50)


def adapter(ranks, seed=0, d_in=7, d_out=5, alpha=ALPHA, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    factors = {
        path: Factors(
            torch.randn(r, d_in, generator=g, dtype=torch.float64).to(dtype),
            torch.randn(d_out, r, generator=g, dtype=torch.float64).to(dtype),
            alpha,
        )
        for path, r in ranks.items()
    }
    return LowRankPayload(factors)


RANKS = Ranks(dict(zip(PATHS, (2, 4, 3), strict=True)))
CLIENT = Client(31, RANKS, num_examples=9)
START = adapter(RANKS, seed=1)


def update(payload=None, **changes):
    payload = adapter(RANKS, seed=2) if payload is None else payload
    return replace(Update(CLIENT, payload, 9), **changes)


def sparse(seed=5, density=0.1, lengths=(4, 6), value=0.5):
    values = {p: torch.full((n,), value) for p, n in zip(PATHS, lengths, strict=False)}
    return SparseDelta(seed, density, values)


PLAIN = LocalPlan()
PRUNES = LocalPlan(technique=LoRA(SelfPrune(0.1, 0.5, 1)))
SWITCHES = LocalPlan(technique=SwitchTraining())


def check(u, client, start, max_norm, plan=PLAIN):
    check_update(u, Expected(client, start, plan), max_norm)


def reason(u, start=START, client=CLIENT, max_norm=0.0, plan=PLAIN):
    with pytest.raises(RejectedUpdate) as error:
        check(u, client, start, max_norm, plan)
    assert error.value.client == client.id
    assert str(client.id) in str(error.value)
    assert error.value.reason in str(error.value)
    return error.value.reason


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_an_honest_update_passes(dtype):
    start, end = adapter(RANKS, 1, dtype=dtype), adapter(RANKS, 2, dtype=dtype)
    check(update(end), CLIENT, start, max_norm=0.0)
    check(update(end), CLIENT, start, max_norm=1e6)
    check(update(sparse()), CLIENT, sparse(value=0.0), max_norm=1e6)


@LAWS
@given(
    data=st.data(), bad=st.sampled_from([math.nan, math.inf, -math.inf]), count=st.integers(1, 3)
)
def test_bad_entries_are_found_wherever_they_are_planted(data, bad, count):
    end = adapter(RANKS, seed=2)
    name, tensor = data.draw(st.sampled_from(list(end.tensors())))
    spots = data.draw(st.sets(st.integers(0, tensor.numel() - 1), min_size=count, max_size=count))
    for i in spots:
        tensor.view(-1)[i] = bad
    said = reason(update(end))
    assert name in said
    assert f"{count} of {tensor.numel()}" in said


@pytest.mark.parametrize("frozen", ["a", "b"])
def test_a_frozen_factor_comes_back_bit_for_bit(frozen):
    """In float32, which clients compute in, whatever the wire carries."""
    plan = LocalPlan(train_a=frozen != "a", train_b=frozen != "b")
    end = adapter(RANKS, seed=2)
    honest = {p: replace(f, **{frozen: getattr(START[p], frozen)}) for p, f in end.items()}
    check(update(LowRankPayload(honest)), CLIENT, START, 0.0, plan)
    held = {p: replace(f, **{frozen: getattr(f, frozen).float()}) for p, f in honest.items()}
    check(update(LowRankPayload(held)), CLIENT, START, 0.0, plan)
    for path in PATHS:
        moved = getattr(START[path], frozen).float()
        moved[-1, -1] = torch.nextafter(moved[-1, -1], torch.tensor(torch.inf))
        wrong = honest | {path: replace(honest[path], **{frozen: moved})}
        said = reason(update(LowRankPayload(wrong)), plan=plan)
        assert said == f"{path}: its {frozen.upper()} has changed, which this round does not train"
        check(update(LowRankPayload(wrong)), CLIENT, START, 0.0, PLAIN)


def test_large_but_finite_entries_are_no_fault():
    """Their sum overflows, which is not what was asked."""
    end = adapter(RANKS, seed=2, dtype=torch.float16)
    for _, t in end.tensors():
        t.fill_(6e4)
    assert not_finite(end) == ""


@pytest.mark.parametrize(
    ("u", "words"),
    [
        (update(num_examples=0), "claims 0 examples"),
        (update(num_examples=-3), "claims -3 examples"),
        (update(num_examples=10), "claims 10 examples, the client has 9"),
        (update(client=replace(CLIENT, id=30)), "comes from client 30"),
        (update(adapter({p: RANKS[p] for p in PATHS[:2]})), f"lacks {PATHS[2]}"),
        (update(adapter({**RANKS, "head": 2})), "unknown head"),
        (update(adapter(RANKS, d_in=8)), "7 inputs and 5 outputs"),
        (update(adapter(RANKS, d_out=8)), "7 inputs and 5 outputs"),
        (update(adapter({**RANKS, PATHS[1]: 3})), f"{PATHS[1]}: rank 3, expected 4"),
        (update(adapter({**RANKS, PATHS[1]: 5})), f"{PATHS[1]}: rank 5, expected 4"),
        (update(adapter(RANKS, alpha=16)), "alpha 16, expected 12"),
        (update(adapter(RANKS, alpha=math.nan)), "alpha nan, expected 12"),
        (update(adapter(RANKS, dtype=torch.int64)), "expected a floating-point type"),
        (update(sparse()), "factors are required"),
        (update(client=replace(CLIENT, ranks=Ranks({**RANKS, PATHS[0]: 1}))), "states rank 1"),
    ],
)
def test_what_was_not_asked_for_is_refused_by_name(u, words):
    assert words in reason(u)


@pytest.mark.parametrize(
    ("delta", "words"),
    [
        (sparse(seed=6), "seed 6"),
        (sparse(density=0.2), "density 0.2"),
        (sparse(lengths=(4, 5)), f"{PATHS[1]}: values (5,), the mask has (6,)"),
        (sparse(lengths=(4,)), f"lacks {PATHS[1]}"),
        (sparse(value=math.inf), "4 of 4"),
        (adapter(RANKS), "SparseDelta is required"),
    ],
)
def test_a_sparse_update_must_follow_the_mask(delta, words):
    assert words in reason(update(delta), start=sparse())


@LAWS
@given(ranks=st.tuples(*[st.integers(1, r) for r in RANKS.values()]))
def test_ranks_may_shrink_only_where_that_was_planned(ranks):
    smaller = Ranks(dict(zip(PATHS, ranks, strict=True)))
    u = update(adapter(smaller), client=replace(CLIENT, ranks=smaller))
    check(u, CLIENT, START, 0.0, plan=PRUNES)
    if smaller != RANKS:
        assert "rank" in reason(u)
    grown = Ranks({**smaller, PATHS[0]: RANKS[PATHS[0]] + 1})
    u = update(adapter(grown), client=replace(CLIENT, ranks=grown))
    assert "at most 2" in reason(u, plan=PRUNES)


@LAWS
@given(seed=st.integers(0, 99), ranks=st.tuples(*[st.integers(1, 5)] * 3))
def test_the_norm_is_that_of_the_dense_change(seed, ranks):
    end = adapter(Ranks(dict(zip(PATHS, ranks, strict=True))), seed)
    dense = math.sqrt(sum(float((end[p].delta() - START[p].delta()).square().sum()) for p in PATHS))
    assert end.change_norm(START) == pytest.approx(dense, rel=1e-10)
    u = update(end, client=replace(CLIENT, ranks=Ranks({p: f.rank for p, f in end.items()})))
    expected = replace(CLIENT, ranks=u.client.ranks)
    check(u, expected, START, max_norm=dense * 1.001)
    assert "norm" in reason(u, client=expected, max_norm=dense * 0.999)


def test_no_change_has_no_norm_and_gauge_does_not_count():
    """A client may rescale its factors: what is bounded is what they do to the weights."""
    factors = {p: Factors(f.a * 1000, f.b / 1000, f.alpha) for p, f in START.items()}
    turned = LowRankPayload(factors)
    assert START.change_norm(START) == pytest.approx(0, abs=1e-6)
    check(update(turned), CLIENT, START, max_norm=1e-4)


def test_the_norm_of_a_sparse_change():
    assert sparse(value=0.5).change_norm(sparse(value=0.0)) == pytest.approx(0.5 * math.sqrt(10))


def test_a_cohort_is_checked_in_a_fraction_of_a_second():
    ranks = Ranks({f"layers.{i}": 8 for i in range(28)})
    start = adapter(ranks, 1, 128, 128, dtype=torch.float32)
    end = update(
        adapter(ranks, 2, 128, 128, dtype=torch.float32), client=replace(CLIENT, ranks=ranks)
    )
    began = time.process_time()
    for _ in range(80):
        check(end, end.client, start, max_norm=0.0)
    assert time.process_time() - began < 0.5


def shifts(value=0.5, d_out=5, paths=PATHS):
    return {p: torch.full((d_out, 7), value) for p in paths}


MOVED = Rebased(shifts(), START)


def test_from_a_moved_base_factors_come_back_or_what_became_of_it():
    check(update(), CLIENT, MOVED, max_norm=0.0)
    check(update(Rebased(shifts())), CLIENT, MOVED, max_norm=0.0, plan=SWITCHES)


@pytest.mark.parametrize(
    ("payload", "plan", "why"),
    [
        (Rebased(shifts()), PLAIN, "a dense update where factors are required"),
        (None, SWITCHES, "holds factors where a dense update is required"),
        (MOVED, SWITCHES, "holds factors where a dense update is required"),
        (Rebased(shifts(paths=PATHS[:2])), SWITCHES, "lacks layers.1.up"),
        (Rebased(shifts(d_out=4)), SWITCHES, "an update (4, 7), the layer is (5, 7)"),
        (Rebased(shifts(float("nan"))), SWITCHES, "entries that are NaN"),
        (sparse(), PLAIN, "a SparseDelta where factors are required"),
        (adapter({**RANKS, PATHS[0]: 1}), PLAIN, "rank 1, expected 2"),
    ],
)
def test_what_was_not_due_from_a_moved_base_is_refused(payload, plan, why):
    assert why in reason(update(payload), MOVED, plan=plan)


def test_the_change_from_a_moved_base_is_that_of_the_weights():
    end = adapter(RANKS, seed=2)
    both = [Rebased(shifts(), f) for f in (START, end)]
    weights = [{p: x.shift[p] + x.factors[p].delta() for p in PATHS} for x in both]
    wanted = math.sqrt(sum(float((weights[1][p] - weights[0][p]).square().sum()) for p in PATHS))
    assert end.change_norm(MOVED) == pytest.approx(wanted)
    assert Rebased(weights[1]).change_norm(MOVED) == pytest.approx(wanted)
    assert "above 1" in reason(update(Rebased(weights[1])), MOVED, max_norm=1.0, plan=SWITCHES)
    with pytest.raises(TypeError, match="no common change"):
        Rebased(shifts()).change_norm(START)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "many", None])
def test_a_metric_that_is_no_finite_number_is_refused(value):
    wrong = update(metrics={"loss": 1.0, "exchanged_up": value})
    assert reason(wrong).startswith("its metric exchanged_up is")
