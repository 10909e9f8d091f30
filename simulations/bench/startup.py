"""What does it cost to start a run, and in which processes?

    python -m simulations.bench.startup                                 this checkout
    python -m simulations.bench.startup --checkout ../older --out FILE  another one

Three commands, as a person types them: ``run --help``, a run of ``experiment=smoke``, and one of it
whose first training step is stamped. Every process that a command starts is watched from outside
and given to a phase by its command line, so that the same program measures a version that starts
others. Wall time says what a person waits on this machine now; CPU time hardly depends on who else
uses it: a busy machine is recognised by the load beside them.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread
from typing import Any

import psutil

from fedlora.core import variables
from simulations.bench.machine import RESULTS, command, load, machine, write

PHASES = (
    ("flower-superlink", "SuperLink"),
    ("flower-superexec", "SuperExec"),
    ("flwr.cli.app", "flwr commands"),
    ("flwr-simulation", "server"),
    ("simulations.app.simulate", "server"),
    ("simulations/app/guard.py", "guard"),
    ("simulations.run", "launcher"),
    ("simulations.cli", "launcher"),
    ("ray/core/src/ray/raylet/raylet", "Ray"),  # whose line holds those of all that it starts
    ("ray/core/src/ray/gcs", "Ray"),
    ("simulations.app.ray_fork", "workers"),
    ("ClientAppActor", "workers"),
    ("ray::IDLE", "workers"),
    ("default_worker.py", "workers"),  # before it has given itself a name, or without ever doing so
    ("ray/dashboard", "Ray"),
    ("ray/autoscaler", "Ray"),
    ("ray/_private", "Ray"),
    ("ray::", "Ray"),
)
"""A part of a command line, and the phase of the process that has it; the first that fits."""
STAMP = (
    "evaluate=none",
    "engine=sequential",
    "+engine.stamp={}",
    "engine._target_=simulations.bench.pool.Stamped",
)
"""Overrides that leave the time of the first training step in a file."""
INTERVAL_S = 0.05


@dataclass
class Watched:
    """One command as seen from outside, in seconds."""

    seconds: float = 0.0
    first_line_s: float = 0.0
    """Until the first line is on the screen."""
    first_step_s: float | None = None
    """Until the first client's first step, where the run was stamped."""
    cpu: dict[str, float] = field(default_factory=dict)
    """CPU seconds by phase, of the whole command."""
    cpu_to_first_step: dict[str, float] = field(default_factory=dict)
    """The same, until the first step."""


def phase(line: str) -> str:
    """The phase of a process by its command line."""
    return next((name for part, name in PHASES if part in line), "other")


class Census:
    """CPU seconds of every process with the mark, also of those that have ended."""

    def __init__(self, mark: str) -> None:
        self._mark = mark
        self._seen: dict[tuple[int, float], tuple[str, float]] = {}

    def take(self) -> None:
        """Look at all processes once."""
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                key = (process.pid, process.create_time())
                if key not in self._seen and process.environ().get(variables.BENCH) != self._mark:
                    continue
                times, line = process.cpu_times(), " ".join(process.cmdline())
                if line:
                    self._seen[key] = (line, times.user + times.system)

    def by_phase(self) -> dict[str, float]:
        """Their sums, the largest first."""
        sums: dict[str, float] = {}
        for line, seconds in self._seen.values():
            sums[phase(line)] = sums.get(phase(line), 0.0) + seconds
        return dict(sorted(sums.items(), key=lambda item: -item[1]))


