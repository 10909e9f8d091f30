"""The Flower ServerApp: compose, federate, and end with one clear line."""

import logging
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.exit import add_exit_handler
from omegaconf import DictConfig

from fedlora.core.config import build
from fedlora.core.errors import ConfigError, RunError
from simulations.app.compose import load, split_overrides
from simulations.app.federate import run
from simulations.app.own_modules import find_own_modules
from simulations.app.ray_setup import TMPDIR, check_cluster, too_long
from simulations.app.runtime import Runtime
from simulations.app.silo_runtime import SiloRuntime
from simulations.app.status import close_status

app = ServerApp()
find_own_modules()

# Flower's message poller holds the interpreter lock in long slices; Ray's driver threads, which
# hand out work, then wait up to the default 5 ms each time (measured: half the message rate).
SWITCH_INTERVAL_S = 2e-4


def say(line: str) -> None:
    """One line to the run's log, at once."""
    print(line, flush=True)


def federation_hint(cfg: DictConfig) -> str:
    """The options that plain ``flwr run`` needs for the configured runtime."""
    runtime = build(cfg.runtime, Runtime, "runtime")
    return f'runtime.* would be --federation-config "{runtime.federation_config()}"'


class SimulationEnded(RunError):
    """Flower ends the process of the run while the run goes on."""


def check_ray() -> None:
    """Refuse what Ray would report minutes later, in stack traces, or not at all.

    Raises:
        ConfigError: one sentence with the remedy.
    """
    if problem := too_long():
        raise ConfigError(f"{problem}: start the SuperLink with {TMPDIR}=/tmp")
    address = os.environ.get("RAY_ADDRESS", "local")
    if address not in ("", "local"):
        check_cluster(address)


@app.main()
def main(grid: Grid, context: Context) -> None:
    """One run of ``flwr run``."""
    ending = Ending()
    # Flower calls this when its simulation breaks (Ray does not start) or is stopped; this thread
    # learns of neither.
    add_exit_handler(ending.cut_off)
    with ending:
        config = context.run_config
        cfg = load(split_overrides(str(config["experiment"]), str(config["overrides"])))
        if not isinstance(build(cfg.runtime, Runtime, "runtime"), SiloRuntime):
            say(f"(CPUs, GPUs and nodes are Flower's: {federation_hint(cfg)})")
            check_ray()
        federate(cfg, grid, ending.say)


def federate(cfg: DictConfig, grid: Grid, emit: Callable[[str], None]) -> None:
    """The run of a composed configuration, in the thread that Flower gives a server."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    logging.getLogger("flwr").propagate = False  # else every Flower line appears twice
    run(cfg, lambda _: grid, emit)


class Ending:
    """The last line of a run, said once: by its own thread, or by Flower's when that ends first.

    As a context it says how the block ended, and lets no exception end a run as if it were done.
    """

    def __init__(self) -> None:
        self._lock, self._over = threading.Lock(), False
        self._folder: Path | None = None

    def __enter__(self) -> "Ending":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> None:
        if error is None:
            self.said("RUN COMPLETED")
            return
        self.said(f"RUN FAILED: {type(error).__name__}: {error}")
        if not isinstance(error, Exception):
            # Flower takes what is no Exception (SystemExit) for the end of a completed run.
            raise RunError(f"{type(error).__name__}: {error}") from error

    def say(self, line: str) -> None:
        """Show a line, and note the run folder that it may name."""
        say(line)
        if line.startswith("run folder: "):
            self._folder = Path(line.removeprefix("run folder: "))

    def said(self, line: str) -> None:
        """Show the last line."""
        with self._lock:
            if not self._over:
                say(line)
            self._over = True

    def cut_off(self) -> None:
        """End a run that is still going on."""
        if self._over:
            return
        error = SimulationEnded(
            "Flower ended the simulation before the run was over: it was stopped, or Ray failed as "
            "the lines above say"
        )
        self.said(f"RUN FAILED: SimulationEnded: {error}")
        close_status(self._folder, error)
