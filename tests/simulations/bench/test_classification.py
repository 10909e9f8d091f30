"""The benchmark of classification: the same clients and losses on every side."""

from simulations.bench import classification
from simulations.bench.engine.measure import TOLERANCE

SMALL = ["model=tiny", "model.task=classification", "data=intents", "client.max_examples=4"]


def test_sides_agree():
    words = [*SMALL, *classification.LORA, *classification.EPOCH]
    record = classification.compare(words, clients=3, repeats=1, threads=1)
    assert list(record["cpu_s"]) == ["peft loop", "sequential", "fused"]
    loss, adapter = TOLERANCE["float32"]
    assert max(record["loss_difference"].values()) <= loss
    assert max(record["adapter_difference"].values()) <= adapter
    assert any(note.startswith("fused, ragged") for note in record["notes"]["fused"])
    assert "3 clients, one epoch each; threads: 1" in classification.table(record)
