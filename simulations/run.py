"""The launcher and Hydra twin of ``flwr run``: same configuration, live progress, true exit code.

fedlora run                                   one run of conf/config.yaml
fedlora run strategy=fedit rounds=20          ... with overrides
fedlora run -m strategy=fedit,flexlora seed=0,1,2      a sweep, one run after another
fedlora run runtime=in_process                without Ray

``python -m simulations.run`` is the same command. What only a run needs is imported when it begins:
help, completion and ``--cfg`` answer without loading torch.
"""

import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from uuid import uuid4

import hydra
import psutil
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from fedlora.core import variables
from fedlora.core.config import build
from fedlora.core.errors import ConfigError
from simulations.app.compose import CONF, load
from simulations.app.launch import launch
from simulations.app.runtime import Runtime
from simulations.app.startup import timed

INTERRUPTED = 130
"""Exit code after Ctrl-C or SIGTERM, as shells have it."""


def say(line: str) -> None:
    """One line of progress, at once."""
    print(line, flush=True)


def one_run(overrides: list[str], began: float) -> int:
    """Compose the configuration and run it; the exit code. The process that imports PyTorch checks
    all groups before anything is loaded.

    Args:
        overrides: words of Hydra's grammar.
        began: when the run was asked for, in seconds since the epoch.
    """
    emit = timed(say, began)
    try:
        cfg = load(overrides)
        runtime = build(cfg.runtime, Runtime, "runtime")
        emit("starting Python packages")
        if runtime.in_process:
            _in_process(cfg, emit)
            return 0
        return launch(overrides, runtime, emit)
    except ConfigError as error:
        say(f"RUN FAILED: {error}")
        return 2
    except KeyboardInterrupt:
        say("interrupted: everything that this run started is being stopped")
        return INTERRUPTED
    except Exception as error:
        say(f"RUN FAILED: {type(error).__name__}: {error}")
        if os.environ.get(variables.TRACEBACK):
            raise
        return 1


def _in_process(cfg: DictConfig, emit: Callable[[str], None]) -> None:
    """The whole run in this process."""
    from simulations.app.client_app import app
    from simulations.app.federate import check, run
    from simulations.app.grid import InProcessGrid

    if not os.environ.get(variables.VERBOSE):
        logging.getLogger("flwr").setLevel(logging.WARNING)
    check(cfg)
    run(cfg, lambda p: InProcessGrid(app, p.runtime.nodes), emit)
    say("RUN COMPLETED")


def main(arguments: Sequence[str] | None = None) -> int:
    """One run, or with ``-m`` one after another; the worst exit code. A failed run of a sweep does
    not keep the others from being done."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    with _sigterm_interrupts():
        if not any(w.startswith("-") for w in words):
            # no sweep and no flag: nothing that Hydra's program would add
            return one_run(words, psutil.Process().create_time())
        with tempfile.TemporaryDirectory(prefix="fedlora-sweep-") as folder:
            _through_hydra(words, Path(folder))
            codes = [int(file.read_text()) for file in Path(folder).iterdir()]
    if len(codes) > 1:
        say(f"{codes.count(0)} of {len(codes)} runs completed")
    return max(codes, default=0)


def _through_hydra(words: list[str], codes: Path) -> None:
    """Hydra's program: flags, and the runs of a sweep.

    Args:
        words: its command line.
        codes: folder in which every run leaves a file with its exit code; a launcher such as
            joblib's does the runs in other processes.
    """

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
    def task(_: DictConfig) -> None:
        # Hydra has checked the overrides here; the run composes them again where it runs.
        code = one_run(list(HydraConfig.get().overrides.task), time.time())
        (codes / uuid4().hex).write_text(str(code))
        if code == INTERRUPTED:
            sys.exit(INTERRUPTED)  # a sweep ends with its interrupted run

    given = sys.argv
    sys.argv = [given[0], *words]
    try:
        task()
    finally:
        sys.argv = given


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """SIGTERM ends a run as Ctrl-C does: what it started is taken down first."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
