"""The launcher without Ray, and one whole run with it: words, exit codes, what is left running."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fedlora.core import variables
from simulations.app.guard import marked
from simulations.app.launch import filter_log
from tests.simulations.app.launched import (
    ROOT,
    SAME,
    Launched,
    Tagged,
    until,
)

GUARD = ROOT / "simulations" / "app" / "guard.py"

# ------------------------------------------------------------------------------------------ words


def test_a_person_sees_the_apps_lines_and_no_routine():
    routine = "\x1b[92mINFO [0m:      Starting"
    worker = "\x1b[36m(ClientAppActor pid=77)\x1b[0m "
    seen = ["run folder: /x", "round 1/2  done", "RUN FAILED: ValueError: no", "  File a.py"]
    lines = [seen[0], routine, "", worker + "\x1b[93mWARNING \x1b[0m: Manually", *seen[1:]]
    assert list(filter_log(lines)) == seen


def test_traces_before_a_failure_that_explains_itself_are_left_out():
    trace = ["\x1b[91mERROR \x1b[0m: An exception was raised", "Traceback", "  File a.py"]
    ended = "RUN FAILED: WorkerDied: round 1"
    assert list(filter_log(["round 1", *trace, ended])) == ["round 1", ended]
    assert list(filter_log([*trace, "round 2/3  done"])) == [*trace, "round 2/3  done"]
    assert list(filter_log(trace)) == trace, "nothing explains it"


def test_a_failure_that_explains_itself_needs_no_stack_trace():
    lines = ["RUN FAILED: RunError: too few", "Traceback (most recent call last):", "  File a.py"]
    assert list(filter_log(lines)) == lines[:1]
    assert list(filter_log(["Traceback", *lines[2:]])) == ["Traceback", *lines[2:]]


# ------------------------------------------------------------------------------------------ guard

FAMILY = """
import subprocess, sys, time
child = "import time; time.sleep(600)"
for _ in range(2):
    subprocess.Popen([sys.executable, "-S", "-c", child], start_new_session=True)
stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
subprocess.Popen([sys.executable, "-S", "-c", stubborn], start_new_session=True)
time.sleep(600 if sys.argv[1] == "stay" else 1)
"""
OWNER = """
import subprocess, sys, time
subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE)
time.sleep(600)
"""


def guarded(mark: str, scratch: Path, stay: str) -> list[str]:
    return [
        sys.executable,
        str(GUARD),
        mark,
        str(scratch),
        sys.executable,
        "-S",
        "-c",
        FAMILY,
        stay,
    ]


@pytest.fixture
def family():
    tagged = Tagged()
    yield tagged
    tagged.kill()


@pytest.mark.parametrize(
    "death",
    [
        signal.SIGKILL,
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(None, marks=pytest.mark.slow),
    ],
)
def test_the_guard_ends_all_that_was_started_when_its_owner_is_gone(family, tmp_path, death):
    mark, scratch = family.tag[:8], tmp_path / "scratch"
    scratch.mkdir()
    owner = subprocess.Popen(
        [sys.executable, "-S", "-c", OWNER, *guarded(mark, scratch, "stay" if death else "leave")],
        env=family.environment,
    )
    until(lambda: len(marked(mark)) == 4, 60)
    assert len(marked(mark)) == 4
    if death:
        owner.send_signal(death)
    else:  # the command ends by itself: what it left behind goes too
        until(lambda: len(marked(mark)) == 0, 60)
        owner.kill()
    owner.wait()
    assert family.left(60) == []
    if death:
        assert not scratch.exists()


def test_the_guard_touches_nobody_else(family, tmp_path):
    other = subprocess.Popen(
        [sys.executable, "-S", "-c", "import time; time.sleep(600)"],
        env=family.environment | {variables.RUN: "another"},
    )
    guard = subprocess.Popen(
        [sys.executable, str(GUARD), "mine", str(tmp_path), sys.executable, "-S", "-c", "pass"],
        stdin=subprocess.PIPE,
        env=family.environment,
    )
    assert guard.wait(60) == 0
    assert other.poll() is None


# ------------------------------------------------------------------------------------ whole runs


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["strategy=flexlore"], "flexlore"),
        (["client.lr=-1"], "client.lr=-1"),
    ],
)
def test_a_mistake_ends_at_once_in_one_message(tmp_path, words, message):
    run = Launched(tmp_path, *SAME, *words)
    try:
        assert run.wait() in (1, 2)
        assert message in run.said()
        assert "Traceback" not in run.said()
        assert "run folder" not in run.said()
        assert run.left(1) == []
    finally:
        run.kill()


@pytest.mark.slow
@pytest.mark.ray
def test_a_run_through_flower_and_ray_equals_the_run_in_one_process(tmp_path, federate):
    """Bit for bit, with two workers; and nothing is left running."""
    alone = "engine=sequential"
    run = Launched(tmp_path, *SAME, alone, "runtime.num_cpus=2", "runtime.nodes=5")
    try:
        here = federate(alone)
        assert run.wait() == 0, run.said()
        assert run.hash == here.hash
        assert [r["state/hash"] for r in run.rounds] == [r["state/hash"] for r in here.rounds]
        assert "RUN COMPLETED" in run.said()
        assert run.left(20) == []
    finally:
        run.kill()
