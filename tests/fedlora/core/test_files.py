"""Laws of files: whole or not at all, whenever a kill comes; a lock ends with its holder."""

import json
import logging
import multiprocessing
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import filelock
import pytest

from fedlora.core.errors import RunFolderError
from fedlora.core.files import (
    RUN_LOCK,
    RUN_OWNER,
    claim,
    draft_folder,
    locked,
    made_once,
    remove_drafts,
    whole_folder,
    write_file,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def drafts(folder: Path) -> list[str]:
    return [name for name in names(folder) if name.startswith(".")]


def killed_at(n: int, act: Callable[[], object]) -> bool:
    """Act in a child process that is killed at its n-th step on the disk; whether it was."""
    child = os.fork()
    if child == 0:
        steps = iter(range(n))

        def deadly(call):
            def step(*args, **kwargs):
                if next(steps, None) is None:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args, **kwargs)

            return step

        owned = [(Path, name) for name in ("open", "mkdir", "rename", "replace", "unlink")]
        for owner, name in [(os, "fsync"), (shutil, "rmtree"), *owned]:
            setattr(owner, name, deadly(getattr(owner, name)))
        act()
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["Grüße\n", b"\x00\xff", ""])
def test_a_file_holds_what_was_written_and_nothing_lies_beside_it(tmp_path, content):
    for _ in range(2):
        write_file(tmp_path / "file", content)
        found = (tmp_path / "file").read_bytes()
        assert found == (content.encode() if isinstance(content, str) else content)
    assert names(tmp_path) == ["file"]


def test_a_file_has_the_rights_of_any_other(tmp_path):
    write_file(tmp_path / "one", "")
    (tmp_path / "two").touch()
    assert (tmp_path / "one").stat().st_mode == (tmp_path / "two").stat().st_mode


def test_an_exception_leaves_the_old_file_and_no_draft(tmp_path, monkeypatch):
    write_file(tmp_path / "file", "old")

    def full(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        write_file(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "old"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("before", [None, "old"], ids=["none before", "one before"])
def test_a_kill_leaves_the_old_file_or_the_new_one(tmp_path, before):
    seen = set()
    for n in range(20):
        folder = tmp_path / str(n)
        folder.mkdir()
        file = folder / "file"
        if before is not None:
            file.write_text(before)
        killed = killed_at(n, lambda: write_file(file, "new" * 10_000))  # noqa: B023 - done at once
        seen.add(found := file.read_text() if file.exists() else None)
        assert found in (before, "new" * 10_000)
        if not killed:
            assert names(folder) == ["file"]
            assert n >= 4 and seen == {before, "new" * 10_000}
            return
    pytest.fail("the child was never left alone")


# --- folders --------------------------------------------------------------------------------------


def fill(folder: Path, text: str) -> None:
    (folder / "inner").mkdir()
    for name in ("one", "inner/two"):
        with (folder / name).open("w") as file:
            file.write(text)


def content(folder: Path) -> set[str]:
    return {path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("before", [False, True], ids=["none before", "one before"])
def test_a_kill_leaves_the_old_folder_the_new_one_or_none(tmp_path, before):
    """None only while an old folder makes room for the new one."""

    def act(target: Path) -> None:
        with whole_folder(target) as draft:
            fill(draft, "new")

    for n in range(60):
        target = tmp_path / str(n) / "target"
        target.parent.mkdir()
        if before:
            act(target)
            (target / "one").write_text("old")
            (target / "inner" / "two").write_text("old")
        killed = killed_at(n, lambda: act(target))  # noqa: B023 - done at once
        if target.exists():
            assert content(target) in ([{"old"}, {"new"}] if before else [{"new"}])
            assert len(list(target.rglob("*"))) == 3
        remove_drafts(target.parent, "target")
        assert not drafts(target.parent)
        if not killed:
            assert content(target) == {"new"}
            assert n > 8
            return
    pytest.fail("the child was never left alone")


def test_an_exception_leaves_the_old_folder_and_no_draft(tmp_path):
    target = tmp_path / "target"
    with whole_folder(target) as draft:
        fill(draft, "old")
    with pytest.raises(FileExistsError), whole_folder(target) as draft:
        [fill(draft, "new") for _ in range(2)]
    assert content(target) == {"old"}
    assert names(tmp_path) == ["target"]


def test_a_draft_s_files_can_be_moved_elsewhere(tmp_path):
    with draft_folder(tmp_path / "new" / "target") as draft:
        fill(draft, "x")
        (draft / "one").rename(tmp_path / "one")
    assert (tmp_path / "one").read_text() == "x"
    assert names(tmp_path / "new") == []


def test_only_the_drafts_of_a_name_are_removed(tmp_path):
    left = [tmp_path / f".unfinished_{name}_0" for name in ("a", "ab", "b")]
    for path in left[:2]:
        path.mkdir()
    left[2].touch()
    remove_drafts(tmp_path, "a")
    assert names(tmp_path) == [".unfinished_ab_0", ".unfinished_b_0"]
    remove_drafts(tmp_path)
    assert names(tmp_path) == []


def test_a_folder_of_a_cache_is_made_once_by_all_together(tmp_path):
    target, made = tmp_path / "cache" / "thing", []
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / ".unfinished_thing_dead").mkdir()

    def make(draft: Path) -> None:
        made.append(draft)
        fill(draft, "x")

    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(lambda _: made_once(target, make), range(8)))
    assert found == {target} and len(made) == 1
    assert names(target.parent) == ["thing", "thing.lock"]
    (target / "one").unlink()
    made_once(target, make, lambda folder: (folder / "one").exists())
    assert len(made) == 2 and content(target) == {"x"}


# --- locks ----------------------------------------------------------------------------------------


def test_a_lock_has_one_holder_at_a_time(tmp_path):
    inside = []

    def enter(_: int) -> int:
        with locked(tmp_path / "lock"):
            inside.append(1)
            time.sleep(0.002)
            seen = len(inside)
            inside.pop()
        return seen

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(enter, range(12))) == {1}


