"""Whole runs of SCAFFOLD and FedDyn: both engines, resume, a classifier, and what is recorded."""

import pytest

WORDS = [
    "population.clients=8",
    "population.per_round=4",
    "population.unseen_fraction=0.25",
    "client.dropout=0.1",
    "client.max_examples=3",
    "client.lr=0.1",
    "evaluate=none",
    "rounds=3",
]
METHODS = ["scaffold", "feddyn"]


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_is_the_whole_one(federate, method):
    whole = federate(f"strategy={method}", *WORDS)
    federate(f"strategy={method}", *WORDS, "rounds=1", output="cut")
    resumed = federate(f"strategy={method}", *WORDS, "resume=auto", output="cut")
    assert resumed.hash == whole.hash
    rows = [c for c in whole.clients if c["round"] == 1]
    assert all(c["lr_sum"] > 0 for c in rows)
    record = whole.rounds[-1]
    # of the size of the factors in float32, and the header of a file
    header = record["client_state/bytes_mean"] - rows[0]["bytes_up"]
    assert 0 < header < 8192
    first, later = whole.rounds[0], whole.rounds[-1]
    assert first["wire/down_bytes"] == first["wire/up_bytes"]
    assert later["wire/down_bytes"] == later["wire/up_bytes"] * (2 if method == "scaffold" else 1)
    assert ("feddyn/shift" in record) is (method == "feddyn")


@pytest.mark.parametrize("method", METHODS)
def test_both_engines_train_the_same(federate, method):
    one, other = (
        federate(f"strategy={method}", *WORDS, f"engine={engine}", output=engine)
        for engine in ("sequential", "fused")
    )
    for x, y in zip(one.rounds, other.rounds, strict=True):
        assert x["train/loss"] == pytest.approx(y["train/loss"], rel=1e-5)
    assert all(c["fused"] == 1.0 for c in other.clients)


@pytest.mark.parametrize("method", METHODS)
def test_a_correction_is_what_makes_it_another_run(federate, method):
    """The first round is FedAvg's; later ones are not."""
    run = federate(f"strategy={method}", *WORDS)
    plain = federate("strategy=fedavg", *WORDS, "client.max_grad_norm=0", output="plain")
    if method == "scaffold":
        assert run.rounds[0]["train/loss"] == plain.rounds[0]["train/loss"]
    assert run.rounds[2]["train/loss"] != plain.rounds[2]["train/loss"]


@pytest.mark.parametrize("method", METHODS)
def test_classifiers(federate, method):
    words = ("data=intents", "model.task=classification", "model.layers=top:1")
    run = federate(f"strategy={method}", *words, "model.head=averaged", *WORDS, "rounds=2")
    assert len(run.clients) == 8
    assert not [c for c in run.clients if "failure" in c]
