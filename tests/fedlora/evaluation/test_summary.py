"""Invariants of summaries: the order of clients is nothing, each metric brings its own weight."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.core.confusion import confusion
from fedlora.core.metric import (
    EXP_MEAN,
    HIGHEST,
    LOWEST,
    MACRO_F1,
    TOTAL,
    Metric,
    count,
    macro_f1,
)
from fedlora.core.types import Client, Evaluation, Ranks
from fedlora.evaluation.summary import bootstrap, gini, jain, summarise

LAWS = settings(derandomize=True, deadline=None, max_examples=40)

RANKS = Ranks({"q": 4})


def evaluation(client: int, **metrics: Metric) -> Evaluation:
    return Evaluation(Client(client, RANKS, 5), metrics)


def measured(client: int, examples: int, tokens: int, loss: float, rouge: float) -> Evaluation:
    return evaluation(
        client,
        examples=count(examples),
        tokens_full=count(3 * tokens),
        tokens_response=count(tokens),
        loss_full=Metric(loss / 2, 3 * tokens),
        loss_response=Metric(loss, tokens),
        perplexity=Metric(loss, tokens, EXP_MEAN),
        rouge_l=Metric(rouge, examples, interval=True),
    )


evaluations = st.lists(
    st.tuples(st.integers(1, 9), st.integers(1, 50), st.floats(0, 9), st.floats(0, 1)),
    min_size=1,
    max_size=9,
).map(lambda rows: [measured(i, *row) for i, row in enumerate(rows)])


@LAWS
@given(found=evaluations, shuffle=st.randoms(use_true_random=False))
def test_order_does_not_matter_and_bounds_enclose(found, shuffle):
    summary = summarise(found)
    shuffled = list(found)
    shuffle.shuffle(shuffled)
    assert summarise(shuffled) == summary
    assert all(math.isfinite(v) for v in summary.values())
    for name in ("loss_full", "loss_response", "rouge_l"):
        values = [e.metrics[name].value for e in found]
        for mean in (summary[name], summary[f"{name}_weighted"]):
            assert min(values) - 1e-9 <= mean <= max(values) + 1e-9
    assert summary["rouge_l_low"] <= summary["rouge_l"] + 1e-12
    assert summary["rouge_l_high"] >= summary["rouge_l"] - 1e-12
    assert summary["clients"] == len(found)
    assert summary["tokens_full"] == 3 * summary["tokens_response"]


def test_each_metric_is_weighted_by_what_it_is_a_mean_of():
    found = [measured(0, 1, 90, 1.0, 0.0), measured(1, 9, 10, 2.0, 1.0)]
    summary = summarise(found)
    assert summary["loss_response"] == 1.5
    assert summary["loss_response_weighted"] == pytest.approx(1.1)
    assert summary["loss_full_weighted"] == pytest.approx(0.55)
    assert summary["rouge_l"] == 0.5
    assert summary["rouge_l_weighted"] == pytest.approx(0.9)
    assert summary["perplexity"] == pytest.approx(math.exp(1.5))
    assert summary["perplexity_weighted"] == pytest.approx(math.exp(1.1))


def test_splitting_a_client_in_two_leaves_weighted_means_alone():
    whole = [measured(0, 4, 40, 1.25, 0.5), measured(1, 6, 10, 3.0, 0.75)]
    split = [measured(0, 4, 40, 1.25, 0.5), *(measured(i, 3, 5, 3.0, 0.75) for i in (1, 2))]
    a, b = summarise(whole), summarise(split)
    for name in a:
        if name.endswith("_weighted"):
            assert a[name] == pytest.approx(b[name], rel=1e-12)


def test_what_was_not_measured_on_a_client_is_not_counted_as_zero():
    bare = evaluation(1, examples=count(5), loss_full=Metric(4.0, 9))
    broken = evaluation(2, examples=count(5), loss_response=Metric(math.nan, 3))
    summary = summarise([measured(0, 5, 10, 2.0, 0.5), bare, broken])
    assert summary["loss_response"] == summary["loss_response_weighted"] == 2.0
    assert summary["loss_full"] == pytest.approx(2.5)
    assert summary["rouge_l"] == 0.5
    assert summary["clients"] == 3


def test_nothing_measured_has_no_means():
    assert summarise([]) == {"clients": 0}
    assert "perplexity" not in summarise([evaluation(0, examples=count(2))])


def test_the_bootstrap_is_deterministic_and_as_wide_as_theory_says():
    values = np.random.default_rng(5).normal(0.4, 0.1, 400).tolist()
    low, high = bootstrap(values, seed=7, resamples=4000)
    assert (low, high) == bootstrap(values, seed=7, resamples=4000)
    assert (low, high) != bootstrap(values, seed=8, resamples=4000)
    assert high - low == pytest.approx(2 * 1.96 * np.std(values) / 20, rel=0.05)
    assert bootstrap([0.3], seed=1) == (0.3, 0.3)


def test_a_name_tells_nothing():
    """Renamed metrics have the same summary under the other names."""
    found = [measured(k, k + 1, 10 * k + 5, 1.0 + k, k / 4) for k in range(4)]
    names = {name: f"x{i}" for i, name in enumerate(found[0].metrics)}
    renamed = [
        dataclasses.replace(e, metrics={names[n]: m for n, m in e.metrics.items()}) for e in found
    ]
    wanted = {}
    for key, value in summarise(found).items():
        name = max((n for n in names if key.startswith(n)), key=len, default="")
        wanted[names.get(name, "") + key.removeprefix(name)] = value
    assert summarise(renamed) == wanted


def test_without_weight_there_is_no_weighted_mean():
    summary = summarise([evaluation(0, x=Metric(2.0, 0)), evaluation(1, x=Metric(4.0, 0))])
    assert summary == {"clients": 2, "x": 3.0}


# --- classes --------------------------------------------------------------------------------------

CLASSES = 4
answers = st.lists(
    st.tuples(st.integers(0, CLASSES - 1), st.integers(0, CLASSES - 1)), min_size=2, max_size=12
)
cohorts = st.lists(answers, min_size=1, max_size=25)
POOLED = ("accuracy_weighted", "loss_weighted", "macro_f1_weighted", "examples")


def labelled(client: int, answers, tier: str = "") -> Evaluation:
    """A client whose answers are pairs of true and predicted class; right ones cost nothing."""
    true, predicted = zip(*answers, strict=True)
    n, hits = len(true), sum(t == p for t, p in answers)
    metrics = {
        "examples": count(n),
        "loss": Metric((n - hits) / n, n, worst=HIGHEST),
        "accuracy": Metric(hits / n, n, interval=True, worst=LOWEST),
        "macro_f1": macro_f1(confusion(true, predicted, CLASSES)),
    }
    return Evaluation(Client(client, RANKS, 5, tier), metrics)


@LAWS
@given(clients=cohorts, shuffle=st.randoms(use_true_random=False))
def test_pooled_scores_are_those_of_all_examples_in_one_client(clients, shuffle):
    found = [labelled(i, client) for i, client in enumerate(clients)]
    everything = [example for client in clients for example in client]
    shuffle.shuffle(everything)
    summary, whole = summarise(found), summarise([labelled(0, everything)])
    for name in POOLED:
        assert summary[name] == pytest.approx(whole[name], rel=1e-12)
    assert summary["macro_f1_weighted"] == whole["macro_f1"]
    shuffle.shuffle(found)
    assert summarise(found) == summary


@LAWS
@given(clients=cohorts)
def test_splitting_a_client_in_two_changes_no_pooled_score(clients):
    halves = [clients[0][:1], clients[0][1:], *clients[1:]]
    whole = summarise([labelled(i, client) for i, client in enumerate(clients)])
    split = summarise([labelled(i, client) for i, client in enumerate(halves)])
    for name in POOLED:
        assert split[name] == pytest.approx(whole[name], rel=1e-12)
    assert split["macro_f1_weighted"] == whole["macro_f1_weighted"]


def test_macro_f1_is_of_the_summed_counts_not_a_mean_of_clients():
    """Each client has one class and is right about it or not; together there is one of each."""
    summary = summarise([labelled(0, [(0, 0), (0, 0)]), labelled(1, [(1, 0), (1, 0)])])
    assert summary["macro_f1"] == 0.5
    assert summary["macro_f1_weighted"] == pytest.approx((2 * 2 / (2 + 4) + 0) / 2)


@LAWS
@given(clients=cohorts)
def test_the_distribution_over_clients_is_that_of_their_values(clients):
    found = [labelled(i, client) for i, client in enumerate(clients)]
    summary = summarise(found)
    for name, sign in (("accuracy", 1), ("macro_f1", 1), ("loss", -1)):
        values = np.array([e.metrics[name].value for e in found])
        worst = sign * np.sort(sign * values)[: math.ceil(len(values) / 10)]
        assert summary[f"{name}_worst_tenth"] == pytest.approx(worst.mean())
        assert summary[f"{name}_std"] == pytest.approx(values.std())
        assert summary[f"{name}_p10"] == pytest.approx(np.quantile(values, 0.1))
        assert summary[f"{name}_p90"] == pytest.approx(np.quantile(values, 0.9))
        assert summary[f"{name}_gini"] == pytest.approx(gini(values))
        assert summary[f"{name}_jain"] == pytest.approx(jain(values))


amounts = st.lists(st.floats(0, 1e6, allow_subnormal=False), min_size=1, max_size=8)


@given(values=amounts, factor=st.floats(1e-3, 1e3))
def test_fairness_indices_are_bounded_scale_free_and_blind_to_order(values, factor):
    n = len(values)
    assert -1e-12 <= gini(values) <= (n - 1) / n + 1e-12
    assert 1 / n - 1e-12 <= jain(values) <= 1 + 1e-12
    scaled = [factor * x for x in values]
    if min(x for x in [*values, 1.0] if x) > 1e-200:
        assert gini(scaled) == pytest.approx(gini(values), abs=1e-9)
        assert jain(scaled) == pytest.approx(jain(values), abs=1e-9)
    assert gini(values[::-1]) == gini(values)
    assert jain(values[::-1]) == pytest.approx(jain(values), rel=1e-12)


@given(values=amounts)
def test_gini_is_the_mean_difference_of_all_pairs(values):
    total = sum(values)
    pairs = sum(abs(x - y) for x in values for y in values)
    wanted = pairs / (2 * len(values) * total) if total else 0.0
    assert gini(values) == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize("n", [1, 2, 9])
def test_fairness_of_equal_shares_and_of_one_who_has_everything(n):
    assert gini([0.3] * n) == pytest.approx(0, abs=1e-12)
    assert jain([0.3] * n) == pytest.approx(1)
    alone = [0.0] * (n - 1) + [7.0]
    assert gini(alone) == pytest.approx((n - 1) / n)
    assert jain(alone) == pytest.approx(1 / n)
    assert (gini([0.0] * n), jain([0.0] * n)) == (0.0, 1.0)


def test_a_metric_with_negative_values_has_no_fairness_index():
    found = [evaluation(i, x=Metric(float(i - 1), worst=LOWEST)) for i in range(3)]
    summary = summarise(found)
    assert "x_std" in summary
    assert not [k for k in summary if k.endswith(("_gini", "_jain"))]


@pytest.mark.parametrize(("clients", "wanted"), [(1, 1), (10, 1), (11, 2), (70, 7), (71, 8)])
def test_the_worst_tenth_is_a_tenth_of_the_clients_and_at_least_one(clients, wanted):
    found = [evaluation(i, x=Metric(float(i), worst=LOWEST)) for i in range(clients)]
    assert summarise(found)["x_worst_tenth"] == (wanted - 1) / 2


def test_clients_that_trained_are_summarised_apart_from_those_that_never_did():
    answers = [[(0, 0), (1, 1)], [(0, 1)], [(1, 1), (0, 1), (1, 0)]]
    found = [labelled(i, a) for i, a in enumerate(answers)]
    summary = summarise(found, trained={0, 2, 99})
    for start, group in (("trained/", [found[0], found[2]]), ("untrained/", [found[1]])):
        alone = summarise(group)
        assert summary[f"{start}clients"] == alone["clients"]
        for name in ("loss", "accuracy", "macro_f1"):
            assert summary[f"{start}{name}"] == alone[f"{name}_weighted"]
    nobody = summarise(found)
    assert not [name for name in nobody if name.startswith(("trained/", "untrained/"))]
    assert nobody.items() <= summary.items()


def test_tiers_are_summarised_as_their_clients_alone():
    tiers = ["phone", "phone", "laptop"]
    answers = [[(0, 0), (1, 0)], [(2, 2), (3, 3), (3, 0)], [(0, 1), (1, 1)]]
    found = [labelled(i, a, t) for i, (a, t) in enumerate(zip(answers, tiers, strict=True))]
    summary = summarise(found)
    for tier in set(tiers):
        alone = summarise([e for e in found if e.client.tier == tier])
        assert summary[f"tier/{tier}/clients"] == alone["clients"]
        for name in ("accuracy", "macro_f1", "loss"):
            assert summary[f"tier/{tier}/{name}"] == alone[f"{name}_weighted"]
        assert not [name for name in alone if name.startswith("tier/")]
    counted = [name for name in summary if name.startswith("tier/")]
    assert len(counted) == 2 * 4


def test_a_metric_that_asks_for_nothing_more_has_means_alone():
    found = [Evaluation(Client(i, RANKS, 5, "ab"[i]), {"x": Metric(float(i))}) for i in (0, 1)]
    assert summarise(found) == {"clients": 2, "x": 0.5, "x_weighted": 0.5}


def test_tables_and_worst_clients_belong_to_the_metrics_that_have_them():
    table = confusion([0], [0], 2)
    for wrong in ({"counts": table}, {"over_clients": MACRO_F1}):
        with pytest.raises(ValueError, match="macro_f1 alone has counts"):
            Metric(1.0, **wrong)
    for combined in (TOTAL, EXP_MEAN):
        with pytest.raises(ValueError, match="has no worst clients"):
            Metric(1.0, over_clients=combined, worst=LOWEST)
    with pytest.raises(ValueError, match="worst='low' is not one of"):
        Metric(1.0, worst="low")


def test_clients_are_combined_in_known_ways_only():
    with pytest.raises(ValueError, match=r"over_clients='median' is not one of"):
        Metric(1.0, over_clients="median")
    assert Metric(0.5, over_clients=EXP_MEAN).scalar == math.exp(0.5)
    assert Metric(1e4, over_clients=EXP_MEAN).scalar == math.inf
