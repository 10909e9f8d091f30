"""Runs the app on this machine in processes of its own, and returns its exit status.

A run is one process, `simulations.app.simulate`, and the Ray processes that it starts. They live in
an empty directory, so that workers import nothing that happens to lie where the user works, and
under a guard that leaves nothing running, whatever becomes of this process.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from fedlora.core import variables
from fedlora.core.package import ROOT
from simulations.app.alone import KNOWN, how_it_ended
from simulations.app.attempts import Attempt, complete
from simulations.app.guard import SIGNALLED, end
from simulations.app.ray_setup import short_folder
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
    r"^RUN FAILED: (((Config|Data|Model|Run|RunFolder|Checkpoint|Disk)Error"
    r"|WorkerDied|ClientsSuspected|SimulationEnded)\b)"
)
OURS = re.compile(r"^(RUN |run folder|report|round \d|engine: |resuming|starting )")
TRACE = re.compile(r"^\x1b\[91mERROR")


def launch(overrides: list[str], runtime: Runtime, emit: Callable[[str], None]) -> int:
    """Do one run through Flower and Ray; its exit code: 0 only if the run completed.

    A run that fails because a worker process died continues from its last checkpoint with new
    workers (`simulations.app.attempts`).

    Raises:
        ConfigError: if Ray cannot be given a directory with a short name.
    """

    def attempt(words: Sequence[str], attempt: Attempt, show: Callable[[str], None]) -> None:
        with short_folder(show) as ray, _process(words, runtime, ray) as process:
            assert process.stdout is not None
            for line in filter_log(process.stdout):
                show(line)
                if match := FOLDER.match(line):
                    attempt.folder = Path(match[1])
            code = process.wait()
            code = SIGNALLED - code if code > SIGNALLED else code
        attempt.completed, attempt.code = code == 0, code if code in KNOWN else 1
        attempt.reason = f"the process of the run {how_it_ended(code)}"

    return complete(attempt, overrides, runtime.restarts, emit)


@contextmanager
def _process(
    overrides: Sequence[str], runtime: Runtime, more: Mapping[str, str]
) -> Iterator["subprocess.Popen[str]"]:
    """The run's process behind its guard; it and all it started end with the block.

    Args:
        overrides: of the run.
        runtime: of the run.
        more: further environment variables.
    """
    home, mark = Path(tempfile.mkdtemp(prefix="fedlora-run-")), uuid.uuid4().hex
    guard = [str(ROOT / "simulations" / "app" / "guard.py"), mark, str(home)]
    command = [sys.executable, "-m", "simulations.app.simulate", *overrides]
    forks = {} if runtime.ray_address else {variables.FORKS: str(home)}
    process = subprocess.Popen(
        [sys.executable, *guard, *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        cwd=home,
        env=environment(runtime) | forks | dict(more),
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

    Flower's routine lines are left out, and so are the stack traces around a failure that explains
    itself. ``FEDLORA_VERBOSE=1`` shows everything.
    """
    everything, explained = bool(os.environ.get(variables.VERBOSE)), False
    held: list[str] = []  # a trace, until the app's next line shows whether it is explained
    for line in lines:
        text = line.rstrip()
        explained = explained or bool(EXPLAINED.match(text))
        if everything:
            yield text
        elif OURS.match(text):
            yield from [] if explained else held
            held = []
            yield text
        elif held or TRACE.match(text):
            held.append(text)
        elif not (ROUTINE.match(text) or explained):
            yield text
    yield from [] if explained else held
