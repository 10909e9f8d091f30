"""Whole runs of LoRA-A²: both engines, unequal budgets, classifiers, missed rounds, resume."""

import pytest

NARROW, WIDE = 128, 352
"""Inputs and outputs of the tiny model's adapted layers."""
WHOLE = {"a": 4 * 4 * (6 * NARROW + WIDE), "b": 4 * 4 * (4 * NARROW + 2 * WIDE + NARROW)}
"""Bytes of a factor per rank: four blocks of q, k, v, o, gate, up and down."""


def test_engines_agree_and_runs_resume(federate):
    words = ["strategy=lora_a2", "ranks=uniform", "rounds=3"]
    alone = [*words, "engine=sequential"]
    whole = federate(*alone)
    fused = federate(*words, "engine=fused", output="fused")
    assert all(r["engine/fused_share"] == 1.0 for r in fused.rounds)
    for mine, theirs in zip(fused.rounds, whole.rounds, strict=True):
        # Scores nearer than float32's rounding may fall otherwise.
        assert mine["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-2)
        assert mine["rejected"] == theirs["rejected"] == 0
        assert mine["aggregate/exactness_gap_relative"] < 1e-5
    federate(*alone, "rounds=1", output="cut")
    assert federate(*alone, "resume=auto", output="cut").hash == whole.hash


def test_budgets_are_what_is_sent_and_a_trial_is_paid_for(federate):
    """At one rank of all clients below the server's, by the byte as far as that is known."""
    words = ["strategy=lora_a2", "strategy.global_rank=12", "ranks=homogeneous", "ranks.rank=3"]
    done = federate(*words, "rounds=3", "engine=fused")
    assert not any(r["rejected"] or r["failed"] for r in done.rounds)
    plain = federate("strategy=rolora", *words[2:], "rounds=3", "engine=fused", output="plain")
    cost = {(c["round"], c["client"]): c for c in plain.clients}
    for row in done.clients:
        chosen = 3 * 4 * 7
        least, most = (chosen * (4 * width + 2) for width in (NARROW, WIDE))
        assert least <= row["bytes_up"] <= most
        assert (row["bytes_up"] - 2 * chosen) % (4 * 32) == 0
        other = cost[row["round"], row["client"]]
        for name in ("steps", "tokens"):
            assert row[name] == other[name] + row[f"probe_{name}"] > other[name]
    for row in (c for c in done.clients if c["round"] == 3):
        took_part = any(c["client"] == row["client"] for c in done.clients if c["round"] == 2)
        sides = "a" if took_part else "ab"
        assert row["bytes_down"] == 12 * sum(WHOLE[side] for side in sides)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["sequential", "fused"])
def test_classifiers_with_a_head_and_rounded_replies(federate, engine):
    done = federate(
        *("data=intents", "model.task=classification", "model.layers=top:1", "rounds=3"),
        *("strategy=lora_a2", "ranks=uniform", "model.head=averaged", f"engine={engine}"),
        *("federation.wire=bfloat16", "evaluate=loss", "evaluate.clients=2", "evaluate.every=3"),
    )
    assert done.status["status"] == "completed"
    assert not any(r["rejected"] or r["failed"] for r in done.rounds)
    assert any("probe_steps" in c for c in done.clients)


@pytest.mark.parametrize("ranks", ["heavy_tail_strong", "normal", "tiers_1_32"])
def test_every_distribution_of_ranks(federate, ranks):
    done = federate("strategy=lora_a2", f"ranks={ranks}", "rounds=1", "engine=fused")
    assert not any(r["rejected"] or r["failed"] for r in done.rounds)
    assert done.rounds[0]["wire/down_bytes"] == 0
