"""Laws of the run folder's lock."""

import json
import os
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from fedlora.core.errors import RunFolderError
from fedlora.core.lock import (
    FILE,
    claim,
    release,
)


def test_a_second_run_is_refused_and_told_who_holds_the_folder(tmp_path):
    lock = claim(tmp_path / "run")
    with pytest.raises(RunFolderError) as error:
        claim(tmp_path / "run")
    for part in (str(os.getpid()), socket.gethostname(), lock.holder.started):
        assert part in str(error.value)
    release(lock)
    with claim(tmp_path / "run"):
        pass
    assert not (tmp_path / "run" / FILE).exists()


def test_an_exception_gives_the_folder_back(tmp_path):
    with pytest.raises(ZeroDivisionError), claim(tmp_path):
        _ = 1 / 0
    claim(tmp_path)


def dead_pid() -> int:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return child


def holder(**changes) -> str:
    here = {"pid": os.getpid(), "host": socket.gethostname(), "started": "2026-01-01", "birth": ""}
    return json.dumps(here | changes)


def test_a_dead_runs_claim_is_taken_over(tmp_path):
    (tmp_path / FILE).write_text(holder(pid=dead_pid()))
    assert claim(tmp_path).holder.pid == os.getpid()


def test_a_claim_of_a_dead_child_that_nobody_has_reaped_is_taken_over(tmp_path):
    child = os.fork()
    if child == 0:
        claim(tmp_path)
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    try:
        assert claim(tmp_path).holder.pid == os.getpid()
    finally:
        os.waitpid(child, 0)


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="process births need /proc")
def test_a_process_id_that_was_given_to_another_process_is_dead(tmp_path):
    (tmp_path / FILE).write_text(holder(birth="1"))
    assert claim(tmp_path).holder.birth not in ("", "1")


@pytest.mark.parametrize("changes", [{}, {"host": "elsewhere"}, {"pid": 1}])
def test_a_claim_that_may_be_alive_is_respected(tmp_path, changes):
    text = holder(**changes)
    (tmp_path / FILE).write_text(text)
    with pytest.raises(RunFolderError, match=json.loads(text)["host"]):
        claim(tmp_path)
    assert (tmp_path / FILE).read_text() == text


@pytest.mark.parametrize("text", ["", '{"pid": 1', "[]", '{"pid": 1}'])
def test_a_torn_lock_file_holds_nobody(tmp_path, text):
    (tmp_path / FILE).write_text(text)
    claim(tmp_path)


def test_giving_back_twice_or_after_a_takeover_harms_nobody(tmp_path):
    lock = claim(tmp_path)
    (tmp_path / FILE).write_text(holder(started="later"))
    release(lock)
    assert json.loads((tmp_path / FILE).read_text())["started"] == "later"
    (tmp_path / FILE).unlink()
    release(lock)
    assert list(tmp_path.iterdir()) == []


def test_of_many_at_once_exactly_one_wins(tmp_path):
    (tmp_path / FILE).write_text(holder(pid=dead_pid()))

    def attempt(_):
        try:
            return claim(tmp_path)
        except RunFolderError:
            return None

    with ThreadPoolExecutor(8) as pool:
        assert sum(lock is not None for lock in pool.map(attempt, range(24))) == 1
