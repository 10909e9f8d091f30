"""One run per folder: a second run is refused by name, a dead run's claim is taken over."""

import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from io import BufferedRandom
from pathlib import Path
from types import TracebackType

from fedlora.core.errors import RunFolderError

log = logging.getLogger(__name__)

FILE = "run.lock"


@dataclass(frozen=True)
class Holder:
    """The process that claimed a folder."""

    pid: int
    host: str
    started: str
    """When the claim was made, ISO 8601 with the zone."""
    birth: str = ""
    """When the process began, in the kernel's ticks, where ``/proc`` tells: process ids recur."""

    @property
    def dead(self) -> bool:
        """Whether this process surely no longer runs. Of another host's, nothing is sure."""
        if self.host != socket.gethostname():
            return False
        if _birth(self.pid) is None:
            return True
        return bool(self.birth) and self.birth != _birth(self.pid)


@dataclass(frozen=True)
class RunLock:
    """A claim on a folder, given back by `release` or at the end of a ``with`` block."""

    folder: Path
    holder: Holder

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        release(self)


def claim(folder: Path) -> RunLock:
    """Claim a run folder for this process; the folder is created if missing.

    Raises:
        RunFolderError: if another run has claimed it and is not known to be dead.
    """
    folder.mkdir(parents=True, exist_ok=True)
    me = _me()
    with _exclusive(folder) as file:
        other = _read(file)
        if other is not None and not other.dead:
            raise RunFolderError(
                f"{folder} belongs to the run of process {other.pid} on {other.host}, started "
                f"{other.started}. Give this run another name or wait; if that run is over, "
                f"remove {folder / FILE}"
            )
        if other is not None:
            log.info("taking %s over from process %s, which is gone", folder, other.pid)
        file.seek(0)
        file.truncate()
        file.write(json.dumps(asdict(me)).encode())
    return RunLock(folder, me)


def release(lock: RunLock) -> None:
    """Give a claim back. A claim that someone else has taken over meanwhile stays theirs."""
    if not (lock.folder / FILE).exists():
        return
    with _exclusive(lock.folder) as file:
        if _read(file) == lock.holder:
            (lock.folder / FILE).unlink()


@contextmanager
def _exclusive(folder: Path) -> Iterator[BufferedRandom]:
    """The lock file, with every other process kept out for as long as it takes to look and write.

    A process that waited on a file which was then removed holds nothing, hence the second look.
    """
    path = folder / FILE
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        with os.fdopen(handle, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if _is_still(file, path):
                yield file
                return


def _is_still(file: BufferedRandom, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _read(file: BufferedRandom) -> Holder | None:
    """Who holds the lock; None also for a file that was torn while it was written."""
    file.seek(0)
    try:
        return Holder(**json.loads(file.read()))
    except (ValueError, TypeError):
        return None


def _me() -> Holder:
    pid = os.getpid()
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return Holder(pid, socket.gethostname(), now, _birth(pid) or "")


def _birth(pid: int) -> str | None:
    """When a process of this host began, empty where unknown; None if no such process runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        return ""
    with suppress(OSError, IndexError):
        # After the name in parentheses: field 3 is the state (Z: dead, not reaped), 22 the birth.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] == "Z" else fields[19]
    return ""
