"""Every client's own metrics are on the disk, once, and give the means that are recorded."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

from fedlora.core.confusion import Confusion, added
from fedlora.data.store import TokenStore
from fedlora.evaluation import metrics as evaluate
from fedlora.run.tracking import JsonlTracker, read_jsonl

EVALUATED = ("evaluate=fast", "evaluate.clients=3", "evaluate.groups=[seen]", "rounds=1")


def test_the_rows_give_the_record(federate):
    done = federate(*EVALUATED)
    rows = read_jsonl(done.folder / "evaluations.jsonl")
    for record in (r for r in done.records if r["kind"] == "evaluate"):
        mine = [r for r in rows if r["round"] == record["round"]]
        assert len(mine) == record["clients"] == 3
        assert [r["client"] for r in mine] == sorted({r["client"] for r in mine})
        assert {(r["group"], r["adapter"]) for r in mine} == {("seen", record["adapter"])}
        for name in ("loss_response", "accuracy"):
            values = [r["metrics"][name] for r in mine]
            weights = [r["weights"][name] for r in mine]
            assert math.fsum(values) / 3 == pytest.approx(record[name])
            weighted = math.fsum(v * w for v, w in zip(values, weights, strict=True))
            assert weighted / math.fsum(weights) == pytest.approx(record[f"{name}_weighted"])


def test_a_resumed_run_repeats_no_row(tmp_path):
    """Rows of an evaluation whose record was lost to a kill are dropped; it is done again."""
    first = JsonlTracker(tmp_path)
    place = {"group": "seen", "adapter": "full"}
    for number in (0, 1, 2):
        first.evaluated([{"round": number, **place, "client": c} for c in (3, 5)])
        if number != 1:
            first.round({"kind": "evaluate", "round": number, **place})
    JsonlTracker(tmp_path, after_round=1)
    kept = read_jsonl(tmp_path / "evaluations.jsonl")
    assert [(r["round"], r["client"]) for r in kept] == [(0, 3), (0, 5)]


LABELLED = ("data=intents", "model.task=classification", "model.layers=top:1", "rounds=1")
EVERYONE = ("evaluate=classification", "evaluate.first=false", "population.unseen_fraction=0")


def test_all_clients_together_are_evaluated_on_the_official_test_set(federate):
    done = federate(*LABELLED, *EVERYONE, "population.clients=30")
    names = json.loads((done.folder / "labels.json").read_text())["labels"]
    rows = read_jsonl(done.folder / "evaluations.jsonl")
    records = [r for r in done.records if r["kind"] == "evaluate"]
    assert [r["adapter"] for r in records] == ["full", "own"]
    for record in records:
        mine = [r for r in rows if r["adapter"] == record["adapter"]]
        counts = [Confusion(77, tuple(map(tuple, r["counts"]["macro_f1"]))) for r in mine]
        pooled = added(counts)
        assert record["clients"] == len(mine) == 30
        assert record["examples"] == pooled.examples == 3080  # of BANKING77
        assert [(s.label, s.true) for s in pooled.by_class] == [(i, 40) for i in range(len(names))]
        assert record["macro_f1_weighted"] == pooled.macro_f1
        assert record["accuracy_weighted"] == pytest.approx(pooled.accuracy, rel=1e-12)
        assert record["accuracy"] == pytest.approx(math.fsum(c.accuracy for c in counts) / 30)
        assert sum(v for k, v in record.items() if re.fullmatch("tier/.*/clients", k)) == 30
        assert all(isinstance(v, int | float | str) for v in record.values())


def test_the_labels_of_clients_are_those_of_the_data(federate, finished):
    done = federate(*LABELLED, "evaluate=none")
    written = json.loads((done.folder / "labels.json").read_text())
    worker = json.loads((done.folder / "worker.json").read_text())
    store = TokenStore(Path(worker["store"]))
    assert tuple(written["labels"]) == store.labels
    for held, counts in zip(written["train"], store.label_counts("train"), strict=True):
        assert {i: n for i, n in enumerate(counts.tolist()) if n} == dict(held)
    assert not (finished(output="tokens").folder / "labels.json").exists()


def test_the_default_evaluation_follows_the_task(federate):
    done = federate(*LABELLED, "evaluate=fast", "evaluate.clients=3", "evaluate.groups=[seen]")
    for record in (r for r in done.records if r["kind"] == "evaluate"):
        assert {"loss", "accuracy", "macro_f1"} < record.keys()
        assert not {"rouge_l", "exact_match", "perplexity", "truncated_prompts"} & record.keys()
    assert "accuracy" in done.said
    assert "token accuracy" not in done.said


def test_an_evaluation_that_claims_more_weight_is_left_out(federate, monkeypatch):
    """In a whole run: the client is counted as failed and named, the others are summarised."""
    honest = evaluate.measure

    def lying(*args, client, **more):
        found = honest(*args, client=client, **more)
        if client == liar:
            found["accuracy"] = replace(found["accuracy"], value=1.0, weight=1e6)
        return found

    plain = federate(*EVALUATED, "evaluate.first=false", "engine=sequential", output="plain")
    rows = read_jsonl(plain.folder / "evaluations.jsonl")
    liar = rows[0]["client"]
    monkeypatch.setattr(evaluate, "measure", lying)
    done = federate(*EVALUATED, "evaluate.first=false", "engine=sequential", output="lying")
    found = {r["client"]: r for r in read_jsonl(done.folder / "evaluations.jsonl")}
    assert found[liar]["failure"] == "RejectedEvaluation"
    assert "its metric accuracy is over 1e+06 tokens_response" in found[liar]["message"]
    assert all(found[r["client"]] == r for r in rows if r["client"] != liar)
    (record,) = [r for r in done.records if r["kind"] == "evaluate"]
    assert (record["failed"], record["clients"]) == (1, 2)
