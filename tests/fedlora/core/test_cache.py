"""One cache folder, that a user can move, and a lock for those who fill it together."""

import fcntl
import time
from concurrent.futures import ThreadPoolExecutor

from fedlora.core.cache import cache_root, locked


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path))
    assert cache_root() == tmp_path
    monkeypatch.delenv("FEDLORA_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / ".cache" / "fedlora"


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
        try:
            with locked(tmp_path / "lock"):
                raise KeyError
        except KeyError:
            pass


def test_a_file_system_without_locks_is_said_and_lived_with(tmp_path, monkeypatch, caplog):
    def refuse(*_: object) -> None:
        raise OSError("not here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(tmp_path / "lock"):
        pass
    assert "not here" in caplog.text
