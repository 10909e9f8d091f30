"""Does the runs of a study, several at a time, and continues where an earlier attempt stopped.

Every run is a process of its own (`simulations.study.worker`) with a folder of its own below
``runs`` in the study's folder, and a log beside that. What a run is, is in the name of its folder
(`simulations.study.plan`): a complete one is never done again, a half one continues from its last
checkpoint, and one that failed is tried again by the next attempt. A failed run does not keep the
others from being done. A run that comes from an archive has no checkpoint: where it has too few
rounds, it is done anew.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Protocol

from filelock import FileLock, Timeout

from fedlora.core.files import RUN_LOCK
from fedlora.core.package import ROOT
from simulations.app.attempts import FAILED_LINE
from simulations.app.since import in_file
from simulations.app.status import COMPLETED, read_status
from simulations.study.plan import RUNS, Planned

PACKED = "packed.json"
"""Marks a run folder that comes from an archive: nothing in it can be continued."""
POLL_S = 0.2
ENDING_S = 30.0
"""Seconds that a run is given to end when the study is interrupted."""
THREADS = {"OMP_NUM_THREADS": "1"}
"""Every run has one thread, so that its last bits do not depend on the number of jobs."""
_TAIL = 2**16
_ROUND = re.compile(rb'"kind": "round", "round": (\d+)')
_SAID = re.compile(rf"^{FAILED_LINE}(.+)$", re.MULTILINE)


class State(Enum):
    """How a run of a study stands."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    PRUNED = "pruned"
    FAILED = "FAILED"


class Process(Protocol):
    """A run that was started."""

    def poll(self) -> int | None:
        """Its exit code once it has ended."""

    def end(self) -> None:
        """End it, and wait until it has ended."""


Start = Callable[[Planned, Path], Process]
"""Starts a run in the folder that is to hold run folders and logs."""


@dataclass
class Progress:
    """One run while the study goes on."""

    run: Planned
    folder: Path
    """The run folder."""
    state: State = State.WAITING
    why: str = ""
    """Why it failed."""
    before: int = 0
    """Rounds that an earlier attempt has done."""
    anew: int = 0
    """Rounds of an archive that are done once more, for it has no checkpoint."""
    process: Process | None = field(default=None, repr=False)

    @property
    def rounds(self) -> int:
        """Rounds done by now."""
        return self.run.wanted if self.state is State.DONE else rounds_done(self.folder)


def progress_of(runs: Sequence[Planned], folder: Path) -> list[Progress]:
    """How the runs of a study stand before anything is started.

    Args:
        runs: of the plan.
        folder: of the study.
    """
    place = folder / RUNS
    names = sorted(found.name for found in place.iterdir()) if place.is_dir() else []
    found = [Progress(run, place / run.name) for run in runs]
    for one in found:
        done = is_complete(one.folder, one.run.wanted)
        if not done and (earlier := _earlier(one.run, place, names)):
            one.folder, done = earlier, True
        one.state = State.DONE if done else State.WAITING
        one.before = one.rounds
    return found


def _earlier(run: Planned, place: Path, names: Sequence[str]) -> Path | None:
    """A complete folder of a run that got its name before the configuration had some keys, which
    change nothing; None if there is none."""
    for name in names:
        if name.startswith(run.stem) and len(name) == len(run.name) and name != run.name:
            then = in_file(place / name / "config.yaml")
            if then and is_complete(place / name, run.wanted) and not run.differs(then):
                return place / name
    return None


