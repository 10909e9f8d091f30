"""Where a run's metrics are written: JSON lines in its folder, and Weights & Biases on request.

Weights & Biases is imported here alone and only when a run wants it. Nothing that happens to a
tracker stops a run before its end; what was lost is then said (`Trackers.lost`).
"""

import json
import logging
import math
import os
import secrets
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from fedlora.core.checks import at_least, one_of
from fedlora.core.files import naming, write_file

log = logging.getLogger(__name__)

Record: TypeAlias = Mapping[str, Any]
"""Names and scalars of one round (``kind="round"``) or one evaluation (``kind="evaluate"``)."""


Table: TypeAlias = tuple[Sequence[str], Sequence[Sequence[Any]]]
"""Names of columns, and rows with a value for each."""


@dataclass(frozen=True)
class Findings:
    """What many runs have found together (`Tracking.summarise`)."""

    config: Mapping[str, Any]
    """What was compared."""
    tables: Mapping[str, Table]
    """By name."""
    figures: Mapping[str, bytes]
    """By name: PNG files."""


class Tracker(Protocol):
    """Receives what a run has to say."""

    def config(self, values: Mapping[str, Any]) -> None:
        """The resolved configuration, once, before the first round."""

    def round(self, record: Record) -> None:
        """One record of ``metrics.jsonl``: a finished round or an evaluation."""

    def clients(self, rows: Sequence[Record]) -> None:
        """One row per client of a finished round."""

    def evaluated(self, rows: Sequence[Record]) -> None:
        """One row per client of a finished evaluation of one group and adapter."""

    def close(self) -> None:
        """The run is over."""


class Tracking(ABC):
    """A choice of the config group ``tracking/``: what to open beside the JSON lines."""

    @abstractmethod
    def open(self, folder: Path, name: str) -> Sequence[Tracker]:
        """Trackers for the run of this name; they may raise, the run goes on without them."""

    def check(self, name: str) -> None:  # noqa: B027 - most trackers take every name
        """Raise a ValueError for what the tracker would refuse of a run of this name."""

    def summarise(self, folder: Path, name: str, found: Findings) -> None:  # noqa: B027
        """Write what many runs have found as a run of this name beside them, its files in a folder;
        may raise. Most trackers have no such thing."""


@dataclass(frozen=True)
class Silent(Tracking):
    """Nothing beside the JSON lines."""

    def open(self, folder: Path, name: str) -> Sequence[Tracker]:
        return ()


@dataclass(frozen=True)
class Wandb(Tracking):
    """Weights & Biases. Offline needs no account; ``wandb sync <dir>`` uploads the run later."""

    mode: str = "offline"
    """``offline``, ``online`` or ``disabled``. Online without a key or a network is offline."""
    project: str = "fedlora"
    entity: str = ""
    """User or team; empty: the account's default."""
    group: str = ""
    """What the runs of one experiment share; empty: none."""
    job_type: str = "train"
    """What kind of run it is within its group."""
    tags: tuple[str, ...] = ()
    notes: str = ""
    client_table: bool = True
    """Also one table row per client and round, beside the histograms."""
    init_timeout_s: float = 60.0
    """How long a run waits for the service before it goes on offline."""

    def __post_init__(self) -> None:
        one_of("tracking.mode", self.mode, ("offline", "online", "disabled"))
        at_least("tracking.init_timeout_s", self.init_timeout_s, 0, strict=True)

    def open(self, folder: Path, name: str) -> Sequence[Tracker]:
        return () if self.mode == "disabled" else (WandbTracker(self, folder, name),)

    def summarise(self, folder: Path, name: str, found: Findings) -> None:
        if self.mode == "disabled":
            return
        self.check(name)
        tracker = WandbTracker(self, folder, name)
        try:
            tracker.findings(found)
        finally:
            tracker.close()

    def check(self, name: str) -> None:
        """Raise a ValueError for what W&B refuses: by its own rules, which it applies when it is
        initialised, and by those that only its service applies.

        Characters of an entity are those of a project: both are parts of an address.
        """
        if self.mode == "disabled":
            return
        for key, text in (("project", self.project), ("entity", self.entity)):
            if found := sorted(set(text) & set(_NOT_IN_ADDRESSES)):
                raise ValueError(
                    f"tracking.{key}={text!r} contains {' '.join(found)}, which W&B does not allow "
                    f"(none of {_NOT_IN_ADDRESSES}); a team goes into tracking.entity"
                )
        if not self.project:
            raise ValueError("tracking.project='' must be the name of a W&B project")
        for key, text in (
            ("tracking.project", self.project),
            ("tracking.group", self.group),
            ("name", name),
        ):
            if len(text) > _LONGEST_NAME:
                raise ValueError(
                    f"{key}={text!r} has {len(text)} characters; W&B allows {_LONGEST_NAME}"
                )
        _validate_settings(run_tags=self.tags, project=self.project)


