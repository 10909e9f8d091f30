"""The exported folder of a run: whole, of its last end, readable by others, with a card."""

import json
import os
import stat

import pytest
import yaml
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from fedlora.core.errors import DiskError
from fedlora.core.files import output_record
from fedlora.models import read_back
from fedlora.techniques.lora.payload import LowRankPayload
from fedlora.techniques.lora.peft import WEIGHTS
from simulations.tools import hub
from simulations.tools.export import main as export
from simulations.tools.merge import main as merge

EVALUATED = ("evaluate=fast", "evaluate.clients=2", "evaluate.groups=[seen]")


def front_matter(card):
    _, head, body = card.split("---\n", 2)
    return yaml.safe_load(head), body


def test_the_folder_has_a_card_a_tokenizer_and_ordinary_modes(federate):
    done = federate(*EVALUATED, read_back=True)
    folder = done.folder / "adapter"
    head, body = front_matter((folder / "README.md").read_text())
    assert head["library_name"] == "peft" and {"fedlora", "lora"} <= set(head["tags"])
    assert "base_model" not in head, "a folder of this machine is no id on the hub"
    (result,) = head["model-index"][0]["results"]
    last = [r for r in done.records if r["kind"] == "evaluate"][-1]
    values = {m["type"]: m["value"] for m in result["metrics"]}
    assert values["loss_response"] == pytest.approx(last["loss_response"])
    assert "tokens_response" not in values
    assert "FlexLoRA" in body and "computes the same from this folder" in body
    assert "public domain" in body and str(done.folder.parent) not in body
    assert AutoTokenizer.from_pretrained(folder).eos_token_id == 2
    mode = 0o666 & ~_umask()
    assert {stat.S_IMODE(p.stat().st_mode) for p in folder.iterdir()} == {mode}
    assert output_record(folder)["read_back"]["agrees"]


def test_an_adapter_that_peft_reads_otherwise_is_said_at_the_end(federate, monkeypatch):
    monkeypatch.setattr(read_back, "_ROOM", 1e9)
    done = federate(read_back=True)
    assert "WARNING: adapter/: PEFT" in done.said and "was not checked on it" in done.said
    assert not output_record(done.folder / "adapter")["read_back"]["checked"]
    assert "was not checked on it" in (done.folder / "adapter/README.md").read_text()


def test_a_continued_run_leaves_no_export_of_its_earlier_end(federate, finished, monkeypatch):
    done = finished()
    before = load_file(done.folder / "adapter" / WEIGHTS)
    save_file(before, done.folder / "adapter" / "left.safetensors")
    monkeypatch.setattr(LowRankPayload, "export", _fails)
    with pytest.raises(Exception, match=r"holds left\.safetensors, which no earlier output"):
        federate("resume=auto", "rounds=3")
    (done.folder / "adapter/left.safetensors").unlink()
    with pytest.raises(DiskError, match="no space left"):
        federate("resume=auto", "rounds=3")
    assert not (done.folder / "adapter").exists()
    monkeypatch.undo()
    assert export([str(done.folder)]) == 0
    after = load_file(done.folder / "adapter" / WEIGHTS)
    assert any((after[k] != before[k]).any() for k in before)


def test_an_interrupted_run_is_exported_and_merged_from_its_checkpoint(finished, tmp_path, capsys):
    done = finished()
    wanted = load_file(done.folder / "adapter" / WEIGHTS)
    assert merge([str(done.folder), str(tmp_path / "a")]) == 0
    for file in sorted((done.folder / "adapter").iterdir()):
        file.unlink()
    (done.folder / "adapter").rmdir()
    assert merge([str(done.folder), str(tmp_path / "b")]) == 0
    assert "the checkpoint after round 2 is taken" in capsys.readouterr().err
    assert export([str(done.folder)]) == 0
    found = load_file(done.folder / "adapter" / WEIGHTS)
    assert all((found[k] == wanted[k]).all() for k in wanted)
    a, b = (load_file(tmp_path / x / "model.safetensors") for x in "ab")
    assert all((a[k] == b[k]).all() for k in a)


def test_a_checkpoint_of_another_configuration_is_refused(finished, tmp_path, capsys):
    done = finished()
    for file in sorted((done.folder / "adapter").iterdir()):
        file.unlink()
    (done.folder / "adapter").rmdir()
    config = yaml.safe_load((done.folder / "config.yaml").read_text())
    config["ranks"]["alpha"] = 24
    (done.folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert merge([str(done.folder), str(tmp_path / "m")]) == 2
    assert "was written under another configuration" in capsys.readouterr().err
    assert not (tmp_path / "m").exists()


class FakeHub:
    """The two calls that are made, and what they were given."""

    def __init__(self, error=None):
        self.error, self.calls = error, []

    def create_repo(self, repo_id, **options):
        self.calls.append((repo_id, options))
        if self.error:
            raise self.error
        return type("Repository", (), {"repo_id": repo_id})

    def upload_folder(self, *, repo_id, folder_path, **options):
        self.calls.append((repo_id, sorted(os.listdir(folder_path)), options))
        return type("Commit", (), {"commit_url": f"https://hub/{repo_id}/commit/1"})


@pytest.mark.parametrize("what", ["adapter", "merged"])
def test_push_uploads_the_whole_folder_as_one_commit(what, finished, tmp_path, monkeypatch, capsys):
    done, fake = finished(), FakeHub()
    monkeypatch.setattr(hub, "HfApi", lambda: fake)
    words = ["--push", "me/model", "--private"]
    if what == "adapter":
        assert export([str(done.folder), *words]) == 0
        folder = done.folder / "adapter"
    else:
        assert merge([str(done.folder), str(tmp_path / "m"), *words]) == 0
        folder = tmp_path / "m"
    (name, made), (repo, files, options) = fake.calls
    assert name == repo == "me/model" and made == {"private": True, "exist_ok": True}
    assert files == output_record(folder)["files"] and "README.md" in files
    assert options["delete_patterns"] == "*"
    assert "pushed: https://hub/me/model/commit/1" in capsys.readouterr().out


def test_a_hub_that_refuses_is_one_sentence(finished, monkeypatch, capsys):
    done = finished()
    for error in (
        RepositoryNotFoundError("401 Client Error", response=_response()),
        OSError("no route to host"),
        ConnectionError("offline"),
    ):
        monkeypatch.setattr(hub, "HfApi", lambda error=error: FakeHub(error))
        assert export([str(done.folder), "--push", "me/model"]) == 2
        said = capsys.readouterr().err
        assert "--push me/model: the hub did not take" in said and "HF_TOKEN" in said
    assert json.loads((done.folder / "adapter/fedlora.json").read_text())["files"]


def _response():
    import httpx

    return httpx.Response(401, request=httpx.Request("POST", "https://hub"))


def _fails(*_):
    raise OSError("no space left on the disk")


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask
