"""What Ray needs is checked before Ray is asked: a cluster that answers, short names of sockets."""

import os
import socket
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from fedlora.core.errors import ConfigError
from simulations.app import ray_setup
from simulations.app.ray_setup import LONGEST, TMPDIR, check_cluster, short_folder, too_long


@pytest.fixture
def listener():
    """A port that accepts connections and says nothing."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        yield f"127.0.0.1:{s.getsockname()[1]}"


@pytest.fixture
def other_service():
    """A gRPC server that is no Ray."""
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(ray_setup, "PATIENCE_S", 1.0)


def refused(address: str) -> str:
    began = time.monotonic()
    with pytest.raises(ConfigError) as error:
        check_cluster(address)
    assert time.monotonic() - began < 20
    said = str(error.value)
    assert address in said and "\n" not in said
    return said


def test_a_mute_peer_a_closed_port_and_an_unknown_host_are_no_cluster(listener):
    for address in (listener, "127.0.0.1:1", "no-such-host.invalid:6379"):
        assert "no Ray cluster answered within 1 s" in refused(address)


def test_another_service_is_no_cluster(other_service):
    assert "is no Ray cluster (UNIMPLEMENTED)" in refused(other_service)


@pytest.mark.parametrize("address", ["head", "ray://head:10001", "head:port", "http://head:8265"])
def test_what_is_no_address_is_refused(address):
    assert "is not auto or host:port" in refused(address)


@pytest.fixture
def long_tmpdir(monkeypatch, tmp_path):
    folder = tmp_path / ("long" * 12)
    folder.mkdir()
    monkeypatch.delenv(TMPDIR, raising=False)
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return folder


def test_a_short_folder_is_found_used_and_removed(long_tmpdir):
    assert str(long_tmpdir) in too_long()
    said: list[str] = []
    with short_folder(said.append) as environment:
        folder = Path(environment[TMPDIR])
        assert folder.is_dir() and len(str(folder)) <= LONGEST
        assert folder.stat().st_mode & 0o077 == 0, "nobody else's"
        assert str(folder) in said[0]
    assert not folder.exists()


def test_where_none_can_be_made_the_sentence_says_what_to_set(long_tmpdir, monkeypatch):
    def no(**kwargs):
        raise PermissionError

    monkeypatch.setattr(tempfile, "mkdtemp", no)
    with pytest.raises(ConfigError, match=f"set {TMPDIR}"), short_folder(print):
        pass


def test_the_usual_folder_stays(monkeypatch):
    monkeypatch.setenv(TMPDIR, "/tmp")
    with short_folder(print) as environment:
        assert environment == {}
    monkeypatch.setenv(TMPDIR, "/tmp/" + "x" * LONGEST)
    assert too_long().startswith(TMPDIR)
    assert os.environ[TMPDIR] in too_long()
