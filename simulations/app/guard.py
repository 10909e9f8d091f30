"""Runs a command, and ends it and all processes it started when its owner ends.

    python -m simulations.app.guard MARK SCRATCH COMMAND...

The owner holds the other end of this process's standard input. When that closes, because the owner
is done, was interrupted or was killed, every process that inherited the environment variable
``FEDLORA_RUN=MARK`` is terminated: Flower and Ray start theirs in sessions of their own, so neither
process groups nor parent links would find them all. The folder SCRATCH goes with its owner.
"""

import os
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import suppress

import psutil

VARIABLE = "FEDLORA_RUN"  # `fedlora.core.variables.RUN`; this file runs by itself
GRACE_S = 5.0
SIGNALLED = 128
"""Exit code of a command that a signal ended, less the signal's number, as in shells."""


def marked(mark: str) -> list[psutil.Process]:
    """Every other process of this machine that carries the mark."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(VARIABLE) == mark:
                found.append(process)
        except (psutil.Error, OSError):
            continue  # it has ended, or belongs to another user
    return found


def end(mark: str, grace_s: float = GRACE_S) -> None:
    """Terminate, wait, kill; twice, for those that were being started meanwhile.

    Args:
        mark: of the processes.
        grace_s: seconds that they are given; 0: they are killed at once.
    """
    for _ in range(2):
        alive = marked(mark)
        if grace_s:
            for p in alive:
                _send(p, signal.SIGTERM)
            _, alive = psutil.wait_procs(alive, timeout=grace_s)
        for p in alive:
            _send(p, signal.SIGKILL)
        psutil.wait_procs(alive, timeout=GRACE_S)


def _send(process: psutil.Process, what: signal.Signals) -> None:
    with suppress(psutil.Error):
        process.send_signal(what)


def main() -> int:
    """Start the command, wait for the owner or the command to end, then leave nothing running.

    Returns:
        The command's exit code.
    """
    for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(s, signal.SIG_IGN)  # the owner decides; it closes our input
    mark, scratch, command = sys.argv[1], sys.argv[2], sys.argv[3:]
    os.environ[VARIABLE] = mark
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    os.environ.pop(VARIABLE)
    over, alone = threading.Event(), threading.Event()

    def watch_owner() -> None:
        while os.read(0, 1024):  # sys.stdin would still hold its lock when this process ends
            pass
        alone.set()
        over.set()

    def watch_child() -> None:
        child.wait()
        over.set()

    for watch in (watch_owner, watch_child):
        threading.Thread(target=watch, daemon=True).start()
    over.wait()
    # A command that has ended has closed what it wrote; what it leaves has nothing to lose.
    end(mark, grace_s=0 if child.poll() is not None else GRACE_S)
    if alone.is_set():  # else the owner may want to read what went wrong
        shutil.rmtree(scratch, ignore_errors=True)
    code = child.wait()
    return code if code >= 0 else SIGNALLED - code


if __name__ == "__main__":
    sys.exit(main())
