"""Writes a token store: the layout of its folder, and the one pass over the records.

Tokens and references lie in the order in which the source gave them; the index names where each
example lies, sorted by client, split and arrival.

    tokens.npy       uint16 or uint32 [tokens]
    responses.npy    bool [tokens], which tokens belong to answers; [0]: in every example those from
                     its prompt_tokens on
    references.utf8  the response texts, end to end
    index.npy        int64 [examples, 7], columns `COLUMNS`; without a label -1
    clients.npy      int64 [3 * clients + 1], first row of the index of each (client, split)
    meta.json        names, versions, file sizes, checksums
"""

import json
import logging
import time
from array import array
from collections import Counter
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from fedlora.core.errors import DataError
from fedlora.core.reading import checksum, sealed
from fedlora.data.encode import RecordEncoder, Tokenizer
from fedlora.data.labels import LabelDraft
from fedlora.data.records import SPLITS, Record
from fedlora.data.source import Source

FORMAT = 3  # of the folder: part of the key
_PLACES = ("start", "tokens", "prompt_tokens", "reference_start", "reference_bytes")
COLUMNS = (*_PLACES, "flags", "label")
TRUNCATED, EMPTY_OUTPUT, MOVED = 1, 2, 4
ARRAYS = ("tokens.npy", "responses.npy", "references.utf8", "index.npy", "clients.npy")
_BATCH = 2048

log = logging.getLogger(__name__)


@dataclass
class Draft:
    """What is gathered while records stream by: about 60 bytes and the tokens of each."""

    tokens: list[NDArray[Any]] = field(default_factory=list)
    responses: list[tuple[int, list[bool]]] = field(default_factory=list)
    """First token and flags of each example whose answers are not all that follows its prompt."""
    rows: "array[int]" = field(default_factory=lambda: array("q"))
    homes: "array[int]" = field(default_factory=lambda: array("q"))
    """``3 * client + split`` of each row."""
    categories: dict[int, Counter[str]] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    labels: LabelDraft = field(default_factory=LabelDraft)
    token_count: int = 0
    reference_bytes: int = 0
    empty: int = 0
    moved: int = 0

    def add(
        self, batch: list[Record], encoder: RecordEncoder, references: BinaryIO, dtype: type
    ) -> None:
        """Tokenise a batch, write its references and note where everything lies."""
        flat: list[int] = []
        for record, encoded in zip(batch, encoder.encode(batch), strict=True):
            reference = record.output.encode()
            references.write(reference)
            start, flags = self.token_count + len(flat), TRUNCATED * encoded.truncated
            flags += EMPTY_OUTPUT * (not record.output) + MOVED * record.moved
            self.rows.extend((start, len(encoded.ids), encoded.prompt_tokens))
            self.rows.extend((self.reference_bytes, len(reference), flags))
            self.rows.append(self.labels.add(record))
            self.reference_bytes += len(reference)
            self.empty += not record.output
            self.moved += record.moved
            own = encoded.responses
            if own is not None and not _follow(own, encoded.prompt_tokens):
                self.responses.append((start, own))
            flat += encoded.ids
            self._note_client(record)
        self.tokens.append(np.array(flat, dtype=dtype))
        self.token_count += len(flat)

    def _note_client(self, record: Record) -> None:
        if record.split not in SPLITS or record.client < 0:
            raise DataError(
                f"a record has split={record.split!r} and client={record.client}: the split must "
                f"be one of {list(SPLITS)}, the client 0 or more"
            )
        self.homes.append(len(SPLITS) * record.client + SPLITS.index(record.split))
        self.categories.setdefault(record.client, Counter())[record.category] += 1
        if record.client_name:
            self.names.setdefault(record.client, record.client_name)

    def clients(self, source_name: str) -> int:
        """How many clients there are.

        Raises:
            DataError: if there is nothing to learn, or if ids are no ids of ``0..N-1``.
        """
        count = len(self.homes)
        if not count:
            raise DataError(f"data={source_name} has no records")
        if self.empty == count:
            raise DataError(f"data={source_name}: all {count} outputs are empty: nothing to learn")
        clients = max(self.categories) + 1
        if clients > 2 * len(self.categories) + 64:
            raise DataError(
                f"data={source_name}: client ids reach {clients - 1} but only "
                f"{len(self.categories)} clients have records; ids must run from 0 to N-1"
            )
        return clients


