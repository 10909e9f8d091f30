"""Every client's own metrics are on the disk, once, and give the means that are recorded."""

import math

import pytest

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
