"""Between run folders and a study's archive: what of a run is packed, and which packed runs are
taken into the folders that the plan names."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from fedlora.core.files import whole_folder, write_file
from fedlora.run.tracking import read_jsonl
from simulations.app.since import Configuration, in_file, nested
from simulations.app.status import COMPLETED, FILE, read_status
from simulations.reporting.run_folder import ANALYSES, Record, Run, number, read_run
from simulations.study.archive import Key, Packed, key_of, rows_of, table
from simulations.study.clients import measured
from simulations.study.cost import cost_file, cost_lines
from simulations.study.plan import RUNS, TUNING, Planned
from simulations.study.results import COST_KEYS
from simulations.study.runner import PACKED, Progress, State, is_held, progress_of
from simulations.study.spec import Study
from simulations.study.values import panel_of

CONFIG = "config.yaml"
_CLIENT = ("round", "client", "tier")
"""Columns of a client's row that say whose it is and when."""


# --- packing --------------------------------------------------------------------------------------


def complete(run: Planned, folder: Path, halts: Sequence[int]) -> Progress | None:
    """How a run stands that is complete, at the end or after a round at which values are compared;
    None for all others.

    Args:
        run: of the plan.
        folder: of the study.
        halts: rounds after which tuning runs are compared, rising.
    """
    for until in (0, *reversed(halts if run.stage == TUNING else ())):
        (one,) = progress_of([replace(run, until=until)], folder)
        if one.state is State.DONE and read_status(one.folder).get("status") == COMPLETED:
            return one
    return None


def halts_of(study: Study) -> tuple[int, ...]:
    """The rounds after which tuning runs are compared."""
    return study.tuning.prune.rounds if study.tuning and study.tuning.prune else ()


def pack(run: Planned, folder: Path, metrics: Iterable[str]) -> Packed | str:
    """A complete run for an archive; or in words, why it is none of today's plan.

    Args:
        run: of the plan.
        folder: its run folder.
        metrics: of the study; the clients' rows are kept as far as these are computed from them.
    """
    then = in_file(folder / CONFIG)
    if then is None:
        return f"its folder has no {CONFIG} that can be read"
    if why := run.differs(then):
        return why
    found, status = read_run(folder), read_status(folder)
    return Packed(
        key_of(run),
        Configuration(then.values, _choices(run, then, folder)),
        {
            "status": COMPLETED,
            "rounds_done": int(status.get("rounds_done", run.rounds)),
            "message": str(status.get("message") or ""),
        },
        table(list(_rounds(found))),
        table([_named(row) | _numbers(row) for row in found.evaluations]),
        table(list(_clients(found, metrics))),
        [
            {key: line[key] for key in ("cpu_s", "wall_s", "machine", "load")}
            for line in cost_lines(folder)
        ],
    )


