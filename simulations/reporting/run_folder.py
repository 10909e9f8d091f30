"""A run folder read back: the input of reports, notebooks and comparisons."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from fedlora.core.metric import TIER
from fedlora.run.tracking import read_jsonl
from simulations.app.identity import LABELS, MODEL

Record = Mapping[str, Any]
ANALYSES = ("aggregate/", "spectrum/", "drift/", TIER)
"""What the names of a round's analyses begin with."""


class RecordError(ValueError):
    """A folder that holds no run: one sentence that names it."""


@dataclass(frozen=True)
class Run:
    """The records of one run, in the order in which they were written."""

    folder: Path
    name: str
    rounds: Sequence[Record]
    """``kind="round"`` of metrics.jsonl."""
    evaluations: Sequence[Record]
    """``kind="evaluate"`` of metrics.jsonl."""
    clients: Sequence[Record]
    """One record per client and round."""
    config: Mapping[str, Any] = field(default_factory=dict)
    population: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    status: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    labels: Mapping[str, Any] = field(default_factory=dict)
    """The names of a classification's ``labels``, and in ``train`` for each client which of them it
    holds, ``[label, examples]``."""

    @property
    def classifies(self) -> bool:
        """Whether labels are predicted; else tokens are."""
        model = self.config.get("model", {})
        return isinstance(model, Mapping) and model.get("task") == "classification"

    @property
    def eval_loss(self) -> str:
        """The name of the loss that evaluations report."""
        return "loss" if self.classifies else "loss_response"

    @property
    def unit(self) -> str:
        """The unit of losses."""
        return "nats per example" if self.classifies else "nats per token"

    def last_clients(self) -> dict[str, list[Record]]:
        """What was measured on each client in the last evaluation, by label of group and adapter:
        rows of evaluations.jsonl without those that failed."""
        rows = [row for row in read_jsonl(self.folder / "evaluations.jsonl") if "metrics" in row]
        return {
            label: [row for row in found if row["round"] == found[-1]["round"]]
            for label, found in _by_label(rows).items()
        }

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """A metric of the rounds: round numbers and values; what is null or missing is left out."""
        return _series(self.rounds, key)

    def evaluated(self, key: str) -> dict[str, tuple[list[int], list[float]]]:
        """A metric of the evaluations: by label of group and adapter, rounds and values."""
        found = {label: _series(rows, key) for label, rows in self.groups().items()}
        return {label: pair for label, pair in found.items() if pair[0]}

    def groups(self) -> dict[str, list[Record]]:
        """The evaluations by label, for example ``unseen random`` or ``seen, own rank``."""
        return _by_label(self.evaluations)

    def analyses(self, round: int) -> dict[str, float]:
        """The numbers of global update and clients (docs/analyses.md) after so many rounds, each as
        it was last recorded."""
        found: dict[str, float] = {}
        for row in self.rounds:
            if int(row["round"]) <= round:
                named = {k: number(v) for k, v in row.items() if k.startswith(ANALYSES)}
                found |= {k: v for k, v in named.items() if v is not None}
        return found

    def suffixes(self, prefix: str) -> list[str]:
        """The ends of the rounds' keys with this prefix, ranks in ascending order."""
        keys = dict.fromkeys(key for row in self.rounds for key in row if key.startswith(prefix))
        return sorted((key.removeprefix(prefix) for key in keys), key=rank_order)


def read_run(folder: Path) -> Run:
    """Read a run folder. Missing files are empty.

    Raises:
        RecordError: if the folder does not exist or has neither records nor a configuration.
    """
    if not any((folder / name).is_file() for name in ("metrics.jsonl", "config.yaml")):
        raise RecordError(f"{folder} is no run folder: it has no metrics.jsonl and no config.yaml")
    records = read_jsonl(folder / "metrics.jsonl")
    return Run(
        folder=folder,
        name=folder.resolve().name,
        rounds=[r for r in records if r.get("kind") == "round"],
        evaluations=[r for r in records if r.get("kind") == "evaluate"],
        clients=read_jsonl(folder / "clients.jsonl"),
        config=_yaml(folder / "config.yaml"),
        population=_json(folder / "population.json"),
        environment=_json(folder / "environment.json"),
        status=_json(folder / "status.json"),
        model=_json(folder / MODEL),
        labels=_json(folder / LABELS),
    )


def number(value: Any) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def rank_order(label: str) -> tuple[float, ...]:
    """Sorts rank labels by their numbers: ``8`` before ``15`` before ``30/200``."""
    parts = label.split("/")
    return tuple(float(p) if p.isdigit() else math.inf for p in parts)


def leaves(config: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """A nested configuration as dotted keys and values."""
    for key, value in config.items():
        where = f"{path}.{key}" if path else str(key)
        if isinstance(value, Mapping):
            yield from leaves(value, where)
        else:
            yield where, value


def _by_label(rows: Sequence[Record]) -> dict[str, list[Record]]:
    groups: dict[str, list[Record]] = {}
    for row in rows:
        label = str(row.get("group", "")).replace("_", " ")
        adapter = str(row.get("adapter", "full"))
        at = "" if adapter == "full" else f", {adapter} rank"
        groups.setdefault(f"{label}{at}", []).append(row)
    return groups


def _series(rows: Sequence[Record], key: str) -> tuple[list[int], list[float]]:
    pairs = [(int(r["round"]), v) for r in rows if (v := number(r.get(key))) is not None]
    return [n for n, _ in pairs], [v for _, v in pairs]


def _json(file: Path) -> dict[str, Any]:
    """A file's object; empty where there is none: a report also shows runs that broke off."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _yaml(file: Path) -> dict[str, Any]:
    try:
        found = OmegaConf.to_container(OmegaConf.load(file))
    except (OSError, OmegaConfBaseException, ValueError, YAMLError):
        return {}
    return {str(k): v for k, v in found.items()} if isinstance(found, dict) else {}
