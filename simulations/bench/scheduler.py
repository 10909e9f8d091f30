"""Which policy fills the fused engine best? Thousands of clients with unequal steps and lengths.

    python -m simulations.bench.scheduler              2,000 clients, all policies, both layouts
    python -m simulations.bench.scheduler --clients 200

Clients have log-normally many steps and texts of their own typical length. Every policy trains the
same ones, in a process of its own with one thread, and must end where the sequential engine does.
"""

import argparse
import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from fedlora.engine.base import EngineSpec
from fedlora.engine.fused import Fused
from fedlora.engine.sequential import Sequential
from simulations.bench.engine.cases import (
    SHORT,
    Case,
    Draw,
    World,
)
from simulations.bench.engine.hosts import (
    Group,
    Opened,
    Run,
    hosts,
)
from simulations.bench.engine.measure import (
    Cohort,
    agreement,
    cohort_of,
    padding,
)
from simulations.bench.machine import RESULTS, command, load, machine, write

POLICIES = ("fifo_wave", "lpt_wave", "fifo_refill", "length_match", "refill")
LAYOUTS = ("padded", "ragged")
CASE = Case(
    "2,000 clients",
    "llama64x2",
    2000,
    SHORT,
    tokens=Draw(8, 32),
    examples=Draw(1, 200, median=4, sigma=1.0),
    ranks=(4, 8, 16, 32),
)


@dataclass(frozen=True)
class Result:
    """One policy, all clients."""

    steps: int
    """Forward passes of the base model."""
    padding_share: float | None
    loss_difference: float | None
    adapter_difference: float | None
    error: str = ""
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)


def specs(tokens: int, slots: int) -> dict[str, EngineSpec]:
    """Every engine by its name in the table."""
    found: dict[str, EngineSpec] = {"sequential": Sequential()}
    for layout in LAYOUTS:
        for policy in POLICIES:
            fused = Fused(layout=layout, policy=policy, tokens=tokens, slots=slots)
            found[f"{layout} {policy}"] = fused
    return found


def measure(case: Case, sides: Mapping[str, EngineSpec], repeats: int) -> dict[str, Result]:
    """Every engine on the same clients, the first one being what the others must agree with.

    Raises:
        RuntimeError: if one does not train what the first one trains.
    """
    cohort = cohort_of(World(case))
    names, results = list(sides), dict[str, Result]()
    with hosts(case, dict.fromkeys(names, 1), sides) as opened:
        reference: Run | None = None
        for name in names:
            run = Group(opened[name]).train(cohort.jobs, cohort.weights)
            reference = reference or run
            results[name] = checked(name, cohort, run, reference)
        for r in range(repeats):
            at = r % len(names)
            for name in names[at:] + names[:at]:
                wall, cpu = opened[name][0].call(timed)
                results[name].seconds.append(wall)
                results[name].cpu_seconds.append(cpu)
    return results


def timed(opened: Opened) -> tuple[float, float]:
    """Seconds of wall and CPU for all clients, in the process that trains them."""
    wall, cpu = time.perf_counter(), time.process_time()
    opened.side.work(opened.world.jobs)
    return time.perf_counter() - wall, time.process_time() - cpu


def checked(name: str, cohort: Cohort, run: Run, reference: Run) -> Result:
    """What a run says, but for its time.

    Raises:
        RuntimeError: if it did not train what the reference trained.
    """
    agreed = agreement(CASE, cohort, run, reference)
    if agreed.error:
        raise RuntimeError(f"{name} {agreed.error}")
    packed = padding(name, cohort, run)
    return Result(packed["forwards"], packed["padding_share"], **vars(agreed))


def table(results: Mapping[str, Result], tokens: int) -> str:
    """One row per policy; medians."""
    lines = [
        f"{'layout, policy':<22}{'s':>8}{'CPU s':>8}{'x sequential':>14}{'steps':>8}"
        f"{'tokens/step':>13}{'padding':>9}{'d loss':>9}{'d adapter':>11}"
    ]
    first = statistics.median(results["sequential"].seconds)
    for name, r in results.items():
        seconds, cpu = statistics.median(r.seconds), statistics.median(r.cpu_seconds)
        share = "-" if r.padding_share is None else f"{r.padding_share:.1%}"
        lines.append(
            f"{name:<22}{seconds:>8.2f}{cpu:>8.2f}{first / seconds:>14.2f}{r.steps:>8}"
            f"{tokens / max(1, r.steps):>13.0f}{share:>9}{r.loss_difference:>9.0e}"
            f"{r.adapter_difference:>11.0e}"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=CASE.clients)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=0, help="budget of a step; 0: from the model")
    parser.add_argument("--slots", type=int, default=0, help="resident clients; 0: automatic")
    parser.add_argument("--out", type=Path, default=RESULTS / f"scheduler-{machine()}.json")
    args = parser.parse_args()
    case = replace(CASE, clients=args.clients, name=f"{args.clients:,} clients")
    before = load()
    tokens = cohort_of(World(case)).tokens
    print(f"{args.clients:,} clients, {tokens:,} tokens; load {before}", flush=True)
    results = measure(case, specs(args.tokens, args.slots), args.repeats)
    print(table(results, tokens))
    record = {
        "command": command("scheduler"),
        "load_before": before,
        "load_after": load(),
        "config": asdict(case),
        "tokens": tokens,
        "policies": {name: vars(r) for name, r in results.items()},
    }
    write(args.out, record)


if __name__ == "__main__":
    main()