def track(tracking: Tracking, folder: Path, name: str, after_round: int = -1) -> "Trackers":
    """All trackers of a run behind one. Only the run folder's own records may raise (a full disk).

    Args:
        tracking: the configured choice.
        folder: the run folder.
        name: the run's name.
        after_round: when resuming, the last complete round; records of later rounds are dropped.
            -1 for a new run: whatever an earlier run left is dropped.
    """
    trackers = Trackers([JsonlTracker(folder, after_round)])
    try:
        trackers.trackers.extend(tracking.open(folder, name))
    except Exception as error:
        trackers.lose(type(tracking).__name__, error)
    return trackers


@dataclass
class Trackers:
    """Passes everything on. A tracker that raises is logged once and the run goes on; only the run
    folder's own records must be written."""

    trackers: list[Tracker]
    _lost: dict[str, str] = field(default_factory=dict, init=False)
    """Tracker -> its first error."""

    @property
    def lost(self) -> str:
        """Which trackers missed something, and why; empty: none."""
        return "; ".join(f"{name}: {error}" for name, error in self._lost.items())

    def lose(self, name: str, error: Exception) -> None:
        """Note that a tracker missed something."""
        if name not in self._lost:
            self._lost[name] = f"{type(error).__name__}: {error}"
            log.error("%s failed, the run goes on without it: %s", name, self._lost[name])
        log.debug("%s failed", name, exc_info=error)

    def config(self, values: Mapping[str, Any]) -> None:
        self._each("config", values)

    def round(self, record: Record) -> None:
        self._each("round", record)

    def clients(self, rows: Sequence[Record]) -> None:
        self._each("clients", rows)

    def evaluated(self, rows: Sequence[Record]) -> None:
        self._each("evaluated", rows)

    def close(self) -> None:
        self._each("close")

    def _each(self, method: str, *values: Any) -> None:
        for tracker in self.trackers:
            try:
                getattr(tracker, method)(*values)
            except Exception as error:
                if isinstance(tracker, JsonlTracker):
                    raise  # a round without a record would be a round that cannot be cited
                self.lose(type(tracker).__name__, error)


# --- JSON lines -----------------------------------------------------------------------------------


class JsonlTracker:
    """``metrics.jsonl``, ``clients.jsonl`` and ``evaluations.jsonl``, on the disk before the next
    round begins.

    NaN and infinities are written as null: JSON has no word for them.
    """

    def __init__(self, folder: Path, after_round: int = -1) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.metrics_file = folder / "metrics.jsonl"
        self.clients_file = folder / "clients.jsonl"
        self.evaluations_file = folder / "evaluations.jsonl"
        for file in (self.metrics_file, self.clients_file, self.evaluations_file):
            _forget_after(file, after_round)
        _forget_unfinished(self.evaluations_file, self.metrics_file)

    def config(self, values: Mapping[str, Any]) -> None:
        """Nothing: ``config.yaml`` lies beside the records."""

    def round(self, record: Record) -> None:
        _append(self.metrics_file, [record])

    def clients(self, rows: Sequence[Record]) -> None:
        _append(self.clients_file, rows)

    def evaluated(self, rows: Sequence[Record]) -> None:
        _append(self.evaluations_file, rows)

    def close(self) -> None:
        """Nothing: every record is already on the disk."""


def read_jsonl(file: Path) -> list[dict[str, Any]]:
    """The records of a file; a last line torn by a kill is left out, a missing file is empty."""
    return list(_records(file)) if file.is_file() else []


