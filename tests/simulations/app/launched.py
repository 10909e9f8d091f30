"""Runs of the launcher as a person starts them: a process, its output, and all that it started."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from fedlora.run.tracking import read_jsonl
from tests.simulations.conftest import SMALL, TEXT

ROOT = Path(__file__).parents[3]
TAG = "FEDLORA_TEST_TAG"
SAME = [word for word in SMALL if not word.startswith("runtime")] + TEXT
"""The settings of `SMALL`, for any runtime."""
PATIENCE_S = 420.0
"""Twenty seconds of work on an idle machine; a busy one may need many times that."""


class Tagged:
    """An environment whose every descendant can be found, however it was started."""

    def __init__(self) -> None:
        self.tag = uuid.uuid4().hex
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.scratch = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # sockets: short names
        own = {TAG: self.tag, "PYTHONPATH": path, "RAY_TMPDIR": str(self.scratch)}
        self.environment = os.environ | own

    def processes(self) -> list[psutil.Process]:
        """Every living process that was started with this environment."""
        found = []
        for process in psutil.process_iter():
            try:
                ours = process.environ().get(TAG) == self.tag
                if ours and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.Error, OSError):
                continue
        return found

    def left(self, seconds: float) -> list[str]:
        """What still runs after so many seconds; returns as soon as nothing does."""
        until(lambda: not self.processes(), seconds)
        lines = []
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):  # it ended since it was listed
                lines.append(" ".join(process.cmdline()[:6]))
        return lines

    def kill(self) -> None:
        """SIGKILL, until nothing is left."""
        for _ in range(50):
            found = self.processes()
            for process in found:
                with suppress(psutil.NoSuchProcess):  # its parent's end can have ended it
                    process.kill()
            if not found:
                break
            psutil.wait_procs(found, timeout=1)
        shutil.rmtree(self.scratch, ignore_errors=True)


class Launched(Tagged):
    """One ``python -m simulations.run``."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        super().__init__()
        note = self.scratch / "ray" / "ray_current_cluster"  # of a cluster that is no more
        note.parent.mkdir()
        note.write_text("127.0.0.1:1")
        self.output = folder / f"out-{self.tag[:6]}"
        self.log = folder / f"log-{self.tag[:6]}.txt"
        words = [w for w in overrides if w.startswith("output_dir=")] or [
            f"output_dir={self.output}"
        ]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "simulations.run", *overrides, *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env=self.environment,
                start_new_session=True,
                preexec_fn=hears_interrupts,
            )

    def said(self) -> str:
        """Everything that a person has seen so far."""
        return self.log.read_text(errors="replace")

    def wait(self) -> int:
        """Its exit code."""
        return self.process.wait(PATIENCE_S)

    def wait_for(self, text: str) -> None:
        """Until it has said this."""
        until(lambda: text in self.said() or self.process.poll() is not None, PATIENCE_S)
        assert text in self.said(), self.said()

    def send(self, what: signal.Signals) -> None:
        """To the launcher alone, not to what it started."""
        self.process.send_signal(what)

    @property
    def folder(self) -> Path:
        """The run folder that it named first."""
        (first, *_) = [s for s in self.said().splitlines() if s.startswith("run folder: ")]
        return Path(first.removeprefix("run folder: "))

    @property
    def rounds(self) -> list[dict]:
        """The round records."""
        return [r for r in read_jsonl(self.folder / "metrics.jsonl") if r["kind"] == "round"]

    @property
    def hash(self) -> str:
        """Of the last state."""
        return self.rounds[-1]["state/hash"]

    @property
    def clients(self) -> list[dict]:
        """The client records."""
        return read_jsonl(self.folder / "clients.jsonl")


def hears_interrupts() -> None:
    """Before a program is started: a shell's background job ignores Ctrl-C, and so would it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def until(condition: Callable[[], bool], seconds: float) -> None:
    """Wait for a condition, or so long."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.2)
