"""Faults of files and disks in one sentence: the file, what it is for, what to do."""

import errno
import json
import tempfile

import pytest
import torch
from safetensors.torch import save_file

from fedlora.core.cache import cache_root
from fedlora.core.errors import DiskError, ModelError
from fedlora.core.files import naming, write_file
from fedlora.core.reading import disk_faults, json_in, tensors_in

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 400000\n"


def _cut(path):
    path.write_bytes(path.read_bytes()[:40])


DAMAGE = {
    "cut short": (_cut, "cut short or damaged"),
    "empty": (lambda p: p.write_bytes(b""), "0 bytes"),
    "a pointer": (lambda p: p.write_bytes(POINTER), "git lfs pull"),
    "gone": (lambda p: p.unlink(), "there is no such file"),
    "a folder": (lambda p: (p.unlink(), p.mkdir()), "it is no file"),
    "other bytes": (lambda p: p.write_bytes(bytes(range(200))), "cut short or damaged"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_tensor_file_is_named_with_what_it_is_for(tmp_path, damage):
    path = tmp_path / "x.safetensors"
    save_file({"w": torch.ones(50)}, path)
    with tensors_in(path, "the adapter") as file:
        assert file.get_tensor("w").sum() == 50
    harm, message = DAMAGE[damage]
    harm(path)
    with pytest.raises(ModelError) as caught, tensors_in(path, "the adapter") as file:
        file.get_tensor("w")
    assert f"the adapter {path} cannot be read: " in str(caught.value)
    assert message in str(caught.value)


def test_a_tensor_that_is_missing_is_a_fault_of_the_file(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "x.safetensors")
    told = pytest.raises(ModelError, match=r"x\.safetensors cannot be read: .*tensor other")
    with told, tensors_in(tmp_path / "x.safetensors", "the adapter") as file:
        file.get_tensor("other")


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_json_file_is_named_with_what_it_is_for(tmp_path, damage):
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"a": "b" * 100}))
    assert json_in(path, "the record")["a"][0] == "b"
    harm, message = DAMAGE[damage]
    harm(path)
    with pytest.raises(ModelError) as caught:
        json_in(path, "the record")
    assert f"the record {path} cannot be read: " in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize("text", ["[1]", "3", "null", '"x"', "true"])
def test_json_of_another_type_is_refused(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ModelError, match=r"x\.json holds a \w+ instead of an object"):
        json_in(tmp_path / "x.json", "the record")


def _refuse(path, number=errno.ENOSPC):
    with disk_faults(path.parent / "run"), naming(path):
        raise OSError(number, "No space left on device")


def test_the_place_decides_what_to_set(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / "cache"))
    with pytest.raises(
        DiskError, match=r"x\.npy: No space.*free some space there, or set FEDLORA_C"
    ):
        _refuse(cache_root() / "x.npy")
    run = tmp_path / "results" / "a"
    told = pytest.raises(DiskError, match=r"results.*set output_dir=\.\.\. or FEDLORA_OUTPUT")
    with told, disk_faults(run), naming(run / "b"):
        raise PermissionError(errno.EACCES, "Permission denied")
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path / "scratch"))
    with pytest.raises(DiskError, match=r"set TMPDIR"), disk_faults():
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "scratch" / "a"))


def test_a_folder_above_the_cache_that_cannot_be_made(monkeypatch):
    """A home that cannot be written: the system names `~/.cache`, not the cache in it."""
    monkeypatch.setenv("FEDLORA_CACHE", "/proc/.cache/fedlora")
    with pytest.raises(DiskError, match=r"/proc/\.cache: .* set FEDLORA_CACHE"), disk_faults():
        cache_root().mkdir(parents=True)


def test_a_write_names_the_file_and_not_its_draft(tmp_path):
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / "full").mkdir()
    with pytest.raises(OSError, match=r"/file'") as caught:
        write_file(tmp_path / "file", "x")
    assert ".unfinished_" not in str(caught.value.filename)


def test_errors_without_number_or_file_get_both(tmp_path):
    with pytest.raises(OSError, match=r"requested.*/x'") as caught, naming(tmp_path / "x"):
        raise OSError("8 requested and 4 written")
    assert caught.value.errno == errno.EIO


def test_what_safetensors_cannot_write_is_an_error_of_the_disk(tmp_path):
    file = tmp_path / "absent" / "x.safetensors"
    with pytest.raises(OSError, match=r"x\.safetensors'"), naming(file):
        save_file({"w": torch.ones(4)}, file)