def plain(value: Any) -> Any:
    """A JSON value: scalars of NumPy and PyTorch become Python's, NaN and infinities None."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    return plain(value.item()) if hasattr(value, "item") else str(value)


def _append(file: Path, records: Sequence[Record]) -> None:
    with naming(file), file.open("a", encoding="utf-8") as f:
        f.write(_lines(records))
        f.flush()
        os.fsync(f.fileno())


def _lines(records: Sequence[Record]) -> str:
    lines = (json.dumps(plain(r), ensure_ascii=False, allow_nan=False) for r in records)
    return "".join(f"{line}\n" for line in lines)


def _records(file: Path) -> Iterator[dict[str, Any]]:
    with file.open(encoding="utf-8", errors="replace") as f:
        for number, line in enumerate(f, start=1):
            try:
                record = json.loads(line)
            except ValueError:
                log.warning("%s, line %d is not JSON and left out", file, number)
                continue
            if not isinstance(record, dict) or not is_round(record.get("round")):
                log.warning("%s, line %d is no record of a round and left out", file, number)
                continue
            yield record


def is_round(value: object) -> bool:
    """Whether a value is the number of a round: a whole number >= 0, and no truth value."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def missing_rounds(file: Path, last: int) -> list[int]:
    """The rounds from 1 to ``last`` of which a ``metrics.jsonl`` has no record."""
    found = {r.get("round") for r in read_jsonl(file) if r.get("kind") == "round"}
    return [n for n in range(1, last + 1) if n not in found]


def _forget_after(file: Path, last: int) -> None:
    """Drop the records of later rounds, all at once or not at all."""
    if not file.exists():
        return
    kept = [r for r in _records(file) if r["round"] <= last]
    write_file(file, _lines(kept))


def _forget_unfinished(rows: Path, metrics: Path) -> None:
    """Drop the rows of clients whose evaluation has no record: a resumed run repeats it."""
    if not rows.exists():
        return
    keys = ("round", "group", "adapter")
    whole = {
        tuple(r.get(k) for k in keys) for r in read_jsonl(metrics) if r.get("kind") == "evaluate"
    }
    kept = [r for r in _records(rows) if tuple(r.get(k) for k in keys) in whole]
    write_file(rows, _lines(kept))


# --- Weights & Biases -----------------------------------------------------------------------------

DATA_DIR = "WANDB_DATA_DIR"
_NOT_IN_ADDRESSES = "/\\#?%:"
"""Characters that W&B refuses in the name of a project (``validate_project``)."""
_LONGEST_NAME = 128
"""Characters of a project, group or run that W&B accepts. Of a project its client says so
(``validate_project`` in ``wandb/sdk/wandb_settings.py``, 0.31); of a run's name and group only its
service, once the run has begun (github.com/NVIDIA-NeMo/Skills, issue 842 and pull request 859). For
an entity, which must exist already, no limit is known."""


def _validate_settings(**values: Any) -> None:
    """Raise a ValueError with W&B's own words for settings that it refuses."""
    try:
        import wandb
    except ImportError as error:
        raise ValueError(f"tracking=wandb needs wandb (pip install wandb): {error}") from error
    for name, value in values.items():
        try:
            wandb.Settings(**{name: value})
        except ValueError as error:  # pydantic's, with the words of W&B's in its last-but-one line
            said: list[dict[str, Any]] = getattr(error, "errors", list)()
            reason = said[0]["msg"] if said else str(error)
            key = name.removeprefix("run_")
            raise ValueError(f"tracking.{key}={value!r}: {reason}") from error
        except wandb.errors.UsageError as error:
            raise ValueError(f"tracking.{name}={value!r}: {error}") from error


