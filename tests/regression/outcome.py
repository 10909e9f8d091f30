"""What is kept of a run, and what two of them have in common."""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from tests.regression.cases import ADDED, RENAMED, STATE_RENAMED

Outcome = dict[str, Any]
"""``states``, ``records``, ``clients`` and ``exports`` are hashes, to be equal; ``metrics`` are
numbers for people, and for machines of another kind."""
T = TypeVar("T")
IGNORED = ("seconds", "per_second")
"""Ends of the names of numbers that no two runs share."""
WORDS = ("kind", "group", "adapter", "tier", "rank", "failure")
WORDS_OF = ("spp/",)
"""Texts that are kept: these names, and those that begin so. Others are for people."""
DIGITS = 7
RELATIVE, ABSOLUTE = 1e-4, 1e-5
"""How far numbers may be apart on another processor. Gaps of exact averages are rounding itself,
about 1e-6."""


def kept(record: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a record or a client's row that a run repeats, by the names of the reference."""
    names = {new: old for old, new in RENAMED.items()}
    found = {names.get(n, n): value for n, value in record.items() if n not in ADDED}
    return {n: _number(found[n]) for n in sorted(found) if _compared(n, found[n])}


def _number(value: Any) -> Any:
    """A count is the same number whether it is held as an integer or not."""
    return float(value) if isinstance(value, int) else value


def _compared(name: str, value: Any) -> bool:
    if name.endswith(IGNORED):
        return False
    return not isinstance(value, str) or name in WORDS or name.startswith(WORDS_OF)


def columns(records: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, list[Any]]]:
    """Numbers by what they are of (``evaluate seen own``) and name, round after round."""
    found: dict[str, dict[str, list[Any]]] = {}
    for record in map(kept, records):
        of = " ".join(str(record[k]) for k in ("kind", "group", "adapter") if k in record)
        table = found.setdefault(of, {})
        for name, value in record.items():
            if name not in ("kind", "group", "adapter"):
                table.setdefault(name, []).append(_short(value))
    return found


def _short(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return int(value) if value.is_integer() else float(f"{value:.{DIGITS}g}")


def digest(value: Any) -> str:
    """Of plain values, whatever the order of their keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def nameless(hashes: Iterable[str]) -> str:
    """Of tensors in any order and under any names: tells a new name from a new number."""
    return digest(sorted(hashes))[:16]


def old_names(state: Mapping[str, T]) -> dict[str, T]:
    """A state's tensors by the names that they had when the reference was recorded."""
    return {_old_name(name): value for name, value in state.items()}


def _old_name(name: str) -> str:
    for old, new in STATE_RENAMED.items():
        if name.startswith(new):
            return old + name[len(new) :]
    return name


def differences(reference: Outcome, found: Outcome) -> list[str]:
    """What is not the same to the last bit, the telling things first."""
    said = []
    for i, (old, new) in enumerate(zip(reference["states"], found["states"], strict=False)):
        if old != new:
            why = "names alone" if old[1] == new[1] else f"{old[0][:12]} -> {new[0][:12]}"
            said.append(f"state of round {i + 1} ({why})")
            break
    if len(reference["states"]) != len(found["states"]):
        said.append(f"{len(reference['states'])} -> {len(found['states'])} rounds")
    for part in ("records", "clients", "population"):
        if reference.get(part) != found.get(part):
            said.append(part)
    files = sorted(reference["exports"].keys() | found["exports"].keys())
    said += [f for f in files if reference["exports"].get(f) != found["exports"].get(f)]
    return said


def apart(reference: Outcome, found: Outcome) -> list[str]:
    """Metrics that are not even close, by name."""
    tables, others = reference["metrics"], found["metrics"]
    said = []
    for of in sorted(tables.keys() | others.keys()):
        table, other = tables.get(of, {}), others.get(of, {})
        for name in sorted(table.keys() | other.keys()):
            old, new = table.get(name, []), other.get(name, [])
            if not _close(old, new):
                said.append(f"{of}: {name} {old} -> {new}")
    return said


def _close(old: Sequence[Any], new: Sequence[Any]) -> bool:
    return len(old) == len(new) and all(
        math.isclose(a, b, rel_tol=RELATIVE, abs_tol=ABSOLUTE) if _numbers(a, b) else a == b
        for a, b in zip(old, new, strict=True)
    )


def _numbers(*values: Any) -> bool:
    return all(isinstance(v, int | float) for v in values)
