"""A merged model computes what the run's adapter computed."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedlora.models.spec import Tiny, TinyGPT2
from fedlora.techniques.lora.peft import load_peft
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
def test_merged_model_equals_the_mounted_adapter(spec, options, federate, tmp_path):
    done = federate("client.lr=2e-2", *options)
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
