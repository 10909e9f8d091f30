"""What is remembered of models and stores is what they say, and is asked again when they change."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from fedlora.core.errors import ModelError
from fedlora.data.sotu import Sotu
from fedlora.data.store import find_or_prepare, prepare
from fedlora.engine.fused.check import reason_of
from fedlora.models import folder as folders
from fedlora.models.folder import find_assets
from fedlora.models.modules import ModelInfo
from fedlora.models.spec import HuggingFace, ModelSpec, Tiny, TinyGPT2

SPECS = [
    Tiny(),
    Tiny(targets=("q_proj",), layers="top:1"),
    TinyGPT2(split_qkv=True),
    Tiny(task="classification", labels=("no", "yes"), head="local"),
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.name}-{s.task}-{s.layers}")
def test_a_description_is_remembered_whole(
    spec: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = spec.folder()
    said = spec._describe(folder, folders.fingerprint(folder))
    assert ModelInfo.from_json(json.loads(json.dumps(said.to_json()))) == said
    assert spec.describe() == said

    def never(*_: object) -> ModelInfo:
        raise AssertionError("asked again")

    monkeypatch.setattr(ModelSpec, "_describe", never)
    assert spec.describe() == said


def test_another_spec_and_other_files_are_described_anew(tmp_path: Path) -> None:
    shutil.copytree(find_assets("tiny"), tmp_path / "model")
    spec = HuggingFace(path=str(tmp_path / "model"))
    first = spec.describe()
    assert len(dataclasses.replace(spec, targets=("q_proj",)).describe().modules) < len(
        first.modules
    )
    config = tmp_path / "model" / "config.json"
    fields = json.loads(config.read_text())
    config.write_text(json.dumps(fields | {"max_position_embeddings": 64}))
    assert spec.describe().context == 64
    assert spec.describe().fingerprint != first.fingerprint
    (tmp_path / "model" / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"lacks a tokenizer"):
        spec.describe()


def test_a_store_is_found_without_a_tokenizer(cache: Path) -> None:
    spec, source = Tiny(), Sotu(clients=8)
    loaded = []

    def load() -> object:
        loaded.append(1)
        return spec.tokenizer()

    found = find_or_prepare(source, load, spec.tokenizer_id(), cache)
    assert loaded
    loaded.clear()
    assert find_or_prepare(source, load, spec.tokenizer_id(), cache) == found
    assert not loaded
    assert prepare(source, spec.tokenizer(), spec.tokenizer_id(), cache) == found

    # Other settings are another store, and a damaged one is built anew.
    other = dataclasses.replace(source, max_length=64)
    assert find_or_prepare(other, load, spec.tokenizer_id(), cache) != found
    (found / "tokens.npy").write_bytes(b"")
    loaded.clear()
    assert find_or_prepare(source, load, spec.tokenizer_id(), cache) == found
    assert loaded


def test_a_check_is_done_once_for_a_model_of_a_folder_and_always_for_others() -> None:
    asked = []

    def check(model: object) -> str:
        asked.append(model)
        return "a reason"

    model = Tiny().load(torch.device("cpu"))
    assert [reason_of(check, model) for _ in range(3)] == ["a reason"] * 3
    assert len(asked) == 1
    model.folder = None
    assert [reason_of(check, model) for _ in range(3)] == ["a reason"] * 3
    assert len(asked) == 4
