"""Whole runs of every strategy: the fused engine gives the sequential one's curves."""

import json

import pytest

OFTEN, SELDOM = ["flexlora"], ["fedavg", "fedit", "fedsa", "heterolora", "slora"]
STRATEGIES = [*OFTEN, *(pytest.param(s, marks=pytest.mark.slow) for s in SELDOM)]
ROUNDS = 2


def curves(run):
    """Every loss that a run records, by what it is of."""
    found = {("train", r["round"]): r["train/loss"] for r in run.rounds}
    for r in run.records:
        if r["kind"] == "evaluate":
            found[r["group"], r["adapter"], r["round"]] = r["loss_response"]
    return found


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strategies_run_unchanged_on_the_fused_engine(federate, strategy):
    words = [
        "experiment=smoke",
        f"strategy={strategy}",
        f"rounds={ROUNDS}",
        "client.dropout=0.1",
        "client.lr=3e-3",
        "evaluate=loss",
        "evaluate.clients=1",
        "evaluate.groups=[participants]",
        "evaluate.adapters=[own]",
        *(["strategy.stage1_rounds=1"] if strategy == "slora" else []),
    ]
    fused = federate(*words, "engine=fused", "engine.tokens=512", "engine.slots=4")
    alone = federate(*words, "engine=sequential")
    assert fused.status["status"] == alone.status["status"] == "completed"
    assert curves(fused) == pytest.approx(curves(alone), abs=1e-4)
    assert len([k for k in curves(fused) if k[0] == "train"]) == ROUNDS
    notes = [r["engine"] for r in fused.rounds]
    sparse = ["sparse updates one by one" in n for n in notes]
    assert sparse == [strategy == "slora" and n == 0 for n in range(ROUNDS)]
    for note, one_by_one in zip(notes, sparse, strict=True):
        assert one_by_one or "fused, ragged, 512 tokens per step" in note
    assert all(r["engine"] == "sequential" for r in alone.rounds)
    assert [r["clients"] for r in fused.rounds] == [r["clients"] for r in alone.rounds]
    ranks = [[(c["round"], c["client"], c["rank"]) for c in r.clients] for r in (fused, alone)]
    assert sorted(ranks[0]) == sorted(ranks[1])


def test_a_run_has_one_token_budget_that_it_records(federate):
    run = federate("engine=auto")
    engine = json.loads((run.folder / "worker.json").read_text())["engine"]
    assert engine["tokens"] > 0
    assert {r["engine"] for r in run.rounds} == {
        f"fused, ragged, {engine['tokens']} tokens per step"
    }
    assert f"engine.tokens={engine['tokens']}, decided from" in run.said


def test_a_resumed_run_keeps_the_budget_that_it_began_with(federate):
    """Also on a machine of another memory, which would decide otherwise."""
    words = ["engine=auto", "name=one"]
    began = federate(*words, "rounds=1")
    file = began.folder / "worker.json"
    worker = json.loads(file.read_text())
    worker["engine"]["tokens"] = 4096
    file.write_text(json.dumps(worker))
    resumed = federate(*words, "rounds=2", "resume=auto")
    assert resumed.rounds[-1]["engine"] == "fused, ragged, 4096 tokens per step"
    assert "engine.tokens=4096, as decided when this run began" in resumed.said
    assert json.loads(file.read_text())["engine"]["tokens"] == 4096


def test_a_resumed_run_keeps_the_number_format_that_it_began_with(federate):
    """Also on a processor that would have another chosen."""
    words = ["model.dtype=auto", "name=one"]
    began = federate(*words, "rounds=1")
    file = began.folder / "worker.json"
    worker = json.loads(file.read_text())
    decided = worker["model"]["dtype"]
    assert f"model.dtype={decided}: the processor has" in began.said
    assert json.loads((began.folder / "model.json").read_text())["dtype"] == decided
    other = {"float32": "bfloat16", "bfloat16": "float32"}[decided]
    worker["model"]["dtype"] = other
    file.write_text(json.dumps(worker))
    resumed = federate(*words, "rounds=2", "resume=auto")
    assert f"model.dtype={other}, as decided when this run began" in resumed.said
    assert json.loads(file.read_text())["model"]["dtype"] == other
