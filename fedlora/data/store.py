"""The tokenised data on disk: built once, then memory-mapped by every worker."""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedlora.core.config import describe
from fedlora.core.errors import DataError
from fedlora.core.files import made_once
from fedlora.core.memo import is_ours, remembered
from fedlora.core.reading import checksum, is_intact
from fedlora.data.build import (
    ARRAYS,
    EMPTY_OUTPUT,
    FORMAT,
    MOVED,
    TRUNCATED,
    write_store,
)
from fedlora.data.encode import Tokenizer
from fedlora.data.records import SPLITS
from fedlora.data.source import Source
from fedlora.data.template import TEMPLATES, prompt

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Example:
    """One tokenised example: prompt, response, EOS, as the source's template lays them out (each as
    far as `max_length` allows)."""

    input_ids: NDArray[np.int32]
    """``[tokens]``"""
    prompt_tokens: int
    """Token ids before the last answer, with BOS if the template has it; of an example with a
    label, those before its second text (all, if it has one text)."""
    responses: NDArray[np.bool_] | None = None
    """``[tokens]``, which tokens belong to answers; None: ``input_ids[prompt_tokens:]``."""
    label: int = -1
    """Index into `TokenStore.labels`; -1: the data has none."""
    states: Tensor | None = None
    """``[inputs, d]``, what enters the first adapted block at each token that the model is given
    (`fedlora.engine.prefix`); None: not at hand."""


@dataclass(frozen=True)
class ClientInfo:
    """Who a client is and how much it holds."""

    id: int
    category: str
    """The category of most of its examples."""
    name: str
    """What the source calls it."""
    num_train: int
    num_eval: int
    num_test: int
    train_tokens: int
    eval_tokens: int
    test_tokens: int
    predicting: int
    """Training examples with more than one token."""
    responding: int
    """Training examples that keep a token of an answer. Of data with labels these are all, as
    `predicting`."""

    def holds(self, split: str) -> tuple[int, int]:
        """How many examples of a split it has, and of how many tokens together."""
        held = {
            "train": (self.num_train, self.train_tokens),
            "eval": (self.num_eval, self.eval_tokens),
            "test": (self.num_test, self.test_tokens),
        }
        return held[split]

    def trains(self, loss: str) -> int:
        """How many training examples have a token with a loss
        (`fedlora.data.batches.supervised_tokens`)."""
        return self.responding if loss == "response" else self.predicting


