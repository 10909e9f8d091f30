"""Updates with a head: on the wire, on disk for PEFT, merged, and refused where they do not fit."""

import dataclasses
import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForSequenceClassification

from fedlora.core.errors import ModelError
from fedlora.core.files import output_folder
from fedlora.models.export import about, merge, read
from fedlora.models.head import head_parameters
from fedlora.models.headed import CONFIG, FILE, WEIGHTS, WithHead
from fedlora.models.read_back import read_back
from fedlora.models.spec import HuggingFace
from fedlora.techniques.lora.payload import LowRankPayload
from fedlora.techniques.rebased.payload import Rebased
from fedlora.wire.codec import decode_payload, encode_payload, encode_reply
from tests.fedlora.models.classifiers import (
    CONFIGS,
    LABELS,
    classifier,
    examples,
    logits,
    tokenizer,
)
from tests.fedlora.models.networks import adapter

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("bases")
    for family in CONFIGS:
        torch.manual_seed(3)
        AutoModel.from_config(CONFIGS[family]()).save_pretrained(root / family)
        tokenizer().save_pretrained(root / family)
    return root


def spec_of(folders: Path, family: str) -> HuggingFace:
    spec = HuggingFace(path=str(folders / family), task="classification", dtype="float32")
    return spec.with_labels(LABELS, 7)


def trained(model, seed: int = 4) -> WithHead:
    """Random factors, and a head that is not the model's own."""
    g = torch.Generator().manual_seed(seed)
    values = {
        n: p.detach() + 0.3 * torch.randn(p.shape, generator=g).to(p.dtype)
        for n, p in head_parameters(model.network).items()
    }
    return WithHead(adapter(model.info.modules, 3, seed, dtype=model.dtype), values)


def same(one: WithHead, other: WithHead) -> bool:
    a, b = dict(one.tensors()), dict(other.tensors())
    return a.keys() == b.keys() and all(torch.equal(t, b[n]) for n, t in a.items())


def test_a_mounted_head_replaces_the_models_own_until_it_is_unmounted():
    model = classifier("roberta")
    payload, held = trained(model), examples(4)
    bare = logits(model, held)
    model.mount(payload.update)
    without = logits(model, held)
    model.mount(payload)
    assert not torch.allclose(logits(model, held), without)
    again = model.payload()
    assert isinstance(again, WithHead) and same(again, payload)
    model.unmount()
    assert torch.equal(logits(model, held), bare)


@pytest.mark.parametrize("wire", ["float32", "float64"])
@pytest.mark.parametrize("travels", [True, False])
def test_the_wire_carries_update_and_head(wire, travels):
    payload = dataclasses.replace(trained(classifier("bert")), travels=travels)
    found = decode_payload(*encode_payload(payload, wire), trusted=False)
    assert isinstance(found, WithHead)
    assert found.travels is travels
    assert list(found.values) == list(payload.values)
    for name, t in found.tensors():
        assert torch.equal(t, dict(payload.tensors())[name].to(t.dtype))
    head = sum(t.numel() for t in payload.values.values())
    assert payload.floats() == payload.update.floats() + travels * head


def test_a_reply_in_bfloat16_is_a_change_of_the_head_too():
    model = classifier("bert")
    start = trained(model)
    moved = start.with_head({n: t + 1e-4 for n, t in start.values.items()})
    array, header, _ = encode_reply(moved, "bfloat16", start)
    found = decode_payload(array, header, start=start).head()
    assert found is not None
    for name, t in found.items():
        torch.testing.assert_close(t.double(), moved.values[name], rtol=0, atol=1e-6)


def test_a_head_within_a_head_is_refused():
    payload = trained(classifier("bert"))
    array, header = encode_payload(payload, "float32")
    h = json.loads(header)
    h["header"]["update"]["_target_"] = "fedlora.models.headed.WithHead"
    with pytest.raises(ValueError, match="a head within a head"):
        decode_payload(array, json.dumps(h), trusted=False)


# --- PEFT -----------------------------------------------------------------------------------------


def exported(payload, model, folder: Path) -> Path:
    with output_folder(folder, about(type(payload), model.info)) as draft:
        payload.export(draft, model.info, "base", 0.1)
    return folder


