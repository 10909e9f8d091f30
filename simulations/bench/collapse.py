"""Energy by rank index after rounds of FlexLoRA, beside what its averages predict.

    fedlora study rank_collapse
    python -m simulations.bench.collapse outputs/study-rank_collapse
    python -m simulations.bench.collapse outputs/study-rank_collapse --rounds 1 10 100 --out FILE

From the records of a study's runs alone; nothing is trained. The prediction is computed for each
run of the reference (``method=all``), from its first round and from who took part in the others
(`fedlora.algebra.spectrum.geometric`): once without training after round 1, and once as if every
client added in each round what it added in the first. Shares are means over seeds.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedlora.algebra.linalg import coverage, normalize
from fedlora.algebra.spectrum import REST, geometric
from simulations.bench.machine import RESULTS, write
from simulations.reporting.run_folder import RecordError, Run, read_run
from simulations.reporting.study_tables import collapse_table

ENERGY = "spectrum/energy_"
ROUNDS = (10, 100)
REFERENCE = "all"
PREDICTED = {"decay": False, "refilled": True}
"""Name of a prediction -> whether clients train after round 1."""


def measured(run: Run, rounds: Sequence[int]) -> dict[str, list[float]]:
    """Label of a range of rank indices -> its share of the energy after each of these rounds.

    Raises:
        RecordError: if a round has no spectrum.
    """
    by_round = {int(row["round"]): row for row in run.rounds}
    for at in rounds:
        if at not in by_round or f"{ENERGY}1" not in by_round[at]:
            raise RecordError(f"{run.folder} has no spectrum of round {at} (docs/analyses.md)")
    labels = [label for label in run.suffixes(ENERGY) if label != REST]
    labels.sort(key=last_index)
    return {label: [float(by_round[at][ENERGY + label]) for at in rounds] for label in labels}


def last_index(label: str) -> int:
    """The last rank index of a range: 6 of ``5-6``."""
    return int(label.rpartition("-")[2])


def covered(run: Run, labels: Sequence[str]) -> list[Tensor]:
    """For each round, for each range: the weight of the clients that hold it, ``[ranges]``.

    Raises:
        RecordError: if a client has unequal ranks in its modules.
    """
    found = []
    for row in run.rounds:
        cohort = [c for c in run.clients if c["round"] == row["round"] and "examples" in c]
        try:
            ranks = [int(c["rank"]) for c in cohort]
        except ValueError:
            raise RecordError(f"{run.folder}: ranks differ between modules of a client") from None
        weights = coverage(normalize([float(c["examples"]) for c in cohort]), ranks)
        # no range has indices that some rank holds in part, so its last index tells for all of it
        ends = [last_index(label) for label in labels]
        at = [float(weights[end - 1]) if end <= len(weights) else 0.0 for end in ends]
        found.append(torch.tensor(at, dtype=torch.float64))
    return found


def predicted(run: Run, rounds: Sequence[int], refilled: bool) -> dict[str, list[float]]:
    """The shares after each of these rounds that follow from the first one (`geometric`)."""
    first = measured(run, [1])
    amplitudes = torch.tensor([share for (share,) in first.values()], dtype=torch.float64).sqrt()
    squares = geometric(amplitudes, covered(run, list(first)), refilled=refilled).square()
    squares = torch.nan_to_num(squares)  # indices that no client of round 1 covers
    shares = squares / squares.sum(dim=1, keepdim=True)
    return {label: [float(shares[at - 1, i]) for at in rounds] for i, label in enumerate(first)}


def found(runs: Mapping[str, Sequence[Run]], rounds: Sequence[int]) -> dict[str, Any]:
    """Method or prediction -> range -> the mean share over runs after each of these rounds.

    Args:
        runs: by method.
        rounds: after which.
    """
    sides = {REFERENCE: [measured(run, rounds) for run in runs[REFERENCE]]}
    for name, refilled in PREDICTED.items():
        sides[name] = [predicted(run, rounds, refilled) for run in runs[REFERENCE]]
    sides |= {method: [measured(run, rounds) for run in some] for method, some in runs.items()}
    return {
        name: {
            label: [
                statistics.fmean(values) for values in zip(*(s[label] for s in some), strict=True)
            ]
            for label in some[0]
        }
        for name, some in sides.items()
    }


def read_study(folder: Path) -> dict[str, list[Run]]:
    """The complete runs of a study's folder by the level of its axis ``method``.

    Raises:
        RecordError: if there is no study, or no run of the reference.
    """
    try:
        planned = json.loads((folder / "plan.json").read_text(encoding="utf-8"))["runs"]
    except (OSError, ValueError, KeyError, TypeError):
        raise RecordError(f"{folder} has no plan.json of a study (fedlora study)") from None
    runs: dict[str, list[Run]] = {}
    for method, run in _complete(folder, planned):
        runs.setdefault(method, []).append(run)
    if REFERENCE not in runs:
        raise RecordError(f"{folder} has no complete run of method {REFERENCE}")
    return runs


def _complete(folder: Path, planned: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Run]]:
    for one in planned:
        run = read_run(folder / "runs" / one["name"])
        if "stage" not in one and run.status.get("status") == "completed":
            yield one["cell"]["method"], run


def main(words: Sequence[str] | None = None) -> int:
    """Print the table and write the record; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m simulations.bench.collapse")
    parser.description, parser.formatter_class = __doc__, argparse.RawDescriptionHelpFormatter
    parser.add_argument("study", type=Path, nargs="?", default=Path("outputs/study-rank_collapse"))
    parser.add_argument("--rounds", type=int, nargs="+", default=ROUNDS)
    parser.add_argument("--out", type=Path, default=RESULTS / "collapse.json")
    given = parser.parse_args(words)
    try:
        runs = read_study(given.study)
        record = {
            "command": "python -m simulations.bench.collapse",
            "rounds": list(given.rounds),
            "seeds": {method: len(some) for method, some in runs.items()},
            "found": found(runs, given.rounds),
        }
    except RecordError as error:
        print(error, file=sys.stderr)
        return 2
    print(collapse_table(record))
    write(given.out, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
