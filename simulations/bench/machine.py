"""The environment recorded with every benchmark: machine, date, versions and load."""

import json
import os
import platform
import re
import shlex
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedlora.run.environment import environment

RESULTS = Path(__file__).parent / "results"


def machine() -> str:
    """Processor and number of usable cores as a word for a file name."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    name = match[1] if match else platform.processor() or platform.machine()
    words = re.findall(r"[a-z0-9]+", name.lower().replace("(r)", "").replace("(tm)", ""))
    return "-".join([*words[:4], f"{len(os.sched_getaffinity(0))}cpu"])


def command(benchmark: str) -> str:
    """What was typed, so that whoever reads the numbers can type it again."""
    return shlex.join(["python", "-m", f"simulations.bench.{benchmark}", *sys.argv[1:]])


def load() -> float:
    """The machine's load average over the last minute."""
    return round(os.getloadavg()[0], 2)


def over(values: Sequence[float], digits: int = 3) -> str:
    """Mean and, of several, sample standard deviation."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def write(path: Path, record: dict[str, Any]) -> None:
    """One JSON file with the environment, without what names a person's machine."""
    where = {k: v for k, v in environment().items() if k not in ("executable", "host")}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": where, **record}, indent=1) + "\n")
