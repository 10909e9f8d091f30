"""Whole runs of SPP: what they record, what they leave, what is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fedlora.core.errors import ConfigError, ModelError
from fedlora.models.compact import compact
from fedlora.models.folder import mask_identity
from fedlora.models.masks import (
    load_masks,
    save_sparse,
)
from fedlora.models.spec import HuggingFace, TinyGPT2
from fedlora.prune.spec import Pruned, read_about
from fedlora.techniques.spp.peft import load_spp
from simulations.app.compose import load
from simulations.app.inputs import prepare_inputs
from simulations.app.parts import build_parts
from simulations.tools.merge import main
from tests.simulations.conftest import SMALL, TEXT

CPU = torch.device("cpu")
MODEL = ("model.pattern=2:4", "model.clients=2", "model.samples=1", "model.length=64")
SPP = ("strategy=spp", *TEXT, *MODEL)


def test_zeros_stay_through_rounds_adapter_and_merge(federate, tmp_path):
    done = federate(*SPP, "engine=fused")
    spec = build_parts(load([*SMALL, *SPP])).model
    mask = mask_identity(spec.folder())
    assert [r["spp/trained"] for r in done.rounds] == ["beta", "alpha"]
    for record in done.rounds:
        assert record["spp/zero_pattern"] == record["spp/mask"] == mask
        assert (record["spp/zeros_moved"], record["spp/density"]) == (0, 0.5)
        assert record["engine"] == "SPP one by one"
    modules = spec.describe().modules
    top = load_spp(done.folder / "adapter").blocks
    down = 4 * sum(top[m.path] * m.d_in + m.d_out for m in modules)
    up = {r: [c["bytes_up"] for c in done.clients if c["round"] == r] for r in (1, 2)}
    assert set(up[1]) == {4 * sum(m.d_out for m in modules)}
    assert len(set(up[2])) >= 2, "alpha is sent at the client's own rank"
    for record in done.rounds:
        assert record["wire/up_bytes"] == sum(up[record["round"]])
        assert record["wire/down_bytes"] == 6 * down
    (before,) = [r for r in done.records if r["kind"] == "model"]
    sums = sum(
        m.d_in for m in modules if m.path.endswith(("q_proj", "o_proj", "up_proj", "n_proj"))
    )
    assert before["calibration/up_bytes"] == 2 * 8 * (sums + 4 * 4)
    assert (before["round"], before["calibration/clients"]) == (0, 2)
    folder = spec.folder()
    small = save_sparse(load_file(folder / "model.safetensors"), load_masks(folder), tmp_path / "s")
    assert before["model/down_bytes"] == small
    assert main([str(done.folder), str(tmp_path / "merged")]) == 0
    merged = HuggingFace(path=str(tmp_path / "merged"))
    assert merged.describe().mask == mask == load_spp(done.folder / "adapter").mask
    assert {p: m.sum() for p, m in load_masks(tmp_path / "merged").items()}
    model = spec.load(CPU)
    ids = torch.tensor([[1, 300, 400, 500, 600]])
    with torch.no_grad():
        base = model.network(ids).logits
        model.mount(load_spp(done.folder / "adapter"))
        mounted = model.network(ids).logits
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits
    assert (mounted - base).abs().max() > 1e-3
    torch.testing.assert_close(plain, mounted, atol=1e-4, rtol=1e-4)


def test_a_model_without_its_zeros_is_written_and_read(federate, tmp_path, capsys):
    done = federate(*SPP, "rounds=1", "client.steps=1")
    folders = [tmp_path / name for name in ("dense", "small")]
    assert main([str(done.folder), str(folders[0])]) == 0
    assert main([str(done.folder), str(folders[1]), "--sparse"]) == 0
    stored = {p.name for p in folders[1].glob("*.safetensors")}
    assert stored == {"sparse.safetensors", "masks.safetensors"}
    (before,) = [r for r in done.records if r["kind"] == "model"]
    assert f"({before['model/down_bytes']:,} bytes without its zeros)" in capsys.readouterr().out
    one, other = (HuggingFace(path=str(f)) for f in folders)
    assert one.describe().mask == other.describe().mask == done.rounds[0]["spp/mask"]
    left, right = (s.load(CPU).network.state_dict() for s in (one, other))
    assert left.keys() == right.keys()
    assert all(torch.equal(t, right[name]) for name, t in left.items())
    # It is a model to go on with: every process finds the expanded one.
    assert other.resolved().folder() == other.folder() != folders[1]
    go_on = ("strategy=spp", "model=hf", f"model.path={folders[1]}", "client.steps=1", "rounds=1")
    assert federate(*go_on, output="more").rounds[0]["spp/zeros_moved"] == 0


def test_masks_of_another_model_are_found_when_a_small_model_is_read(federate, tmp_path, pruned):
    folder = tmp_path / "small"
    shutil.copytree(pruned, folder)
    compact(folder)
    other = Pruned(method="magnitude", pattern="2:8").folder()
    shutil.copy(other / "masks.safetensors", folder)
    with pytest.raises(
        ModelError, match=r"sparse.safetensors, expanded: the zeros of model.layers"
    ):
        HuggingFace(path=str(folder)).folder()


def test_only_a_model_with_zeros_can_be_written_without_them(finished, tmp_path, capsys):
    done = finished("strategy=fedit")
    assert main([str(done.folder), str(tmp_path / "m"), "--sparse"]) == 2
    assert "has no adapter that keeps a pruned model's zeros" in capsys.readouterr().err
    assert not (tmp_path / "m").exists()


def test_what_was_trained_is_merged_into_the_base_it_was_trained_on(federate, tmp_path, capsys):
    """Found where it lay; made again if it is gone; refused if it is another."""
    options = (*SPP[:2], "model.method=magnitude", "model.pattern=2:4", "client.steps=1")
    done = federate(*options, "rounds=1")
    about = json.loads((done.folder / "model.json").read_text())
    assert about["mask"] == done.rounds[0]["spp/mask"]
    shutil.rmtree(about["folder"])
    assert main([str(done.folder), str(tmp_path / "m")]) == 0
    assert "pruned base, is gone: it is looked for, or made, again" in capsys.readouterr().err
    config = (done.folder / "config.yaml").read_text()
    for was, now in (("'2:4'", "'2:8'"), ("2:4", "2:8")):
        config = config.replace(f"pattern: {was}", f"pattern: {now}")
    (done.folder / "config.yaml").write_text(config)
    assert main([str(done.folder), str(tmp_path / "n")]) == 0, "the folder of then is taken"
    about |= {"folder": str(tmp_path / "gone")}
    (done.folder / "model.json").write_text(json.dumps(about))
    assert main([str(done.folder), str(tmp_path / "o")]) == 2
    said = capsys.readouterr().err
    assert f"a base pruned with the mask {about['mask']}, and" in said
    assert f"bring back the folder of then ({about['folder']})" in said
    assert not (tmp_path / "o").exists()
    (done.folder / "model.json").unlink()
    assert main([str(done.folder), str(tmp_path / "o")]) == 2, "and the adapter itself knows"
    assert "Traceback" not in capsys.readouterr().err


SLOW = {
    "a whole schedule": ("strategy.schedule=[beta,beta,alpha]", "rounds=4"),
    "beta_only": ("strategy.mode=beta_only",),
    "separate": ("strategy.mode=separate",),
    "uniform": ("strategy.weights=uniform",),
}


@pytest.mark.parametrize(
    ("options", "merges"),
    [
        pytest.param(("strategy.mode=stack",), 2, id="stack"),
        # Three rounds, cut between beta and alpha; and, merged after the second, before beta.
        pytest.param(("strategy.merge_every=2", "rounds=3"), 1, id="alternate, merged"),
        *(pytest.param(o, 0, id=name, marks=pytest.mark.slow) for name, o in SLOW.items()),
    ],
)
def test_every_mode_runs_and_resumes(federate, options, merges):
    options = (*SPP, "client.steps=1", "population.per_round=3", *options)
    whole = federate(*options)
    rounds = len(whole.rounds)
    for cut in range(1, rounds):
        federate(*options, f"rounds={cut}", output=f"cut{cut}")
        resumed = federate(*options, "resume=auto", output=f"cut{cut}")
        assert len(resumed.rounds) == rounds
        assert resumed.hash == whole.hash
        assert [r["spp/trained"] for r in resumed.rounds] == [
            r["spp/trained"] for r in whole.rounds
        ]
    last = resumed.rounds[-1]
    assert (last["spp/zeros_moved"], last["spp/merges"]) == (0, merges)
    assert ("spp/residual" in last) == ("strategy.mode=separate" in options)


def test_a_dense_model_is_refused_and_lora_on_a_pruned_one_is_told(federate):
    with pytest.raises(
        ConfigError,
        match="scales the weights of a pruned model by alpha and beta, and tiny is dense",
    ):
        federate("strategy=spp", "model=tiny")
    told = federate("strategy=fedit", "model=pruned", *MODEL, "rounds=1", "client.steps=1")
    assert "what client=adamw trains fills its zeros when it is merged: strategy=spp" in told.said


def test_text_that_is_too_short_is_refused(federate):
    with pytest.raises(ModelError, match=r"lower model.clients, model.samples or model.length"):
        federate(*SPP, "model.samples=900")


@pytest.fixture
def pruned(federate) -> Path:
    """The folder of the tiny model pruned by size: needs no text. Needs the session's cache."""
    return Pruned(method="magnitude", pattern="2:4").folder()


