"""Whether bytes that a server receives hold anything of a silo's records.

Records are looked for as text (any run of five words), and as tokens (any run of six ids) in every
form in which a process writes numbers: integers of 8, 4 and 2 bytes in both orders, those of
protobuf, decimals with commas or spaces; all of it plain and in base64.
"""

import base64
import json
import re
from pathlib import Path

import numpy as np
from flwr.app import Message
from flwr.common.serde import message_to_proto

from fedlora.data.encode import Encoder
from fedlora.data.records import Record
from fedlora.data.template import TEMPLATES
from simulations.app.compose import load
from simulations.app.parts import build_parts

WORDS, TOKENS = 5, 6


def of_reply(reply: Message) -> bytes:
    """A reply as the bytes that it travels as, and its arrays as they are."""
    whole = message_to_proto(reply).SerializeToString()
    if reply.has_error():
        return whole
    arrays = [a.data for r in reply.content.array_records.values() for a in r.values()]
    return whole + b"".join(arrays)


def tokens_of(file: Path) -> list[tuple[str, list[int]]]:
    """The text and the token ids of each record of a JSONL file, as a silo lays them out."""
    parts = build_parts(load([]))
    encoder = Encoder(parts.model.tokenizer(), 512, "input", TEMPLATES["ours"])
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    records = [Record(0, "train", "", r["instruction"], "", r["output"]) for r in rows]
    ids = [encoded.ids for encoded in encoder.encode(records)]
    return [
        (f"{r['instruction']} {r['output']}", [*map(int, i)])
        for r, i in zip(rows, ids, strict=True)
    ]


def secrets_of(file: Path) -> list[bytes]:
    """Everything of a file's records that must not be found."""
    found: set[bytes] = set()
    for text, ids in tokens_of(file):
        words = text.split()
        runs = [" ".join(words[i : i + WORDS]) for i in range(len(words) - WORDS + 1)]
        found.update(run.encode() for run in runs)
        # the prompt's template is the same for everybody: what follows it is the record's own
        for i in range(len(ids) - TOKENS + 1):
            found.update(_written(ids[i : i + TOKENS]))
    common = _template()
    return [s for s in sorted(found) if s not in common]


def _template() -> set[bytes]:
    """What every laid out record has, whoever wrote it."""
    parts = build_parts(load([]))
    encoder = Encoder(parts.model.tokenizer(), 512, "input", TEMPLATES["ours"])
    found: set[bytes] = set()
    for word in ("x", "y"):
        (encoded,) = encoder.encode([Record(0, "train", "", word, "", word)])
        ids = [*map(int, encoded.ids)]
        for i in range(len(ids) - TOKENS + 1):
            found.update(_written(ids[i : i + TOKENS]))
    return found


def _written(ids: list[int]) -> list[bytes]:
    """A run of ids in every form."""
    forms = [np.array(ids, dtype=t).tobytes() for t in ("<i8", "<i4", "<u2", ">i8", ">i4", ">u2")]
    forms += [b"".join(map(_varint, ids)), b"".join(_varint(2 * i) for i in ids)]
    return forms + [sep.join(map(str, ids)).encode() for sep in (",", ", ", " ")]


def _varint(value: int) -> bytes:
    """A number as protobuf writes it; twice the number, as it writes signed ones."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def leaks(blob: bytes, hidden: list[bytes]) -> list[bytes]:
    """Which of the secrets are in these bytes."""
    views = [blob]
    for two in (b"+/", b"-_"):  # the last letters of base64 and of its form for URLs
        for piece in re.findall(rb"[A-Za-z0-9%s]{40,}" % re.escape(two), blob):
            for shift in range(4):
                cut = piece[shift:]
                views.append(base64.b64decode(cut[: len(cut) // 4 * 4], altchars=two))
    joined = b"\0\0".join(views)
    return [s for s in hidden if s in joined]
