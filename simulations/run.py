"""The launcher and Hydra twin of ``flwr run``: same configuration, live progress, true exit code.

python -m simulations.run                                   one run of conf/config.yaml
python -m simulations.run strategy=fedit rounds=20          ... with overrides
python -m simulations.run -m strategy=fedit,flexlora seed=0,1,2      a sweep, one run after another
python -m simulations.run runtime=in_process                without Ray and Flower's SuperLink
"""

import logging
import os
import signal
import sys
from types import FrameType

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from fedlora.core.errors import ConfigError
from simulations.app.compose import load
from simulations.app.federate import run
from simulations.app.launch import LaunchError, launch
from simulations.app.parts import build_parts

INTERRUPTED = 130
"""Exit code after Ctrl-C or SIGTERM, as shells have it."""


def say(line: str) -> None:
    """One line of progress, at once."""
    print(line, flush=True)


def _as_interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def one_run(overrides: list[str]) -> int:
    """Check the configuration, then run it; the exit code."""
    try:
        cfg = load(overrides)
        parts = build_parts(cfg)
        if parts.runtime.in_process:
            from simulations.app.client_app import app
            from simulations.app.grid import InProcessGrid

            if not os.environ.get("FEDLORA_VERBOSE"):
                logging.getLogger("flwr").setLevel(logging.WARNING)
            run(cfg, lambda p: InProcessGrid(app, p.runtime.nodes), say)
            say("RUN COMPLETED")
            return 0
        return launch(overrides, parts.runtime, say)
    except (ConfigError, LaunchError) as error:
        say(f"RUN FAILED: {error}")
        return 2
    except KeyboardInterrupt:
        say("interrupted: everything that this run started is being stopped")
        return INTERRUPTED
    except Exception as error:
        say(f"RUN FAILED: {type(error).__name__}: {error}")
        if os.environ.get("FEDLORA_TRACEBACK"):
            raise
        return 1


def main() -> int:
    """One run, or with ``-m`` one after another; the worst exit code. A failed run of a sweep does
    not keep the others from being done."""
    words = sys.argv[1:]
    if not any(w.startswith("-") for w in words):
        return one_run(words)  # nothing to sweep: nothing that Hydra's own program would add
    codes: list[int] = []

    @hydra.main(version_base="1.3", config_path="../conf", config_name="config")
    def task(_: DictConfig) -> None:
        # Hydra has checked the overrides here; the run composes them again where it runs.
        codes.append(one_run(list(HydraConfig.get().overrides.task)))
        if codes[-1] == INTERRUPTED:
            sys.exit(INTERRUPTED)  # a sweep ends with its interrupted run

    task()
    if len(codes) > 1:
        say(f"{codes.count(0)} of {len(codes)} runs completed")
    return max(codes, default=0)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _as_interrupt)
    sys.exit(main())
