"""Whole runs over a base that moves: engines, resuming, traffic, exports, refusals."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fedlora.core.errors import ConfigError
from fedlora.models.spec import Tiny
from fedlora.techniques.rebased.payload import Rebased
from simulations.tools.merge import main

WORDS = ["client.lr=1e-2", "client.dropout=0"]
SHAPES = 4 * (4 * [(128, 128)] + 2 * [(352, 128)] + [(128, 352)])
"""Of the adapted weights of the tiny model."""
METHODS = {
    "flora": ["strategy=flora"],
    "own_a": ["strategy=flora", "strategy.own_a=true"],
    "fedex": ["strategy=fedex"],
    "fedex_own": ["strategy=fedex", "strategy.heterogeneous=own"],
    "florist": ["strategy=florist"],
    "svd": ["strategy=flora", "strategy.hold=svd", "strategy/server_optimizer=fedavgm"],
}


def payload(rank, held=True):
    """Bytes of factors of one rank on all modules."""
    return 4 * sum(rank * (m + n) for m, n in SHAPES) * held


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[] if n in ("flora", "fedex_own") else pytest.mark.slow)
        for n in METHODS
    ],
)
def test_engines_agree_a_cut_run_goes_on_and_nothing_is_lost(federate, name):
    """The recorded gap is rounding, but where the method drops directions; the fused engine trains
    clients of each base together."""
    words = [*METHODS[name], *WORDS, "engine=sequential"]
    whole = federate(*words)
    fused = federate(*METHODS[name], *WORDS, "engine=fused", output="fused")
    assert whole.status["status"] == fused.status["status"] == "completed"
    assert all(r["engine/fused_share"] == 1.0 for r in fused.rounds)
    for mine, theirs in zip(fused.rounds, whole.rounds, strict=True):
        assert mine["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-4)
        assert mine["wire/down_bytes"] == theirs["wire/down_bytes"]
    federate(*words, "rounds=1", output="cut")
    resumed = federate(*words, "resume=auto", output="cut")
    assert resumed.hash == whole.hash

    first, second = whole.rounds
    gap = first["aggregate/exactness_gap_relative"]
    assert 1e-3 < gap <= 0.1**0.5 if name == "florist" else gap < 1e-6
    if name != "svd":  # a server optimizer goes further than the average
        assert second["aggregate/exactness_gap_relative"] < (1 if name == "florist" else 1e-6)
    assert first["wire/down_bytes"] == 0 < first["rebase/shift_norm"]
    assert second["wire/down_bytes"] > 0
    assert "update/ instead of adapter/" in whole.said


def test_each_client_is_sent_what_it_missed(federate):
    """Table of the specification, equal to the byte: one rank, three rounds of two clients of
    six."""
    words = [
        "ranks=homogeneous",
        "ranks.rank=2",
        "population.clients=6",
        "population.per_round=2",
        "population.unseen_fraction=0",
        "rounds=4",
        "client.steps=1",
    ]
    for name, of_round in (("flora", 2 * 2), ("fedex", (2 - 1) * 2)):
        done = federate(*METHODS[name], *words, output=name)
        knows = dict.fromkeys(range(6), 0)
        for t in range(4):
            rows = [c for c in done.clients if c["round"] == t + 1]
            assert len(rows) == 2
            for row in rows:
                missed = (t - knows[row["client"]]) * of_round
                base = 4 * sum(min(missed * (m + n), m * n) for m, n in SHAPES)
                assert row["bytes_down"] == base + payload(2, name == "fedex" and t > 0)
                assert row["bytes_up"] == payload(2)
            knows |= {row["client"]: t for row in rows}


def logits(network, ids):
    with torch.no_grad():
        return network(ids).logits


@pytest.mark.parametrize("name", ["flora", pytest.param("fedex_own", marks=pytest.mark.slow)])
def test_the_update_is_exported_dense_and_merged(federate, name, tmp_path):
    done = federate(*METHODS[name], *WORDS)
    assert not (done.folder / "adapter").exists()
    assert main([str(done.folder), str(tmp_path / "merged")]) == 0
    model = Tiny().load(torch.device("cpu"))
    ids = torch.tensor([[1, 300, 400, 500, 600]])
    base = logits(model.network, ids)
    update = Rebased.load(done.folder / "update", model.info)
    model.mount(update)
    mounted = logits(model.network, ids)
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), ids)
    assert (mounted - base).abs().max() > 1e-3
    torch.testing.assert_close(merged, mounted, atol=1e-4, rtol=1e-4)
    norm = torch.stack([d.norm() for d in update.shift.values()]).norm()
    assert float(norm) == pytest.approx(done.rounds[-1]["rebase/shift_norm"], rel=1e-5)


@pytest.mark.parametrize(("name", "head"), [("flora", "averaged"), ("fedex", "local")])
def test_classifiers_train_over_a_moving_base(federate, name, head, tmp_path):
    words = ["data=intents", "model.task=classification", "model.layers=top:1", *WORDS]
    done = federate(*METHODS[name], *words, f"model.head={head}", "engine=fused")
    assert all(r["engine/fused_share"] == 1.0 for r in done.rounds)
    assert done.rounds[-1]["aggregate/exactness_gap_relative"] < 1e-6
    assert done.rounds[0]["wire/down_bytes"] == (6 * 4 * 77 * 128 if head == "averaged" else 0)
    assert main([str(done.folder), str(tmp_path / "merged")]) == 0
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert merged.config.num_labels == 77
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    plain = Tiny().load(torch.device("cpu")).base_state()
    layer = "model.layers.3.self_attn.q_proj.weight"
    assert not torch.equal(stored[layer], plain[layer])


@pytest.mark.slow
def test_slora_goes_on_without_loss(federate):
    """``base ← W + D`` under held factors: the second stage begins at all of ``D``."""
    words = ["strategy=slora", "strategy.stage1_rounds=1", *WORDS]
    done = federate(*words, "strategy@strategy.aggregator=fedex")
    assert done.status["status"] == "completed"
    assert done.rounds[1]["aggregate/exactness_gap_relative"] < 1e-6
    dense = 4 * sum(m * n for m, n in SHAPES)
    second = {c["bytes_down"] for c in done.clients if c["round"] == 2}
    assert len(second) == 1 and second.pop() > dense


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["strategy=flora", "federation.wire=bfloat16"], "federation.wire=bfloat16 with strategy"),
        (
            ["strategy=fedex", "model=hf", "model.path=x", "model.quantization=int8"],
            "model.quantization=int8 with strategy.hold=mean",
        ),
        (["strategy=florist", "strategy.energy=0"], "strategy.energy=0.0 must lie"),
        (["strategy=fedex", "strategy.own_a=true"], "own_a=true draws new factors"),
        (["strategy=fedex", "strategy/server_optimizer=fedavgm"], "with strategy.hold=mean"),
        (
            ["strategy=fedex", "strategy.heterogeneous=refuse"],
            "refuse wants one rank for all .* hold ranks? ",
        ),
        (["strategy=flora", "client=switchlora"], "client/technique=switchlora lets .* Rebase"),
    ],
)
def test_what_means_nothing_is_refused_at_composition(federate, overrides, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        federate(*overrides)
    assert not list(tmp_path.iterdir())
