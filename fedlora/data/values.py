"""What one value of a record means, wherever it was read: whether it is there, its text, its id.

JSON, CSV, Parquet, pandas and NumPy spell the same value in many ways. Every source asks these
functions, so that all of them agree:

* **missing**: ``None``, NaN, ``pandas.NA`` and NaT; a field that is absent; an empty cell of a CSV
  file, which is read as ``None``. Zero, false, ``""`` in JSON and the words "NA" and "None" are
  values.
* **one id**: ``1``, ``1.0``, ``"1"``, ``" 1"`` and ``numpy.int64(1)``.
"""

import datetime
import decimal
import numbers
import re
import unicodedata
from collections.abc import Iterable
from typing import Any

import numpy as np

from fedlora.core.errors import DataError
from fedlora.data.records import SPLITS

SPLIT_NAMES = {s: s for s in SPLITS} | {
    "training": "train",
    "validation": "eval",
    "valid": "eval",
    "val": "eval",
    "dev": "eval",
    "evaluation": "eval",
}
"""What data sets call a split -> one of `SPLITS`."""

_SCALARS = (str, numbers.Number, np.bool_, datetime.date, datetime.time)
_INTEGER = re.compile(r"(-?(?:0|[1-9]\d*))(?:\.0*)?", re.ASCII)
_NUMBER = re.compile(r"[+-]?\d+(?:\.\d*)?(?:e[+-]?\d{1,3})?", re.ASCII | re.IGNORECASE)


def missing(value: Any) -> bool:
    """Whether a value stands for nothing: ``None``, NaN, NaT or ``pandas.NA``.

    >>> [missing(v) for v in (None, float("nan"), 0, 0.0, False, "", "0", "NaN", [])]
    [True, True, False, False, False, False, False, False, False]
    """
    if value is None or type(value).__name__ == "NAType":  # pandas.NA has no truth value
        return True
    return isinstance(value, (*_SCALARS, np.generic)) and bool(value != value)


def text(value: Any, name: str, where: str) -> str:
    """A value that is there as text: ``0`` is "0", ``False`` is "False".

    Raises:
        DataError: if it is a list, a mapping, bytes or something else without a plain text.
    """
    if not isinstance(value, _SCALARS):
        kind = type(value).__name__
        raise DataError(f"{where}: {name!r} must be a text or a number, not {kind}")
    return str(value)


def identity(value: Any, name: str, where: str) -> str:
    """The one spelling of a client's id or a label: integers without a fraction, no outer spaces.

    >>> [identity(v, "client", "") for v in (1, 1.0, "1", " 1", "1.0", np.int64(1), "01", "a 1")]
    ['1', '1', '1', '1', '1', '1', '01', 'a 1']
    """
    spelled = unicodedata.normalize("NFC", text(value, name, where)).strip()
    if isinstance(value, float | np.floating | decimal.Decimal) and float(value).is_integer():
        return str(int(value))
    integer = _INTEGER.fullmatch(spelled)
    return str(int(integer[1])) if integer else spelled


def check_spellings(ids: Iterable[tuple[str, str]], name: str) -> None:
    """Refuse two ids that are probably one: "7" and "007", "1000" and "1e3", "a b" and "a  b".

    Args:
        ids: results of `identity`, each with where it was read.
        name: the field.

    Raises:
        DataError: naming both spellings and where they are.
    """
    known: dict[object, tuple[str, str]] = {}
    for spelled, where in ids:
        first, place = known.setdefault(_likeness(spelled), (spelled, where))
        if first != spelled:
            raise DataError(
                f"{name!r} is {first!r} at {place} and {spelled!r} at {where}: if that is one "
                "client or label, spell it in one way; if they are two, give one another name"
            )


def _likeness(spelled: str) -> object:
    """Equal for what could be two spellings of one id."""
    plain = " ".join(unicodedata.normalize("NFKC", spelled).split())
    if _NUMBER.fullmatch(plain):
        return decimal.Decimal(plain)
    return plain.lower() if plain.lower() in ("true", "false") else plain


def split_name(value: Any, name: str, where: str) -> str:
    """The split that a value names, one of `SPLITS`.

    Raises:
        DataError: naming the value and what is allowed.
    """
    found = SPLIT_NAMES.get(str(value).strip().lower())
    if missing(value) or found is None:
        raise DataError(f"{where}: {name}={value!r} is not one of {sorted(SPLIT_NAMES)}")
    return found


def client_number(value: Any, name: str, where: str) -> int:
    """A client's number in ``0..N-1``, in whatever spelling.

    Raises:
        DataError: if it is missing or is no whole number.
    """
    if not missing(value) and not isinstance(value, bool | np.bool_):
        spelled = identity(value, name, where)
        if spelled.isascii() and spelled.isdigit():
            return int(spelled)
    raise DataError(f"{where}: {name}={value!r} must be a whole number, 0 or more")
