"""A merged model computes what the run's adapter computed."""

import json
import os
import shutil
import stat

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedlora.core.errors import RunError
from fedlora.core.files import output_record
from fedlora.models.folder import find_assets, fingerprint
from fedlora.models.spec import Tiny, TinyGPT2
from fedlora.techniques.lora.peft import load_peft
from simulations.tools.generate import main as generate
from simulations.tools.merge import main

SPLIT = ("model=tiny_gpt2", "model.split_qkv=true", "model.targets=[q_attn,v_attn]")


@pytest.mark.parametrize(
    ("spec", "options"),
    [
        pytest.param(Tiny(), (), id="llama"),
        pytest.param(
            TinyGPT2(["q_attn", "v_attn"], split_qkv=True),
            SPLIT,
            id="split gpt2",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_merged_model_equals_the_mounted_adapter(spec, options, finished, tmp_path):
    done = finished("client.lr=2e-2", *options)
    assert main([str(done.folder), str(tmp_path / "merged")]) == 0
    model = spec.load(torch.device("cpu"))
    ids = torch.tensor([[1, 300, 400, 500, 600]])
    with torch.no_grad():
        base = model.network(ids).logits
        model.mount(load_peft(done.folder / "adapter", model.info))
        mounted = model.network(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits
    assert (mounted - base).abs().max() > 1e-3
    torch.testing.assert_close(merged, mounted, atol=1e-4, rtol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").eos_token_id == 2


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    assert main([str(tmp_path), str(tmp_path / "m")]) == 2
    assert "is not a run folder" in capsys.readouterr().err


@pytest.fixture
def own_base(tmp_path):
    """A base that may be changed."""
    return shutil.copytree(find_assets("tiny"), tmp_path / "base")


def move(base):
    """Change the weights of a base a little, as a second training would."""
    file = base / "model.safetensors"
    state = {k: t + 1e-3 for k, t in load_file(file).items()}
    save_file(state, file, metadata={"format": "pt"})


def test_a_second_merge_replaces_the_first_and_nothing_else(finished, tmp_path, capsys):
    first, second = finished("client.lr=2e-2"), finished()
    target = tmp_path / "x"
    assert main([str(first.folder), str(target)]) == 0
    before = load_file(target / "model.safetensors")
    assert main([str(second.folder), str(target)]) == 0
    assert main([str(second.folder), str(tmp_path / "clean")]) == 0
    assert fingerprint(target) == fingerprint(tmp_path / "clean")
    assert {p.name for p in target.iterdir()} == {p.name for p in (tmp_path / "clean").iterdir()}
    after = load_file(target / "model.safetensors")
    assert any(not torch.equal(after[k], before[k]) for k in after)
    assert output_record(target)["merged_from"] == second.folder.name
    (target / "notes.txt").write_text("mine")
    capsys.readouterr()
    assert main([str(first.folder), str(target)]) == 2
    assert "holds notes.txt, which no earlier output" in capsys.readouterr().err
    assert all(torch.equal(t, after[k]) for k, t in load_file(target / "model.safetensors").items())


def test_a_merged_model_can_be_shared(finished, tmp_path):
    assert main([str(finished().folder), str(tmp_path / "m")]) == 0
    os.umask(mask := os.umask(0))
    modes = {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "m").iterdir()}
    assert modes == {0o666 & ~mask}
    card = (tmp_path / "m/README.md").read_text()
    assert "library_name: transformers" in card and "FlexLoRA" in card


def test_a_run_is_merged_onto_its_own_base_only(federate, own_base, tmp_path, capsys):
    done = federate("model=hf", f"model.path={own_base}", "rounds=1")
    move(own_base)
    for command in (main, generate):
        words = [str(done.folder)] + ([str(tmp_path / "m")] if command is main else [])
        assert command(words) == 2
        said = capsys.readouterr().err
        assert "was trained on the base base (" in said and "holds another (" in said
    assert not (tmp_path / "m").exists()


def test_an_adapter_of_another_base_is_refused(federate, own_base, tmp_path, capsys):
    """Copied from another run, say: shapes and names fit."""
    done = federate("model=hf", f"model.path={own_base}", "rounds=1")
    record = json.loads((done.folder / "adapter/fedlora.json").read_text())
    record["base"] = "0" * 16
    (done.folder / "adapter/fedlora.json").write_text(json.dumps(record))
    assert main([str(done.folder), str(tmp_path / "m")]) == 2
    assert "an update is valid on its own base only" in capsys.readouterr().err


def test_the_base_and_the_run_are_not_written_over(federate, own_base, capsys):
    first = federate("model=hf", f"model.path={own_base}", "rounds=1")
    merged = own_base.parent / "merged"
    assert main([str(first.folder), str(merged)]) == 0
    second = federate("model=hf", f"model.path={merged}", "rounds=1")
    for target in (merged, second.folder):
        assert main([str(second.folder), str(target)]) == 2
        assert "is what would be merged: name another folder" in capsys.readouterr().err
    assert main([str(first.folder), str(own_base)]) == 2
    assert (merged / "config.json").exists()


def test_a_resumed_run_says_that_its_base_is_another(federate, own_base):
    words = ("model=hf", f"model.path={own_base}")
    federate(*words, "rounds=1")
    move(own_base)
    with pytest.raises(RunError, match=r"What differs: the base model \(\w+, was \w+\)"):
        federate(*words, "rounds=2", "resume=auto")
