"""Ray starts without what no run uses, and workers are set up only where there is something to."""

import json
import os
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest
from ray._private import node

from simulations.app import lean_ray
from simulations.app.lean_ray import HERE, KNOWN, lean
from simulations.app.ray_worker import command, forked

WORKER = ["/ray/default_worker.py", "--gcs-address=1.2.3.4:5", "--runtime-env-hash=7"]


def test_the_installed_ray_has_been_looked_at():
    assert metadata.version("ray") in KNOWN


def test_ray_is_as_it_was_after_the_block():
    full = node.Node
    with lean():
        assert issubclass(node.Node, full)
        assert node.Node is not full
    assert node.Node is full


def test_an_unknown_ray_starts_as_it_is(monkeypatch):
    monkeypatch.setattr(lean_ray, "KNOWN", ())
    full = node.Node
    with lean():
        assert node.Node is full


@pytest.mark.parametrize("context", ["{}", "", '{"env_vars": {}, "command_prefix": []}'])
def test_a_worker_without_an_environment_starts_at_once(context):
    words = [f"--serialized-runtime-env-context={context}", "--language=PYTHON"]
    assert command([WORKER[0], *words, *WORKER[1:]]) == WORKER
    assert command([*WORKER, *words]) == WORKER


@pytest.mark.parametrize(
    "words",
    [
        ['--serialized-runtime-env-context={"env_vars": {"A": "b"}}', "--language=PYTHON"],
        ["--serialized-runtime-env-context={}", "--language=JAVA"],
        ["--serialized-runtime-env-context={}"],
    ],
)
def test_an_environment_or_another_language_is_left_to_ray(words):
    assert command([*WORKER, *words]) is None


def test_the_stand_in_says_that_services_are_off_and_ends_with_its_raylet(tmp_path: Path):
    files = [tmp_path / "metrics", tmp_path / "runtime"]
    agent = [sys.executable, "-S", "-E", str(HERE / "ray_agent.py"), *map(str, files)]
    raylet = (
        "import subprocess, sys; p = subprocess.Popen(sys.argv[1:]); print(p.pid, flush=True);"
        "sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-S", "-c", raylet, *agent], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        until(lambda: all(f.exists() for f in files))
        assert [f.read_text() for f in files] == ["-1", "-1"]
        assert os.path.exists(f"/proc/{pid}")
    until(lambda: not os.path.exists(f"/proc/{pid}"))


# -------------------------------------------------------------------------------------------- forks

SERVER = """
import sys
from simulations.app import ray_fork
ray_fork._import = lambda: None
ray_fork.main(sys.argv[1:])
"""
TOLD = """
import json, os, sys
words = dict(words=sys.argv[1:], directory=os.getcwd(), variable=os.environ["FEDLORA_TRIED"])
print(json.dumps(words | {"pid": os.getpid(), "server": os.getppid()}), flush=True)
sys.exit(3)
"""
ASKS = """
import sys
from simulations.app.ray_worker import forked
sys.exit(0 if forked(sys.argv[2:], sys.argv[1]) else 9)
"""


@pytest.fixture
def server(tmp_path: Path):
    """A process of which others are forks, without what it imports for workers."""
    folder = tmp_path / "forks"
    folder.mkdir()
    with subprocess.Popen([sys.executable, "-c", SERVER, str(folder)]) as process:
        until(lambda: (folder / "fork.sock").exists())
        yield process, folder
        process.kill()


def asked(folder: Path, tmp_path: Path, *words: str) -> "subprocess.Popen[str]":
    """A process that asks for a fork which tells what it is."""
    file = tmp_path / "told.py"
    file.write_text(TOLD)
    return subprocess.Popen(
        [sys.executable, "-c", ASKS, str(folder), str(file), *words],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"FEDLORA_TRIED": "x" * 100_000},
    )


def test_a_fork_is_what_its_command_line_says(server, tmp_path: Path):
    process, folder = server
    for words in (["a b", "--c=d"], []):
        with asked(folder, tmp_path, *words) as shim:
            told = json.loads(shim.communicate()[0])
        assert shim.returncode == 0
        assert told["words"] == words
        assert told["directory"] == os.getcwd()
        assert told["variable"] == "x" * 100_000
        assert told["server"] == process.pid
        assert told["pid"] not in (process.pid, shim.pid)
        until(lambda pid=told["pid"]: not os.path.exists(f"/proc/{pid}"))


def test_who_cannot_have_a_fork_is_told_so(server, tmp_path: Path):
    process, folder = server
    process.kill()
    process.wait()
    here = os.getcwd()
    assert not forked(["never.py"], str(folder))
    assert not forked(["never.py"], str(tmp_path / "missing"))
    assert os.getcwd() == here


def until(true, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)
