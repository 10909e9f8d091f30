"""Whole runs of Fed-SB and RAVAN, on both engines: traffic, resumption, heads, exports."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from simulations.app.export import READ_BACK
from simulations.tools.base_model import base_of
from simulations.tools.final_payload import run_config
from simulations.tools.merge import main
from tests.simulations.conftest import Run

MODULES = 4 * 7
"""Adapted layers of the tiny model."""
EQUAL = ("ranks=homogeneous", "ranks.rank=8")
SENT = {"fedsb": 4 * MODULES * 8**2, "ravan": 4 * MODULES * 4 * 2**2}
"""Bytes of the cores at rank 8: one block of 8, four heads of 2."""


def counted(run: Run, name: str) -> list[set[int]]:
    return [{c[name] for c in run.clients if c["round"] == t} for t in (1, 2, 3)]


@pytest.mark.parametrize("strategy", SENT)
def test_engines_agree_traffic_is_the_core_and_runs_resume(federate, strategy):
    words = [*EQUAL, f"strategy={strategy}", "population.clients=6", "rounds=3"]
    words += ["population.per_round=3", "population.unseen_fraction=0"]
    alone = [*words, "engine=sequential"]
    whole = federate(*alone)
    fused = federate(*words, "engine=fused", output="fused")
    assert all(r["engine/fused_share"] == 1.0 for r in fused.rounds)
    for mine, theirs in zip(fused.rounds, whole.rounds, strict=True):
        assert mine["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-4)
        assert mine["rejected"] == theirs["rejected"] == 0
        assert mine["aggregate/exactness_gap_relative"] < 1e-5
    assert counted(whole, "bytes_up") == [{SENT[strategy]}] * 3
    assert counted(whole, "bytes_down") == [{0}, {SENT[strategy]}, {SENT[strategy]}]
    federate(*alone, "rounds=1", output="cut")
    assert federate(*alone, "resume=auto", output="cut").hash == whole.hash


@pytest.mark.parametrize(
    ("strategy", "engine"),
    [
        ("fedsb", "fused"),
        ("ravan", "sequential"),
        pytest.param("fedsb", "sequential", marks=pytest.mark.slow),
        pytest.param("ravan", "fused", marks=pytest.mark.slow),
    ],
)
def test_classifiers_with_a_head_and_rounded_replies(federate, strategy, engine):
    done = federate(
        *("data=intents", "model.task=classification", "model.layers=top:1", "rounds=3"),
        *(f"strategy={strategy}", "model.head=averaged", f"engine={engine}"),
        *("federation.wire=bfloat16", "federation.error_feedback=true"),
        *("evaluate=loss", "evaluate.clients=2", "evaluate.every=3"),
    )
    assert done.status["status"] == "completed"
    assert not any(r["rejected"] or r["failed"] for r in done.rounds)
    assert [r["clients"] for r in done.rounds] == [6, 6, 6]


@pytest.mark.parametrize("ranks", [EQUAL, ("ranks=uniform",)], ids=["equal", "unequal"])
def test_peft_and_the_merged_model_compute_what_was_trained(federate, tmp_path, ranks):
    """``A = V`` has orthonormal rows, and ``B = U R`` lies in the span of as many columns."""
    done = federate(*ranks, "strategy=ravan", "rounds=2", read_back=True)
    assert not any(r["rejected"] for r in done.rounds)
    record = json.loads((done.folder / "adapter" / "fedlora.json").read_text())
    assert record[READ_BACK]["agrees"]
    tensors = load_file(done.folder / "adapter" / "adapter_model.safetensors")
    for name, a in tensors.items():
        if ".lora_A." in name:
            torch.testing.assert_close(a @ a.T, torch.eye(len(a)), rtol=0, atol=1e-5)
    assert main([str(done.folder), str(tmp_path / "merged")]) == 0
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    spec = base_of(done.folder, run_config(done.folder).model, lambda line: None)
    base = AutoModelForCausalLM.from_pretrained(spec.folder(), dtype=torch.float32).eval()
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        bare, merged = base(input_ids=ids).logits, plain(input_ids=ids).logits
        theirs = peft.PeftModel.from_pretrained(base, done.folder / "adapter").eval()
        adapted = theirs(input_ids=ids).logits
    torch.testing.assert_close(adapted, merged, rtol=1e-4, atol=1e-4)
    assert float((adapted - bare).abs().max()) > 1e-3
