"""A run in one process, without Ray, watched by the process that started it.

    python -m simulations.app.alone NOTE OWNER OVERRIDE...

A client that ends the process takes the run with it. The watching process stays: it reads which
message was being worked on, records it (`fedlora.server.incidents`), closes status.json and says
how the run ended, or lets it continue. It also ends a process that exceeds a message's deadline.
Standard streams are shared, so a debugger works.

NOTE is a file to which the run folder is written; OWNER a pipe that closes when the watching
process is gone, and this one with it.
"""

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
from omegaconf import DictConfig

from fedlora.core import variables
from fedlora.core.errors import RunError
from fedlora.core.package import ROOT
from fedlora.server.incidents import DEADLINE, Incident, Incidents
from simulations.app.attempts import Attempt
from simulations.app.startup import timed
from simulations.app.status import RUNNING, close_status, read_status

UNDER_WAY = "under_way.json"
"""Names the message that is being worked on, in the run folder."""
POLL_S = 0.5
GRACE_S = 20.0
KNOWN = (1, 2)
"""Exit codes of a process that has said why the run failed."""


# --- the watching process -------------------------------------------------------------------------


def watch(words: Sequence[str], attempt: Attempt, cfg: DictConfig) -> None:
    """Make one attempt in a process of its own.

    Args:
        words: overrides.
        attempt: is filled in.
        cfg: the composed configuration.
    """
    with tempfile.TemporaryDirectory(prefix="fedlora-alone-") as scratch:
        note, (ours, theirs) = Path(scratch) / "folder", os.pipe()
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [sys.executable, "-m", __name__, str(note), str(ours), *words]
        process = subprocess.Popen(command, pass_fds=[ours], env=os.environ | {"PYTHONPATH": path})
        os.close(ours)
        try:
            late = _wait(process, note, float(cfg.federation.timeout_s))
        except KeyboardInterrupt:
            process.terminate()
            raise
        finally:
            _end(process)
            os.close(theirs)
            attempt.folder = _folder(note)
    code = process.returncode
    attempt.code = code if code in KNOWN else 1
    attempt.completed, attempt.reason = code == 0, f"the process of the run {how_it_ended(code)}"
    if read_status(attempt.folder).get("status") == RUNNING:
        _explain(attempt, late)
    else:
        attempt.said = code in KNOWN


def _wait(process: "subprocess.Popen[bytes]", note: Path, timeout_s: float) -> bool:
    """Wait for the end of the process; whether it was ended because a message took too long."""
    while True:
        try:
            process.wait(POLL_S)
            return False
        except subprocess.TimeoutExpired:
            folder = _folder(note)
            began = _modified(folder / UNDER_WAY) if folder else None
            if began is not None and time.time() - began > timeout_s:
                process.kill()
                return True


def _end(process: "subprocess.Popen[bytes]") -> None:
    try:
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _explain(attempt: Attempt, late: bool) -> None:
    """Record what the process was doing when it ended, and close status.json accordingly."""
    folder = attempt.folder
    assert folder is not None
    journal, done = folder / UNDER_WAY, int(read_status(folder).get("rounds_done") or 0)
    safe = f"The first {done} rounds are safe in {folder}" if done else "No round was complete yet"
    try:
        lost = Incident.from_json(json.loads(journal.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError):
        return  # no such file: it ended outside the work of clients
    journal.unlink(missing_ok=True)
    incidents = Incidents(folder)
    error: RunError
    if late:
        lost = Incident(lost.round, lost.phase, DEADLINE, lost.clients, lost.alone, lost.answered)
        incidents.add(lost)
        error = incidents.blocked(lost.phase, lost.round, safe)
    else:
        error = incidents.died(lost, safe)
    close_status(folder, error)


def how_it_ended(code: int) -> str:
    """An exit code in words."""
    if code >= 0:
        return f"ended with exit code {code} before the run did"
    number = -code
    name = signal.Signals(number).name if number in {*signal.Signals} else f"signal {number}"
    hint = ": the machine may have run out of memory" if number == signal.SIGKILL else ""
    return f"was ended by {name}{hint}"


def _folder(note: Path) -> Path | None:
    return Path(note.read_text(encoding="utf-8")) if note.exists() else None


def _modified(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None


# --- the process of the run -----------------------------------------------------------------------


def main() -> int:
    """The whole run in this process; its exit code."""
    from simulations.run import INTERRUPTED, guarded, interrupts

    note, owner, words = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    threading.Thread(target=_end_with, args=[owner], daemon=True).start()
    with interrupts():
        try:
            return guarded(lambda: _run(words, note))
        except KeyboardInterrupt:
            return INTERRUPTED


def _run(words: Sequence[str], note: Path) -> int:
    from simulations.app.client_app import app
    from simulations.app.compose import load
    from simulations.app.federate import run
    from simulations.app.grid import InProcessGrid
    from simulations.app.parts import build_parts, check_machine
    from simulations.run import say

    show = timed(say, psutil.Process().create_time())

    def emit(line: str) -> None:
        show(line)
        if line.startswith("run folder: "):
            note.write_text(line.removeprefix("run folder: "), encoding="utf-8")

    if not os.environ.get(variables.VERBOSE):
        logging.getLogger("flwr").setLevel(logging.WARNING)
    cfg = load(words)
    check_machine(build_parts(cfg).runtime)
    run(cfg, lambda p: InProcessGrid(app, p.runtime.nodes), emit, watched=True)
    say("RUN COMPLETED")
    return 0


def _end_with(owner: int) -> None:
    """End this process when the other end of a pipe closes."""
    os.read(owner, 1)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
