"""Runs the app through Flower on this machine, in its own SuperLink, and returns its exit status.

``flwr run`` returns 0 whatever becomes of the run, leaves its SuperLink running for ever, and lets
workers import whatever lies in the directory where that was started. This launcher starts a
SuperLink with a home and a port of its own from a neutral directory, streams the run's log, reads
the run's status, and takes everything down again. It is the only module that knows how.
"""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from fedlora.core import variables
from fedlora.run.source_hash import ROOT
from simulations.app.attempts import Attempt, complete
from simulations.app.bundle import app_folder
from simulations.app.guard import end
from simulations.app.ray_setup import short_folder
from simulations.app.runtime import Runtime

QUIET = {
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # Ray's announced future behaviour, silently
    "RAY_DEDUP_LOGS": "0",
    "PYTHONUNBUFFERED": "1",
}
START_PATIENCE_S = 60.0
ANSWER_PATIENCE_S = 300.0
FOLDER = re.compile(r"^run folder: (.+)$")
ROUTINE = re.compile(
    r"^(\x1b\[36m\(ClientAppActor pid=\d+(, ip=[\d.]+)?\)\x1b\[0m )?"
    r"(\x1b\[9[23]m(INFO|WARNING)|Using SuperLink|Successfully installed|$)"
)
EXPLAINED = re.compile(
    r"^RUN FAILED: (((Config|Data|Model|Run|RunFolder|Checkpoint)Error"
    r"|WorkerDied|ClientsSuspected|SimulationEnded)\b)"
)
OURS = re.compile(r"^(RUN |run folder|report|round \d|engine: |resuming)")
TRACE = re.compile(r"^\x1b\[91mERROR")


class LaunchError(RuntimeError):
    """Flower could not be started or asked; the message holds what it said."""


def launch(overrides: list[str], runtime: Runtime, emit: Callable[[str], None]) -> int:
    """Do one run through Flower; its true exit code: 0 only if the run completed.

    A run that fails because a worker process died continues from its last checkpoint with new
    workers (`simulations.app.attempts`).

    Raises:
        ConfigError: if Ray cannot be given a directory with a short name.
        LaunchError: if Flower does not start or refuses the app.
    """

    def attempt(words: Sequence[str], attempt: Attempt, show: Callable[[str], None]) -> None:
        with short_folder(show) as ray, _superlink(runtime, ray) as flwr:
            status = _run(flwr, words, runtime, attempt, show)
        attempt.completed = status == "finished:completed"
        attempt.reason = f"the process of the run is gone (Flower says: {status})"

    return complete(attempt, overrides, runtime.restarts, emit)


class _Flower:
    """The ``flwr`` command of this environment against one SuperLink."""

    def __init__(self, home: Path, port: int, environment: dict[str, str]) -> None:
        self.home, self.port = home, port
        self.environment = environment | {"FLWR_HOME": str(home)}
        # `flwr` itself needs no mark: it ends by itself, and is ours to end.
        self.environment.pop(variables.RUN, None)

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "flwr.cli.app", *words]

    def ask(self, *words: str) -> dict[str, object]:
        """Run a ``flwr`` command that answers in JSON."""
        done = subprocess.run(
            self.command(*words, "--format", "json"),
            env=self.environment,
            cwd=self.home,
            capture_output=True,
            text=True,
            check=False,
            timeout=ANSWER_PATIENCE_S,
        )
        try:
            answer = json.loads(done.stdout[done.stdout.index("{") :])
        except ValueError:
            answer = {"success": False, "error-message": (done.stdout + done.stderr).strip()}
        if not answer.get("success", True) or done.returncode:
            raise LaunchError(f"flwr {words[0]}: {answer.get('error-message', answer)}")
        assert isinstance(answer, dict)
        return answer


