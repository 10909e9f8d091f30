"""Files and folders that appear whole or not at all, and locks that a dead process releases.

A draft is written beside its target under a name that begins with ``.unfinished_``, flushed to the
disk and renamed. A process that is killed leaves the old file or the new one, never a half; a draft
that it leaves behind is removed by the process that next makes the same folder or claims the folder
it lies in.
"""

import errno
import json
import logging
import os
import secrets
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from fedlora.core.errors import ConfigError, RunFolderError
from fedlora.core.reading import json_in

log = logging.getLogger(__name__)

RUN_LOCK = "run.lock"
RUN_OWNER = "run.owner.json"
RECORD = "fedlora.json"
"""What an output folder is and which files belong to it (`output_folder`)."""
_DRAFT = ".unfinished_"


# --- files and folders ----------------------------------------------------------------------------


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give an OSError of the block, such as that of a full disk, the path it lacks.

    Raises:
        OSError: what was raised, with a file name; also for safetensors' own error of a write.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:  # such as NumPy's "1024 requested and 512 written"
            raise OSError(errno.EIO, str(error), str(path)) from error
        if error.filename is None or _DRAFT in str(error.filename):
            error.filename = str(path)
        raise
    except SafetensorError as error:
        full = "os error 28" in str(error)
        raise OSError(errno.ENOSPC if full else errno.EIO, str(error), str(path)) from error


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file, text as UTF-8, that other processes see whole: the old content or the new.

    Raises:
        OSError: from the file system; the old file is then as it was.
    """
    draft = _draft(path)
    with naming(path):
        try:
            with draft.open("xb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(path)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
        _flush(path.parent)


@contextmanager
def draft_folder(target: Path) -> Iterator[Path]:
    """An empty folder beside a target, removed at the end with whatever is still in it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = _draft(target)
    draft.mkdir()
    try:
        yield draft
    finally:
        shutil.rmtree(draft, ignore_errors=True)


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder to write into, which takes the target's name at the end of the block.

    A folder that already has the name is replaced. A kill between the two renames of a replacement
    leaves no folder of that name: keep another one (`fedlora.run.checkpoint` keeps earlier rounds)
    or make it again (`made_once`). Files get the mode that the process's umask gives to new ones;
    safetensors writes them for their owner alone.

    Yields:
        The draft; if the block raises, it is removed and the target stays as it was.
    """
    with naming(target), draft_folder(target) as draft:
        yield draft
        mode = draft.stat().st_mode & 0o666  # the draft is new: umask and defaults are in it
        for path in draft.rglob("*"):
            if path.is_symlink():
                continue
            if path.is_file():
                path.chmod(mode)
            _flush(path)
        _flush(draft)
        if target.exists():
            with draft_folder(target) as replaced:
                target.rename(replaced / target.name)
                draft.rename(target)
        else:
            draft.rename(target)
    _flush(target.parent)


@contextmanager
def output_folder(target: Path, about: Mapping[str, Any]) -> Iterator[Path]:
    """`whole_folder` for a place that a user has named: only earlier output is replaced.

    Args:
        target: missing, empty, or with nothing in it but what an earlier call wrote there.
        about: JSON values for `RECORD`, read at the end of the block; the names of the files are
            added to them.

    Raises:
        ConfigError: at once, if the target holds anything else.
    """
    require_own(target)
    with whole_folder(target) as draft:
        yield draft
        names = sorted(_files(draft) | {RECORD})
        text = json.dumps({**about, "files": names}, indent=1, ensure_ascii=False)
        write_file(draft / RECORD, text + "\n")


def require_own(target: Path) -> None:
    """Refuse a place for output that holds anything that no earlier output left there.

    Raises:
        ConfigError: naming one such file.
    """
    if target.exists() and not target.is_dir():
        raise ConfigError(f"{target} is a file: name a new folder")
    found = _files(target) if target.exists() else set()
    foreign = sorted(found - set(output_record(target).get("files", ())) - {RECORD})
    if foreign:
        raise ConfigError(
            f"{target} holds {foreign[0]}, which no earlier output of fedlora left there "
            f"({len(foreign)} files): name a new folder, or empty this one"
        )


def output_record(folder: Path) -> dict[str, Any]:
    """What `output_folder` noted of a folder; empty: it was not made by it.

    Raises:
        ConfigError: if the note cannot be read.
    """
    file = folder / RECORD
    if not file.is_file():
        return {}
    found = json_in(file, "the list of an earlier output's files,", ConfigError)
    if not isinstance(found.get("files"), list):
        raise ConfigError(f"{file} is damaged: it lists no files")
    return found


def _files(folder: Path) -> set[str]:
    """Every file below a folder, by its path in it."""
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir()}


def made_once(
    target: Path, make: Callable[[Path], object], whole: Callable[[Path], bool] = Path.is_dir
) -> Path:
    """A folder of a cache: the first process that asks makes it, others wait and find it.

    Args:
        target: the folder.
        make: writes its content into an empty folder, which is then renamed.
        whole: whether the target is there and complete; if not, it is made anew.

    Returns:
        ``target``.
    """
    if whole(target):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target.with_name(f"{target.name}.lock")):
        if not whole(target):
            remove_drafts(target.parent, target.name)
            with whole_folder(target) as draft:
                make(draft)
    return target


def remove_drafts(folder: Path, name: str = "") -> None:
    """Remove what killed processes left unfinished in a folder, of one target or of all.

    Only for a process that knows that no other writes there.
    """
    for path in folder.glob(f"{_DRAFT}{name}{'_' if name else ''}*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _draft(target: Path) -> Path:
    return target.with_name(f"{_DRAFT}{target.name}_{secrets.token_hex(4)}")


def _flush(path: Path) -> None:
    """Flush a file, or a folder's entries: a rename is durable only once its parent is."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --- locks ----------------------------------------------------------------------------------------


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait for a lock file and hold it; where the file system has no locks, go on without.

    Without a lock two processes may make the same thing; callers must tolerate that, or
    fail loudly.
    """
    lock = FileLock(path)
    try:
        lock.acquire()
    except PermissionError:
        raise  # what the lock is for could not be written either
    except (NotImplementedError, OSError) as error:
        log.warning("no lock on %s (%s): start one process first", path, error)
    try:
        yield
    finally:
        lock.release()


@contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Hold a run folder, created if missing, for the block: no second run may write there.

    The operating system releases the claim of a process that dies. Its drafts are removed by the
    next run that claims the folder.

    Raises:
        RunFolderError: if another run holds the folder; the message says which.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, owner = folder / RUN_LOCK, folder / RUN_OWNER
    lock = FileLock(path, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RunFolderError(
            f"{folder} belongs to the run of {_owner(owner) or 'another process'}. Give this run "
            "another name or wait until that one is over"
        ) from None
    try:
        if owner.exists():
            log.info("taking %s over from %s, which is gone", folder, _owner(owner) or "a process")
        remove_drafts(folder)
        me = {"pid": os.getpid(), "host": socket.gethostname()}
        write_file(owner, json.dumps(me | {"started": datetime.now(UTC).isoformat(" ", "seconds")}))
        yield
    finally:
        # While the lock is held: a process that waits on a removed file notices and opens another.
        owner.unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        lock.release()


def _owner(file: Path) -> str:
    """Who claimed a folder, in words; empty if the file does not say: its process may have died
    while it wrote, and the lock alone decides."""
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
        return f"process {said['pid']} on {said['host']}, started {said['started']}"
    except (OSError, ValueError, TypeError, KeyError):
        return ""