def _choices(run: Planned, then: Configuration, folder: Path) -> Mapping[str, str]:
    """The chosen files of a run: today's if its configuration is, else what its archive said."""
    if run.configuration is not None and run.configuration.values == then.values:
        return run.configuration.choices
    try:
        found = json.loads((folder / PACKED).read_text(encoding="utf-8"))["choices"]
        return {str(group): str(file) for group, file in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _named(row: Record) -> dict[str, Any]:
    """The columns of an evaluation that are no numbers."""
    return {key: str(row[key]) for key in ("group", "adapter") if key in row}


def _numbers(row: Record) -> dict[str, Any]:
    return {key: value for key, value in row.items() if number(value) is not None}


def _rounds(found: Run) -> Iterator[dict[str, Any]]:
    """The cost of each round, and the analyses last recorded before each evaluation."""
    kept: set[tuple[int, str]] = set()
    for end in {int(row["round"]) for row in found.evaluations}:
        last: dict[str, int] = {}
        for i, row in enumerate(found.rounds):
            if int(row["round"]) <= end:
                last |= {key: i for key in _numbers(row) if key.startswith(ANALYSES)}
        kept |= {(i, key) for key, i in last.items()}
    for i, row in enumerate(found.rounds):
        numbers = _numbers(row).items()
        yield {k: v for k, v in numbers if k in ("round", *COST_KEYS) or (i, k) in kept}


def _clients(found: Run, metrics: Iterable[str]) -> Iterator[dict[str, Any]]:
    """What was measured on each client, of the metrics that no record has and that are computed
    from it (`simulations.study.clients`)."""
    recorded = {name for record in found.evaluations for name in record}
    wanted = {panel_of(metric)[0] for metric in metrics} - recorded
    bases = sorted({measured(name) for name in wanted} & recorded)
    for row in read_jsonl(found.folder / "evaluations.jsonl") if bases else ():
        if "metrics" in row:
            kept: dict[str, Any] = {k: v for k, v in row.items() if k in _CLIENT}
            for part in ("metrics", "weights"):
                of_part = row.get(part, {})
                kept |= {f"{part}/{base}": of_part[base] for base in bases if base in of_part}
            yield kept | _named(row)


# --- unpacking ------------------------------------------------------------------------------------


def unpack(one: Packed, folder: Path) -> None:
    """Make a run folder with what an archive has of a run, and the costs beside it."""
    lines = "".join(json.dumps(line) + "\n" for line in one.cost)
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_file(cost_file(folder), lines)
    records = [{"kind": "evaluate", **row} for row in rows_of(one.evaluations)]
    records += [{"kind": "round", **row} for row in rows_of(one.rounds)]
    clients = []
    for row in rows_of(one.clients):
        apart: dict[str, Any] = {"metrics": {}, "weights": {}}
        for key in [key for key in row if "/" in key]:
            part, _, base = key.partition("/")
            apart[part][base] = row.pop(key)
        clients.append(row | apart)
    with whole_folder(folder) as draft:
        config = OmegaConf.create(nested(one.configuration.values))
        write_file(draft / CONFIG, OmegaConf.to_yaml(config))  # with quotes around "1e5"
        write_file(draft / PACKED, json.dumps({"choices": dict(one.configuration.choices)}) + "\n")
        for name, rows in (("metrics.jsonl", records), ("evaluations.jsonl", clients)):
            if rows:
                write_file(draft / name, "".join(json.dumps(row) + "\n" for row in rows))
        write_file(draft / FILE, json.dumps({**one.status, "kind": ""}, indent=1) + "\n")


@dataclass
class Taken:
    """What came of the runs of one stage of an archive."""

    taken: int = 0
    left: dict[str, list[str]] = field(default_factory=dict)
    """By reason: the runs that were not taken."""

    def lines(self, what: str) -> list[str]:
        """Sentences: how many were taken, and how many not and why."""
        total = self.taken + sum(map(len, self.left.values()))
        found = [f"{what}: {self.taken} of {total} runs taken"]
        for why, runs in self.left.items():
            more = f" and {len(runs) - 1} more" if len(runs) > 1 else ""
            found.append(f"  not taken: {runs[0]}{more}: {why}")
        return found


def take(
    archive: Mapping[Key, Packed],
    stage: str,
    runs: Sequence[Planned],
    folder: Path,
    halts: Sequence[int],
) -> Taken:
    """Unpack the runs of a stage that the plan has, with today's configuration, and that are not
    here yet.

    Args:
        archive: the packed runs.
        stage: ``tuning``, or empty for the reported ones.
        runs: of the plan, of this stage.
        folder: of the study.
        halts: rounds after which tuning runs are compared.
    """
    planned, found = {key_of(run): run for run in runs}, Taken()
    for key, one in archive.items():
        if key[0] != stage:
            continue
        why = _left(one, planned.get(key), folder, halts if stage == TUNING else ())
        if why:
            found.left.setdefault(why, []).append(one.label)
        else:
            unpack(one, folder / RUNS / planned[key].name)
            found.taken += 1
    return found


def _left(one: Packed, run: Planned | None, folder: Path, halts: Sequence[int]) -> str:
    """Why a packed run is not taken; empty if it is."""
    if run is None:
        return "the plan has no such run"
    if why := run.differs(one.configuration):
        return why
    if not any(one.reaches(rounds) for rounds in (*halts, run.rounds)):
        return f"it ended after round {one.done}, and no checkpoint is left to go on from"
    (here,) = progress_of([replace(run, until=min(one.done, run.rounds))], folder)
    if here.state is State.DONE:
        return "it is here already"
    return "a process is at work on it" if is_held(here.folder) else ""
