"""The Flower ServerApp: compose, federate, and end with one clear line."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from omegaconf import DictConfig

from fedlora.core.config import build
from simulations.app.compose import load, split_overrides
from simulations.app.federate import run
from simulations.app.runtime import Runtime

app = ServerApp()

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


@app.main()
def main(grid: Grid, context: Context) -> None:
    """One run of ``flwr run``."""
    with last_line():
        config = context.run_config
        cfg = load(split_overrides(str(config["experiment"]), str(config["overrides"])))
        say(f"(CPUs, GPUs and nodes are Flower's: {federation_hint(cfg)})")
        _federate(cfg, grid)


def serve(cfg: DictConfig, grid: Grid) -> None:
    """One run of a composed configuration."""
    with last_line():
        _federate(cfg, grid)


def _federate(cfg: DictConfig, grid: Grid) -> None:
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    logging.getLogger("flwr").propagate = False  # else every Flower line appears twice
    run(cfg, lambda _: grid, say)


@contextmanager
def last_line() -> Iterator[None]:
    """End in one clear line; an exception ends the run as failed after it."""
    try:
        yield
    except BaseException as error:
        say(f"RUN FAILED: {type(error).__name__}: {error}")
        raise
    say("RUN COMPLETED")
