"""Tables on disk, checked before a row of them is read."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedlora.core.errors import DataError


def require(columns: Any, wanted: Sequence[str], where: str) -> None:
    """Refuse columns, or an object's keys, that lack one of those wanted."""
    if not hasattr(columns, "__iter__") or isinstance(columns, str):
        raise DataError(f"{where} must be an object, not {columns!r}")
    missing = [c for c in wanted if c not in columns]
    if missing:
        raise DataError(f"{where} has no {missing}; found {sorted(columns)}, needed {list(wanted)}")


def open_parquet(path: Path, wanted: Sequence[str]) -> Any:
    """A `pyarrow.parquet.ParquetFile` that has the columns wanted.

    Raises:
        DataError: if it is no Parquet file or lacks a column.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"data.path={str(path)!r} is not a Parquet file: {error}") from error
    require(file.schema_arrow.names, wanted, str(path))
    return file