def _follow(responses: list[bool], prompt_tokens: int) -> bool:
    """Whether the flags are true from the prompt's end on and nowhere else."""
    return not any(responses[:prompt_tokens]) and all(responses[prompt_tokens:])


def write_store(
    source: Source, tokenizer: Tokenizer, tokenizer_id: str, folder: Path, key: str
) -> None:
    """Tokenise every record of a source into an empty folder.

    Raises:
        DataError: if the source cannot be read or makes no sense.
    """
    encoder = source.encoder(tokenizer)
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    draft = Draft()
    began = time.monotonic()
    log.info("data=%s is tokenised once, for all later runs", source.name)
    records = iter(source.records())
    with (folder / "references.utf8").open("wb") as references:
        while batch := [_encodable(r) for r in islice(records, _BATCH)]:
            draft.add(batch, encoder, references, dtype)
            if len(draft.tokens) % 10 == 0:
                log.info("data=%s: %d records tokenised", source.name, len(draft.homes))
    clients = draft.clients(source.name)
    labels, numbers = draft.labels.names(source.name) if source.labelled else ([], None)
    _write_arrays(draft, clients, folder, dtype, numbers)
    meta = {
        "format": FORMAT,
        "key": key,
        "source": {
            "name": source.name,
            "fingerprint": source.fingerprint(),
            "cutoff": source.max_length,
            "truncation": source.truncation,
        },
        "tokenizer": {"id": tokenizer_id, "size": len(tokenizer)},
        "template": encoder.version,
        "labels": labels,
        "files": {name: _identity(folder / name) for name in ARRAYS},
        "clients": [
            [
                draft.categories[k].most_common(1)[0][0] if k in draft.categories else "",
                draft.names.get(k, str(k)),
            ]
            for k in range(clients)
        ],
    }
    (folder / "meta.json").write_text(json.dumps(sealed(meta)), encoding="utf-8")
    seconds = time.monotonic() - began
    log.info("data=%s: %d records in %.1f s", source.name, len(draft.homes), seconds)
    if draft.moved:
        log.info("data=%s: %s", source.name, moved_text(draft.moved, len(draft.homes)))


def moved_text(moved: int, examples: int) -> str:
    """What a partition did so that no client has less than it must have."""
    return (
        f"{moved:,} of {examples:,} examples were moved to clients that the draw left with less "
        "than data.min_examples"
    )


def _encodable(record: Record) -> Record:
    """The record without lone surrogates, which JSON can hold and UTF-8 cannot."""
    turns = "".join(turn.text for turn in record.turns)
    try:
        f"{record.instruction}{record.input}{record.output}{turns}".encode()
    except UnicodeEncodeError:
        return record.map_texts(lambda text: text.encode(errors="replace").decode())
    return record


def _write_arrays(
    draft: Draft, clients: int, folder: Path, dtype: type, numbers: NDArray[np.int64] | None
) -> None:
    """Write tokens and index.

    Args:
        draft: all that was gathered.
        clients: how many there are.
        folder: the store's.
        dtype: of the tokens.
        numbers: ``[labels]``, the label index of each number in the draft; None: without labels.
    """
    header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (draft.token_count,)}
    with (folder / "tokens.npy").open("wb") as file:  # a full disk kills who writes to a mapping
        np.lib.format.write_array_header_1_0(file, header)
        for chunk in draft.tokens:
            file.write(chunk.tobytes())
    homes = np.frombuffer(draft.homes, dtype=np.int64)
    order = np.argsort(homes, kind="stable")
    rows = np.array(draft.rows, dtype=np.int64).reshape(-1, len(COLUMNS))
    rows[:, -1] = -1 if numbers is None else numbers[rows[:, -1]]
    np.save(folder / "index.npy", rows[order])
    np.save(folder / "responses.npy", _responses(draft, rows))
    bounds = np.searchsorted(homes[order], np.arange(len(SPLITS) * clients + 1))
    np.save(folder / "clients.npy", bounds.astype(np.int64))


def _responses(draft: Draft, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    """The flags of all tokens, or none where they follow from the index."""
    flags = np.zeros(draft.token_count if draft.responses else 0, dtype=np.bool_)
    if draft.responses:
        for start, tokens, prompt_tokens in rows[:, :3].tolist():
            flags[start + prompt_tokens : start + tokens] = True
        for start, own in draft.responses:
            flags[start : start + len(own)] = own
    return flags


def _identity(path: Path) -> dict[str, int]:
    return {"bytes": path.stat().st_size, "crc32": checksum(path)}
