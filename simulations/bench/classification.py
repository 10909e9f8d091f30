"""What does it save to train many classification clients in common forward passes?

    python -m simulations.bench.classification                 MiniLM, 30 clients of BANKING77
    python -m simulations.bench.classification --case small    MiniLM, 1,000 clients of 8 examples
    python -m simulations.bench.classification --clients 4     seconds, for a try

All sides train the first cohort of a run in this process, for one epoch, on as many threads as
asked for: a plain PEFT loop, the sequential and the fused engine. They must agree on every client's
losses before anything is timed; repeats are interleaved.
"""

import argparse
import gc
import statistics
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fedlora.engine.memory import keep_freed_memory
from simulations.bench.engine.measure import differences, trains_otherwise
from simulations.bench.engine.sides import EngineSide
from simulations.bench.machine import RESULTS, command, load, machine, write
from simulations.bench.prefix import ENGINES, LOOP, Loop, Run

LORA = ("strategy=fedit", "ranks=homogeneous", "ranks.rank=8", "population.unseen_fraction=0")
EPOCH = ("client.steps=0", "client.epochs=1", "client.batch_size=8")
CASES: Mapping[str, tuple[str, ...]] = {
    "banking77": ("model=minilm", "data=intents", "data.clients=30"),
    "small": (
        "model=minilm",
        "data=intents",
        "data.clients=1000",
        "data.partition=iid",
        "client.max_examples=8",
    ),
}


def compare(words: Sequence[str], clients: int, repeats: int, threads: int) -> dict[str, Any]:
    """CPU and wall seconds of the cohort on each side.

    Args:
        words: of the configuration.
        clients: how many of the first cohort.
        repeats: of every side.
        threads: of each side.
    """
    run = Run(words, clients)
    sides: dict[str, Any] = {LOOP: Loop(run.plain())}
    for name, spec in ENGINES.items():
        sides[name] = EngineSide(run, replace(spec, prefix="off", threads=threads))  # type: ignore[arg-type]
    torch.set_num_threads(threads)
    outcomes = {name: list(side.train(run.jobs)) for name, side in sides.items()}
    gaps = {n: differences(run.jobs, o, outcomes[LOOP]) for n, o in outcomes.items()}
    cpu: dict[str, list[float]] = {name: [] for name in sides}
    wall: dict[str, list[float]] = {name: [] for name in sides}
    for r in range(repeats):
        names = list(sides)
        for name in names[r % len(names) :] + names[: r % len(names)]:
            gc.collect()
            began = time.process_time(), time.perf_counter()
            sides[name].work(run.jobs)
            cpu[name].append(time.process_time() - began[0])
            wall[name].append(time.perf_counter() - began[1])
    return {
        "words": list(words),
        "clients": len(run.jobs),
        "threads": threads,
        "tokens_held": run.positions(),
        "cpu_s": cpu,
        "wall_s": wall,
        "loss_difference": {name: gap[0] for name, gap in gaps.items()},
        "adapter_difference": {name: gap[1] for name, gap in gaps.items()},
        "notes": {name: side.notes() for name, side in sides.items()},
    }


def table(record: Mapping[str, Any]) -> str:
    """A line per side; ratios are of CPU time."""
    base = statistics.median(record["cpu_s"][LOOP])
    head = f"{'':<14}{'CPU s':>9}{'wall s':>9}{'x PEFT loop':>13}{'difference of a loss':>22}"
    lines = [head]
    for name, seconds in record["cpu_s"].items():
        cpu, wall = statistics.median(seconds), statistics.median(record["wall_s"][name])
        gap = record["loss_difference"][name]
        lines.append(f"{name:<14}{cpu:>9.2f}{wall:>9.2f}{base / cpu:>13.2f}{gap:>22.1e}")
    lines.append(f"{record['clients']:,} clients, one epoch each; threads: {record['threads']}")
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> int:
    """Measure, print, write; 1 if a side trains something else."""
    about = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser("simulations.bench.classification", description=about)
    parser.add_argument("overrides", nargs="*", help="of the configuration: client.lr=...")
    parser.add_argument("--case", choices=tuple(CASES), default="banking77")
    parser.add_argument("--clients", type=int, default=0, help="of the cohort; 0: all")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_intermixed_args(words)
    warnings.filterwarnings("ignore")
    keep_freed_memory()
    clients = args.clients or (1000 if args.case == "small" else 30)
    before = load()
    settings = [*CASES[args.case], *LORA, *EPOCH, *args.overrides]
    record = compare(settings, clients, args.repeats, args.threads)
    print(table(record))
    about_run = {"command": command("classification"), "load_before": before, "load_after": load()}
    write(args.out or RESULTS / f"classification-{args.case}-{machine()}.json", about_run | record)
    return int(trains_otherwise(record))


if __name__ == "__main__":
    raise SystemExit(main())
