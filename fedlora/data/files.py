"""Rows of one file of records, whatever its form, or a sentence that says what it is instead.

The content decides, not the name: JSON lines, a JSON array or an object that holds one, CSV with
any usual separator, Parquet and Arrow; each also compressed by gzip or zstd.

JSON and CSV are not read through `datasets` or pandas, which guess types by column: there "007"
becomes 7, and the answers "NA" and "None" become missing.
"""

import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import IO, Any

from fedlora.core.errors import DataError
from fedlora.data.conversations import FIELDS as CONVERSATIONS
from fedlora.data.fields import Row, require
from fedlora.data.values import SPLIT_NAMES

_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_FOREIGN = (  # how a file begins, what it is, what to do
    (b"PK\x03\x04", "a zip archive or an Excel workbook", "unpack it, or save the sheet as CSV"),
    (b"version https://git-lfs", "a pointer of Git LFS, not the data", "run `git lfs pull`"),
    (b"SQLite format 3", "an SQLite database", "export the table as CSV"),
    (b"%PDF", "a PDF document", "records are JSON lines, a JSON array, CSV or Parquet"),
    (b"\x89HDF", "an HDF5 file", "save the table as Parquet"),
    (b"\x80", "a pickle, which is never opened", "save the data as JSON lines or Parquet"),
    (b"\x93NUMPY", "a NumPy array", "save the texts as JSON lines"),
    (b"\xfd7zXZ", "an xz archive", "unpack it, or compress it by gzip or zstd"),
    (b"Obj\x01", "an Avro file", "save the table as Parquet"),
    (b"<", "an HTML or XML page", "download the data file itself"),
)
_MARKS = ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))
_FORMS = "JSON lines, a JSON array, CSV with a header or Parquet"


def read(file: Path) -> Iterator[Row]:
    """The rows of a file, in its order.

    Raises:
        DataError: naming the place, what is wrong and what to do.
    """
    try:
        with closing(_opened(file)) as stream:
            yield from _rows(stream, file)
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(
            f"{file} cannot be read ({type(error).__name__}: {error}); if it is compressed, it is "
            "damaged or not complete"
        ) from error


def _opened(file: Path) -> Any:
    """A file as an uncompressed binary stream that can be peeked into."""
    with file.open("rb") as stream:
        head = stream.read(4)
    if head == _ZSTD:
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(file), compression="zstd"))
    return gzip.open(file) if head.startswith(_GZIP) else file.open("rb")


def _rows(stream: Any, file: Path) -> Iterator[Row]:
    """Rows of an uncompressed stream by how it begins."""
    head = bytes(stream.peek(512))[:512]
    if head.startswith((b"PAR1", b"ARROW1", b"\xff\xff\xff\xff")):
        whole = stream if isinstance(stream, io.BufferedReader) and stream.seekable() else None
        yield from _from_table(whole or io.BytesIO(stream.read()), head, file)
        return
    for magic, what, remedy in _FOREIGN:
        if head.lstrip().startswith(magic):
            raise DataError(f"{file} is {what}: {remedy}")
    if head[257:262] == b"ustar":
        raise DataError(f"{file} is a tar archive: unpack it and name a file or the folder")
    encoding = next((name for mark, name in _MARKS if head.startswith(mark)), "utf-8")
    if b"\0" in head and encoding != "utf-16":
        raise DataError(f"{file} is a binary file of an unknown form; records are {_FORMS}")
    begin = head.decode(encoding, errors="ignore").lstrip()[:1]
    if begin not in ("{", "["):
        yield from _from_csv(_text(stream.read(), encoding, file), file)
    elif begin == "[" or encoding == "utf-16":
        yield from _from_document(_text(stream.read(), encoding, file), file)
    else:
        yield from _from_lines(stream, file)


def _text(content: bytes, encoding: str, file: Path) -> str:
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DataError(
            f"{file}:{line} is not UTF-8: byte 0x{content[error.start]:02x}; save the file as "
            "UTF-8 (iconv -f latin1 -t utf-8)"
        ) from error


# --- JSON ----------------------------------------------------------------------------------------


def _from_lines(stream: IO[bytes], file: Path) -> Iterator[Row]:
    """An object per line; or one object over several lines, which may hold the records."""
    lines = ((n, line) for n, line in enumerate(stream, 1) if line.strip())
    number, first = next(lines)
    second = next(lines, None)
    try:
        value = json.loads(first)
    except ValueError as error:
        if second is None:
            raise _not_json(f"{file}:{number}", error) from error
        rest = b"".join(line for _, line in chain([second], lines))
        yield from _from_document(_text(b"\n" * (number - 1) + first + rest, "utf-8", file), file)
        return
    if second is None:
        yield from _from_value(value, file, f"{file}:{number}")
        return
    yield Row(value, f"{file}:{number}")
    for number, line in chain([second], lines):
        try:
            yield Row(json.loads(line), f"{file}:{number}")
        except ValueError as error:  # also bytes that are not UTF-8
            raise _not_json(f"{file}:{number}", error) from error


def _from_document(text: str, file: Path) -> Iterator[Row]:
    """A whole file that is one JSON value."""
    try:
        value = json.loads(text.removeprefix("\ufeff"))
    except json.JSONDecodeError as error:
        raise _not_json(f"{file}:{error.lineno}", error) from error
    yield from _from_value(value, file, f"{file}:1")


