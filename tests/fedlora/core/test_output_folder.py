"""An output folder is one output, whole; what nobody of us wrote is never touched."""

import json
import os
import stat
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import save_file

from fedlora.core.errors import ConfigError
from fedlora.core.files import RECORD, output_folder, output_record


def write(target, *names, **about):
    with output_folder(target, about) as draft:
        for name in names:
            (draft / name).parent.mkdir(exist_ok=True)
            (draft / name).write_text(name)


def content(folder):
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


@contextmanager
def umask(value):
    before = os.umask(value)
    try:
        yield
    finally:
        os.umask(before)


def test_a_second_output_replaces_the_first_as_a_whole(tmp_path):
    target = tmp_path / "x"
    write(target, "old", "both", "sub/old", about=1)
    write(target, "both", "new", about=2)
    assert content(target) == {"both", "new", RECORD}
    assert output_record(target) == {"about": 2, "files": ["both", RECORD, "new"]}
    assert list(tmp_path.iterdir()) == [target], "no draft is left"


@pytest.mark.parametrize("owned", [True, False], ids=["beside an output", "alone"])
def test_what_no_output_left_there_is_refused_and_kept(owned, tmp_path):
    target = tmp_path / "x"
    if owned:
        write(target, "ours")
    (target / "notes").mkdir(parents=True)
    (target / "notes/mine.txt").write_text("mine")
    before = content(target)
    with pytest.raises(ConfigError, match=r"holds notes/mine\.txt, which no earlier output"):
        write(target, "ours")
    assert content(target) == before
    (target / "notes/mine.txt").unlink()
    write(target, "ours")


def test_a_file_and_a_damaged_record_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file: name a new folder"):
        write(tmp_path / "file", "a")
    write(tmp_path / "x", "a")
    for text, why in (
        ("{", "cannot be read: .*damaged"),
        ("[]", "holds a list instead of an object"),
        (json.dumps({"files": "a"}), "is damaged: it lists no files"),
    ):
        (tmp_path / "x" / RECORD).write_text(text)
        with pytest.raises(ConfigError, match=why):
            write(tmp_path / "x", "a")


def test_a_block_that_fails_leaves_the_earlier_output(tmp_path):
    write(tmp_path / "x", "a")

    def fail():
        with output_folder(tmp_path / "x", {}) as draft:
            (draft / "b").write_text("b")
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fail()
    assert content(tmp_path / "x") == {"a", RECORD}


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_have_the_mode_of_the_umask_whoever_wrote_them(mask, mode, tmp_path):
    """safetensors writes for the owner alone."""
    with umask(mask), output_folder(tmp_path / "x", {}) as draft:
        save_file({"t": torch.ones(1)}, draft / "t.safetensors")
        (draft / "plain").write_text("")
    found = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "x").iterdir()}
    assert found == dict.fromkeys(["t.safetensors", "plain", RECORD], mode)
