"""How fast are our engines beside a plain PEFT loop and Apple's pfl, on this product's clients?

    fedlora bench compare                     three minutes on one core
    fedlora bench compare client.lr=1e-3 client.batch_size=8 --clients 16

All sides train the first cohort of a run (by default the default data, 80 clients of rank 8,
dropout 0) in the same order of the same tokens from the same start, each in a process of its own
with one thread. Before anything is timed they must agree on every client's losses. Repeats are
interleaved, and CPU time counts, so that others who use the machine count little. ``pfl`` is left
out where it is not installed (`pip install 'fedlora[pfl]'` in an environment of its own).
"""

import argparse
import warnings
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fedlora.core.types import LocalPlan
from simulations.bench.engine.cases import Case
from simulations.bench.engine.measure import Effort, Entry, measure
from simulations.bench.machine import RESULTS, command, load, machine, write

SIDES = ("pfl", "peft loop", "sequential", "ragged")
NAMES = {"ragged": "fused"}
RANK = ("ranks=homogeneous", "ranks.rank=8")  # pfl trains one model, hence one rank


def missing() -> dict[str, str]:
    """Sides that cannot run here, with the reason."""
    if find_spec("pfl") is None:
        return {"pfl": "not installed: pip install 'fedlora[pfl]' in an environment of its own"}
    return {}


def compare(case: Case, repeats: int, sides: Sequence[str] = SIDES) -> dict[str, Any]:
    """The record of one case, `simulations.bench.engine.measure.measure`, and what was skipped."""
    skipped = {side: why for side, why in missing().items() if side in sides}
    entries = [Entry(side) for side in sides if side not in skipped]
    record = measure(case, entries, Effort(repeats, trainer_clients=0))
    return record | {"skipped": skipped}


def table(record: Mapping[str, Any]) -> str:
    """A line per side: CPU seconds of the cohort (the fastest repeat), ratio to the PEFT loop, and
    the largest difference of a loss to the PEFT loop's."""
    seconds = {
        e["side"]: min((r["cpu_s"] for r in e["repeats"]), default=float("nan"))
        for e in record["entries"].values()
    }
    lines = [f"{'':<12}{'CPU s':>8}{'x PEFT loop':>13}{'largest difference of a loss':>30}"]
    for e in record["entries"].values():
        side = e["side"]
        ratio, gap = seconds["peft loop"] / seconds[side], e["loss_difference"]
        lines.append(f"{NAMES.get(side, side):<12}{seconds[side]:>8.2f}{ratio:>13.2f}{gap:>30.1e}")
        if e["error"]:
            lines.append(f"{'':<12}not timed: {e['error']}")
    lines += [f"{side:<12}skipped: {why}" for side, why in record["skipped"].items()]
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> int:
    """Measure, print, write; 1 if sides disagree."""
    parser = argparse.ArgumentParser("fedlora bench compare", description=__doc__.splitlines()[0])
    parser.add_argument(
        "overrides", nargs="*", help="of the configuration: data=..., client.lr=..."
    )
    parser.add_argument("--model", choices=("tiny", "smollm2"), default="tiny")
    parser.add_argument("--clients", type=int, default=80)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / f"compare-{machine()}.json")
    args = parser.parse_intermixed_args(words)
    warnings.filterwarnings("ignore")
    overrides = (f"model={args.model}", *RANK, *args.overrides)
    plan = LocalPlan(dropout=0.0)
    case = Case("compare", args.model, args.clients, plan, overrides=overrides)
    before = load()
    record = compare(case, args.repeats)
    print(table(record))
    load_s = {"load_before": before, "load_after": load()}
    write(args.out, {"command": command("compare"), **load_s, "case": record})
    return int(any(e["error"] for e in record["entries"].values()))


if __name__ == "__main__":
    raise SystemExit(main())
