"""Checks of single values; each error names the field, its value and what is allowed."""

import math
from collections.abc import Iterable, Sequence
from typing import TypeGuard, TypeVar

T = TypeVar("T")


def is_real(value: object) -> TypeGuard[int | float]:
    """Whether a value is a number as JSON has them; True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def real(name: str, value: object) -> float:
    """A value as a float; raise a ValueError unless it is a number: text is not read as one."""
    if not is_real(value):
        raise ValueError(f"{name} is {value!r:.80}, expected a number")
    return float(value)


def one_line(text: object, length: int = 300) -> str:
    """Foreign text for a log line: without control characters, of bounded length."""
    plain = "".join(c if c.isprintable() else " " for c in str(text)[: 4 * length])
    return plain if len(plain) <= length else f"{plain[: length - 1]}…"


def one_of(name: str, value: T, allowed: Iterable[T]) -> None:
    """Raise a ValueError that names the field, its value and what is allowed."""
    choices = list(allowed)
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not one of {choices}")


def at_least(name: str, value: float, low: float, *, strict: bool = False) -> None:
    """Raise a ValueError unless ``value >= low`` (``> low`` if strict) and finite."""
    if not (math.isfinite(value) and (value > low if strict else value >= low)):
        finite = "" if math.isfinite(value) else " and finite"
        raise ValueError(f"{name}={value!r} must be {'>' if strict else '>='} {low}{finite}")


MOST_THREADS = 1024
"""Threads of one process: OpenMP ends a process for which it cannot start them all."""


def within(name: str, value: int, low: int, high: int) -> None:
    """Raise a ValueError unless ``low <= value <= high``."""
    if not low <= value <= high:
        raise ValueError(f"{name}={value!r} must lie in {low:,}..{high:,}")


def distinct(name: str, values: Sequence[str]) -> None:
    """Raise a ValueError that names what is listed twice."""
    if twice := sorted({v for v in values if values.count(v) > 1}):
        raise ValueError(f"{name}={list(values)} lists {twice[0]} more than once")


def fraction(name: str, value: float) -> None:
    """Raise a ValueError unless ``0 <= value <= 1``."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name}={value!r} must lie in [0, 1]")


def wrong_names(found: Iterable[str], due: Iterable[str]) -> str:
    """What is wrong with the modules that something names; empty if they are those that are due."""
    ordered, first = list(found), list(due)
    if ordered == first:
        return ""
    names, wanted = set(ordered), set(first)
    if names == wanted:
        return "it names its modules in another order than it was sent"
    missing, extra = sorted(wanted - names), sorted(names - wanted)
    parts = [f"lacks {missing[0]}"] if missing else []
    parts += [f"has the unknown {extra[0]}"] if extra else []
    return (
        f"it {' and '.join(parts)} ({len(names)} modules, {len(missing)} missing, "
        f"{len(extra)} unknown)"
    )
