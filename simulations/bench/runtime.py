"""What do Flower and Ray cost beside a plain pool of processes that does the same work?

    python -m simulations.bench.runtime                      rounds of 80 clients, both sides
    python -m simulations.bench.runtime --memory-rounds 50   also memory over many small rounds

Both sides are whole runs, started as a person starts them, one after the other and in turns:

    flower   `python -m simulations.run`: Flower's simulation engine, Ray workers
    pool     `python -m simulations.bench.pool`: the same session and a `multiprocessing` pool

They send the same jobs (client, start adapter, plan) to the same engine with the same model and
token store, and aggregate alike: their final states must be equal, or nothing is reported. A round
is the time from the end of the round before to its own end; the first holds the start-up, the last
the end of the processes, so neither is counted. Other jobs may share the cores, so CPU time stands
beside the clock.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from fedlora.core import variables
from fedlora.core.cache import cache_root
from fedlora.data.store import TokenStore, prepare
from fedlora.run.tracking import read_jsonl
from simulations.app.compose import load as compose
from simulations.app.parts import build_parts
from simulations.bench.machine import RESULTS, command, load, machine, write

TINY = ("population.clients=200", "population.per_round=8", "client.steps=1", "client.batch_size=1")

# --------------------------------------------------------------------------------------- watching


@dataclass
class Watched:
    """One run as seen from outside."""

    startup_s: float = 0.0
    """From the command to the first client's first step."""
    rounds: list[dict[str, float]] = field(default_factory=list)
    state: str = ""
    seconds: float = 0.0


def say(line: str) -> None:
    """One line, at once."""
    print(line, flush=True)


def watch(side: str, overrides: list[str]) -> Watched:
    """Run one side as a process of its own and measure all that it starts.

    Raises:
        RuntimeError: if it fails.
    """
    with tempfile.TemporaryDirectory(prefix="fedlora-bench-") as home:
        mark, stamp, log = uuid.uuid4().hex, Path(home) / "stamp", Path(home) / "log"
        module = "simulations.run" if side == "flower" else "simulations.bench.pool"
        words = [*overrides, f"output_dir={home}/out", f"+engine.stamp={stamp}"]
        words.append("engine=sequential")
        words.append("engine._target_=simulations.bench.pool.Stamped")
        watched, began = Watched(), time.time()
        with log.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", module, *words],
                env=os.environ | {variables.BENCH: mark},
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        try:
            records = follow(process, Path(home) / "out", mark, watched)
        finally:
            process.terminate()
            process.wait()
        if process.returncode:
            raise RuntimeError(f"{side} failed:\n{log.read_text()[-2000:]}")
        watched.seconds = time.time() - began
        watched.startup_s = float(stamp.read_text()) - began
        watched.state = str(records[-1]["state/hash"])
    return watched


def follow(
    process: "subprocess.Popen[bytes]", out: Path, mark: str, watched: Watched
) -> list[dict[str, Any]]:
    """Measure whenever a round is recorded, until the process ends; the records."""
    records: list[dict[str, Any]] = []
    before, cpu_before = time.monotonic(), 0.0
    while True:
        ended = process.poll() is not None
        files = list(out.glob("*/metrics.jsonl"))
        found = [r for f in files for r in read_jsonl(f) if r["kind"] == "round"]
        if len(found) > len(records):
            now, (cpu, pss) = time.monotonic(), tree(mark)
            new = found[len(records) :]
            for record in new:
                watched.rounds.append(
                    {
                        "s": (now - before) / len(new),
                        "cpu_s": (cpu - cpu_before) / len(new),
                        "pss_mb": pss,
                        "train_s": float(record["round/train_seconds"]),
                    }
                )
            before, cpu_before, records = now, cpu, found
        if ended:
            return records
        time.sleep(0.05)


def tree(mark: str) -> tuple[float, float]:
    """CPU seconds so far and proportional memory in MB of all processes with the mark."""
    cpu = pss = 0.0
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.environ().get(variables.BENCH) == mark:
                times = process.cpu_times()
                cpu += times.user + times.system
                cpu += times.children_user + times.children_system  # those that have ended
                pss += process.memory_full_info().pss / 1e6
    return cpu, pss


# ---------------------------------------------------------------------------------------- results


