"""Whole runs of methods whose clients keep a part of the model."""

import pytest

WORDS = [
    "strategy=fedsa",
    "population.clients=10",
    "population.per_round=3",
    "population.unseen_fraction=0",
    "client.lr=1e-2",
    "evaluate=loss",
    "evaluate.clients=0",
    "evaluate.groups=[seen]",
    "evaluate.adapters=[own]",
    "evaluate.plan.max_examples=1",
]


def evaluations(run):
    return [
        {k: v for k, v in r.items() if k != "round/evaluate_seconds"}
        for r in run.records
        if r["kind"] == "evaluate"
    ]


def test_fedsa_resumes_and_tells_clients_that_trained_from_those_that_never_did(federate):
    whole = federate(*WORDS, "rounds=3")
    federate(*WORDS, "rounds=1", output="cut")
    resumed = federate(*WORDS, "rounds=3", "resume=auto", output="cut")
    assert resumed.hash == whole.hash
    assert evaluations(resumed) == evaluations(whole)

    before, *after = evaluations(whole)
    assert not [k for k in before if k.startswith(("trained/", "untrained/"))]
    took_part = set()
    for t, (found, record) in enumerate(zip(after, whole.rounds, strict=True), start=1):
        took_part |= {c["client"] for c in whole.clients if c["round"] == t}
        assert found["trained/clients"] == len(took_part) == record["client_state/clients"]
        assert found["trained/clients"] + found["untrained/clients"] == found["clients"] == 10
        mean = record["client_state/bytes"] / len(took_part)
        assert record["client_state/bytes_mean"] == pytest.approx(mean)
        assert "aggregate/exactness_gap" not in record  # there is no global model
    assert whole.rounds[0]["wire/down_bytes"] == 0
    assert all(r["wire/down_bytes"] == r["wire/up_bytes"] for r in whole.rounds[1:])
