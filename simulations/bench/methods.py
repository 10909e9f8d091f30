"""One experiment under every method: what each reaches over several seeds, and what it costs.

    python -m simulations.bench.methods --seeds 0 1 2                 intents_banking77
    python -m simulations.bench.methods --experiment intents_clinc150 --seeds 0 --methods ffa fedit
    python -m simulations.bench.methods --seeds 0 -- rounds=2         overrides of every run

The methods are the files of conf/strategy, and two bounds: every client alone, and one client that
holds all data (`<experiment>_centralised`). Runs of equal seeds share partition, head, starts and
batches, and learning rates are the experiment's, but for methods whose file brings one (that of
plain SGD, of cores): nothing is tuned. Every run is a process of its own on one thread, `--jobs` of
them at a time; its cost is the CPU time of that process. A row goes into the JSON file as soon as
there is one, with the machine that it comes from and its configuration. What is there with today's
configuration is not run again: keys that are new since then, at their defaults, change nothing
(`simulations.app.since`). A method that the experiment cannot run is recorded with the sentence of
its refusal.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from fedlora.core.package import ROOT
from fedlora.core.reading import json_in
from fedlora.run.tracking import read_jsonl
from simulations.app.compose import load_chosen
from simulations.app.since import Configuration, configuration, difference, recorded, shared
from simulations.bench.machine import RESULTS, command, load, machine, write
from simulations.reporting.tables import by_method
from simulations.study.plan import is_personal

CENTRALISED = "centralised"
FULL, OWN = ("evaluate.adapters=[full]",), ("evaluate.adapters=[own]",)
REFUSED = 2
"""The exit code of a configuration that cannot be run."""
PARTS = ("values", "choices")
"""Keys of a recorded configuration."""
At = tuple[str, int]
"""Method and seed."""
SHOWN = ("accuracy_weighted", "macro_f1_weighted", "accuracy_worst_tenth", "loss_weighted")


@dataclass(frozen=True)
class Case:
    """One run: a method of an experiment with a seed."""

    experiment: str
    method: str
    seed: int
    overrides: tuple[str, ...] = ()

    def words(self) -> list[str]:
        """Its overrides, without those that only say where and how it runs."""
        if self.method == CENTRALISED:
            chosen = [f"experiment={self.experiment}_{CENTRALISED}"]
        else:
            chosen = [f"experiment={self.experiment}", f"strategy={self.method}"]
        beside = () if self.method == CENTRALISED else rate_of_its_own(self.method)
        evaluated = OWN if self.method in personal() else FULL
        return [*chosen, *evaluated, *beside, *self.overrides, f"seed={self.seed}"]

    @cached_property
    def configuration(self) -> Configuration:
        """What tells it from other runs, the experiment's own keys among it."""
        *words, _ = self.words()
        cfg, choices = composed(tuple(words))
        cfg = deepcopy(cfg)
        cfg.seed = self.seed
        resolved = OmegaConf.to_container(cfg, resolve=True)
        assert isinstance(resolved, dict)
        return configuration(resolved, choices)


@cache
def composed(words: tuple[str, ...]) -> tuple[DictConfig, dict[str, Any]]:
    """A configuration, which is not to be changed, and its choices."""
    return load_chosen(words)


def presets() -> list[str]:
    """All of conf/strategy."""
    return sorted(f.stem for f in (ROOT / "conf/strategy").glob("*.yaml"))


@cache
def rate_of_its_own(preset: str) -> tuple[str, ...]:
    """The word that keeps the learning rate of a preset that brings one (of plain SGD, of cores),
    which an experiment's rate would replace; none for the others.

    Args:
        preset: a file of conf/strategy.
    """
    usual, own = (composed(words)[0].client.lr for words in ((), (f"strategy={preset}",)))
    return () if own == usual else (f"client.lr={own}",)


@cache
def personal() -> frozenset[str]:
    """The presets whose clients keep a part: each client is evaluated with its own. The rest have
    one model."""
    found = {p: composed((f"strategy={p}",))[0] for p in presets()}
    targets = {p: str(cfg.strategy["_target_"]) for p, cfg in found.items()}
    return frozenset(p for p, target in targets.items() if is_personal(target))


def methods() -> list[str]:
    """All of conf/strategy and the bound of one client that holds all data."""
    return [*presets(), CENTRALISED]


def measure(case: Case) -> dict[str, Any]:
    """Run it: metrics by evaluation, bytes and CPU seconds; or the sentence of its refusal.

    Raises:
        RuntimeError: if the run fails otherwise; its last lines are the message.
    """
    with tempfile.TemporaryDirectory() as folder:
        place = [f"output_dir={folder}", "name=run", "report=false", "runtime=in_process"]
        lines = Path(folder, "lines")
        with lines.open("wb") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", "simulations.run", *case.words(), *place],
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdout=out,
                stderr=subprocess.STDOUT,
            )
            _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        said = lines.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        if process.returncode == REFUSED:
            return {
                "words": case.words(),
                "refused": said[-1].removeprefix("RUN FAILED: ") if said else "",
            }
        if process.returncode:
            raise RuntimeError("\n".join([" ".join(case.words()), *said[-20:]]))
        records = read_jsonl(Path(folder, "run", "metrics.jsonl"))
    return {"words": case.words(), "cpu_s": round(usage.ru_utime + usage.ru_stime, 1)} | row(
        records
    )


