"""Texts made for the runs: instruction records with answers, and documents to pre-train on."""

import json
import random
from pathlib import Path

TEXT = "the senate and house of united states were in session when a ship came to the river"
WORDS = TEXT.split()
KINDS = ("upper", "count", "last", "copy")
CLIENTS, FEWEST, MOST = 24, 5, 16


def write_records(file: Path) -> None:
    """Records of a few clients with unequal numbers of them, each kind of task unevenly spread."""
    rng = random.Random(0)
    rows = [
        _record(rng, f"client {c}", KINDS[min(c % 5, 3)])
        for c in range(CLIENTS)
        for _ in range(rng.randint(FEWEST, MOST))
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _record(rng: random.Random, client: str, kind: str) -> dict[str, str]:
    words = rng.choices(WORDS, k=rng.randint(2, 24))
    text = " ".join(words)
    answers = {"upper": text.upper(), "count": str(len(words)), "last": words[-1], "copy": text}
    return {
        "client": client,
        "category": kind,
        "instruction": f"Do {kind}.",
        "input": text,
        "output": answers[kind],
    }


def documents(sources: tuple[str, ...]) -> list[tuple[str, str, str]]:
    """Source, group and text of a few documents."""
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=30)) for _ in range(30)]
    return [(sources[i % len(sources)], str(i // len(sources)), t) for i, t in enumerate(texts)]
