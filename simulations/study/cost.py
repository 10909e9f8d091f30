"""What the runs of a study cost: CPU and wall time, machine and load, a line for each attempt.

Lines are beside the run folder, for they change from attempt to attempt and results do not. An
attempt that is killed leaves none.
"""

import json
import os
import resource
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simulations.bench.machine import load, machine


@dataclass(frozen=True)
class Cost:
    """Cost of one run: all recorded attempts together."""

    cpu_s: float
    """CPU seconds of its process and of those that it has started and ended."""
    wall_s: float
    machines: tuple[str, ...]
    load: float
    """Largest load average of the machine at the end of an attempt."""


def cost_file(folder: Path) -> Path:
    """Where a run's costs are: beside its folder."""
    return folder.with_name(f"{folder.name}.cost.jsonl")


def add_cost(folder: Path, began: float) -> None:
    """Add a line for the attempt that ends now.

    Args:
        folder: the run folder.
        began: `time.monotonic` at the attempt's begin.
    """
    used = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    line: dict[str, Any] = {
        "cpu_s": round(sum(u.ru_utime + u.ru_stime for u in used), 2),
        "wall_s": round(time.monotonic() - began, 2),
        "machine": machine(),
        "load": load(),
    }
    with cost_file(folder).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def cost_lines(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's attempts, without one that was cut off."""
    file = cost_file(folder)
    lines = []
    for text in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        with suppress(ValueError):
            lines.append(json.loads(text))
    return lines


def cost_of(folder: Path) -> Cost | None:
    """The cost of a run; None if no attempt has left a line."""
    lines = cost_lines(folder)
    if not lines:
        return None
    return Cost(
        sum(float(line["cpu_s"]) for line in lines),
        sum(float(line["wall_s"]) for line in lines),
        tuple(dict.fromkeys(str(line["machine"]) for line in lines)),
        max(float(line["load"]) for line in lines),
    )