def _not_json(where: str, error: ValueError) -> DataError:
    return DataError(f"{where} is not JSON: {error}; needed are records, one per line or in a list")


def _from_value(value: Any, file: Path, where: str) -> Iterator[Row]:
    """An array of records, an object that holds such arrays, or a single record."""
    if isinstance(value, list):
        yield from (Row(v, f"{file}, record {i}") for i, v in enumerate(value, 1))
        return
    lists = {
        str(k): v
        for k, v in value.items()
        if k not in CONVERSATIONS and isinstance(v, list) and v and isinstance(v[0], Mapping)
    }
    if (set(lists) and set(lists) <= set(SPLIT_NAMES)) or len(lists) == 1:
        for name, rows in lists.items():
            split = SPLIT_NAMES.get(name, "") if len(lists) > 1 else ""
            where = f"{file}, {name!r}, record"
            yield from (Row(v, f"{where} {i}", split=split) for i, v in enumerate(rows, 1))
    elif lists:
        raise DataError(f"{file} holds several lists, {sorted(lists)}: save each as a file")
    elif len(value) > 1 and all(_is_column(v) for v in value.values()):
        raise DataError(
            f"{file} holds columns {sorted(value)}, not records: with pandas, save it by "
            "to_json(path, orient='records')"
        )
    else:
        yield Row(value, where)


def _is_column(value: Any) -> bool:
    """Whether an object's value is a column of a table: a list of scalars, or scalars by row."""
    entries = value.values() if isinstance(value, Mapping) else value
    return isinstance(value, Mapping | list) and all(
        not isinstance(entry, Mapping | list) for entry in entries
    )


# --- CSV -----------------------------------------------------------------------------------------


def _from_csv(text: str, file: Path) -> Iterator[Row]:
    """Rows below a header. An empty cell is missing, all others are texts as they are written."""
    header = next((line for line in text.splitlines() if line.strip()), "")
    if not header:
        return
    separator = max(",;\t|", key=lambda c: len(next(csv.reader([header], delimiter=c))))
    names = [name.strip() for name in next(csv.reader([header], delimiter=separator))]
    single = len(names) < 2 and names[0] not in CONVERSATIONS
    if single or not all(names[1:]) or max(map(len, names)) > 80:  # an index has no name
        raise DataError(f"{file} is plain text without a header of fields; records are {_FORMS}")
    for values, where in csv_rows(text, str(file), separator):
        yield Row({k: v or None for k, v in values.items()}, where)


def csv_rows(
    text: str, where: str, separator: str = ",", needed: Sequence[str] = ()
) -> Iterator[tuple[dict[str, str], str]]:
    """The cells of every row by the names of the header, and the line on which it ends.

    Args:
        text: of the whole file.
        where: the file, for messages.
        separator: between cells.
        needed: names that the header must have.

    Raises:
        DataError: naming the line.
    """
    csv.field_size_limit(sys.maxsize)  # texts are longer than the 128 KiB that it allows
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    names: list[str] = []
    try:
        for cells in reader:
            at = f"{where}:{reader.line_num}"
            if not any(cells):
                continue
            if not names:
                names = [name.strip() for name in cells]
                if twice := sorted({name for name in names if names.count(name) > 1}):
                    raise DataError(f"{at} has the columns {twice} twice")
                require(names, needed, where)
                continue
            if len(cells) != len(names):
                raise DataError(
                    f"{at} has {len(cells)} fields, not {len(names)} as the header: {names}"
                )
            yield dict(zip(names, cells, strict=True)), at
    except csv.Error as error:
        raise DataError(f"{where}:{reader.line_num} is not CSV: {error}") from error
    require(names, needed, where)


# --- tables --------------------------------------------------------------------------------------


def parquet_rows(
    file: Path, needed: Sequence[str], only: Sequence[str] = ()
) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file that must have some columns.

    Args:
        file: its path.
        needed: names of the columns.
        only: read only these; empty: read all.

    Raises:
        DataError: if it is no Parquet file or lacks a column.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"data.path={str(file)!r} is not a Parquet file: {error}") from error
    require(table.schema_arrow.names, needed, str(file))
    for batch in table.iter_batches(4096, columns=list(only) or None):
        yield from batch.to_pylist()


def _from_table(stream: IO[bytes], head: bytes, file: Path) -> Iterator[Row]:
    """Parquet or Arrow."""
    import pyarrow

    number = 0
    try:
        for batch in _batches(stream, head):
            for values in batch.to_pylist():
                yield Row(values, f"{file}, row {number}")
                number += 1
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{file} is damaged: {error}") from error


def _batches(stream: IO[bytes], head: bytes) -> Iterator[Any]:
    """Record batches of a Parquet file, an Arrow file or an Arrow stream."""
    import pyarrow
    import pyarrow.parquet

    if head.startswith(b"PAR1"):
        yield from pyarrow.parquet.ParquetFile(stream).iter_batches(4096)
    elif head.startswith(b"ARROW1"):
        reader = pyarrow.ipc.open_file(stream)
        yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
    else:
        yield from pyarrow.ipc.open_stream(stream)