def watch(words: Sequence[str], checkout: Path, stamp: Path | None = None) -> Watched:
    """Run a command in a checkout and measure all that it starts.

    Raises:
        RuntimeError: if it fails.
    """
    mark, watched, began = uuid.uuid4().hex, Watched(), time.time()
    process = subprocess.Popen(
        [sys.executable, "-m", *words],
        cwd=checkout,
        env=os.environ | {variables.BENCH: mark},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    with _watching(Census(mark), watched, stamp):
        lines = [process.stdout.readline()]
        watched.first_line_s = time.time() - began
        lines += process.stdout.readlines()
        process.wait()
    watched.seconds = time.time() - began
    if process.returncode:
        raise RuntimeError(f"{' '.join(words)} failed:\n{''.join(lines)[-2000:]}")
    if stamp is not None:
        watched.first_step_s = float(stamp.read_text()) - began
    return watched


@contextmanager
def _watching(census: Census, watched: Watched, stamp: Path | None) -> Iterator[None]:
    """Take the census again and again while the block runs."""
    over = Event()

    def look() -> None:
        while not over.wait(INTERVAL_S):
            census.take()
            if stamp is not None and not watched.cpu_to_first_step and stamp.exists():
                watched.cpu_to_first_step = census.by_phase()

    watcher = Thread(target=look)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
        watched.cpu = census.by_phase()


def profile(checkout: Path, overrides: Sequence[str]) -> dict[str, Watched]:
    """The three commands, once."""
    with tempfile.TemporaryDirectory(prefix="fedlora-bench-") as scratch:
        smoke = ["simulations.run", "experiment=smoke", f"output_dir={scratch}", *overrides]
        stamp = Path(scratch) / "stamp"
        stamped = [word.format(stamp) for word in STAMP]
        return {
            "help": watch(["simulations.cli", "run", "--help"], checkout),
            "first step": watch([*smoke, "report=false", *stamped], checkout, stamp),
            "smoke": watch(smoke, checkout),
        }


def table(runs: Sequence[dict[str, Watched]]) -> str:
    """Medians over the repetitions: wall times, then CPU seconds by phase."""

    def middle(values: Sequence[float]) -> float:
        return statistics.median(values)

    steps = [run["first step"] for run in runs]
    rows = [
        ("fedlora run --help", middle([r["help"].seconds for r in runs])),
        ("experiment=smoke: first line", middle([r["smoke"].first_line_s for r in runs])),
        ("experiment=smoke: first training step", middle([w.first_step_s or 0 for w in steps])),
        ("experiment=smoke: whole", middle([r["smoke"].seconds for r in runs])),
    ]
    lines = [f"{'wall':<42}{'s':>8}", *(f"{name:<42}{value:>8.2f}" for name, value in rows)]
    lines.append(f"\n{'CPU seconds':<22}{'to first step':>20}{'whole smoke':>14}")
    wholes = [r["smoke"].cpu for r in runs]
    firsts = [w.cpu_to_first_step for w in steps]
    names = list(dict.fromkeys(name for cpu in wholes for name in cpu))
    sums: list[tuple[str, float, float]] = []
    for name in names:
        first, whole = (middle([c.get(name, 0.0) for c in cpus]) for cpus in (firsts, wholes))
        sums.append((name, first, whole))
    sums.append(("all", sum(row[1] for row in sums), sum(row[2] for row in sums)))
    lines += [f"{name:<22}{first:>20.2f}{whole:>14.2f}" for name, first, whole in sums]
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--checkout", type=Path, default=Path.cwd(), help="whose commands are run")
    parser.add_argument("--out", type=Path, default=RESULTS / f"startup-{machine()}.json")
    parser.add_argument("overrides", nargs="*", help="further overrides")
    args = parser.parse_args()
    commit = ["git", "-C", str(args.checkout), "rev-parse", "--short", "HEAD"]
    record: dict[str, Any] = {"command": command("startup"), "load_before": load()}
    record["commit"] = subprocess.run(commit, capture_output=True, text=True).stdout.strip()
    profile(args.checkout, args.overrides)  # once for the caches of files, tokens and tuning
    runs = [profile(args.checkout, args.overrides) for _ in range(args.repeats)]
    print(table(runs))
    print(f"commit {record['commit']}; load {record['load_before']} before, {load()} after")
    record["load_after"] = load()
    record["runs"] = [json.loads(json.dumps({k: vars(w) for k, w in r.items()})) for r in runs]
    write(args.out, record)


if __name__ == "__main__":
    main()
