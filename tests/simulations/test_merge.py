"""A merged model computes what the run's adapter computed."""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedlora.models.export import load_peft
from fedlora.models.spec import Tiny
from simulations.merge import main


def test_merged_model_equals_the_mounted_adapter(federate, tmp_path):
    done = federate("client.lr=2e-2")
    assert main([str(done.folder), str(tmp_path / "merged")]) == 0
    model = Tiny().load(torch.device("cpu"))
    ids = torch.tensor([[1, 300, 400, 500, 600]])
    with torch.no_grad():
        base = model.network(ids).logits
        model.mount(load_peft(done.folder / "adapter"))
        mounted = model.network(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits
    assert (mounted - base).abs().max() > 1e-3
    torch.testing.assert_close(merged, mounted, atol=1e-4, rtol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").eos_token_id == 2


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    assert main([str(tmp_path), str(tmp_path / "m")]) == 2
    assert "is not a run folder" in capsys.readouterr().err
