"""Asynchronous against synchronous federation, by virtual time on the same devices.

    python -m simulations.bench.asynchrony              three ways on the default data
    python -m simulations.bench.asynchrony --seconds 300 strategy.weights=uniform
    python -m simulations.bench.asynchrony --list          the commands, without running them

The ways differ in the federation alone: model, data, clients, devices and their seeds are the same.
Each runs for as many rounds as its virtual time allows at most; a way that is finished is not run
again, and one that was cut goes on from its checkpoint. The table is of equal virtual time.
"""

import argparse
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from simulations.app.client_app import app
from simulations.app.compose import load
from simulations.app.federate import run
from simulations.app.grid import InProcessGrid
from simulations.app.status import COMPLETED
from simulations.bench.machine import RESULTS, command, machine, write
from simulations.bench.machine import load as busy
from simulations.reporting.budgets import BYTES, SECONDS, curve, shown
from simulations.reporting.run_folder import read_run

COMMON = (
    *("devices=lognormal", "strategy=flexlora", "strategy.residual=carry", "evaluate=fast"),
    *("evaluate.plan.generate=false", "runtime=in_process", "report=true"),
)
WAYS: Mapping[str, tuple[str, ...]] = {
    "synchronous": ("population.per_round=10", "rounds=20"),
    "over-selection": (
        *("population.per_round=10", "rounds=40"),
        *("federation.over=1.5", "federation.deadline=30"),
    ),
    "buffered": (
        *("federation.mode=buffered", "federation.buffer=10", "federation.concurrency=40"),
        *("population.per_round=10", "rounds=60"),
    ),
}
PARTS = (0.25, 0.5, 1.0)
"""Budgets as fractions of the virtual time that all ways have spent."""


def words_of(way: str, folder: Path, more: Sequence[str]) -> list[str]:
    """The configuration of a way."""
    name = f"asynchrony-{way}"
    place = (f"output_dir={folder}", f"name={name}", "resume=auto")
    return [*COMMON, *WAYS[way], *place, *more]


def done(folder: Path) -> bool:
    """Whether a run folder is that of a complete run."""
    return folder.is_dir() and read_run(folder).status.get("status") == COMPLETED


def compare(folders: Mapping[str, Path], budgets: Sequence[float]) -> dict[str, Any]:
    """Quality and bytes of each way at the same budgets of virtual time.

    Args:
        folders: of finished runs, by way.
        budgets: seconds; empty: fractions of the time that all have spent.
    """
    curves = {way: found for way, f in folders.items() if (found := curve(read_run(f)))}
    least = min(c.spent(SECONDS) or 0.0 for c in curves.values())
    at = list(budgets) or [part * least for part in PARTS]
    rows: dict[str, Any] = {}
    for way, found in curves.items():
        best = [found.best(SECONDS, x) for x in at]
        rows[way] = {
            "quality": [p and p.quality for p in best],
            "round": [p and p.round for p in best],
            "bytes": [p and p.spent.get(BYTES) for p in best],
            "seconds": found.spent(SECONDS),
        }
    metric = next(iter(curves.values()))
    return {"metric": metric.metric, "group": metric.label, "budgets_s": at, "ways": rows}


def table(record: Mapping[str, Any]) -> str:
    """A line per way, a column per budget."""
    heads = "".join(f"{shown(SECONDS, x):>12}" for x in record["budgets_s"])
    lines = [f"{record['metric']}, {record['group']}", f"{'':<16}{heads}"]
    for way, row in record["ways"].items():
        cells = "".join(f"{'–' if q is None else f'{q:.4f}':>12}" for q in row["quality"])
        lines.append(f"{way:<16}{cells}")
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> int:
    """Run what is not finished, print, write."""
    parser = argparse.ArgumentParser(
        "simulations.bench.asynchrony", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("overrides", nargs="*", help="of the configuration of all ways")
    parser.add_argument("--ways", nargs="+", choices=tuple(WAYS), default=list(WAYS))
    parser.add_argument("--seconds", type=float, nargs="+", default=(), help="budgets")
    parser.add_argument("--folder", type=Path, default=Path("outputs/asynchrony"))
    parser.add_argument("--list", action="store_true", help="print the commands and stop")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_intermixed_args(words)
    asked = {way: words_of(way, args.folder.absolute(), args.overrides) for way in args.ways}
    if args.list:
        for given in asked.values():
            print(f"fedlora run {shlex.join(given)}")
        return 0
    before, folders = busy(), {}
    for way, given in asked.items():
        folders[way] = args.folder.absolute() / f"asynchrony-{way}"
        if not done(folders[way]):
            run(load(given), lambda p: InProcessGrid(app, p.runtime.nodes), print)
    record = compare(folders, args.seconds)
    print(table(record))
    about = {"command": command("asynchrony"), "load_before": before, "load_after": busy()}
    about |= {"common": list(COMMON), "ways_words": {w: list(WAYS[w]) for w in args.ways}}
    file = args.out or RESULTS / f"asynchrony-{machine()}.json"
    write(file, about | {"overrides": list(args.overrides)} | record)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
