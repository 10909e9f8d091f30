"""A part of a study's runs, and the same study as a sweep of W&B, which asks for parts.

The sweep is a grid of the study's axes and seeds, or of the names of its runs where these are no
grid, and its command does the one run that has them. A run is the same one whoever asks for it.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from fedlora.core.errors import ConfigError
from simulations.app.compose import load
from simulations.study.plan import Planned
from simulations.study.spec import Study

SEED, RUN = "seed", "run"
"""Keys of a run beside its axes and tuned keys: its seed, and the name of its folder."""
ONLINE = "tracking=wandb_online"
"""The word of runs that have no tracker yet."""
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
"""What W&B accepts as the name of a parameter."""


def selected(study: Study, runs: Sequence[Planned], words: Sequence[str]) -> list[Planned]:
    """The runs that have one of the values given for each key, in the order of the plan.

    Args:
        study: for messages.
        runs: all that are known.
        words: ``<axis>=<level>``, ``<tuned key>=<value>``, ``seed=0``, ``run=<name>``; several of
            one key mean either.

    Raises:
        ConfigError: for a key that no run has, and if no run is left.
    """
    wanted: dict[str, set[str]] = {}
    for word in words:
        key, _, value = word.partition("=")
        wanted.setdefault(key, set()).add(value)
    have = [_values(run) for run in runs]
    known = list(dict.fromkeys(key for values in have for key in values))
    for key in wanted:
        if key not in known:
            raise ConfigError(f"study {study.name}: --only names {key!r}; {', '.join(known)}")
    found = [
        run
        for run, values in zip(runs, have, strict=True)
        if all(values.get(key) in some for key, some in wanted.items())
    ]
    if not found:
        said = " ".join(words)
        raise ConfigError(f"study {study.name}: --only {said}: no run has all of these (--list)")
    return found


def _values(run: Planned) -> dict[str, str]:
    return {**dict(run.cell), SEED: str(run.seed), RUN: run.name}


def sweep_yaml(study: Study, runs: Sequence[Planned], name: str, words: Sequence[str]) -> str:
    """The file for ``wandb sweep``.

    Args:
        study: the study.
        runs: of the reported stage, or of the tuning stage as long as nothing is chosen.
        name: of the study or its file, as the command line takes it.
        words: of the command line.
    """
    tracked = [] if runs[0].labels else [ONLINE]
    node = load([*runs[0].words, *tracked]).tracking
    command = ["${env}", "fedlora", "study", name, *words, *tracked, "--only", "${args_no_hyphens}"]
    content: dict[str, Any] = {
        "name": study.name,
        **{key: node[key] for key in ("project", "entity") if node.get(key)},
        "method": "grid",
        "parameters": {key: {"values": values} for key, values in _parameters(runs).items()},
        "command": command,
    }
    stage = f"{runs[0].stage} runs" if runs[0].stage else "runs"
    return (
        f"# The {len(runs)} {stage} of study {study.name}: wandb sweep THIS_FILE, then wandb agent "
        "ID in this folder, on\n# as many machines as share it; then the same `fedlora study` "
        "without --only writes the results.\n"
        + yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=1000)
    )


def _parameters(runs: Sequence[Planned]) -> Mapping[str, list[str] | list[int]]:
    """Axes and seeds if the runs are all of their combinations, else the names of the runs."""
    keys = [key for key, _ in runs[0].cell]
    levels = {key: list(dict.fromkeys(dict(run.cell)[key] for run in runs)) for key in keys}
    seeds = list(dict.fromkeys(run.seed for run in runs))
    whole = math.prod(map(len, levels.values())) * len(seeds) == len(runs)
    if whole and all(_NAME.fullmatch(key) for key in keys):
        return {**levels, SEED: seeds}
    return {RUN: [run.name for run in runs]}