@pytest.mark.parametrize(
    ("made", "options", "said"),
    [
        (
            Pruned(targets=["q_proj"], method="magnitude"),
            (),
            r"adapts model.layers.0.self_attn.k_proj, which .* has no mask for \(24 of 28 adapted "
            r"layers\): .* use model.targets=\[q_proj\]",
        ),
        (
            Pruned(base=TinyGPT2(), method="magnitude"),
            ("model.split_qkv=true",),
            r"pruned with transformer.h.0.attn.c_attn whole, .* use model.split_qkv=false",
        ),
    ],
    ids=["fewer layers pruned than adapted", "split after pruning"],
)
def test_layers_without_a_mask_of_their_own_are_refused(federate, tmp_path, made, options, said):
    model = ("model=hf", f"model.path={made.folder()}", "model.dtype=float32", *options)
    with pytest.raises(ModelError, match=said):
        federate("strategy=spp", *model)
    assert not (tmp_path / "out").exists()


def test_zeros_that_moved_are_found_before_there_is_a_run_folder(federate, tmp_path, pruned):
    shutil.copytree(pruned, tmp_path / "moved")
    state = load_file(pruned / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    state[name][3] = state[name][3].roll(1)
    save_file(state, tmp_path / "moved/model.safetensors", metadata={"format": "pt"})
    for strategy in ("spp", "fedit"):
        with pytest.raises(
            ModelError, match=r"zeros of model.layers.1.mlp.up_proj are not .* 40 weights of 45056"
        ):
            federate(f"strategy={strategy}", "model=hf", f"model.path={tmp_path / 'moved'}")
    assert not (tmp_path / "out").exists()


def test_clients_that_are_held_out_do_not_calibrate(federate):
    """With half of the clients apart; and the run itself holds out the same ones."""
    options = (*SPP, "population.unseen_fraction=0.5", "seed=3", "model.clients=9")
    cfg = load([*options, "population.clients=24"])
    parts = build_parts(cfg)
    folder = parts.model.folder()
    inputs = prepare_inputs(parts, lambda line: None)
    used = read_about(folder)["calibration_clients"]
    assert len(used) == 9
    assert set(used) <= set(inputs.roster.trainable)
    assert len(inputs.roster.groups["unseen_random"]) == 12
    with pytest.raises(ModelError, match=r"asks 13 clients .* 12 of 12 hold so much text"):
        replace(parts.model, clients=13).folder()
    anybody = replace(parts.model, population=None, clients=13)
    assert anybody.folder() != folder
