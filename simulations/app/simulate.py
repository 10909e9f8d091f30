"""The process of a run: Flower's simulation engine with the app on Ray workers.

    python -m simulations.app.simulate OVERRIDES...

`simulations.app.launch` starts it. ``flwr run`` does the same in more processes: a SuperLink with a
database, a SuperExec and two clients of them, whose start takes longer than that of a small run.
Ray and the app's packages are started side by side: Ray spends most of its start waiting.
"""

import logging
import os
import subprocess
import sys
import threading
import traceback
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn

from omegaconf import DictConfig

from fedlora.core import variables
from fedlora.core.config import build
from fedlora.core.errors import ConfigError
from simulations.app.compose import load
from simulations.app.imports import without_collection
from simulations.app.runtime import Runtime

REFUSED, FAILED = 2, 1
"""Exit codes of a run whose configuration is refused, and of one that fails."""


def say(line: str) -> None:
    """One line to the run's log, at once."""
    print(line, flush=True)


def main(overrides: Sequence[str]) -> int:
    """One run; its exit code, after one clear line."""
    try:
        import_for_workers()
        cfg = load(overrides)
        runtime = build(cfg.runtime, Runtime, "runtime")
        # Ray stays in the main thread: Linux ends its processes with the thread that started them.
        importing = threading.Thread(target=_import_and_check, args=(cfg,))
        importing.start()
        say(f"starting {runtime.describe()}")
        start_ray(runtime)
        importing.join()
        return _simulate(cfg, runtime)
    except Exception as error:
        return failed(error)


def import_for_workers() -> None:
    """Start the process of which workers are forks, if the run has a folder for it."""
    if folder := os.environ.get(variables.FORKS):
        subprocess.Popen([sys.executable, "-m", "simulations.app.ray_fork", folder])


def start_ray(runtime: Runtime) -> None:
    """Start Ray for the run, or connect to its cluster."""
    import ray

    from simulations.app.lean_ray import lean

    with lean():
        ray.init(**runtime.ray_init(), include_dashboard=False, logging_level=logging.ERROR)


def failed(error: Exception) -> int:
    """Say why the run cannot be; the exit code."""
    refused = isinstance(error, ConfigError)
    say(f"RUN FAILED: {error}" if refused else f"RUN FAILED: {type(error).__name__}: {error}")
    if os.environ.get(variables.TRACEBACK):
        traceback.print_exception(error)
    return REFUSED if refused else FAILED


def _import_and_check(cfg: DictConfig) -> None:
    """Import the app. A configuration that it refuses ends this process: the guard ends Ray."""
    try:
        with without_collection():
            from simulations.app import client_app, federate  # noqa: F401
            from simulations.app.parts import build_parts, check_machine

            check_machine(build_parts(cfg).runtime)
    except Exception as error:
        leave(failed(error))


def _simulate(cfg: DictConfig, runtime: Runtime) -> int:
    """The run on Flower's engine, which finds Ray running."""
    from flwr.app import Context
    from flwr.serverapp import Grid, ServerApp
    from flwr.simulation import run_simulation

    from simulations.app import client_app, server_app

    if not os.environ.get(variables.VERBOSE):
        logging.getLogger("flwr").setLevel(logging.ERROR)
    server, ending, completed = ServerApp(), server_app.Ending(), threading.Event()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        with ending:
            server_app.federate(cfg, grid, ending.say)
            completed.set()
        if completed.is_set() and not runtime.ray_address:
            leave(0)  # Flower would take Ray apart in seconds; the guard does it at once

    # The server's exceptions arrive here too, after it has said them.
    with suppress(Exception):
        run_simulation(server, client_app.app, runtime.nodes, backend_config=runtime.backend())
    ending.cut_off()  # unless it has ended
    return 0 if completed.is_set() else FAILED


def leave(code: int) -> NoReturn:
    """End this process now: a server that waits for workers that are gone would wait for ever."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
