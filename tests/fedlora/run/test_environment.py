"""Laws of the record of the environment."""

import json
import shutil
import subprocess

import pytest
import torch

from fedlora.run.environment import (
    environment,
    sources,
    versions,
)


def test_it_is_json_and_says_what_matters():
    record = environment()
    assert json.loads(json.dumps(record)) == record
    assert record["packages"]["torch"].startswith(torch.__version__.split("+")[0])
    assert record["torch_threads"] == torch.get_num_threads()
    assert 1 <= record["cpus_usable"] <= record["cpus"]


def test_a_package_that_is_not_installed_is_left_out():
    assert list(versions(("torch", "no-such-package-at-all"))) == ["torch"]


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_a_checkout_has_a_commit_and_may_be_dirty(tmp_path):
    def git(*command):
        who = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", "-C", tmp_path, *who, *command], check=True, capture_output=True)

    assert sources(tmp_path) == {}
    package, installed = tmp_path / "package", tmp_path / "env"
    for folder in (package, installed):
        folder.mkdir()
        (folder / "a.py").write_text("")
    git("init", "-q")
    git("add", "package")
    assert sources(package) == {}
    git("commit", "-qm", "first")
    clean = sources(package)
    assert len(clean["commit"]) == 40
    assert clean["dirty"] is False
    assert sources(installed) == {}
    (package / "a.py").write_text("changed")
    assert sources(package) == {**clean, "dirty": True}
