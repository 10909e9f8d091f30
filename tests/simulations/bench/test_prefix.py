"""The benchmark of states: the same clients and losses on every side."""

import json
import os

import pytest

from fedlora.core import variables
from simulations.bench import prefix
from simulations.bench.engine.measure import TOLERANCE

SMALL = ["data.clients=40", "data.max_length=64", "client.steps=2", "client.max_examples=4"]


def test_sides_agree_and_states_are_counted():
    before = os.environ.get(variables.CACHE)
    words = [*prefix.CASES["tiny"], *prefix.LORA, *SMALL]
    record = prefix.compare(words, clients=2, repeats=1, sides=[prefix.LOOP, *prefix.ENGINES])
    assert list(record["cpu_s"]) == [
        "peft loop",
        "sequential",
        "sequential, states",
        "fused",
        "fused, states",
    ]
    loss, adapter = TOLERANCE["float32"]
    assert max(record["loss_difference"].values()) <= loss
    assert max(record["adapter_difference"].values()) <= adapter
    assert record["blocks"] == [2, 4]
    assert record["fill"]["bytes"] == pytest.approx(4 * 128 * record["tokens_held"], rel=0.02)
    used = "the first 2 of 4 blocks computed once per example"
    assert {name: used in notes for name, notes in record["notes"].items()} == {
        name: name.endswith("states") for name in record["notes"]
    }
    assert "states behind 2 of 4 blocks" in prefix.table(record)
    assert os.environ.get(variables.CACHE) == before


@pytest.mark.parametrize("gap", [0.0, 1.0])
def test_a_side_that_trains_something_else_fails_the_benchmark(gap, monkeypatch, tmp_path, capsys):
    record = {
        "cpu_s": {"peft loop": [1.0], "fused, states": [0.5]},
        "loss_difference": {"peft loop": 0.0, "fused, states": gap},
        "adapter_difference": {"peft loop": 0.0, "fused, states": 0.0},
        "blocks": [2, 4],
        "clients": 2,
        "tokens_held": 10,
        "fill": {"cpu_s": 0.1, "bytes": 1000},
    }
    monkeypatch.setattr(prefix, "compare", lambda *_: dict(record))
    out = tmp_path / "out.json"
    assert prefix.main(["--model", "tiny", "--out", str(out)]) == (gap > 0)
    assert ("fused, states trains something else" in capsys.readouterr().out) == (gap > 0)
    assert json.loads(out.read_text())["clients"] == 2
