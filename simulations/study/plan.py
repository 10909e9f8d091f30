"""From a study to its runs: words, names and identities.

The identity of a run is a hash of its whole resolved configuration without what results do not
depend on (`simulations.app.identity`). It is a part of the name of the run's folder, so that a run
whose configuration has changed is another run, and all others keep what they have. Keys that are
new since a folder got its name, at their defaults, are no change (`simulations.app.since`).
"""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from fedlora.core.errors import ConfigError
from fedlora.core.files import write_file
from simulations.app.compose import load_chosen
from simulations.app.identity import digest
from simulations.app.since import Configuration, configuration, difference
from simulations.app.words import SEARCH_PATH, readable
from simulations.study.spec import Evaluation, Study
from simulations.study.tracked import labels_of
from simulations.study.tuning import VALIDATION, key_words
from simulations.study.values import Cell, panel_of

PLAN, COMMANDS, RUNS = "plan.json", "commands.txt", "runs"
TUNING = "tuning"
"""The stage of runs from which values are chosen."""
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
    stage: str = ""
    """``tuning``, or empty for a reported run."""
    until: int = 0
    """Rounds that are wanted for now, where tuning compares halfway; 0: all."""
    labels: tuple[str, ...] = ()
    """Words that tell a tracker what the run is within its study; results depend on none."""
    configuration: Configuration | None = field(default=None, repr=False, compare=False)
    """What `identity` is a hash of."""

    @property
    def wanted(self) -> int:
        """Rounds that are wanted for now."""
        return min(self.until or self.rounds, self.rounds)

    @property
    def label(self) -> str:
        """The run in words, for messages."""
        return f"{label(self.cell)}, seed {self.seed}"

    def differs(self, then: Configuration) -> str:
        """In words, what of a recorded configuration is not the run's; empty if it is."""
        if self.configuration is None:
            return "its configuration is not known"
        paths = [word for word in self.words if word.startswith(SEARCH_PATH)]
        return difference(then, self.configuration, paths)

    @property
    def stem(self) -> str:
        """The name of its folder without the part that tells its configuration."""
        return self.name[:-_DIGITS]

    @property
    def name(self) -> str:
        """The name of its folder."""
        texts = [*filter(None, [self.stage]), *(level for _, level in self.cell)]
        levels = "-".join(re.sub(r"[^A-Za-z0-9_.,=+-]+", "_", text) for text in texts)
        return f"{levels[:_LONGEST]}-s{self.seed}-{self.identity[:_DIGITS]}"

    def record(self) -> dict[str, Any]:
        """What plan.json says of it."""
        return {
            "name": self.name,
            **({"stage": self.stage} if self.stage else {}),
            "cell": dict(self.cell),
            "seed": self.seed,
            "rounds": self.rounds,
            "words": [*self.words, *self.labels],
            "identity": self.identity,
        }


def label(cell: Cell) -> str:
    """A cell in words."""
    return ", ".join(f"{axis} {level}" for axis, level in cell)


def plan(
    study: Study, search_path: Sequence[str] = (), chosen: Mapping[Cell, Cell] | None = None
) -> list[Planned]:
    """All reported runs of a study, seed by seed, so that every cell has its first run early.

    Args:
        study: the study.
        search_path: words that tell Hydra of further folders of configuration.
        chosen: by tuned group, the values that its runs have; cells of other groups have no runs.
            Without them all groups have the first values of their grids.

    Raises:
        ConfigError: if a cell cannot be composed, or two cells are the same run.
    """
    tuning = study.tuning
    if tuning is not None and chosen is None:
        chosen = {group: next(tuning.candidates(group)) for group in study.groups()}
    planned = []
    for cell in study.cells():
        values: Cell | None = ()
        if tuning is not None and chosen is not None:
            values = chosen.get(tuning.group(cell))
        if values is not None:
            last = (*key_words(values), *study.last)
            composed = _composed(study, cell, study.words(cell), search_path, last)
            planned.append([composed.run(cell, seed) for seed in study.seeds_of(cell)])
    return _distinct(study, by_seed(planned))


def tuning_plan(study: Study, search_path: Sequence[str] = ()) -> list[Planned]:
    """All runs of the tuning stage, seed by seed; none without one.

    Args:
        study: the study.
        search_path: words that tell Hydra of further folders of configuration.

    Raises:
        ConfigError: if a run cannot be composed, or is the same as another.
    """
    tuning = study.tuning
    if tuning is None:
        return []
    planned, cells = [], list(study.cells())
    for group in study.groups():
        for values in tuning.candidates(group):
            for cell in tuning.cells(cells, group):
                words = (*study.words(cell), *tuning.words)
                last = (*key_words(values), *study.last, VALIDATION)
                composed = _composed(study, cell, words, search_path, last)
                runs = [composed.run((*cell, *values), seed, TUNING) for seed in tuning.seeds]
                planned.append(runs)
    return _distinct(study, by_seed(planned))


def by_seed(cells: Sequence[Sequence[Planned]]) -> list[Planned]:
    """The first run of each cell, then the second of each, and so on."""
    return [run for runs in zip_longest(*cells) for run in runs if run is not None]


def _distinct(study: Study, runs: list[Planned]) -> list[Planned]:
    """The runs, none of which may be the same as another."""
    seen: dict[str, Planned] = {}
    for run in runs:
        if (other := seen.setdefault(run.identity, run)) is not run:
            raise ConfigError(
                f"study {study.name}: {other.label} and {run.label} are the same configuration; "
                "leave one of them out with skip"
            )
    return runs