def do_all(
    runs: Sequence[Progress],
    jobs: int,
    start: Start,
    show: Callable[[Sequence[Progress]], object],
    sleep: Callable[[float], object] = time.sleep,
) -> None:
    """Do what is not done yet, the given number of runs at a time, in the order of the plan.

    Args:
        runs: are brought up to date.
        jobs: processes at a time.
        start: starts one.
        show: is called with the runs after every change, and while nothing changes.
        sleep: waits for some seconds.
    """
    if not runs:
        return
    try:
        while True:
            for one in runs:
                if one.process is not None:
                    _settle(one)
            for one in runs:
                active = sum(r.process is not None for r in runs)
                if one.state is State.WAITING and active < jobs and not is_held(one.folder):
                    _begin(one, start)
            show(runs)
            if all(one.process is None and one.state is not State.WAITING for one in runs):
                return
            sleep(POLL_S)
    finally:
        for one in runs:
            if one.process is not None:
                one.process.end()


def _begin(one: Progress, start: Start) -> None:
    """Start a run that another process has not completed meanwhile."""
    if is_complete(one.folder, one.run.wanted):
        one.state = State.DONE
        return
    one.folder.parent.mkdir(parents=True, exist_ok=True)
    done = rounds_done(one.folder)
    with suppress(FileNotFoundError):
        (one.folder / PACKED).unlink()  # of several processes one can, and that one removes the run
        shutil.rmtree(one.folder)
        one.anew, one.before = done, 0
    one.process = start(one.run, one.folder.parent)
    one.state = State.RUNNING


def _settle(one: Progress) -> None:
    """Take in how a run has ended, if it has."""
    assert one.process is not None
    code = one.process.poll()
    if code is None:
        return
    one.process = None
    if code == 0 and is_complete(one.folder, one.run.wanted):
        one.state = State.DONE
        return
    one.state, one.why = State.FAILED, _reason(one.folder, code)


def _reason(folder: Path, code: int) -> str:
    """Why a run failed: its own last word, or what it was ended by."""
    said: list[str] = []
    with suppress(OSError):
        said = _SAID.findall(log_of(folder).read_text(encoding="utf-8", errors="replace"))
    if said:
        return said[-1].strip()
    message = str(read_status(folder).get("message") or "")
    ended = f"ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
    return message or f"its process {ended}; see {log_of(folder).name}"


def is_complete(folder: Path, rounds: int) -> bool:
    """Whether the run of a folder has completed so many rounds, or ended early by its own rule."""
    status = read_status(folder)
    done = status.get("rounds_done", rounds)
    if status.get("status") == COMPLETED and (done >= rounds or status.get("message")):
        return True
    return rounds_done(folder) > rounds  # half of a longer run, which has evaluated that round


def is_held(folder: Path) -> bool:
    """Whether a process is at work in a run folder, such as one that a killed study has left and
    that is about to end."""
    lock = folder / RUN_LOCK
    if not lock.is_file():
        return False
    try:
        with FileLock(lock, timeout=0):
            return False
    except Timeout:
        return True
    except (NotImplementedError, OSError):
        return False


def rounds_done(folder: Path) -> int:
    """The last round that metrics.jsonl has; 0 if there is none."""
    try:
        with (folder / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL))
            found = _ROUND.findall(file.read())
    except OSError:
        return 0
    return int(found[-1]) if found else 0


def log_of(folder: Path) -> Path:
    """Where a run's output goes: beside its folder."""
    return folder.with_name(f"{folder.name}.log")


# --- processes ------------------------------------------------------------------------------------


class _Worker:
    """A run in a process of its own."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self._process = process

    def poll(self) -> int | None:
        return self._process.poll()

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(ENDING_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def start_process(run: Planned, folder: Path) -> Process:
    """Start a run; it ends with this process, whatever becomes of that."""
    place = [f"output_dir={folder}", f"name={run.name}", "resume=auto"]
    if run.wanted < run.rounds:  # all else is as in the whole run, which continues this one
        place.append(f"federation.rounds={run.wanted}")
    environment = THREADS | os.environ
    if Path(sysconfig.get_path("purelib")) != ROOT:  # a checkout, found through the directory
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    with log_of(folder / run.name).open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "simulations.study.worker", *run.words, *run.labels, *place],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches the study alone, which ends its runs
        )
    return _Worker(process)
