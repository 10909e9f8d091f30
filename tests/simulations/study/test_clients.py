"""Numbers over clients that a language model's records lack are those that records would have."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.core.metric import HIGHEST, Metric
from fedlora.core.types import Client, Evaluation, Ranks
from fedlora.evaluation.summary import summarise
from simulations.reporting.run_folder import read_run
from simulations.study import clients
from simulations.study.clients import apart, measured
from simulations.study.plan import Planned
from simulations.study.results import recorded
from tests.planted import planted

WANTED = {f"loss_response{end}": False for end in ("_worst_tenth", "_gini", "_tier_gap", "_std")}
VALUES = st.lists(
    st.tuples(st.floats(0.1, 9), st.integers(1, 50), st.sampled_from("ab")), min_size=1, max_size=25
)


def run_folder(place, values, worst=""):
    """A run with one evaluation of clients with these losses, weights and tiers."""
    metrics = [Metric(loss, tokens, worst=worst) for loss, tokens, _ in values]
    found = summarise([
        Evaluation(Client(i, Ranks({}), 0, tier), {"loss_response": metric})
        for i, (metric, (_, _, tier)) in enumerate(zip(metrics, values, strict=True))
    ])  # fmt: skip
    at = {"round": 0, "group": "g", "adapter": "full"}
    rows = [
        at | {"client": i, "tier": tier, "metrics": {"loss_response": loss, "perplexity": 2.0 + i},
              "weights": {"loss_response": tokens, "perplexity": tokens}}
        for i, (loss, tokens, tier) in enumerate(values)
    ]  # fmt: skip
    record = at | {"kind": "evaluate", "perplexity": 2.0} | found
    (place / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    (place / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return found


@given(values=VALUES)
def test_they_are_those_of_the_summary(values, tmp_path_factory):
    place = tmp_path_factory.mktemp("run")
    expected = run_folder(place, values, HIGHEST)
    wanted = WANTED | {f"tier/{tier}/loss_response": False for tier in "ab"}
    assert apart(read_run(place), dict.fromkeys(expected.keys() & wanted.keys(), False)) == {}
    run_folder(place, values)
    found = apart(read_run(place), wanted)
    assert found == {(0, "g", "full"): {k: v for k, v in expected.items() if k in wanted}}


def test_a_metric_that_is_no_mean_of_its_clients_has_none(tmp_path):
    run_folder(tmp_path, [(1.0, 2, "a"), (3.0, 2, "b")])
    assert apart(read_run(tmp_path), {"perplexity_worst_tenth": False}) == {}


def test_a_study_reads_them_as_other_metrics_and_the_worst_is_the_highest_loss(tmp_path):
    run_folder(tmp_path, [(1.0, 2, "a"), (3.0, 2, "b")])
    wanted = {"loss_response_worst_tenth@g/full": False, "tier/a/loss_response": False}
    one = recorded(Planned((("m", "x"),), 0, (), 1, "i" * 8), tmp_path, wanted)
    assert [one.curve("round", metric)[1] for metric in wanted] == [[3.0], [1.0]]
    assert "loss_response_gini" not in one.rows[0]


@pytest.mark.parametrize(
    ("name", "base"),
    [("loss_worst_tenth", "loss"), ("tier/T1/accuracy", "accuracy"), ("rouge_l", "")],
)
def test_names(name, base):
    assert measured(name) == base


def test_a_fault_is_caught(tmp_path):
    law = test_a_study_reads_them_as_other_metrics_and_the_worst_is_the_highest_loss
    right = "LOWEST if higher else HIGHEST"
    with planted(clients._summary, right, "LOWEST"), pytest.raises(AssertionError):
        law(tmp_path)
