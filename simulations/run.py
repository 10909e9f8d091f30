"""The launcher and Hydra twin of ``flwr run``: same configuration, live progress, true exit code.

fedlora run                                   one run of conf/config.yaml
fedlora run strategy=fedit rounds=20          ... with overrides
fedlora run -m strategy=fedit,flexlora seed=0,1,2      a sweep, one run after another
fedlora run runtime=in_process                without Ray

``python -m simulations.run`` is the same command. What only a run needs is imported when it begins:
help, completion and ``--cfg`` answer without loading torch.
"""

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
from simulations.app.alone import watch
from simulations.app.attempts import FAILED_LINE, Attempt, complete
from simulations.app.compose import CONF, REFUSALS, load, refused
from simulations.app.launch import launch
from simulations.app.own_modules import find_own_modules
from simulations.app.ray_setup import check_cluster
from simulations.app.runtime import Runtime
from simulations.app.startup import timed
from simulations.app.words import SEARCH_PATH, absolute, readable, with_search_path

SWEEP = ("-m", "--multirun")
FULL_ERROR = "HYDRA_FULL_ERROR"
"""With this variable Hydra's program raises what it would else print before it ends the process."""
INTERRUPTED = 130
"""Exit code after Ctrl-C or SIGTERM, as shells have it."""


def say(line: str) -> None:
    """One line of progress, at once."""
    print(line, flush=True)


def one_run(overrides: list[str], began: float) -> int:
    """Compose the configuration, then do the run; the exit code. A failed run ends in one line.

    The process that imports PyTorch checks all groups, before anything is loaded.

    Args:
        overrides: words of Hydra's grammar.
        began: when the run was asked for, in seconds since the epoch.
    """
    return guarded(lambda: _one_run(overrides, timed(say, began)))


def _one_run(overrides: list[str], emit: Callable[[str], None]) -> int:
    cfg = load(overrides)
    emit("starting Python packages")
    runtime = build(cfg.runtime, Runtime, "runtime")
    runtime.check_launch()
    if runtime.in_process:  # another process loads torch, and may die of what clients do

        def alone(words: Sequence[str], attempt: Attempt, _: Callable[[str], None]) -> None:
            watch(words, attempt, cfg)

        return complete(alone, overrides, runtime.restarts, say)
    if runtime.ray_address:
        from simulations.app.parts import build_parts
        from simulations.app.run_folder import failing

        with failing(build_parts(cfg)):
            check_cluster(runtime.ray_address)
    return launch(overrides, runtime, emit)


def guarded(do: Callable[[], int]) -> int:
    """Call, and turn whatever is raised into one line and an exit code."""
    try:
        return do()
    except ConfigError as error:
        say(f"{FAILED_LINE}{error}")
        return 2
    except KeyboardInterrupt:
        say(f"{FAILED_LINE}interrupted; everything that this run started has been stopped")
        return INTERRUPTED
    except (Exception, SystemExit) as error:
        say(f"{FAILED_LINE}{type(error).__name__}: {error}")
        if os.environ.get(variables.TRACEBACK):
            raise
        return 1


def main(arguments: Sequence[str] | None = None) -> int:
    """One run, or with ``-m`` one after another; the worst exit code. A failed run of a sweep does
    not keep the others from being done."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    sweep = not set(SWEEP).isdisjoint(given)
    try:
        words = readable(with_search_path(given), sweep=sweep)
    except ConfigError as error:
        say(f"{FAILED_LINE}{error}")
        return 2
    find_own_modules()
    with interrupts():
        if not any(w.startswith("-") for w in words):
            # no sweep and no flag: nothing that Hydra's program would add
            return one_run(words, psutil.Process().create_time())
        # Beside the runs: jobs of a sweep may be done on machines that share that folder alone.
        place = _output_dir(words) if sweep else None
        with tempfile.TemporaryDirectory(prefix=".fedlora-sweep-", dir=place) as folder:
            try:
                _through_hydra(words, Path(folder))
            except ConfigError as error:
                say(f"{FAILED_LINE}{error}")
                return 2
            codes = [int(file.read_text() or 1) for file in Path(folder).iterdir()]
    if sweep and not codes:
        say(f"{FAILED_LINE}no run of the sweep has left its exit code")
        return 1
    if len(codes) > 1:
        say(f"{codes.count(0)} of {len(codes)} runs completed")
    return max(codes, default=0)


def _output_dir(words: Sequence[str]) -> Path:
    """The folder in which a sweep's runs make theirs, as far as the words say it."""
    named = [w.partition("=")[2] for w in words if w.startswith("output_dir=") and "," not in w]
    path = absolute(
        named[-1].strip("'\"") if named else os.environ.get(variables.OUTPUT, "outputs")
    )
    path.mkdir(parents=True, exist_ok=True)
    return path


def _through_hydra(words: list[str], codes: Path) -> None:
    """Hydra's program: flags, and the runs of a sweep.

    Args:
        words: its command line.
        codes: folder in which every run leaves a file with its exit code; a launcher such as
            joblib's does the runs in other processes.

    Raises:
        ConfigError: for words of which no configuration can be made.
    """

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
    def task(_: DictConfig) -> None:
        # Hydra has checked the overrides here; the run composes them again where it runs.
        given = HydraConfig.get().overrides
        paths = [w for w in given.hydra if w.startswith(SEARCH_PATH)]
        left = codes / uuid4().hex
        left.touch()  # stays empty if this process dies
        code = one_run([*paths, *given.task], time.time())
        left.write_text(str(code))
        if code == INTERRUPTED:
            sys.exit(INTERRUPTED)  # a sweep ends with its interrupted run

    given = sys.argv
    os.environ.setdefault(FULL_ERROR, "1")
    sys.argv = [given[0], *words]
    try:
        task()
    except REFUSALS as error:
        raise refused(error, [w for w in words if "=" in w or w.startswith("~")]) from error
    finally:
        sys.argv = given


@contextmanager
def interrupts() -> Iterator[None]:
    """SIGTERM and SIGHUP end a run as Ctrl-C does: what it started is taken down first."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {
        s: signal.signal(s, interrupt)
        for s in (signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(s) is not signal.SIG_IGN  # nohup
    }
    try:
        yield
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


if __name__ == "__main__":
    sys.exit(main())
