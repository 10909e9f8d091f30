"""From a study to its runs: words, names and identities.

The identity of a run is a hash of its whole resolved configuration without what results do not
depend on (`simulations.app.identity`). It is a part of the name of the run's folder, so that a run
whose configuration has changed is another run, and all others keep what they have.
"""

import hashlib
import json
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from fedlora.core.errors import ConfigError
from fedlora.core.files import write_file
from simulations.app.compose import load
from simulations.app.identity import stable
from simulations.study.spec import Cell, Study

PLAN, COMMANDS, RUNS = "plan.json", "commands.txt", "runs"
WHERE = ("runtime=in_process", "report=false")
"""Words of a study's runs on this machine; those of the study win."""
_DIGITS, _LONGEST = 8, 80


@dataclass(frozen=True)
class Planned:
    """One run of a study."""

    cell: Cell
    seed: int
    words: tuple[str, ...]
    """All that `fedlora run` needs to do it again."""
    rounds: int
    identity: str

    @property
    def label(self) -> str:
        """The run in words, for messages."""
        return f"{label(self.cell)}, seed {self.seed}"

    @property
    def name(self) -> str:
        """The name of its folder."""
        levels = "-".join(re.sub(r"[^A-Za-z0-9_.,=+-]+", "_", level) for _, level in self.cell)
        return f"{levels[:_LONGEST]}-s{self.seed}-{self.identity[:_DIGITS]}"

    def record(self) -> dict[str, Any]:
        """What plan.json says of it."""
        return {
            "name": self.name,
            "cell": dict(self.cell),
            "seed": self.seed,
            "rounds": self.rounds,
            "words": list(self.words),
            "identity": self.identity,
        }


def label(cell: Cell) -> str:
    """A cell in words."""
    return ", ".join(f"{axis} {level}" for axis, level in cell)


def plan(study: Study, search_path: Sequence[str] = ()) -> list[Planned]:
    """All runs of a study, seed by seed, so that every cell has its first run early.

    Args:
        study: the study.
        search_path: words that tell Hydra of further folders of configuration.

    Raises:
        ConfigError: if a cell cannot be composed, or two cells are the same run.
    """
    cells = [list(_runs(study, cell, search_path)) for cell in study.cells()]
    runs = [run for seeds in zip(*cells, strict=True) for run in seeds]
    seen: dict[str, Planned] = {}
    for run in runs:
        if (other := seen.setdefault(run.identity, run)) is not run:
            raise ConfigError(
                f"study {study.name}: {other.label} and {run.label} are the same configuration; "
                "leave one of them out with skip"
            )
    return runs


def _runs(study: Study, cell: Cell, search_path: Sequence[str]) -> Iterator[Planned]:
    """The runs of a cell, composed once; a seed changes values that follow it."""
    words = (*search_path, *WHERE, *study.words(cell))
    try:
        cfg = load(words)
    except ConfigError as error:
        raise ConfigError(f"study {study.name}, {label(cell)}: {error}") from error
    for seed in study.seeds:
        cfg.seed = seed
        resolved = OmegaConf.to_container(cfg, resolve=True)
        assert isinstance(resolved, dict)
        rounds = resolved["rounds"]
        if not isinstance(rounds, int):
            raise ConfigError(f"study {study.name}, {label(cell)}: rounds={rounds!r} is no number")
        values = {str(k): v for k, v in resolved.items()}
        content = stable(values) | {"rounds": rounds}
        text = json.dumps(content, sort_keys=True, default=str)
        identity = hashlib.sha256(text.encode()).hexdigest()
        yield Planned(cell, seed, (*words, f"seed={seed}"), rounds, identity)


def write_plan(folder: Path, study: Study, runs: Sequence[Planned]) -> None:
    """Write plan.json, what each run is, and commands.txt, how to do each by hand."""
    content = {"study": study.name, "axes": list(study.axes), "runs": [r.record() for r in runs]}
    write_file(folder / PLAN, json.dumps(content, indent=1) + "\n")
    write_file(folder / COMMANDS, "".join(f"{command(run)}\n" for run in runs))


def command(run: Planned) -> str:
    """The command that does one run by itself, into a folder of the same name."""
    return shlex.join(["fedlora", "run", *run.words, f"name={run.name}"])