def row(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What is kept of a run's metrics: the series of its first group and adapter, and the bytes."""
    rounds = [r for r in records if r["kind"] == "round"]
    found = [r for r in records if r["kind"] == "evaluate"]
    if not rounds or not found:
        raise RuntimeError("the run has no round or no evaluation")
    first = found[0]["group"], found[0]["adapter"]
    series = [r for r in found if (r["group"], r["adapter"]) == first]
    return {
        "evaluated": {
            "group": first[0],
            "adapter": first[1],
            "rounds": [r["round"] for r in series],
        },
        "metrics": {k: [r[k] for r in series] for k in SHOWN if k in series[0]},
        "up_bytes": sum(r["wire/up_bytes"] for r in rounds),
        "down_bytes": sum(r["wire/down_bytes"] for r in rounds),
        "state": rounds[-1]["state/hash"],
        "load": load(),
    }


class Record:
    """The JSON file: results by method and seed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        old = json_in(path, "the record") if path.is_file() else {}
        self.runs: dict[str, dict[str, Any]] = old.get("runs", {})
        self.configurations = self._read(old.get("configurations", {}))
        self.commands = sorted({*old.get("commands", []), command("methods")})
        self._lock = threading.Lock()

    def has(self, case: Case) -> bool:
        """Whether it was measured with today's configuration; else it is said what has changed."""
        if str(case.seed) not in self.runs.get(case.method, {}):
            return False
        then = self.configurations.get((case.method, case.seed))
        why = "recorded without its configuration"
        if then is not None and not (why := difference(then, case.configuration)):
            return True
        print(f"{case.method}, seed {case.seed}, is run again: {why}", flush=True)
        return False

    def add(self, case: Case) -> None:
        """Measure and write it."""
        found = {"machine": machine()} | measure(case)
        with self._lock:
            self.runs.setdefault(case.method, {})[str(case.seed)] = found
            self.configurations[case.method, case.seed] = case.configuration
            self.write()
            print(f"{case.method}, seed {case.seed}: {_said(found)}", flush=True)

    def write(self) -> None:
        """Write the file. What all configurations share is in it once, and likewise what those of a
        method share."""
        self.runs = dict(sorted(self.runs.items()))
        there = {at: one.record() for at, one in sorted(self.configurations.items())}
        common: dict[str, Any] = {}
        for part in PARTS:
            parts = {at: one[part] for at, one in there.items()}
            kept, parts = _taken_out(parts)
            common.setdefault("all", {})[part] = kept
            for method in {method: None for method, _ in parts}:
                kept, own = _taken_out({at: one for at, one in parts.items() if at[0] == method})
                common.setdefault(method, {})[part] = kept
                for at, one in own.items():
                    there[at][part] = one
        for (method, seed), one in there.items():
            self.runs[method][str(seed)]["configuration"] = one
        content = {"commands": self.commands, "configurations": common, "runs": self.runs}
        write(self.path, content)

    def _read(self, common: Mapping[str, Any]) -> dict[At, Configuration]:
        """The configurations of the rows that have one."""
        found = {}
        for method, rows in self.runs.items():
            for seed, row in rows.items():
                if own := row.get("configuration"):
                    levels = (common["all"], common[method], own)
                    parts = {p: {k: v for one in levels for k, v in one[p].items()} for p in PARTS}
                    found[method, int(seed)] = recorded(parts)
        return found


def _taken_out(
    parts: Mapping[At, dict[str, Any]],
) -> tuple[dict[str, Any], dict[At, dict[str, Any]]]:
    """What all have in common, and what each has beside that."""
    common, rests = shared(list(parts.values()))
    return common, dict(zip(parts, rests, strict=True))


def _said(found: Mapping[str, Any]) -> str:
    if "refused" in found:
        return str(found["refused"])
    last = ", ".join(f"{name} {values[-1]:.3f}" for name, values in found["metrics"].items())
    return f"{last}; {found['cpu_s']:.0f} CPU s"


def main(words: Sequence[str] | None = None) -> int:
    """Run what is missing, print the table; 1 if a run failed."""
    about = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m simulations.bench.methods", description=about)
    parser.add_argument("overrides", nargs="*", help="of every run: rounds=2")
    parser.add_argument("--experiment", default="intents_banking77")
    parser.add_argument("--methods", nargs="*", choices=methods(), default=methods())
    parser.add_argument("--seeds", type=int, nargs="*", default=[], help="none: only the table")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, default=None)
    given = parser.parse_intermixed_args(words)
    record = Record(given.out or RESULTS / f"methods-{given.experiment}.json")
    cases = [
        Case(given.experiment, method, seed, tuple(given.overrides))
        for seed in given.seeds
        for method in given.methods
    ]
    failed = 0
    with ThreadPoolExecutor(given.jobs) as pool:
        for result in [pool.submit(record.add, c) for c in cases if not record.has(c)]:
            if (error := result.exception()) is not None:
                failed += 1
                print(error, file=sys.stderr, flush=True)
    print(by_method(record.runs))
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
