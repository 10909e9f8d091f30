"""Workers of Ray as forks of one process, which has imported for all of them what they need.

    python -m simulations.app.ray_fork FOLDER

Importing PyTorch, transformers, Flower and Ray takes seconds of a core and hundreds of megabytes. A
run's workers all need the same, so one process imports it, while Ray starts, and becomes a worker
as often as it is asked to: forks share what has been imported, in time and memory. It starts no
thread before it forks, and neither opens a device nor asks whether there is one.

Who wants a worker (`simulations.app.ray_worker`) sends command line, environment, directory and the
three standard files through a socket in FOLDER, which belongs to this user alone.
"""

import json
import os
import runpy
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SOCKET = "fork.sock"
"""In the folder; relative names keep it short enough for a socket, wherever the folder is."""
POLL_S = 1.0
LENGTH = 8
"""Bytes that say how long a request is."""


@dataclass(frozen=True)
class Request:
    """A worker that is wanted."""

    words: tuple[str, ...]
    """Its command line: a Python file with arguments."""
    environment: dict[str, str]
    directory: str
    connection: socket.socket
    """Closes when the worker ends."""
    files: tuple[int, ...]
    """Standard input, output and error."""


def main(arguments: Sequence[str]) -> None:
    """Import, then fork on every request, until this process is ended."""
    os.chdir(arguments[0])
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(SOCKET)
        listener.listen(socket.SOMAXCONN)
        listener.settimeout(POLL_S)
        _import()
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the exit codes of forks are not read
        request = _fork(listener)
    _become(request)


def _import() -> None:
    """What a worker needs, without a thread."""
    import importlib

    from simulations.app.imports import without_collection

    with without_collection():
        importlib.import_module("simulations.app.preload")


def _fork(listener: socket.socket) -> Request:
    """Fork for every request; returns in the forks alone. This process ends with the one that
    started it."""
    owner = os.getppid()
    while True:
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            if os.getppid() != owner:
                sys.exit()
            continue
        with connection:
            request = _read(connection)
            if request is None:
                continue
            pid = os.fork()
            if pid == 0:
                return Request(**vars(request) | {"connection": connection.dup()})
            connection.sendall(b"%d\n" % pid)
            for file in request.files:
                os.close(file)


def _read(connection: socket.socket) -> Request | None:
    """What is wanted; None: the other end has closed."""
    head, files, _, _ = socket.recv_fds(connection, LENGTH, 3)
    if len(head) < LENGTH or len(files) < 3:
        return None
    body = bytearray()
    while len(body) < int.from_bytes(head):
        part = connection.recv(int.from_bytes(head) - len(body))
        if not part:
            return None
        body += part
    wanted: dict[str, Any] = json.loads(body)
    return Request(
        tuple(wanted["words"]), wanted["environment"], wanted["directory"], connection, tuple(files)
    )


def _become(request: Request) -> None:
    """Be the worker, as if it had been started by its command line."""
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number, file in enumerate(request.files):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(request.environment)
    os.chdir(request.directory)
    sys.argv = list(request.words)
    sys.path[0] = str(Path(request.words[0]).parent)
    runpy.run_path(request.words[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