@pytest.mark.parametrize("family", CONFIGS)
def test_plain_peft_reads_the_same_logits(folders, family, tmp_path):
    spec = spec_of(folders, family)
    model, held = spec.load(CPU), examples(5)
    payload = trained(model)
    folder = exported(payload, model, tmp_path / "adapter")
    config = json.loads((folder / CONFIG).read_text())
    assert config["task_type"] == "SEQ_CLS"
    assert config["modules_to_save"] == list(model.info.head_modules)
    model.mount(payload)
    wanted = logits(model, held)

    # Nothing of ours: the bare checkpoint, another head, PEFT's own reader.
    torch.manual_seed(123)
    base = AutoModelForSequenceClassification.from_pretrained(
        folders / family, num_labels=len(LABELS), dtype=torch.float32, pad_token_id=1
    )
    theirs = peft.PeftModel.from_pretrained(base, str(folder)).eval()
    batch = model.collate(held, "full")
    types = {} if batch.segments is None else {"token_type_ids": batch.segments}
    with torch.no_grad():
        found = theirs(input_ids=batch.inputs, attention_mask=batch.mask.long(), **types).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    back = read_back(payload, folder, spec)
    assert back is not None and back.agrees


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize("record", [True, False])
def test_what_is_exported_is_read_again(folders, family, record, tmp_path):
    model = spec_of(folders, family).load(CPU)
    payload = trained(model)
    folder = exported(payload, model, tmp_path / "adapter")
    if not record:  # as another program wrote it
        for file in folder.iterdir():
            if file.name not in (CONFIG, WEIGHTS):
                file.unlink()
    found = read(folder, model.info, LowRankPayload)
    assert isinstance(found, WithHead) and same(found, payload)


def test_a_dense_update_has_its_head_beside_it(folders, tmp_path):
    model = spec_of(folders, "bert").load(CPU)
    shift = {m.path: torch.full((m.d_out, m.d_in), 0.01) for m in model.info.modules}
    payload = dataclasses.replace(trained(model), update=Rebased(shift))
    folder = exported(payload, model, tmp_path / "update")
    assert (folder / FILE).is_file() and payload.folder == "update"
    found = read(folder, model.info, LowRankPayload)
    assert isinstance(found, WithHead) and same(found, payload)
    assert payload.reader(folder) is None


def test_a_merged_classifier_is_a_plain_one_with_its_labels(folders, tmp_path):
    spec = spec_of(folders, "distilbert")
    model, held = spec.load(CPU), examples(5)
    payload = trained(model)
    model.mount(payload)
    wanted = logits(model, held)
    merge(model, payload, tmp_path / "merged")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert plain.config.id2label == dict(enumerate(LABELS))
    batch = model.collate(held, "full")
    with torch.no_grad():
        found = plain(input_ids=batch.inputs, attention_mask=batch.mask.long()).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    again = HuggingFace(path=str(tmp_path / "merged"), task="classification", dtype="float32")
    assert torch.equal(logits(again.with_labels(LABELS, 99).load(CPU), held), found)


def test_folders_of_another_task_or_other_labels_are_refused(folders, tmp_path):
    spec = spec_of(folders, "gpt2")
    model = spec.load(CPU)
    folder = exported(trained(model), model, tmp_path / "adapter")
    for file in folder.iterdir():
        if file.name not in (CONFIG, WEIGHTS):
            file.unlink()
    other = spec.with_labels(LABELS[:3], 7).describe()
    with pytest.raises(ModelError, match=r"score\.weight.* for 3 labels"):
        read(folder, other, LowRankPayload)
    causal = dataclasses.replace(model.info, task="causal_lm", labels=(), head=(), head_modules=())
    with pytest.raises(ModelError, match=r"task_type=SEQ_CLS.*use model\.task=classification"):
        read(folder, causal, LowRankPayload)
    headless = shutil.copytree(folder, tmp_path / "headless")
    tensors = {k: t for k, t in load_file(folder / WEIGHTS).items() if "lora_" in k}
    save_file(tensors, headless / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"has none of score\.weight"):
        read(headless, model.info, LowRankPayload)


@pytest.mark.parametrize("wrong", ["name", "shape"])
def test_a_head_of_another_model_is_not_mounted(wrong):
    model = classifier("bert")
    payload = trained(model)
    name = "classifier.weight"
    values = dict(payload.values)
    if wrong == "name":
        del values[name]
    else:
        values[name] = values[name][:3]
    before = dict(model.mounted())
    with pytest.raises(ValueError, match=r"head does not fit random: .*classifier\.weight"):
        model.mount(payload.with_head(values))
    assert model.mounted() == before
