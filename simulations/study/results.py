"""The recorded runs of a study read back: one row for each run and evaluation.

Everything comes from the run folders (`simulations.reporting.run_folder`) of complete runs.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fedlora.core.errors import ConfigError
from fedlora.core.files import write_file
from simulations.reporting.run_folder import number, read_run
from simulations.study.clients import apart
from simulations.study.plan import Planned
from simulations.study.values import panel_of

PARQUET = "results.parquet"
VIRTUAL = "virtual"
COSTS = ("round", "bytes", "seconds", VIRTUAL)
"""What a quality is bought with, each up to an evaluation: rounds, bytes that all clients together
have sent and received, seconds of training rounds, and seconds of the virtual clock where clients
have devices."""


COST_KEYS = ("wire/up_bytes", "wire/down_bytes", "round/seconds", "time/virtual")
"""Keys of the rounds' records that costs are computed from."""


@dataclass(frozen=True)
class Recorded:
    """The evaluations of one complete run."""

    run: Planned
    rows: Sequence[Mapping[str, Any]]
    """One for each evaluation, in the order of the rounds."""

    def curve(self, cost: str, metric: str) -> tuple[list[float], list[float]]:
        """Cost and metric of the evaluations of the run's first group and adapter, or of those that
        the metric names; what is null or missing is left out, so that a run without devices has no
        curve over virtual time.

        Args:
            cost: of `COSTS`.
            metric: a key of the evaluation records, alone or as ``key@group/adapter``.
        """
        pairs = [
            (float(row[cost]), value)
            for row in self.rows_of(metric)
            if (value := number(row.get(panel_of(metric)[0]))) is not None and cost in row
        ]
        return [c for c, _ in pairs], [v for _, v in pairs]

    def rows_of(self, metric: str) -> list[Mapping[str, Any]]:
        """The evaluations of the group and the adapter that a metric is of."""
        _, group, adapter = panel_of(metric)
        first = self.rows[0] if self.rows else {}
        panel = group or first.get("group"), adapter or first.get("adapter")
        return [row for row in self.rows if (row["group"], row["adapter"]) == panel]


def recorded(run: Planned, folder: Path, metrics: Mapping[str, bool] | None = None) -> Recorded:
    """Read a complete run.

    Args:
        run: of the plan.
        folder: its run folder.
        metrics: that are asked for, and whether higher is better; what records lack of them over
            clients and tiers is computed (`simulations.study.clients`).
    """
    found = read_run(folder)
    over_clients = apart(found, {panel_of(m)[0]: higher for m, higher in (metrics or {}).items()})
    rounds = [int(r["round"]) for r in found.rounds]
    spent: dict[str, dict[int, float]] = {}
    for name in COST_KEYS[:3]:
        sums = accumulate(number(r.get(name)) or 0.0 for r in found.rounds)
        spent[name] = {0: 0.0} | dict(zip(rounds, sums, strict=True))
    clock = {
        int(r["round"]): x for r in found.rounds if (x := number(r.get(COST_KEYS[3]))) is not None
    }
    rows = []
    for record in found.evaluations:
        at = int(record["round"])
        up, down, seconds = (spent[name].get(at, 0.0) for name in spent)
        group, adapter = str(record.get("group", "")), str(record.get("adapter", ""))
        numbers = {k: v for k, x in record.items() if (v := number(x)) is not None}
        rows.append(
            found.analyses(at)
            | over_clients.get((at, group, adapter), {})
            | numbers
            | {"run": run.name, "seed": run.seed, **dict(run.cell)}
            | {"group": group, "adapter": adapter}
            | {"round": at, "bytes_up": up, "bytes_down": down, "bytes": up + down}
            | {"seconds": seconds}
            | ({VIRTUAL: clock.get(at, 0.0)} if clock else {})
        )
    return Recorded(run, rows)


def write_parquet(file: Path, runs: Sequence[Recorded], axes: Sequence[str]) -> None:
    """Write all rows: axes and seed first, then cost, then every number of the evaluations."""
    rows = [row for one in runs for row in one.rows]
    costs = [cost for cost in COSTS if cost != VIRTUAL or any(cost in row for row in rows)]
    first = [*axes, "seed", "run", "group", "adapter", *costs, "bytes_up", "bytes_down"]
    columns = [*first, *sorted({key for row in rows for key in row} - set(first))]
    table = pa.table({name: [row.get(name) for row in rows] for name in columns})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    write_file(file, sink.getvalue().to_pybytes())


def check_costs(kinds: Iterable[str], runs: Sequence[Recorded], where: str) -> None:
    """Refuse budgets of virtual time if a run's clients have no devices.

    Raises:
        ConfigError: naming the run.
    """
    without = [one.run.name for one in runs if not any(VIRTUAL in row for row in one.rows)]
    if VIRTUAL in kinds and without:
        raise ConfigError(
            f"{where}.{VIRTUAL}: the clients of {without[0]} have no devices, so that it takes no "
            "virtual time; choose devices=lognormal for every run, or budgets of rounds or bytes"
        )


def check_metrics(metrics: Sequence[str], runs: Sequence[Recorded], where: str) -> None:
    """Refuse metrics that no run has.

    Raises:
        ConfigError: naming the metric and those that there are.
    """
    for metric in metrics:
        there = {key for one in runs for row in one.rows_of(metric) for key in row}
        if panel_of(metric)[0] in there:
            continue
        if there:
            known = f"there are {', '.join(sorted(there))}"
        else:
            panels = {f"{row['group']}/{row['adapter']}" for one in runs for row in one.rows}
            known = f"groups and adapters are {', '.join(sorted(panels))}"
        raise ConfigError(f"{where}: no evaluation has the metric {metric!r}; {known}")
