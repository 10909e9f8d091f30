"""Metrics of evaluations are foreign input: a client that forges them is left out and named."""

import math
from dataclasses import replace

import pytest

from fedlora.core.confusion import confusion
from fedlora.core.metric import EXP_MEAN, LOWEST, MACRO_F1, TOTAL, Metric, count, macro_f1
from fedlora.core.types import Client, Evaluation, Failure, Ranks
from fedlora.server import validation
from fedlora.server.evaluation_round import evaluation_record, validate_evaluations

TABLE = confusion([0, 0, 1, 2, 2], [0, 1, 1, 2, 0], 3)
CLIENTS = [Client(i, Ranks({"w": 2}), 10) for i in range(4)]
METRICS = {
    "examples": count(5),
    "loss_full": Metric(2.0, 40.0),
    "perplexity": Metric(2.0, 40.0, EXP_MEAN),
    "rouge_l": Metric(0.5, 5.0, interval=True),
    "accuracy": Metric(0.6, 5.0, worst=LOWEST),
    "macro_f1": macro_f1(TABLE),
}
BAD = 1


def cohort(**more: Metric):
    found = [Evaluation(c, METRICS) for c in CLIENTS]
    found[BAD] = replace(found[BAD], metrics={**METRICS, **more})
    return found


FORGED = {
    "a NaN count": {"examples": Metric(math.nan, over_clients=TOTAL)},
    "an infinite count": {"examples": Metric(math.inf, over_clients=TOTAL)},
    "half an example": {"examples": Metric(4.5, over_clients=TOTAL)},
    "a negative count": {"examples": Metric(-1.0, over_clients=TOTAL)},
    "a huge value": {"loss_full": Metric(1e300, 40.0)},
    "a NaN weight": {"loss_full": Metric(2.0, math.nan)},
    "an infinite weight": {"loss_full": Metric(2.0, math.inf)},
    "a negative weight": {"loss_full": Metric(2.0, -40.0)},
    "another way to combine": {"loss_full": Metric(2.0, 40.0, TOTAL)},
    "an interval": {"loss_full": Metric(2.0, 40.0, interval=True)},
    "other worst clients": {"loss_full": Metric(2.0, 40.0, worst=LOWEST)},
    "classes of its own": {"macro_f1": macro_f1(confusion([0, 3], [0, 3], 4))},
    "a score that its counts do not give": {
        "macro_f1": Metric(1.0, 5, MACRO_F1, worst=LOWEST, counts=TABLE)
    },
    "more weight than counts": {
        "macro_f1": Metric(TABLE.macro_f1, 1e9, MACRO_F1, worst=LOWEST, counts=TABLE)
    },
    "more counts than a sum can hold": {
        "macro_f1": macro_f1(replace(TABLE, counts=((0, 0, 10**30),)))
    },
    "a tier's name": {"tier/phone/accuracy": Metric(1.0)},
    "a worst tenth": {"accuracy_worst_tenth": Metric(1.0)},
    "the round": {"round": Metric(99.0)},
    "the kind": {"kind": Metric(1.0)},
    "the clients": {"clients": count(1000)},
    "a summary's name": {"loss_full_weighted": Metric(0.0)},
    "a long name": {"k" * 10**4: Metric(0.0)},
    "a name with an escape": {"\x1b[2J": Metric(0.0)},
    "too many": {f"m{i}": Metric(0.0) for i in range(100)},
}


@pytest.mark.parametrize("kind", FORGED)
def test_the_record_is_that_without_the_client(kind):
    found = validate_evaluations(cohort(**FORGED[kind]))
    failure = found[BAD]
    assert isinstance(failure, Failure)
    assert failure.kind == "RejectedEvaluation"
    assert failure.message.startswith("its metric") or failure.message.startswith("it has")
    without: list[Evaluation | Failure] = list(cohort())
    without[BAD] = Failure(CLIENTS[BAD], "PlantedFault", "no")
    records = [evaluation_record("seen:full", r, round=3, seconds=1.0) for r in (found, without)]
    assert records[0] == records[1]
    assert records[0]["round"] == 3
    assert records[0]["failed"] == 1
    assert records[0]["macro_f1_weighted"] == TABLE.macro_f1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_mean_that_is_no_number_is_its_clients_fault_alone(value):
    found = validate_evaluations(cohort(loss_full=Metric(value, 40.0)))
    assert [isinstance(r, Failure) for r in found] == [i == BAD for i in range(4)]
    assert "that of most clients is a finite number" in found[BAD].message


def test_a_model_that_diverged_is_no_fault():
    """What is no number for most clients is left out of a summary; other metrics stay."""
    metrics = {**METRICS, "loss_full": Metric(math.nan, 40.0)}
    found = validate_evaluations([Evaluation(c, metrics) for c in CLIENTS[:3]] + cohort()[:1])
    assert not any(isinstance(r, Failure) for r in found)
    record = evaluation_record("seen:full", found, round=1, seconds=0.0)
    assert record["loss_full"] == 2.0
    assert record["accuracy"] == 0.6


def test_a_table_of_many_counts_is_refused(monkeypatch):
    monkeypatch.setattr(validation, "MOST_COUNTS", 2)
    found = validate_evaluations([Evaluation(CLIENTS[0], METRICS)])
    assert isinstance(found[0], Failure)
    assert found[0].message == "it has 5 counts of classes, at most 2 are recorded"
