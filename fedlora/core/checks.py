"""Checks of single values; each error names the field, its value and what is allowed."""

import math
from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


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


def fraction(name: str, value: float) -> None:
    """Raise a ValueError unless ``0 <= value <= 1``."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name}={value!r} must lie in [0, 1]")


def wrong_names(found: Iterable[str], due: Iterable[str]) -> str:
    """What is wrong with the modules that something names; empty if they are those that are due."""
    names, wanted = set(found), set(due)
    if names == wanted:
        return ""
    missing, extra = sorted(wanted - names), sorted(names - wanted)
    parts = [f"lacks {missing[0]}"] if missing else []
    parts += [f"has the unknown {extra[0]}"] if extra else []
    return (
        f"it {' and '.join(parts)} ({len(names)} modules, {len(missing)} missing, "
        f"{len(extra)} unknown)"
    )
