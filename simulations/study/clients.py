"""How far clients are apart, where a run's records do not say: computed from what was measured on
each client (evaluations.jsonl).

Records of a classification have the worst tenth of the clients, the spread over them and every
tier; those of a language model have means alone. Here the same summary is made of both.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

from fedlora.core.metric import DERIVED, HIGHEST, LOWEST, TIER, Metric
from fedlora.core.types import Client, Evaluation, Ranks
from fedlora.evaluation.summary import summarise
from fedlora.run.tracking import read_jsonl
from simulations.reporting.run_folder import Record, Run, number

At = tuple[int, str, str]
"""Round, group and adapter of an evaluation."""


def measured(name: str) -> str:
    """The metric from which a summary makes a number of this name; empty if it makes none."""
    if name.startswith(TIER):
        return name.rpartition("/")[2]
    end = next((end for end in DERIVED if name.endswith(end)), "")
    return name.removesuffix(end) if end else ""


def apart(run: Run, wanted: Mapping[str, bool]) -> dict[At, dict[str, float]]:
    """Numbers over clients and tiers that no record of a run has, by evaluation.

    Metrics whose record is not the mean of the clients' values (totals, perplexities) have none.

    Args:
        run: the run.
        wanted: names such as ``loss_response_worst_tenth`` or ``tier/T1/loss_response``, and
            whether higher is better.
    """
    recorded = {name for record in run.evaluations for name in record}
    missing = {name: higher for name, higher in wanted.items() if name not in recorded}
    bases = {measured(name): higher for name, higher in missing.items()}
    bases = {base: higher for base, higher in bases.items() if base in recorded}
    if not bases:
        return {}
    rows: dict[At, list[Record]] = defaultdict(list)
    for row in read_jsonl(run.folder / "evaluations.jsonl"):
        if "metrics" in row:
            rows[int(row["round"]), str(row.get("group", "")), str(row.get("adapter", ""))] += [row]
    found: dict[At, dict[str, float]] = {}
    for record in run.evaluations:
        at = int(record["round"]), str(record.get("group", "")), str(record.get("adapter", ""))
        for base, higher in bases.items():
            values = _summary(rows[at], base, higher)
            if _same(values.get(base), number(record.get(base))):
                kept = {name: values[name] for name in missing if name in values}
                found.setdefault(at, {}).update(kept)
    return found


def _summary(rows: Sequence[Record], base: str, higher: bool) -> dict[str, float]:
    """The summary of one metric of the clients of an evaluation."""
    evaluations = []
    for row in rows:
        value = number(row["metrics"].get(base))
        if value is not None:
            weight = number(row.get("weights", {}).get(base)) or 0.0
            metric = Metric(value, weight, worst=LOWEST if higher else HIGHEST)
            client = Client(int(row["client"]), Ranks({}), 0, str(row.get("tier", "")))
            evaluations.append(Evaluation(client, {base: metric}))
    return summarise(evaluations)


def _same(a: float | None, b: float | None) -> bool:
    return a is not None and b is not None and math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12)