def middle(runs: Sequence[Watched], key: str) -> float:
    """Median over all rounds but each run's first and last."""
    return statistics.median(r[key] for w in runs for r in w.rounds[1:-1])


def startup_cpu(runs: Sequence[Watched]) -> float:
    """CPU seconds of the first round beyond those of a later one: what starting costs."""
    return statistics.median(w.rounds[0]["cpu_s"] for w in runs) - middle(runs, "cpu_s")


def table(sides: dict[str, list[Watched]], clients: int) -> str:
    """One row per side; ratios of speed to the pool's."""
    lines = [
        f"{'side':<8}{'s/round':>9}{'clients/s':>11}{'training s':>12}{'CPU s':>8}"
        f"{'start-up s':>12}{'(CPU s)':>9}{'PSS MB':>9}"
    ]
    for side, runs in sides.items():
        start = statistics.median(w.startup_s for w in runs)
        seconds = middle(runs, "s")
        lines.append(
            f"{side:<8}{seconds:>9.2f}{clients / seconds:>11.2f}{middle(runs, 'train_s'):>12.2f}"
            f"{middle(runs, 'cpu_s'):>8.2f}{start:>12.1f}{startup_cpu(runs):>9.1f}"
            f"{middle(runs, 'pss_mb'):>9.0f}"
        )
    for key, name in (("s", "wall"), ("train_s", "training"), ("cpu_s", "CPU")):
        ratio = middle(sides["pool"], key) / middle(sides["flower"], key)
        lines.append(f"flower's speed relative to the pool's, by {name} time: {ratio:.2f}")
    return "\n".join(lines)


def growth(run: Watched) -> dict[str, float]:
    """Memory early and late in a long run, in MB, medians of five rounds, and their ratio."""
    memory = [r["pss_mb"] for r in run.rounds[:-1]]
    early, late = statistics.median(memory[4:9]), statistics.median(memory[-5:])
    return {"first": memory[0], "rounds_5_to_9": early, "last_5": late, "growth": late / early - 1}


def compare(args: argparse.Namespace, overrides: list[str]) -> dict[str, Any]:
    """Both sides in turns.

    Raises:
        RuntimeError: if they do not reach the same state.
    """
    sides: dict[str, list[Watched]] = {"pool": [], "flower": []}
    for i in range(args.repeats):
        for side in ("pool", "flower") if i % 2 == 0 else ("flower", "pool"):
            sides[side].append(watch(side, [*overrides, f"rounds={args.rounds + 2}"]))
    states = {w.state for runs in sides.values() for w in runs}
    if len(states) != 1:
        raise RuntimeError(f"the sides end in different states: {sorted(states)}")
    say(table(sides, args.clients))
    return {side: [vars(w) for w in runs] for side, runs in sides.items()}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=4, help="counted, per run; 0: none")
    parser.add_argument("--clients", type=int, default=80)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--memory-rounds", type=int, default=0, help="0, or at least 15")
    parser.add_argument("--out", type=Path, default=RESULTS / f"runtime-{machine()}.json")
    parser.add_argument("overrides", nargs="*", help="further overrides, such as client.steps=2")
    args = parser.parse_args()
    words = ["evaluate=none", "report=false", f"runtime.num_cpus={args.workers}", *args.overrides]
    parts = build_parts(compose(words))
    model = parts.model.resolved()
    store = prepare(parts.data, model.tokenizer(), model.tokenizer_id(), cache_root())
    say(f"{len(TokenStore(store).clients)} clients tokenised; load {load()}")
    record: dict[str, Any] = {"command": command("runtime")}
    record |= {"config": {k: v for k, v in vars(args).items() if k != "out"}, "overrides": words}
    record["load_before"] = load()
    if args.rounds:
        record["sides"] = compare(args, [*words, f"population.per_round={args.clients}"])
    if args.memory_rounds:
        long = watch("flower", [*words, *TINY, f"rounds={args.memory_rounds}"])
        record["memory"] = {"overrides": TINY, **growth(long), "run": vars(long)}
        say(f"memory over {args.memory_rounds} rounds: {growth(long)}")
    record["load_after"] = load()
    say(f"load {record['load_before']} before, {record['load_after']} after")
    write(args.out, record)


if __name__ == "__main__":
    main()
