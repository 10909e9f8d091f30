"""What does every method cost beside FedIT, and how exact is its average?

    python -m simulations.bench.costs                       all parts
    python -m simulations.bench.costs traffic exactness memory     what is no time: on any machine
    python -m simulations.bench.costs server steps          times: on a quiet machine
    python -m simulations.bench.costs --presets fedit ffa --out /tmp/costs

    server     CPU and wall time of a round's average and starts, 80 clients, random changes
    steps      CPU and wall time of a client's step in both engines, the same text for all
    traffic    bytes of short real runs beside the formulas of `simulations.bench.costs.formulas`
    exactness  the gap between the average and the mean of the clients' updates, of the same runs
    memory     bytes on disk of what clients keep, by formula and measured

The methods are the files of conf/strategy: a new one is measured unasked, and shown without a
formula until it has one. Each part prints its table and writes one JSON file. The exit code is 1 if
bytes differ from a formula; the method is named.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from simulations.bench.costs import memory, runs, server, steps
from simulations.bench.costs.shapes import smollm2, tiny
from simulations.bench.machine import RESULTS, command, load, machine, write
from simulations.bench.methods import presets
from simulations.reporting.cost_tables import PARTS

BLOCKS = 4
"""Blocks of SmolLM2-135M that the server's times are measured on; of equal blocks, 4 of 30."""
TIMES = ("server", "steps")
"""Parts whose record depends on the machine."""


def _say(text: str) -> None:
    """At once, into a file too."""
    print(text, flush=True)


@cache
def _traces(preset: str) -> Mapping[str, runs.Trace]:
    """The short runs of a preset, which two parts look at."""
    _say(f"running strategy={preset}")
    return {name: runs.trace(preset, words) for name, words in runs.RANKS.items()}


def _server(given: argparse.Namespace) -> dict[str, Any]:
    shapes = [tiny(), smollm2(BLOCKS)]
    return {s.name: server.measure(given.presets, s, given.repeats) for s in shapes}


def _steps(given: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for work in (steps.TINY, steps.SMOLLM2):
        if missing := work.missing():
            _say(missing)
        else:
            found[work.model] = steps.measure(given.presets, work, given.repeats, _say)
    return found


def _traffic(given: argparse.Namespace) -> dict[str, Any]:
    return {p: runs.traffic(_traces(p)) for p in given.presets}


def _exactness(given: argparse.Namespace) -> dict[str, Any]:
    return {p: runs.exactness(_traces(p)) for p in given.presets}


def _memory(given: argparse.Namespace) -> dict[str, Any]:
    return memory.memory(given.presets, [tiny(), smollm2()])


MEASURES: Mapping[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "server": _server,
    "steps": _steps,
    "traffic": _traffic,
    "exactness": _exactness,
    "memory": _memory,
}


def faults(found: Any, where: str = "") -> list[str]:
    """Every ``wrong`` in a record, with the names that lead there."""
    said: list[str] = []
    for key, value in found.items():
        if key == "wrong":
            said += [f"{where}: {x}" for x in ([value] if isinstance(value, str) else value) if x]
        elif isinstance(value, Mapping):
            said += faults(value, f"{where}, {key}" if where else str(key))
    return said


def measured(part: str, given: argparse.Namespace) -> list[str]:
    """Do one part: print its table, write its record; what differs from a formula."""
    before = load()
    record = {
        "command": command("costs"),
        "threads": torch.get_num_threads(),
        "load_before": before,
        "found": MEASURES[part](given),
        "load_after": load(),
    }
    name = f"costs-{part}-{machine()}" if part in TIMES else f"costs-{part}"
    write(given.out / f"{name}.json", record)
    _say(f"\n{part}, {record['threads']} thread(s)\n\n{PARTS[part](record)}\n")
    return faults(record["found"])


def main(words: Sequence[str] | None = None) -> int:
    """The parts that are asked for; 1 if bytes differ from a formula."""
    about = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m simulations.bench.costs", description=about)
    parser.add_argument(
        "parts", nargs="*", choices=[*MEASURES, []], metavar="PART", help=", ".join(MEASURES)
    )
    parser.add_argument("--presets", nargs="*", choices=presets(), default=presets())
    parser.add_argument("--repeats", type=int, default=3, help="of times")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the records")
    given = parser.parse_args(words)
    torch.set_num_threads(given.threads)
    wrong = [x for part in given.parts or MEASURES for x in measured(part, given)]
    for line in wrong:
        print(f"differs from its formula: {line}", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
