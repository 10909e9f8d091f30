"""One run of a study: `simulations.run`, ended with the process that asked for it.

    python -m simulations.study.worker WORD...

The study holds the other end of this process's standard input. When that closes, because the study
was interrupted or killed, the run is interrupted as by Ctrl-C: it takes down what it started, and
keeps its last checkpoint.
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path

from simulations import run
from simulations.study.cost import add_cost


def _end_with_owner() -> None:
    while os.read(0, 1024):  # sys.stdin would still hold its lock when this process ends
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> int:
    """Do the run; its exit code."""
    began = time.monotonic()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_owner, daemon=True).start()
    try:
        return run.main(sys.argv[1:])
    finally:
        given = dict(word.partition("=")[::2] for word in sys.argv[1:])
        add_cost(Path(given["output_dir"], given["name"]), began)


if __name__ == "__main__":
    sys.exit(main())
