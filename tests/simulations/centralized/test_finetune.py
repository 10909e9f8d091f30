"""What SPP is compared with: masked baselines keep zeros, and are what their names say."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fedlora.models.layers import dense_weight
from fedlora.models.masks import density, load_masks
from fedlora.models.spec import HuggingFace
from simulations.centralized.baselines import (
    METHODS,
    MaskedLowRank,
    Start,
    loss_of,
    mount_masked_full,
    mount_masked_lora,
)
from simulations.centralized.finetune import main
from tests.fedlora.models.networks import adapter, step, tokens
from tests.fedlora.prune.models import pruned, zeros
from tests.simulations.conftest import TEXT

TRAINED = [name for name, mount in METHODS.items() if mount]


@dataclass(frozen=True)
class Text:
    input_ids: NDArray[np.int64]
    prompt_tokens: int = 1
    responses: None = None
    label: int = -1
    states: None = None


@pytest.mark.parametrize("name", TRAINED)
def test_every_technique_starts_at_the_pruned_model_and_learns(name):
    model = pruned(dtype=torch.float32)
    texts = [Text(row.numpy()) for row in tokens()]
    before, kept = loss_of(model, texts), zeros(model)
    parameters = METHODS[name](model, Start(2, alpha=4.0))
    assert loss_of(model, texts) == pytest.approx(before, rel=1e-5)
    for _ in range(4):
        step(model, parameters)
    assert loss_of(model, texts) < before
    same = [torch.equal(model.effective_weight(p) == 0, z) for p, z in kept.items()]
    assert all(same) == (name != "lora")


def test_masked_lora_is_the_masked_product():
    model = pruned()
    factors = adapter(model.info.modules, 3)
    for path, f in factors.items():
        layer = model.layers[path]
        update = MaskedLowRank(f, 0.0, model.device, model.dtype)
        w = dense_weight(layer.base)
        torch.testing.assert_close(update.weight(layer.base), w + (w != 0) * f.delta())
        x = torch.randn(3, w.shape[1], dtype=torch.float64)
        torch.testing.assert_close(update(x, layer.base), x @ update.weight(layer.base).T)


def test_masked_full_trains_every_weight_that_is_not_zero():
    model = pruned()
    count = sum(int((~z).sum()) for z in zeros(model).values())
    assert sum(p.numel() for p in mount_masked_full(model, Start())) == count
    assert len(mount_masked_lora(model, Start(2))) == 2 * len(model.layers)


WORDS = (*TEXT, "population.clients=24", "model.method=magnitude", "model.pattern=2:4")
SHORT = ("client.steps=3", "client.batch_size=2", "--held", "4", "--rank", "4")


def done(folder: Path, method: str, *more: str) -> dict:
    assert main([str(folder), "--method", method, *SHORT, *more]) == 0
    return json.loads((folder / "finetune.json").read_text())


@pytest.mark.parametrize("method", TRAINED)
def test_what_is_written_is_what_was_trained(method, tmp_path, capsys):
    record = done(tmp_path / "m", method, *WORDS, "client.lr=0.02")
    assert "model: " in capsys.readouterr().out
    spec = HuggingFace(path=str(tmp_path / "m"), dtype="float32")
    assert (record["mask"] == "") == (method == "lora")
    assert spec.describe().mask == record["mask"]
    spec.load(torch.device("cpu"))  # checks the zeros
    assert record["perplexity_after"] != record["perplexity_before"]
    assert record["parameters"] > 0
    # What was measured in training is what the folder computes.
    hf = ("model=hf", f"model.path={tmp_path / 'm'}", "model.dtype=float32", *WORDS[:3])
    again = done(tmp_path / "n", "none", *hf)
    assert again["parameters"] == 0
    for name in ("perplexity_before", "perplexity_after"):
        assert math.isclose(again[name], record["perplexity_after"], rel_tol=1e-4)


def test_lora_can_be_pruned_again(tmp_path):
    filled = done(tmp_path / "lora", "lora", *WORDS, "client.lr=0.02")
    base = ("model@model.base=hf", f"model.base.path={tmp_path / 'lora'}")
    again = done(tmp_path / "again", "none", *WORDS, *base, "model.base.dtype=float32")
    assert (filled["mask"], again["parameters"]) == ("", 0)
    assert density(load_masks(tmp_path / "again")) == 0.5
    assert again["perplexity_before"] > filled["perplexity_after"], "zeros cost something"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ("spp", *TEXT, "model=tiny"),
            "--method spp keeps a pruned model's zeros, and tiny is dense",
        ),
        (
            ("lora", "model=tiny", "data=intents"),
            "data=intents with model.task=",
        ),
        (("masked_full", *WORDS, "client.dropout=0.1"), "client.dropout=0.1 with --method masked"),
        (
            ("spp", *WORDS, "client.technique=full"),
            "client.technique='full' is no group",
        ),
        (
            ("spp", *WORDS, "population.unseen_fraction=0"),
            "unseen_fraction=0.0 holds no client out",
        ),
        (("spp", *WORDS, "--held", "0"), "--held=0 must be >= 1"),
        (("spp", *WORDS, "--rank", "999"), "rank 999 of model.layers.0"),
        (("spp", *WORDS, "data.clients=x"), "'x'"),
    ],
)
def test_a_mistake_is_one_sentence_and_writes_nothing(options, said, tmp_path, capsys):
    assert main([str(tmp_path / "m"), "--method", options[0], *SHORT, *options[1:]]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error
    assert not (tmp_path / "m").exists()


def test_a_method_that_fills_zeros_against_its_word_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(METHODS, "masked_lora", METHODS["lora"])
    words = (*SHORT, *WORDS, "client.lr=0.02")
    assert main([str(tmp_path / "m"), "--method", "masked_lora", *words]) == 2
    assert "after training: the zeros of model.layers" in capsys.readouterr().err
    assert not (tmp_path / "m").exists()


def test_what_is_there_is_not_written_over(tmp_path, capsys):
    (tmp_path / "mine").write_text("precious")
    assert main([str(tmp_path), "--method", "spp", *SHORT]) == 2
    assert "is not empty: name a new folder" in capsys.readouterr().err
