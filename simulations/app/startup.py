"""Lines that say what a run starts carry the seconds since it was asked for."""

import time
from collections.abc import Callable

STARTING = "starting "
"""How such a line begins; whoever starts something says so without knowing the time."""


def timed(emit: Callable[[str], None], began: float) -> Callable[[str], None]:
    """``emit`` with the seconds since ``began`` (since the epoch) before lines that say what is
    started."""

    def show(line: str) -> None:
        emit(f"[{time.time() - began:4.1f} s] {line}" if line.startswith(STARTING) else line)

    return show
