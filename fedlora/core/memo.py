"""Answers that take seconds to find, kept as files of the cache for the next process that asks.

Such an answer follows from this package, the libraries of `LIBRARIES` and the question alone: their
sources and versions are part of the key, and the caller puts everything else into the question,
files by a hash of what they hold. What cannot be read, or was written for another question, is
asked again; a cache that cannot be written costs time and nothing else.
"""

import functools
import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedlora.core.cache import cache_root
from fedlora.core.files import write_file
from fedlora.core.reading import is_intact, sealed
from fedlora.core.source_hash import PACKAGES, source_hash

FOLDER = "answers"
"""In the cache."""
LIBRARIES = ("torch", "transformers", "peft")
MOST = 256
"""Answers that are kept; each edit of the sources makes all of them old."""


def remembered(
    subject: str, question: Mapping[str, Any], answer: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """The answer to a question, found once on this machine.

    Args:
        subject: of the question; letters.
        question: JSON values, all that the answer depends on beside sources and versions.
        answer: finds it, as JSON values; what it raises is raised, and not kept.
    """
    whole = _whole(subject, question)
    file = _file(subject, whole)
    kept = _kept(file, whole)
    if kept is not None:
        return kept
    found: dict[str, Any] = json.loads(json.dumps(answer()))  # as the next process reads it
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        _make_room(file.parent)
        write_file(file, json.dumps(sealed({"question": whole, "answer": found})))
    return found


def is_ours(value: object) -> bool:
    """Whether the class of a value is in the sources that are part of every key: what a user's own
    class answers may change without them."""
    return type(value).__module__.partition(".")[0] in PACKAGES


def _whole(subject: str, question: Mapping[str, Any]) -> str:
    """Everything that the answer depends on, as one text."""
    parts = {"subject": subject, "question": question, "sources": source_hash()}
    return json.dumps(parts | {"versions": _versions()}, sort_keys=True)


@functools.lru_cache(maxsize=1)
def _versions() -> tuple[str, ...]:
    return tuple(map(importlib.metadata.version, LIBRARIES))


def _file(subject: str, whole: str) -> Path:
    digest = hashlib.sha256(whole.encode()).hexdigest()[:16]
    return cache_root() / FOLDER / f"{subject}-{digest}.json"


def _kept(file: Path, whole: str) -> dict[str, Any] | None:
    """What a file answers, if it is whole and of this question."""
    try:
        values = json.loads(file.read_bytes())
        fits = is_intact(values) and values["question"] == whole
        return dict(values["answer"]) if fits else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _make_room(folder: Path) -> None:
    """Remove the oldest answers if there are too many."""
    files = sorted(folder.glob("*.json"), key=lambda p: p.stat().st_mtime_ns)
    for file in files[: max(0, len(files) - MOST + 1)]:
        file.unlink(missing_ok=True)