def store_key(source: Source, tokenizer: Tokenizer, tokenizer_id: str) -> str:
    """Hash of everything that the store's content depends on."""
    text = prompt("Probe: 2 + 40?", "naïve TEXT\n")
    probe = tokenizer([text], add_special_tokens=False, verbose=False)
    parts = {
        "source": [source.name, source.fingerprint(), source.max_length, source.truncation],
        "tokenizer": [tokenizer_id, tokenizer.bos_token_id, tokenizer.eos_token_id],
        "probe": [int(i) for i in probe["input_ids"][0]],  # a tokenizer that changed under its name
        "template": source.encoder(tokenizer).version,
        "format": FORMAT,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def prepare(source: Source, tokenizer: Tokenizer, tokenizer_id: str, cache: Path) -> Path:
    """Tokenise a source once and return the store's folder; later calls return at once.

    Processes that call this together build one store: the first takes a lock, the others wait. A
    store appears under its name by one rename, and a damaged one is built anew.

    Args:
        source: the data.
        tokenizer: any Hugging Face tokenizer.
        tokenizer_id: part of the key, for example a hub id with revision or a file's hash.
        cache: the folder of all stores.

    Raises:
        DataError: if the source cannot be read or makes no sense.
    """
    key = store_key(source, tokenizer, tokenizer_id)
    folder = _place(source, key, cache)

    def build(draft: Path) -> None:
        if folder.exists():
            log.warning("%s is damaged (%s) and is built anew", folder, damage(folder))
        write_store(source, tokenizer, tokenizer_id, draft, key)

    return made_once(folder, build, lambda made: made.exists() and not damage(made))


def find_or_prepare(
    source: Source, load_tokenizer: Callable[[], Tokenizer], tokenizer_id: str, cache: Path
) -> Path:
    """`prepare`, with a tokenizer that is loaded only where the store must be built.

    The store's key is remembered (`fedlora.core.memo`) unless source or template are a user's own.

    Args:
        source: the data.
        load_tokenizer: loads the tokenizer.
        tokenizer_id: a hash of the tokenizer's files.
        cache: the folder of all stores.

    Raises:
        DataError: as `prepare`.
    """
    if is_ours(source) and (source.labelled or source.template in TEMPLATES):
        question = {"source": describe(source), "records": source.fingerprint()}

        def keyed() -> dict[str, str]:
            return {"key": store_key(source, load_tokenizer(), tokenizer_id)}

        found = remembered("store", question | {"tokenizer": tokenizer_id}, keyed)
        folder = _place(source, found["key"], cache)
        if folder.exists() and not damage(folder):
            return folder
    return prepare(source, load_tokenizer(), tokenizer_id, cache)


def _place(source: Source, key: str, cache: Path) -> Path:
    return cache / f"{source.name}-{key[:16]}"


def damage(folder: Path) -> str:
    """What is wrong with a store, or an empty text. Reads all of it, at gigabytes per second: a
    flipped bit is another token in somebody's text, and nothing else would notice."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        if not is_intact(meta):
            return "meta.json does not match its checksum"
        files = meta["files"]
        for name in ARRAYS:
            size = (folder / name).stat().st_size
            if size != files[name]["bytes"]:
                return f"{name} has {size} bytes instead of {files[name]['bytes']}"
            if checksum(folder / name) != files[name]["crc32"]:
                return f"{name} does not match its checksum"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


Attach: TypeAlias = Callable[[int, str, list[Example]], list[Example]]
"""Client, split and all its examples -> the same examples with their `Example.states`."""


# --- reading -------------------------------------------------------------------------------------


class TokenStore:
    """A built store, memory-mapped: opening costs milliseconds, examples are read on demand."""

    def __init__(self, folder: Path | str, only: int | None = None) -> None:
        """Open a store that `prepare` returned.

        Args:
            folder: of the store.
            only: id under which the single client of the store is asked for; None: ids are those of
                the store.

        Raises:
            DataError: if it is damaged.
            ValueError: if there is an id for a single client, and there are several.
        """
        self.folder = Path(folder)
        reason = damage(self.folder)
        if reason:
            raise DataError(f"the token store {self.folder} is damaged: {reason}")
        self._meta = json.loads((self.folder / "meta.json").read_text(encoding="utf-8"))
        self._index: NDArray[np.int64] = np.load(self.folder / "index.npy", mmap_mode="r")
        self._bounds: list[int] = np.load(self.folder / "clients.npy").tolist()
        # A plain view of the mapped file: slices of np.memmap itself cost microseconds each.
        self._tokens: NDArray[Any] = np.asarray(np.load(self.folder / "tokens.npy", mmap_mode="r"))
        flags = np.load(self.folder / "responses.npy", mmap_mode="r")
        self._responses: NDArray[np.bool_] | None = flags if len(flags) else None

        self._attach: Attach | None = None
        self._only = only
        if only is not None and self.num_clients != 1:
            raise ValueError(f"{self.folder} has {self.num_clients} clients, expected one")

    def with_states(self, attach: "Attach") -> "TokenStore":
        """The same store, whose `examples` pass through a function that gives them `states`."""
        other = object.__new__(TokenStore)
        vars(other).update(vars(self) | {"_attach": attach})
        return other

    def __reduce__(self) -> tuple[type["TokenStore"], tuple[Path, int | None]]:
        return TokenStore, (self.folder, self._only)

    @property
    def key(self) -> str:
        """Hash of everything that its content depends on (`store_key`)."""
        return str(self._meta["key"])

    @property
    def num_clients(self) -> int:
        """Clients have the ids ``0..num_clients - 1``."""
        return len(self._meta["clients"])

    @cached_property
    def clients(self) -> tuple[ClientInfo, ...]:
        """Every client, ``clients[k].id == k``."""
        tokens = np.array(self._index[:, 1])
        held = self._sums(np.ones_like(tokens)).tolist()
        lengths = self._sums(tokens).tolist()
        predicting = self._sums((tokens > 1) | bool(self.labels))[:, 0].tolist()
        responding = self._sums(self._answers > 0)[:, 0].tolist()
        rows = zip(self._meta["clients"], held, lengths, predicting, responding, strict=True)
        return tuple(
            ClientInfo(k, category, name, n[0], n[1], n[2], t[0], t[1], t[2], full, response)
            for k, ((category, name), n, t, full, response) in enumerate(rows)
        )

    def _sums(self, column: NDArray[Any]) -> NDArray[np.int64]:
        """The sums of a column of the index by client and split, ``[clients, splits]``, as
        differences of running sums: many splits are empty."""
        running = np.concatenate([[0], np.cumsum(column)])
        return np.diff(running[self._bounds]).reshape(-1, len(SPLITS))

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """Names of the labels by index, of data for classification: whole numbers by value, else
        by name, whatever the order of the records. Empty: the data has none."""
        return tuple(self._meta["labels"])

    def label_counts(self, split: str) -> NDArray[np.int64]:
        """``[clients, labels]``: how many examples of a split each client holds of each label.

        Raises:
            ValueError: if there is no such split.
        """
        counts = np.zeros((self.num_clients, len(self.labels)), dtype=np.int64)
        for client in range(self.num_clients if self.labels else 0):
            held = self._index[slice(*self._rows(client, split)), -1]
            counts[client] = np.bincount(held, minlength=len(self.labels))
        return counts

    @cached_property
    def categories(self) -> tuple[str, ...]:
        """The distinct categories in order of first appearance."""
        return tuple(dict.fromkeys(category for category, _ in self._meta["clients"] if category))

    @property
    def num_examples(self) -> int:
        """Examples of all clients and splits."""
        return len(self._index)

    @property
    def cut_examples(self) -> int:
        """How many of them are cut to ``Source.max_length``."""
        return int(np.count_nonzero(self._index[:, 5] & TRUNCATED))

    @property
    def moved_examples(self) -> int:
        """How many a partition gave to clients that had too few (`Record.moved`)."""
        return int(np.count_nonzero(self._index[:, 5] & MOVED))

    @cached_property
    def largest_token(self) -> int:
        """The largest token id of any example. Reads all tokens, at gigabytes per second."""
        return int(self._tokens.max())

    @property
    def source(self) -> dict[str, Any]:
        """Name, fingerprint, ``cutoff`` (`Source.max_length`) and truncation of the source."""
        return dict(self._meta["source"])

    def count(self, client: int, split: str) -> int:
        """How many examples a client's split has."""
        first, end = self._rows(client, split)
        return end - first

    def example(self, client: int, split: str, i: int) -> Example:
        """One example.

        Raises:
            IndexError: naming the client, the split and how many examples it has.
        """
        first, end = self._rows(client, split)
        if not 0 <= i < end - first:
            raise IndexError(f"client {client}'s {split} split has {end - first} examples, no #{i}")
        return self._example(first + i)

    def examples(self, client: int, split: str) -> list[Example]:
        """All examples of a client's split, in the source's order."""
        found = [self._example(row) for row in range(*self._rows(client, split))]
        return found if self._attach is None else self._attach(client, split, found)

    def sizes(self, client: int, split: str) -> NDArray[np.int64]:
        """``[examples, 3]``: of each example of a client's split its tokens, those of them before
        the last answer, and its label (-1: none). Reads no text."""
        return np.array(self._index[slice(*self._rows(client, split))][:, [1, 2, 6]])

    def supervised(self, client: int, split: str, loss: str) -> NDArray[np.int64]:
        """``[examples]``: how many tokens of each have a loss
        (`fedlora.data.batches.supervised_tokens`)."""
        place = slice(*self._rows(client, split))
        if loss == "response":
            return self._answers[place]
        tokens = np.array(self._index[place, 1])
        return np.ones_like(tokens) if self.labels else np.maximum(0, tokens - 1)

    def references(self, client: int, split: str) -> list[str]:
        """The whole response texts of a client's split, uncut, for ROUGE."""
        rows = self._index[slice(*self._rows(client, split)), 3:5].tolist()
        return [bytes(self._references[at : at + n]).decode() for at, n in rows]

    @cached_property
    def _references(self) -> NDArray[np.uint8]:
        path = self.folder / "references.utf8"
        if not path.stat().st_size:
            return np.zeros(0, dtype=np.uint8)
        return np.memmap(path, dtype=np.uint8, mode="r")

    def _rows(self, client: int, split: str) -> tuple[int, int]:
        if self._only is not None:
            if client != self._only:
                raise IndexError(f"client {client} is not here, client {self._only} is")
            client = 0
        if not 0 <= client < self.num_clients:
            raise IndexError(f"client {client} is not in 0..{self.num_clients - 1}")
        if split not in SPLITS:
            raise ValueError(f"split={split!r} is not one of {list(SPLITS)}")
        home = len(SPLITS) * client + SPLITS.index(split)
        return self._bounds[home], self._bounds[home + 1]

    def _example(self, row: int) -> Example:
        start, tokens, prompt_tokens, _, _, _, label = self._index[row].tolist()
        place = slice(start, start + tokens)
        flags = None if self._responses is None else np.array(self._responses[place])
        return Example(self._tokens[place].astype(np.int32), prompt_tokens, flags, label)

    @cached_property
    def _answers(self) -> NDArray[np.int64]:
        """``[examples]``: how many tokens of each belong to answers, its first one apart
        (`fedlora.data.batches.supervised_tokens`); with labels one answer, the label."""
        if self.labels:
            return np.ones(self.num_examples, dtype=np.int64)
        starts, tokens, prompts = (np.array(self._index[:, c]) for c in (0, 1, 2))
        if self._responses is None:
            return np.maximum(0, tokens - np.maximum(1, prompts))
        running = np.concatenate([[0], np.cumsum(self._responses)])
        return np.asarray(running[starts + tokens] - running[starts + 1])

    def statistics(self) -> dict[str, Any]:
        """Counts and fractions (in [0, 1]) of the whole store."""
        tokens, flags = (self._index[:, c] for c in (1, 5))
        answers = self._answers
        empty = (flags & EMPTY_OUTPUT) > 0
        held = np.diff(self._bounds).reshape(-1, len(SPLITS))
        owner = np.repeat(np.arange(self.num_clients), held.sum(axis=1))
        speaks = np.bincount(owner[~empty], minlength=self.num_clients) > 0
        train = held[:, 0]
        split = np.repeat(np.tile(np.arange(len(SPLITS)), self.num_clients), held.ravel())
        rows = {name: split == s for s, name in enumerate(SPLITS) if (split == s).any()}
        silent = ~speaks & (held.sum(axis=1) > 0)
        return {
            "source": self.source["name"],
            "tokenizer": self._meta["tokenizer"]["id"],
            "max_length": self.source["cutoff"],
            "truncation": self.source["truncation"],
            "clients": self.num_clients,
            "examples": dict(zip(SPLITS, held.sum(axis=0).tolist(), strict=True)),
            "train_examples_per_client": _spread(train),
            "tokens": int(tokens.sum()),
            "tokens_per_example": _spread(tokens),
            "tokens_by_split": {s: _spread(tokens[r]) for s, r in rows.items()},
            "response_tokens_by_split": {s: _spread(answers[r]) for s, r in rows.items()},
            "response_token_share": float(answers.sum() / tokens.sum()),
            "truncated_share": float(((flags & TRUNCATED) > 0).mean()),
            "without_response": int((answers == 0).sum()),
            "empty_outputs": int(empty.sum()),
            "moved_examples": self.moved_examples,
            "labels": list(self.labels),
            "labels_per_client": _spread((self.label_counts("train") > 0).sum(axis=1))
            if self.labels
            else None,
            "clients_with_only_empty_outputs": np.flatnonzero(silent).tolist(),
            "clients_without_training_examples": np.flatnonzero(train == 0).tolist(),
            "categories": len(self.categories),
            "largest_categories": dict(Counter(c.category for c in self.clients).most_common(10)),
        }


def _spread(values: NDArray[np.int64]) -> dict[str, float]:
    return {
        "min": int(values.min()),
        "mean": float(values.mean()),
        "median": float(np.median(values)),
        "p95": float(np.percentile(values, 95)),
        "max": int(values.max()),
    }