def test_an_exception_gives_the_lock_back(tmp_path):
    for _ in range(2):
        with pytest.raises(KeyError), locked(tmp_path / "lock"):
            raise KeyError


def test_a_file_system_without_locks_is_said_and_lived_with(tmp_path, monkeypatch, caplog):
    def refuse(*_: object) -> None:
        raise OSError("not here")

    monkeypatch.setattr(filelock.FileLock, "_acquire", refuse)
    with locked(tmp_path / "lock"):
        pass
    assert "not here" in caplog.text


def test_a_second_run_is_refused_and_told_who_holds_the_folder(tmp_path):
    folder = tmp_path / "run"
    with claim(folder):
        started = json.loads((folder / RUN_OWNER).read_text())["started"]
        with pytest.raises(RunFolderError) as error, claim(folder):
            pass
        for part in (str(folder), f"process {os.getpid()}", socket.gethostname(), started):
            assert part in str(error.value)
    with claim(folder):
        pass
    assert names(folder) == []


def test_an_exception_gives_the_folder_back(tmp_path):
    with pytest.raises(ZeroDivisionError), claim(tmp_path):
        _ = 1 / 0
    with claim(tmp_path):
        pass


def hold(folder: Path, ready: "multiprocessing.synchronize.Event") -> None:
    with claim(folder):
        (folder / ".unfinished_status.json_0").touch()
        ready.set()
        time.sleep(60)


def test_a_claim_is_respected_until_its_process_is_killed(tmp_path, caplog):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    child = context.Process(target=hold, args=(tmp_path, ready))
    child.start()
    assert ready.wait(30)
    with pytest.raises(RunFolderError, match=f"belongs to the run of process {child.pid}"):
        claim(tmp_path).__enter__()
    os.kill(child.pid, signal.SIGKILL)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, and not reaped
    with caplog.at_level(logging.INFO), claim(tmp_path):
        assert json.loads((tmp_path / RUN_OWNER).read_text())["pid"] == os.getpid()
        assert names(tmp_path) == [RUN_LOCK, RUN_OWNER]
    assert f"process {child.pid}" in caplog.text
    child.join()


@pytest.mark.parametrize("text", ["", '{"pid": 1', "[]", '{"pid": 1}'])
def test_a_torn_owner_file_gives_no_owner(tmp_path, text):
    (tmp_path / RUN_OWNER).write_text(text)
    (tmp_path / RUN_LOCK).touch()
    with claim(tmp_path):
        (tmp_path / RUN_OWNER).write_text(text)
        with pytest.raises(RunFolderError, match="belongs to the run of another process"):
            claim(tmp_path).__enter__()


def test_of_many_at_once_exactly_one_wins(tmp_path):
    (tmp_path / RUN_OWNER).write_text('{"pid": 1, "host": "gone", "started": "2026-01-01"}')

    def attempt(_: int) -> AbstractContextManager[None] | None:
        held = claim(tmp_path)
        try:
            held.__enter__()
        except RunFolderError:
            return None
        return held

    with ThreadPoolExecutor(8) as pool:
        held = [lock for lock in pool.map(attempt, range(24)) if lock is not None]
    assert len(held) == 1
    held[0].__exit__(None, None, None)
