"""Whole runs of methods that train one factor at a time, on both engines."""

import pytest
import torch
from safetensors.torch import load_file

EQUAL = ["ranks=homogeneous", "ranks.rank=8"]
OF_A = 4 * 8 * (4 * 4 * 128 + 4 * (2 * 128 + 352))
OF_B = 4 * 8 * (4 * 4 * 128 + 4 * (2 * 352 + 128))
"""Bytes of a factor of the tiny model at rank 8: four layers of q, k, v, o, gate and up, down."""


def counted(run, name):
    return [{c[name] for c in run.clients if c["round"] == t} for t in (1, 2, 3)]


@pytest.mark.parametrize("strategy", ["ffa", "rolora"])
def test_engines_agree_traffic_is_one_factor_and_runs_resume(federate, strategy):
    words = [*EQUAL, f"strategy={strategy}", "population.clients=6", "rounds=3"]
    words += ["population.per_round=6", "population.unseen_fraction=0"]
    alone = [*words, "engine=sequential"]
    whole = federate(*alone)
    fused = federate(*words, "engine=fused", output="fused")
    assert all(r["engine/fused_share"] == 1.0 for r in fused.rounds)
    for mine, theirs in zip(fused.rounds, whole.rounds, strict=True):
        assert mine["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-4)
        assert mine["rejected"] == theirs["rejected"] == 0
        assert mine["aggregate/exactness_gap_relative"] < 1e-5
    second = OF_A if strategy == "rolora" else OF_B
    assert counted(whole, "bytes_up") == [{OF_B}, {second}, {OF_B}]
    assert counted(whole, "bytes_down") == [{0}, {OF_B}, {second}]  # all took part in each round
    federate(*alone, "rounds=1", output="cut")
    assert federate(*alone, "resume=auto", output="cut").hash == whole.hash


def test_unequal_ranks_send_what_they_hold_and_who_missed_rounds_is_sent_more(federate):
    done = federate("strategy=rolora", "ranks=uniform", "rounds=3")
    assert not any(r["rejected"] for r in done.rounds)
    for row in (c for c in done.clients if c["round"] == 3):
        took_part = any(c["client"] == row["client"] for c in done.clients if c["round"] == 2)
        up = row["bytes_up"]  # a round of B
        assert (row["bytes_down"] < up) == took_part
    sizes = {c["rank"]: c["bytes_up"] for c in done.clients if c["round"] == 1}
    assert len(set(sizes.values())) == len(sizes) >= 3


@pytest.mark.parametrize(
    ("strategy", "engine"),
    [
        ("ffa", "sequential"),
        ("rolora", "fused"),
        ("fedsvd", "fused"),
        *(
            pytest.param(*pair, marks=pytest.mark.slow)
            for pair in [("ffa", "fused"), ("rolora", "sequential"), ("fedsvd", "sequential")]
        ),
    ],
)
def test_classifiers_with_a_head_and_rounded_replies(federate, strategy, engine):
    """Error feedback keeps what rounding lost of a factor until that factor trains again."""
    done = federate(
        *("data=intents", "model.task=classification", "model.layers=top:1", "rounds=3"),
        *(f"strategy={strategy}", "model.head=averaged", f"engine={engine}"),
        *("federation.wire=bfloat16", "federation.error_feedback=true"),
        *("evaluate=loss", "evaluate.clients=2", "evaluate.every=3"),
    )
    assert done.status["status"] == "completed"
    assert not any(r["rejected"] or r["failed"] for r in done.rounds)
    assert [r["clients"] for r in done.rounds] == [6, 6, 6]


def deltas(run):
    """The final update ``B A`` of every module, as exported for PEFT; the scales are alike."""
    found = load_file(run.folder / "adapter" / "adapter_model.safetensors")
    of_a = {n: t.double() for n, t in found.items() if ".lora_A." in n}
    return {n: found[n.replace("lora_A", "lora_B")].double() @ a for n, a in of_a.items()}


def distance(one, other):
    """``||one - other|| / ||other||`` over all modules."""
    x, y = (torch.cat([t.flatten() for t in deltas(run).values()]) for run in (one, other))
    return float((x - y).norm() / y.norm())


@pytest.mark.parametrize("clip", [0.5, 0.0])
def test_fedsvd_is_ffa_in_another_basis_under_sgd(federate, clip):
    """FSVD-4, FSVD-10: what it changes is the conditioning of A, once; FSVD-5: under AdamW, whose
    steps see the basis, the two differ; FSVD-6: so do they if A is left as it was drawn."""
    words = [*EQUAL, "rounds=3", "client=sgd", "client.lr=0.5", "client.dropout=0"]
    words += [f"client.max_grad_norm={clip}", "engine=sequential"]
    orthonormal = "strategy.init_a=orthonormal"
    svd = federate(*words, "strategy=fedsvd", orthonormal, output="svd")
    ffa = federate(*words, "strategy=ffa", orthonormal, output="ffa")
    assert distance(svd, ffa) < 1e-5
    if not clip:
        return
    rarely = federate(*words, "strategy=fedsvd", "strategy.period=2", orthonormal, output="rarely")
    assert distance(rarely, ffa) < 1e-5
    raw = federate(*words, "strategy=ffa", output="raw")
    assert distance(raw, ffa) > 0.1
    adam = ["client=adamw", "client.lr=1e-3"]
    svd, ffa = (
        federate(*words, *adam, f"strategy={s}", orthonormal, output=f"adam-{s}")
        for s in ("fedsvd", "ffa")
    )
    assert distance(svd, ffa) > 0.01
