"""A pruned model's folder without its zeros, and back."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from fedlora.core.errors import ModelError
from fedlora.models.compact import (
    compact,
    expand,
    is_compact,
)
from fedlora.models.folder import fingerprint
from fedlora.models.spec import Tiny, TinyGPT2
from fedlora.models.stored import inspect
from fedlora.prune.spec import Pruned


@pytest.fixture(params=[Tiny(), TinyGPT2()], ids=["llama", "gpt2"])
def folder(request, tmp_path, monkeypatch):
    """GPT-2 has square layers that are stored turned."""
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / "cache"))
    made = Pruned(base=request.param, method="magnitude", pattern="2:4").folder()
    return shutil.copytree(made, tmp_path / "model")


def test_nothing_is_lost_and_it_is_expanded_once(folder):
    before, found = load_file(folder / "model.safetensors"), inspect(folder)
    assert expand(folder) == folder
    size = compact(folder)
    assert size == found.bytes < sum(t.numel() * t.element_size() for t in before.values())
    assert size <= (folder / "sparse.safetensors").stat().st_size < 1.1 * size
    whole = expand(folder)
    assert is_compact(folder)
    assert not is_compact(whole)
    after = load_file(whole / "model.safetensors")
    assert after.keys() == before.keys()
    assert all(torch.equal(after[k], t) and after[k].dtype == t.dtype for k, t in before.items())
    assert inspect(whole) == found
    made = (whole / "model.safetensors").stat().st_mtime_ns
    assert expand(folder) == whole
    assert (whole / "model.safetensors").stat().st_mtime_ns == made
    assert {p.name for p in whole.iterdir()} >= {"config.json", "tokenizer.json", "pruning.json"}


def test_another_model_of_the_same_name_is_another(folder):
    compact(folder)
    name = fingerprint(folder)
    other = Pruned(method="magnitude", pattern="2:8").folder()
    shutil.rmtree(folder)
    shutil.copytree(other, folder)
    compact(folder)
    assert fingerprint(folder) != name
    assert inspect(expand(folder)).density == 0.25


def test_a_dense_model_has_no_zeros_to_leave_out(folder):
    (folder / "masks.safetensors").unlink()
    with pytest.raises(ModelError, match="is no pruned model"):
        compact(folder)
    assert (folder / "model.safetensors").is_file()
