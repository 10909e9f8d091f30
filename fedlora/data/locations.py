"""What `data.path` names: a file, a pattern, a folder, a data set saved to disk or on the hub."""

import glob
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.core.errors import DataError
from fedlora.data import files
from fedlora.data.fields import Row
from fedlora.data.source import file_identity
from fedlora.data.suffixes import COMPRESSED, SUFFIXES
from fedlora.data.values import SPLIT_NAMES, missing

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_SAVED = ("dataset_dict.json", "state.json")  # what `save_to_disk` writes
_PART = re.compile(r"-\d{5}-of-\d{5}$")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Location:
    """A place of records, local or on the hub."""

    path: str
    revision: str | None = None
    """Revision of a hub data set."""
    subset: str | None = None
    """Subset of a hub data set that has several."""

    def rows(self) -> Iterator[Row]:
        """Every record, in an order that depends on nothing but the content and the names.

        Raises:
            DataError: naming the place, what is wrong and what to do.
        """
        if self._saved():
            yield from _from_splits(load_saved(self._local()), self.path)
        elif found := self._files():
            names = self._names(found)
            for file, (client, split) in zip(found, names, strict=True):
                for row in files.read(file):
                    yield row._replace(client=client, split=row.split or split)
        else:
            parts = load_hub(self.hub_id(), self.revision, self.subset)
            yield from _from_splits(parts, self.path)

    def identity(self) -> list[str]:
        """What the records are: content of the files, and their names where these say something."""
        if self._saved():
            return [file_identity(f) for f in sorted(self._local().rglob("*.arrow"))]
        found = self._files()
        if not found:
            return [f"{self.hub_id()}@{self.revision} {self.subset or ''}"]
        names = [] if len(found) == 1 else [str(name) for name in self._names(found)]
        return [file_identity(f) for f in found] + names

    def hub_id(self) -> str:
        """The path as a hub id.

        Raises:
            DataError: if it is none either.
        """
        data_file = Path(self.path).suffix in (*SUFFIXES, *COMPRESSED)
        if data_file or not _HUB_ID.fullmatch(self.path):
            raise DataError(
                f"data.path={self.path!r} is neither a folder nor a file nor a hub id "
                f"'owner/name', and as a pattern it matches no file (from {Path.cwd()})"
            )
        return self.path

    def _local(self) -> Path:
        return Path(self.path).expanduser()

    def _saved(self) -> bool:
        return any((self._local() / name).is_file() for name in _SAVED)

    def _files(self) -> list[Path]:
        """The files of a pattern in order of their names, or the data files of a folder."""
        path = self._local()
        if path.is_file():
            return [path]
        if not path.is_dir():
            found = (Path(p) for p in glob.glob(str(path), recursive=True))
            return sorted(p for p in found if p.is_file())
        every = [p for p in sorted(path.rglob("*")) if p.is_file() and not _hidden(p, path)]
        data = [p for p in every if _is_data(p)]
        if not data:
            names = ", ".join(p.name for p in every[:8]) or "nothing"
            raise DataError(
                f"data.path={self.path!r} is a folder without data files "
                f"(*{', *'.join(SUFFIXES)}, also compressed); it has: {names}"
            )
        if others := [p.name for p in every if p not in set(data)]:
            log.info("data.path=%s: %d other files are ignored: %s", path, len(others), others[:8])
        return data

    def _names(self, found: Sequence[Path]) -> list[tuple[str, str]]:
        """Client and split of each file, by its name below the folder.

        ``train/7.json`` and ``user_7.train.json`` name a split if every file does so.
        """
        path = self._local()
        root = path if path.is_dir() else Path(os.path.commonpath([p.parent for p in found]))
        labels = [_PART.sub("", _stem(p.relative_to(root)).as_posix()) for p in found]
        words = [re.split(r"[/_.-]", label) for label in labels]
        splits = [[SPLIT_NAMES[w] for w in held if w in SPLIT_NAMES] for held in words]
        if all(len(s) == 1 for s in splits) and len({s[0] for s in splits}) > 1 and path.is_dir():
            rest = ["_".join(w for w in held if w not in SPLIT_NAMES) for held in words]
            return [(name, s[0]) for name, s in zip(rest, splits, strict=True)]
        return [(label, "") for label in labels]


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _is_data(path: Path) -> bool:
    """Whether a file has the name of a data file."""
    suffixes = [s.lower() for s in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return bool(suffixes) and suffixes[-1] in SUFFIXES


def _stem(path: Path) -> Path:
    """A path without the suffixes of a data file."""
    if path.suffix.lower() in COMPRESSED:
        path = path.with_suffix("")
    return path.with_suffix("") if path.suffix.lower() in SUFFIXES else path


# --- data sets of the library `datasets` ----------------------------------------------------------


def load_saved(folder: Path) -> Mapping[str, Any]:
    """The splits of a data set that `save_to_disk` wrote.

    Raises:
        DataError: if it cannot be read.
    """
    import datasets

    try:
        return _splits(datasets.load_from_disk(str(folder)))
    except Exception as error:  # missing files, another version, damage: many classes, one remedy
        raise DataError(
            f"data.path={str(folder)!r} was written by save_to_disk of `datasets` and cannot be "
            f"read ({type(error).__name__}: {error}); save it again"
        ) from error


def load_hub(hub_id: str, revision: str | None, subset: str | None = None) -> Mapping[str, Any]:
    """The splits of a data set on the hub.

    Raises:
        DataError: if it cannot be loaded.
    """
    import datasets

    try:
        names = [subset] if subset else []
        return _splits(datasets.load_dataset(hub_id, *names, revision=revision))
    except Exception as error:  # offline, unknown, gated: many classes, one remedy
        raise DataError(
            f"data.path={hub_id!r} is no local file or folder and could not be loaded from the "
            f"hub ({type(error).__name__}: {error}); give a path, or go online once"
        ) from error


def _splits(loaded: Any) -> Mapping[str, Any]:
    """Data sets by split; one that has no splits by an empty name."""
    return loaded if isinstance(loaded, dict) else {"": loaded}


def _from_splits(parts: Mapping[str, Any], path: str) -> Iterator[Row]:
    """Rows of each split; a data set whose only split is "train" is not split yet."""
    alone = set(parts) <= {"", "train"}
    for name, part in parts.items():
        if not alone and name.lower() not in SPLIT_NAMES:
            raise DataError(
                f"data.path={path!r} has a split {name!r}, which is not one of "
                f"{sorted(SPLIT_NAMES)}: save the wanted splits under such names"
            )
        split = "" if alone else SPLIT_NAMES[name.lower()]
        yield from (row._replace(split=split) for row in table_rows(part, f"{path} {name}".strip()))


def table_rows(table: Any, where: str) -> Iterator[Row]:
    """Rows of one `datasets.Dataset`; the numbers of a class label are read as its names."""
    names = {
        column: feature.names
        for column, feature in table.features.items()
        if hasattr(feature, "names")
    }
    for i, values in enumerate(table):
        for column, known in names.items():
            value = values[column]
            empty = missing(value) or value < 0  # the library's mark of an unknown label
            values[column] = None if empty else known[value]
        yield Row(values, f"{where}, row {i}")
