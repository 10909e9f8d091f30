"""Runs the app on this machine in processes of its own, and returns its exit status.

A run is one process, `simulations.app.simulate`, and the Ray processes that it starts. They live in
an empty directory, so that workers import nothing that happens to lie where the user works, and
under a guard that leaves nothing running, whatever becomes of this process.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fedlora.core import variables
from fedlora.run.source_hash import ROOT
from simulations.app.guard import end
from simulations.app.runtime import Runtime

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # Ray's announced future behaviour, silently
    "RAY_DEDUP_LOGS": "0",
    "PYTHONUNBUFFERED": "1",
}
FOLDER = re.compile(r"^run folder: (.+)$")
ROUTINE = re.compile(
    r"^(\x1b\[36m\(ClientAppActor pid=\d+(, ip=[\d.]+)?\)\x1b\[0m )?"
    r"((\x1b\[9[23]m)?(INFO|WARNING)[: ]|$)"
)
EXPLAINED = re.compile(
    r"^RUN FAILED: (Config|Data|Model|Run|RunFolder|Checkpoint|Disk)Error|^RUN FAILED: WorkerDied"
)
OURS = re.compile(r"^(RUN |run folder|report)")


def launch(overrides: list[str], runtime: Runtime, emit: Callable[[str], None]) -> int:
    """Do one run through Flower and Ray; its exit code: 0 only if the run completed.

    A run that fails because a worker process died continues from its last checkpoint with new
    workers, ``runtime.restarts`` times.
    """
    attempt, words = 0, overrides
    while True:
        code, folder = _run(words, runtime, emit)
        if code == 0 or attempt == runtime.restarts or not _worker_died(folder):
            return code
        attempt += 1
        emit(f"starting again from the last checkpoint ({attempt} of {runtime.restarts})")
        words = [*(w for w in overrides if not w.startswith("resume=")), f"resume='{folder}'"]


def _worker_died(folder: Path | None) -> bool:
    try:
        status = json.loads((folder / "status.json").read_text()) if folder else {}
    except (OSError, ValueError):
        return False
    return isinstance(status, dict) and status.get("kind") == "WorkerDied"


def _run(
    overrides: Sequence[str], runtime: Runtime, emit: Callable[[str], None]
) -> tuple[int, Path | None]:
    """One attempt: show its log. Returns its exit code and the run folder."""
    folder = None
    with _process(overrides, runtime) as process:
        assert process.stdout is not None
        for line in filter_log(process.stdout):
            emit(line)
            if match := FOLDER.match(line):
                folder = Path(match[1])
        return process.wait(), folder


@contextmanager
def _process(overrides: Sequence[str], runtime: Runtime) -> Iterator["subprocess.Popen[str]"]:
    """The run's process behind its guard; it and all it started end with the block."""
    home, mark = Path(tempfile.mkdtemp(prefix="fedlora-run-")), uuid.uuid4().hex
    guard = [str(ROOT / "simulations" / "app" / "guard.py"), mark, str(home)]
    command = [sys.executable, "-m", "simulations.app.simulate", *overrides]
    process = subprocess.Popen(
        [sys.executable, *guard, *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        cwd=home,
        env=environment(runtime),
        start_new_session=True,
    )
    try:
        yield process
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            end(mark)
        shutil.rmtree(home, ignore_errors=True)


def environment(runtime: Runtime) -> dict[str, str]:
    """The environment of the run's process, and of the Ray workers that inherit it."""
    own = QUIET | runtime.ray_environment()
    own[variables.CWD] = os.getcwd()
    if Path(sysconfig.get_path("purelib")) != ROOT:  # a checkout, found through the directory
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        own["PYTHONPATH"] = os.pathsep.join(paths)
    return os.environ | own


def filter_log(lines: Iterable[str]) -> Iterator[str]:
    """The lines of a run's log that a user needs: the app's own lines and all errors.

    Flower's routine lines are left out, and so is the stack trace after a failure that explains
    itself. ``FEDLORA_VERBOSE=1`` shows everything.
    """
    everything, explained = bool(os.environ.get(variables.VERBOSE)), False
    for line in lines:
        text = line.rstrip()
        explained = explained or bool(EXPLAINED.match(text))
        if everything or not (ROUTINE.match(text) or (explained and not OURS.match(text))):
            yield text