@contextmanager
def _superlink(runtime: Runtime, more: Mapping[str, str]) -> Iterator[_Flower]:
    """A SuperLink that lives as long as the block, with all it started, whatever happens.

    Args:
        runtime: for the address of a Ray cluster.
        more: further environment variables.
    """
    home = Path(tempfile.mkdtemp(prefix="fedlora-flower-"))
    mark, port = uuid.uuid4().hex, _free_port()
    environment = (
        os.environ | QUIET | dict(more) | {"FLWR_HOME": str(home), variables.CWD: os.getcwd()}
    )
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    environment.setdefault(variables.ROOT, str(ROOT))  # Flower's copy of the app lacks some files
    # "local": else Ray joins whatever cluster `ray start` has left a note of on this machine.
    environment["RAY_ADDRESS"] = runtime.ray_address or "local"
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "own"\n\n[superlink.own]\naddress = "127.0.0.1:{port}"\n'
        "insecure = true\n"
    )
    command = ["--insecure", "--simulation", "--disable-runtime-dependency-installation"]
    command += ["--isolation", "subprocess", "--host", "127.0.0.1", "--port", str(port)]
    superlink = shutil.which("flower-superlink", path=environment["PATH"])
    if superlink is None:
        raise LaunchError(f"there is no flower-superlink on {environment['PATH']}: install flwr")
    log = (home / "superlink.log").open("w")
    guarded = [sys.executable, str(ROOT / "simulations" / "app" / "guard.py"), mark, str(home)]
    guard = subprocess.Popen(
        [*guarded, superlink, *command],
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=subprocess.STDOUT,
        cwd=home,
        env=environment,
        start_new_session=True,
    )
    try:
        _wait_for(port, guard, home / "superlink.log")
        yield _Flower(home, port, environment)
    finally:
        assert guard.stdin is not None
        guard.stdin.close()
        try:
            guard.wait(timeout=30)
        except subprocess.TimeoutExpired:
            guard.kill()
            end(mark)
        log.close()
        shutil.rmtree(home, ignore_errors=True)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _wait_for(port: int, guard: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + START_PATIENCE_S
    while time.monotonic() < deadline and guard.poll() is None:
        with socket.socket() as s:
            s.settimeout(0.2)
            if s.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
    raise LaunchError(f"the SuperLink did not start on port {port}:\n{tail}")


def _run(
    flwr: _Flower,
    overrides: Sequence[str],
    runtime: Runtime,
    attempt: Attempt,
    emit: Callable[[str], None],
) -> str:
    """Submit, stream the log, note the run folder in the attempt; the final status."""
    text = shlex.join(overrides)
    answer = flwr.ask(
        "run",
        str(app_folder(flwr.home)),
        "own",
        "--federation-config",
        runtime.federation_config(),
        "--run-config",
        f"overrides={toml_string(text)}",
    )
    run_id = str(answer["run-id"])
    stream = subprocess.Popen(
        flwr.command("log", run_id, "own", "--stream"),
        env=flwr.environment,
        cwd=flwr.home,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    try:
        assert stream.stdout is not None
        for line in filter_log(stream.stdout):
            emit(line)
            if match := FOLDER.match(line):
                attempt.folder = Path(match[1])
        return _status(flwr, run_id)
    finally:
        stream.terminate()
        stream.wait()


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


def _status(flwr: _Flower, run_id: str) -> str:
    """The final status of the run; the log may close a moment before it is final."""
    deadline = time.monotonic() + START_PATIENCE_S
    while True:
        answer = flwr.ask("list", "own", "--run-id", run_id)
        runs = answer["runs"]
        assert isinstance(runs, list)
        status = str(runs[0]["status"])
        if status.startswith("finished") or time.monotonic() > deadline:
            return status
        time.sleep(0.3)


def toml_string(text: str) -> str:
    """Text as a value of ``--run-config``: TOML on one line.

    Flower ends a value at the next quote, escaped or not, so a quote inside is written by its
    number; so is whatever else is not plainly printable.
    """
    plain = (c if c.isprintable() and c not in '"\\' else f"\\U{ord(c):08x}" for c in text)
    return '"' + "".join(plain) + '"'
