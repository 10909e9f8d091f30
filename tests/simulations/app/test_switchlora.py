"""Whole runs of SwitchLoRA: modes, resuming, traffic, engines, refusals."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from fedlora.core.errors import ConfigError
from fedlora.models.spec import Tiny
from fedlora.techniques.rebased.payload import Rebased
from simulations.tools.merge import main

WORDS = [
    "strategy=switchlora",
    "ranks=homogeneous",
    "ranks.rank=8",
    "ranks.alpha=1",
    "client.technique.interval=10",
    "client.steps=2",
]
FACTOR = 4 * 8 * (4 * 4 * 128 + 4 * (2 * 128 + 352))
"""Bytes of all A of the tiny model at rank 8: four layers of q, k, v, o, gate and up, and down."""
DENSE = 4 * 4 * (4 * 128 * 128 + 3 * 128 * 352)


def test_alternating_rounds_send_one_factor_and_resume(federate, tmp_path):
    """The fused engine trains the clients together, and the same up to rounding."""
    words = [*WORDS, "strategy.horizon=3", "engine=sequential"]
    whole = federate(*words)
    fused = federate(*WORDS, "strategy.horizon=3", "engine=fused", output="fused")
    assert all(r["engine/fused_share"] == 1.0 for r in fused.rounds)
    for mine, theirs in zip(fused.rounds, whole.rounds, strict=True):
        assert mine["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-4)
    assert whole.status["status"] == fused.status["status"] == "completed"
    first, second = ([c for c in whole.clients if c["round"] == t] for t in (1, 2))
    assert {c["bytes_up"] for c in first} == {FACTOR}
    assert {c["bytes_down"] for c in first} == {0}
    assert {c["bytes_down"] for c in second} == {FACTOR}
    of_b = 4 * 8 * (4 * 4 * 128 + 4 * (2 * 352 + 128))
    assert {c["bytes_up"] for c in second} == {of_b}
    federate(*words, "rounds=1", output="cut")
    resumed = federate(*words, "resume=auto", output="cut")
    assert resumed.hash == whole.hash

    assert "update/ instead of adapter/" in whole.said
    assert main([str(whole.folder), str(tmp_path / "merged")]) == 0
    model = Tiny().load(torch.device("cpu"))
    ids = torch.tensor([[1, 300, 400, 500, 600]])
    with torch.no_grad():
        base = model.network(ids).logits
        model.mount(Rebased.load(whole.folder / "update", model.info))
        mounted = model.network(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits
    assert (mounted - base).abs().max() > 1e-3
    torch.testing.assert_close(merged, mounted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", [pytest.param("sync_product", marks=pytest.mark.slow), "dense"])
def test_other_modes_run_and_are_counted(federate, mode):
    done = federate(*WORDS, f"strategy.mode={mode}", "client.steps=2")
    assert done.status["status"] == "completed"
    up = {c["bytes_up"] for c in done.clients}
    both = 4 * 8 * 4 * (8 * 128 + 3 * 480)
    assert up == ({DENSE} if mode == "dense" else {both})
    assert {c["bytes_down"] for c in done.clients if c["round"] == 1} == {0}
    second = {c["bytes_down"] for c in done.clients if c["round"] == 2}
    assert second == {DENSE} if mode == "dense" else min(second) > 2 * both


@pytest.mark.slow
def test_unequal_ranks_train_the_slots_they_have(federate):
    words = [w for w in WORDS if not w.startswith("ranks")]
    done = federate(*words, "ranks=uniform", "rounds=1")
    sizes = {c["rank"]: c["bytes_up"] for c in done.clients}
    assert len(sizes) >= 3
    assert len(set(sizes.values())) == len(sizes)


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "mode"), [("nan", "sync_alternate"), ("shape", "dense")])
def test_a_bad_update_is_rejected_and_named(federate, fault, mode):
    done = federate(
        *WORDS, "engine=faulty", f"engine.{fault}_fraction=0.4", f"strategy.mode={mode}", "rounds=1"
    )
    rejected = [c for c in done.clients if c.get("failure") == "RejectedUpdate"]
    assert 0 < len(rejected) == done.rounds[0]["rejected"] < 6


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["strategy=fedavg", "client=switchlora"],
            "client/technique=switchlora lets .* FedAvg averages",
        ),
        (["strategy=flexlora", "client=switchlora"], "hold alike: use strategy=switchlora"),
        (
            ["strategy=heterolora", "client=switchlora"],
            "client/technique=switchlora lets .* HeteroLoRA averages",
        ),
        (
            ["strategy=splitlora", "client=switchlora"],
            "client/technique=switchlora lets .* SplitLoRA averages",
        ),
        (
            ["strategy=slora", "strategy@strategy.aggregator=switchlora"],
            "strategy.aggregator=SwitchLoRA .*base that moves",
        ),
        (
            ["strategy=splitlora", "strategy@strategy.aggregator=switchlora", "client=adamw"],
            "strategy.aggregator=SwitchLoRA .*base that moves",
        ),
        (
            [w for w in WORDS if "technique.interval" not in w] + ["client=adamw"],
            "without switches.*or client=switchlora",
        ),
        ([*WORDS, "client.steps=0"], "client.steps=0 with strategy=switchlora"),
        ([*WORDS, "federation.wire=bfloat16"], "federation.wire=bfloat16"),
        ([*WORDS, "client.technique.interval=8"], "interval=8 is less than twice"),
        (
            [*WORDS, "model=hf", "model.path=x", "model.quantization=int8"],
            "model.quantization=int8 with strategy=switchlora",
        ),
        (
            [*WORDS, "strategy.mode=dense", "client.optimizer=sgd"],
            "client.optimizer='sgd' with strategy.mode=dense",
        ),
        ([*WORDS, "ranks.rank=1"], "rank 1 cannot switch.*choose a rank in 2..127"),
        ([*WORDS, "ranks.rank=128", "strategy.mode=dense"], "rank 128 cannot switch: there are"),
    ],
)
def test_illegal_combinations_are_refused_at_composition(federate, overrides, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        federate(*overrides)
    assert not list(tmp_path.iterdir())