class WandbTracker:
    """One run of Weights & Biases whose files lie in the run folder.

    Its id is kept in ``wandb_run_id``, so that a resumed run continues the same one. Offline, every
    process writes a folder of its own under ``wandb/`` with that id: ``wandb sync`` in this order,
    the later ones with ``--append``.
    """

    def __init__(self, settings: Wandb, folder: Path, name: str) -> None:
        import wandb  # here, because it takes a second and most runs do without

        (folder / "wandb").mkdir(parents=True, exist_ok=True)
        # Tables are staged in the home directory unless the environment says otherwise.
        self._data_dir_before = os.environ.get(DATA_DIR)
        os.environ[DATA_DIR] = str(folder / "wandb")
        self._wandb: Any = wandb
        self._table = settings.client_table
        self._run = self._init(settings, folder, name)

    def config(self, values: Mapping[str, Any]) -> None:
        self._run.config.update(plain(values), allow_val_change=True)

    def round(self, record: Record) -> None:
        self._run.log(flat_metrics(record), step=int(record["round"]))

    def clients(self, rows: Sequence[Record]) -> None:
        if not rows:
            return
        step = int(rows[0]["round"])
        histograms = {
            f"clients/{name}": self._wandb.Histogram(values)
            for name, values in distributions(rows).items()
        }
        if self._table:
            columns = list(dict.fromkeys(key for row in rows for key in row if key != "traceback"))
            data = [[plain(row.get(key)) for key in columns] for row in rows]
            histograms["clients/table"] = self._wandb.Table(
                columns=columns, data=data, allow_mixed_types=True
            )
        self._run.log(histograms, step=step)

    def evaluated(self, rows: Sequence[Record]) -> None:
        """Nothing: the means are in the record, the clients in ``evaluations.jsonl``."""

    def findings(self, found: Findings) -> None:
        """Tables and pictures of many runs, in the place of those that the run had before."""
        from PIL import Image

        self.config(found.config)
        shown: dict[str, Any] = {
            f"table/{name}": self._wandb.Table(
                columns=list(columns), data=[plain(row) for row in rows], allow_mixed_types=True
            )
            for name, (columns, rows) in found.tables.items()
        }
        for name, picture in found.figures.items():
            shown[f"figure/{name}"] = self._wandb.Image(Image.open(BytesIO(picture)))
        self._run.log(shown)

    def close(self) -> None:
        self._run.finish()
        if self._data_dir_before is None:
            os.environ.pop(DATA_DIR, None)
        else:
            os.environ[DATA_DIR] = self._data_dir_before

    def _init(self, settings: Wandb, folder: Path, name: str) -> Any:
        if settings.mode == "online":
            try:
                if self._wandb.login(prompt=False):
                    return self._start(settings, folder, name, "online")
                log.warning("W&B has no API key: recording offline (wandb login, then wandb sync)")
            except Exception as error:
                log.warning("W&B cannot go online, recording offline: %s", error)
        return self._start(settings, folder, name, "offline")

    def _start(self, settings: Wandb, folder: Path, name: str, mode: str) -> Any:
        return self._wandb.init(
            mode=mode,
            dir=str(folder),
            id=kept_id(folder / "wandb_run_id"),
            resume="allow",
            name=name,
            project=settings.project,
            entity=settings.entity or None,
            group=settings.group or None,
            tags=list(settings.tags) or None,
            notes=settings.notes or None,
            job_type=settings.job_type or None,
            settings=self._wandb.Settings(
                console="off",
                disable_git=True,
                save_code=False,
                silent=True,
                init_timeout=settings.init_timeout_s,
            ),
        )


def flat_metrics(record: Record) -> dict[str, Any]:
    """A record's metrics under names that keep groups apart: ``evaluate/seen/full/rouge_l``."""
    keys = ("kind", "round", "rounds", "group", "adapter")
    prefix = ""
    if record.get("kind") == "evaluate":
        parts = ["evaluate", record.get("group"), record.get("adapter")]
        prefix = "".join(f"{part}/" for part in parts if part)
    return {f"{prefix}{k.removeprefix('evaluate/')}": v for k, v in record.items() if k not in keys}


def distributions(rows: Sequence[Record]) -> dict[str, list[float]]:
    """Every numeric column of a round's clients, finite values only, and ``rank``.

    A client whose modules differ in rank (label ``30/200``) counts with its largest.
    """
    found: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            if name == "rank":
                value = max(int(r) for r in str(value).split("/"))
            if name in ("round", "client") or isinstance(value, bool | str):
                continue
            number = plain(value)
            if isinstance(number, int | float):
                found.setdefault(name, []).append(float(number))
    return found


def kept_id(file: Path) -> str:
    """A random name, twelve hexadecimal digits, that stays the same once the file has it."""
    if not file.exists():
        file.write_text(secrets.token_hex(6))
    return file.read_text().strip()
