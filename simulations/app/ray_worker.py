"""Becomes a worker of Ray at once where nothing has to be set up (`simulations.app.lean_ray`).

    python ray_worker.py --language=PYTHON --serialized-runtime-env-context={} default_worker.py ...

Ray runs ``setup_worker.py`` of its own here, which imports Ray to find out that there is nothing to
do, and then starts the worker. This asks `simulations.app.ray_fork` for a fork and stays as long as
that does, or becomes the worker itself. Imports little: it starts with every worker.
"""

import json
import os
import socket
import sys
from collections.abc import Sequence

CONTEXT, LANGUAGE = "--serialized-runtime-env-context", "--language"
FORKS, SOCKET, LENGTH = "FEDLORA_FORKS", "fork.sock", 8
"""`fedlora.core.variables.FORKS`, `ray_fork.SOCKET` and `ray_fork.LENGTH`; this runs by itself."""


def command(words: Sequence[str]) -> list[str] | None:
    """The worker's own command line.

    Args:
        words: arguments of Ray's ``setup_worker.py``.

    Returns:
        None: there is an environment to set up.
    """
    given = dict(word.partition("=")[::2] for word in words if word.startswith((CONTEXT, LANGUAGE)))
    rest = [word for word in words if not word.startswith((CONTEXT, LANGUAGE))]
    context = json.loads(given.get(CONTEXT) or "{}")
    return None if any(context.values()) or given.get(LANGUAGE) != "PYTHON" else rest


def forked(words: Sequence[str], folder: str) -> bool:
    """Ask for a fork that is the worker, and wait for its end.

    Args:
        words: the worker's command line.
        folder: of the socket.

    Returns:
        Whether there was one.
    """
    here = os.getcwd()
    request = {"words": words, "environment": dict(os.environ), "directory": here}
    body = json.dumps(request).encode()
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            os.chdir(folder)
            connection.connect(SOCKET)
            socket.send_fds(connection, [len(body).to_bytes(LENGTH)], [0, 1, 2])
            connection.sendall(body)
            begun = connection.recv(64)
            while begun and connection.recv(64):
                pass
        except OSError:
            return False
        finally:
            os.chdir(here)
    return bool(begun)


def main() -> None:
    """Become the worker, or Ray's program that sets its environment up."""
    words = sys.argv[1:]
    alone = command(words)
    folder = os.environ.get(FORKS)
    if alone is not None and folder and forked(alone, folder):
        return
    if alone is None:
        worker = next(word for word in words if word.endswith("default_worker.py"))
        alone = [os.path.join(os.path.dirname(worker), "setup_worker.py"), *words]
    os.execv(sys.executable, [sys.executable, *alone])


if __name__ == "__main__":
    main()