@dataclass
class _Composed:
    """A cell composed once; a seed changes the values that follow it."""

    words: tuple[str, ...]
    cfg: Any
    choices: Mapping[str, Any]
    where: str
    study: str

    def run(self, cell: Cell, seed: int, stage: str = "") -> Planned:
        """The run of a seed."""
        self.cfg.seed = seed
        resolved = OmegaConf.to_container(self.cfg, resolve=True)
        assert isinstance(resolved, dict)
        rounds = resolved["rounds"]
        if not isinstance(rounds, int):
            raise ConfigError(f"{self.where}: rounds={rounds!r} is no number")
        identity = digest({str(k): v for k, v in resolved.items()})
        words = (*self.words, f"seed={seed}")
        labels = labels_of(self.study, self.cfg.tracking, cell, seed, stage)
        content = configuration(resolved, self.choices)
        return Planned(
            cell, seed, words, rounds, identity, stage, labels=labels, configuration=content
        )


def _composed(
    study: Study,
    cell: Cell,
    words: Sequence[str],
    search_path: Sequence[str],
    last: Sequence[str] = (),
) -> _Composed:
    """Compose a cell.

    Args:
        study: the study; its metrics say what is evaluated.
        cell: for messages.
        words: of the cell.
        search_path: words that tell Hydra of further folders of configuration.
        last: words that follow, and usually set single values.
    """
    where = f"study {study.name}, {label(cell)}"
    all_words = (*search_path, *WHERE, *words)
    try:
        found = _followed(all_words, tuple(last))
        all_words = (*all_words, *last)
        evaluated = evaluation_words(study, found[0])
        cfg, choices = _followed(all_words, tuple(evaluated), found)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    return _Composed((*all_words, *evaluated), cfg, choices, where, study.name)


def _followed(
    words: tuple[str, ...], last: tuple[str, ...], found: tuple[Any, dict[str, Any]] | None = None
) -> tuple[Any, dict[str, Any]]:
    """A configuration with further words, and its choices. Words that set a value which is there
    are set without composing all anew, as Hydra would do it: a study has many runs that differ in
    little else.

    Args:
        words: of the configuration.
        last: further ones.
        found: configuration and choices, if they have been composed.
    """
    cfg, choices = deepcopy(_loaded(words) if found is None else found)
    for override in OverridesParser.create().parse_overrides(readable(last)):
        key = override.key_or_group
        plain = "." in key and "@" not in key and not (override.is_add() or override.is_delete())
        there = OmegaConf.select(cfg, key) if plain else None
        if there is None or isinstance(there, DictConfig):
            return deepcopy(_loaded((*words, *last)))
        OmegaConf.update(cfg, key, override.value(), merge=True)
    return cfg, choices


@cache
def _loaded(words: tuple[str, ...]) -> tuple[Any, dict[str, Any]]:
    """A configuration, which is not to be changed, and the chosen file of each group."""
    return load_chosen(words)


def evaluation_words(study: Study, cfg: Any) -> list[str]:
    """Words that have a run evaluated on all that the study's metrics are read from, the study's
    own group and adapter first; none if the study leaves that to the run.

    Args:
        study: the study.
        cfg: the run without these words.
    """
    asked = study.evaluation
    group = asked.group or str(cfg.evaluate.groups[0])
    adapter = asked.adapter or str(cfg.evaluate.adapters[0])
    if adapter == "auto":
        adapter = "own" if is_personal(str(cfg.strategy["_target_"])) else "full"
    tuned = [study.tuning.metric] if study.tuning else []
    panels = [panel_of(metric) for metric in (*study.metrics, *tuned)]
    if asked == Evaluation() and not any(g or a for _, g, a in panels):
        return []
    groups = dict.fromkeys([group, *(g for _, g, _ in panels if g)])
    adapters = dict.fromkeys([adapter, *(a for _, _, a in panels if a)])
    return [f"evaluate.groups=[{','.join(groups)}]", f"evaluate.adapters=[{','.join(adapters)}]"]


def is_personal(target: str) -> bool:
    """Whether clients of a method keep a part of their adapter, so that there is no global model.

    Args:
        target: the dotted name of its class.
    """
    try:
        return bool(getattr(get_class(target), "private", ""))
    except (ImportError, ValueError, HydraException):  # the run says what is wrong with it
        return False


def write_plan(
    folder: Path,
    study: Study,
    runs: Sequence[Planned],
    tuned: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write plan.json, what each run is, and commands.txt, how to do each by hand.

    Args:
        folder: of the study.
        study: the study.
        runs: of the tuning stage, then the reported ones as far as their values are chosen.
        tuned: what was chosen for each group, and among what.
    """
    content: dict[str, Any] = {"study": study.name, "axes": list(study.axes)}
    if study.tuning is not None:
        content["tuning"] = list(tuned)
    content["runs"] = [run.record() for run in runs]
    write_file(folder / PLAN, json.dumps(content, indent=1) + "\n")
    write_file(folder / COMMANDS, "".join(f"{command(run)}\n" for run in runs))


def command(run: Planned) -> str:
    """The command that does one run by itself, into a folder of the same name."""
    return shlex.join(["fedlora", "run", *run.words, *run.labels, f"name={run.name}"])
