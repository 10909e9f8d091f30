"""Classifiers of every family: padding, heads, and equality with plain PEFT."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from transformers import AutoModel, MambaConfig

from fedlora.core.config import build, describe
from fedlora.core.errors import ConfigError, ModelError
from fedlora.models.classifier import Classifier
from fedlora.models.head import draw_head, head_parameters, output_parameters
from fedlora.models.spec import HuggingFace, ModelSpec, Tiny
from tests.fedlora.models.classifiers import (
    CLASSES,
    CONFIGS,
    LABELS,
    classifier,
    examples,
    logits,
    network,
    one_by_one,
    tokenizer,
)
from tests.fedlora.models.networks import adapter

CPU = torch.device("cpu")
FAMILIES = list(CONFIGS)
ENCODERS = [f for f in FAMILIES if f not in ("llama", "qwen2", "gpt2")]
HEADS = {
    "bert": ("bert.pooler", "classifier"),
    "roberta": ("classifier",),
    "distilbert": ("pre_classifier", "classifier"),
    "deberta": ("pooler", "classifier"),
    "modernbert": ("head", "classifier"),
    "modernbert_mean": ("head", "classifier"),
    "llama": ("score",),
    "qwen2": ("score",),
    "gpt2": ("score",),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_no_logit(family):
    model, held = classifier(family), examples(6)
    model.mount(adapter(model.info.modules, 3))
    wanted = one_by_one(model, held)
    torch.testing.assert_close(logits(model, held), wanted, rtol=1e-12, atol=1e-12)
    longer = [*held, examples(1, seed=9, longest=60)[0]]
    torch.testing.assert_close(logits(model, longer)[:6], wanted, rtol=1e-12, atol=1e-12)


def test_a_mean_over_padding_is_noticed():
    model, held = classifier("modernbert_mean"), examples(6)
    wanted, batch = one_by_one(model, held), model.collate(held, "full")
    with torch.no_grad():
        wrong = model.logits(dataclasses.replace(batch, mask=torch.ones_like(batch.mask)))
    assert (wrong - wanted).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_is_what_follows_the_blocks_and_carries_no_adapter(family):
    model = classifier(family)
    assert model.info.head_modules == HEADS[family]
    assert {h.name for h in model.info.head} == set(head_parameters(model.network))
    inside = tuple(f"{path}." for path in HEADS[family])
    assert not any(f"{m.path}.".startswith(inside) for m in model.info.modules)
    assert len(model.info.modules) % 2 == 0  # those of two equal blocks
    last = output_parameters(model.network)
    assert {p.shape[0] for n, p in model.network.named_parameters() if n in last} == {CLASSES}


def test_token_types_follow_from_where_the_second_text_begins():
    model, held = classifier("bert"), examples(4)
    segments = model.collate(held, "full").segments
    assert segments is not None
    for row, example in zip(segments.tolist(), held, strict=True):
        length, at = len(example.input_ids), example.prompt_tokens
        assert row == [0] * at + [1] * (length - at) + [0] * (len(row) - length)
    assert classifier("roberta").collate(held, "full").segments is None


@pytest.mark.parametrize("family", FAMILIES)
def test_permuted_labels_permute_the_logits(family):
    order = torch.tensor([3, 0, 4, 1, 2])
    one, other = classifier(family), classifier(family)
    with torch.no_grad():
        for name in output_parameters(other.network):
            parameter = other.network.get_parameter(name)
            parameter.copy_(parameter[order].clone())
    wanted = logits(one, examples(4))[:, order]
    torch.testing.assert_close(logits(other, examples(4)), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_is_a_function_of_the_seed(family):
    model = network(family)
    before = {n: p.detach().clone() for n, p in head_parameters(model).items()}
    draw_head(model, before, 1)
    for name, parameter in head_parameters(model).items():
        assert torch.equal(parameter, before[name]) == (parameter.ndim < 2)
    torch.manual_seed(99)
    draw_head(model, before, 0)
    assert all(torch.equal(p, before[n]) for n, p in head_parameters(model).items())


# --- folders --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """A bare base model of every family, as most checkpoints are: without a head."""
    root = tmp_path_factory.mktemp("bases")
    for family in FAMILIES:
        torch.manual_seed(3)
        model = AutoModel.from_config(CONFIGS[family]())
        model.save_pretrained(root / family)
        tokenizer().save_pretrained(root / family)
    return root


def spec_of(folder: Path, **more) -> HuggingFace:
    spec = HuggingFace(path=str(folder), task="classification", dtype="float32", **more)
    return spec.with_labels(LABELS, 7)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_description_agrees_with_the_loaded_classifier(folders, family):
    spec = spec_of(folders / family)
    info, model = spec.describe(), spec.load(CPU)
    assert isinstance(model, Classifier)
    assert model.info == info
    assert info.labels == LABELS
    assert info.head_modules == HEADS[family]
    assert info.context == 32
    assert logits(model, examples(3)).shape == (3, CLASSES)
    assert model.network.config.id2label == dict(enumerate(LABELS))


@pytest.mark.parametrize("family", FAMILIES)
def test_two_processes_draw_the_same_head_and_other_seeds_another(folders, family):
    spec = spec_of(folders / family)
    torch.manual_seed(1)
    one = logits(spec.load(CPU), examples(4))
    torch.manual_seed(2)
    assert torch.equal(logits(spec.load(CPU), examples(4)), one)
    assert not torch.equal(logits(spec.with_labels(LABELS, 8).load(CPU), examples(4)), one)
    sent = build(describe(spec), ModelSpec, "model")
    assert sent == spec


def test_a_trained_head_is_loaded_unless_it_is_of_other_classes(folders, tmp_path):
    shutil.copytree(folders / "bert", tmp_path / "tuned")
    spec = spec_of(tmp_path / "tuned")
    tuned = spec.network(CPU)
    with torch.no_grad():
        tuned.classifier.weight.add_(1.0)
    tuned.save_pretrained(tmp_path / "tuned")
    wanted = tuned.classifier.weight
    again = spec.network(CPU)
    assert torch.equal(again.classifier.weight, wanted)
    assert torch.equal(again.bert.pooler.dense.weight, tuned.bert.pooler.dense.weight)
    for labels in (LABELS[::-1], LABELS[:3], (*LABELS[:-1], "another")):
        fresh = spec.with_labels(labels, 7).network(CPU)
        assert fresh.classifier.weight.shape[0] == len(labels)
        assert fresh.classifier.weight.mean() < 0.5  # drawn with mean 0, not loaded
        assert torch.equal(fresh.bert.pooler.dense.weight, tuned.bert.pooler.dense.weight)


def test_a_head_over_bfloat16_computes_in_float32(folders):
    spec = dataclasses.replace(spec_of(folders / "roberta"), dtype="bfloat16")
    model = spec.load(CPU)
    assert {p.dtype for p in head_parameters(model.network).values()} == {torch.float32}
    found = logits(model, examples(4))
    assert found.dtype == torch.float32
    wanted = logits(spec_of(folders / "roberta").load(CPU), examples(4))
    torch.testing.assert_close(found, wanted, rtol=0.1, atol=0.1)


def test_layers_of_the_base_are_never_drawn(folders, tmp_path):
    shutil.copytree(folders / "bert", tmp_path / "cut")
    model = AutoModel.from_config(CONFIGS["bert"]())
    state = model.state_dict()
    del state["encoder.layer.1.output.dense.weight"]
    model.save_pretrained(tmp_path / "cut", state_dict=state)
    with pytest.raises(ModelError, match=r"lack .*layer\.1\.output\.dense\.weight.*random"):
        spec_of(tmp_path / "cut").load(CPU)


def test_the_bundled_models_classify():
    spec = Tiny(task="classification").with_labels(LABELS, 0)
    assert [h.name for h in spec.describe().head] == ["score.weight"]
    assert isinstance(spec.load(CPU), Classifier)


# --- refusals -------------------------------------------------------------------------------------


def test_a_family_without_classification_is_refused(tmp_path):
    MambaConfig(vocab_size=40, hidden_size=16).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(save({"x": torch.zeros(1)}))
    with pytest.raises(ModelError, match=r"holds mamba.*no sequence classification.*causal_lm"):
        spec_of(tmp_path).describe()


def test_an_encoder_is_no_language_model_and_the_refusal_says_what_takes_it(folders):
    with pytest.raises(ModelError, match=r"bert .*not a causal.*model\.task=classification"):
        HuggingFace(path=str(folders / "bert")).describe()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"task": "regression"}, r"model\.task='regression' is not one of"),
        ({"task": "classification", "head": "mean"}, r"model\.head='mean' is not one of"),
    ],
)
def test_impossible_tasks_are_refused(wrong, said):
    with pytest.raises(ConfigError, match=said):
        build({"_target_": "fedlora.models.spec.Tiny", **wrong}, ModelSpec, "model")
