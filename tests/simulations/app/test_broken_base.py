"""A broken base model is found before round 1, and is never a failure of clients."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedlora.core.errors import ModelError, RunError
from fedlora.engine import worker as workers
from fedlora.models.folder import find_assets
from fedlora.run.tracking import read_jsonl
from tests.fedlora.core.test_reading import POINTER

NAME = "model.norm.weight"


def _tensors(change):
    def harm(folder):
        file = folder / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})

    return harm


def _cut(name, size):
    def harm(folder):
        (folder / name).write_bytes((folder / name).read_bytes()[:size])

    return harm


def _index(folder):
    shards = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(shards))


def _write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def _pickled(content):
    def harm(folder):
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").write_bytes(content)

    return harm


BROKEN = {
    "a pointer": (_write("model.safetensors", POINTER), "Git LFS pointer"),
    "a pointer in the old format": (_pickled(POINTER), "Git LFS pointer"),
    "no weights at all": (lambda f: (f / "model.safetensors").unlink(), "lacks weights"),
    "empty weights": (_write("model.safetensors", b""), "0 bytes"),
    "an empty old file": (_pickled(b""), "it is empty"),
    "an old file of noise": (_pickled(bytes(range(256))), "cannot be loaded"),
    "cut in the header": (_cut("model.safetensors", 100), "cut short or damaged"),
    "cut in the weights": (_cut("model.safetensors", 90_000), "cut short or damaged"),
    "a shard is missing": (_index, "lacks model-00002-of-00002.safetensors"),
    "an index of noise": (_write("model.safetensors.index.json", b"{"), "index.json cannot be"),
    "a tensor is missing": (_tensors(lambda t: t.pop(NAME)), "lack ['model.norm.weight']"),
    "a tensor of another shape": (
        _tensors(lambda t: t.update({NAME: torch.ones(7)})),
        "model.norm.weight",
    ),
    "a NaN": (_tensors(lambda t: t[NAME].__setitem__(3, torch.nan)), "NaN or infinity in ['"),
    "an infinity": (_tensors(lambda t: t[NAME].__setitem__(0, torch.inf)), "NaN or infinity"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "lacks a tokenizer"),
    "a pointer as tokenizer": (_write("tokenizer.json", POINTER), "the tokenizer in "),
    "half a configuration": (_cut("config.json", 60), "config.json cannot be read"),
    "a pointer as configuration": (_write("config.json", POINTER), "config.json cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_base_is_found_before_round_one(federate, tmp_path, case):
    folder = shutil.copytree(find_assets("tiny"), tmp_path / "base")
    harm, message = BROKEN[case]
    harm(folder)
    with pytest.raises((ModelError, RunError)) as caught:
        federate("model=hf", f"model.path={folder}", "strategy=fedit", "evaluate=fast")
    text = str(caught.value)
    assert message in text
    assert "clients succeeded" not in text and "\n" not in text
    assert not any(read_jsonl(file) for file in tmp_path.glob("out/*/clients.jsonl"))


@pytest.mark.parametrize(
    ("what", "error"),
    [
        ("resolve_device", ValueError("runtime.device='cuda:7', but this process sees 0")),
        ("TokenStore", OSError(2, "No such file or directory", "/cache/sotu/meta.json")),
        ("TokenStore", MemoryError("cannot map")),
    ],
)
def test_a_worker_that_cannot_be_set_up_is_no_client_that_fails(
    federate, tmp_path, monkeypatch, what, error
):
    """Data that vanished, a device that is missing: found by a message without jobs."""

    def broken(*_):
        raise error

    workers.resident.cache_clear()
    workers.worker.cache_clear()
    monkeypatch.setattr(workers, what, broken)
    with pytest.raises(
        RunError, match="a worker cannot be set up, so no client has begun"
    ) as caught:
        federate("strategy=fedit")
    assert str(error.args[-1]) in str(caught.value)
    (folder,) = (tmp_path / "out").iterdir()
    assert read_jsonl(folder / "clients.jsonl") == read_jsonl(folder / "metrics.jsonl") == []
    assert json.loads((folder / "status.json").read_text())["kind"] == "RunError"


def test_an_empty_message_costs_no_bytes_and_no_record(federate):
    """The set-up is no traffic: bytes and records are those of the rounds."""
    done = federate("strategy=fedit", "rounds=1")
    assert [r["kind"] for r in done.records] == ["round"]
    assert done.rounds[0]["wire/down_bytes"] == sum(row["bytes_down"] for row in done.clients)
