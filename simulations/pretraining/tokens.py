"""The pre-training corpus as tokens: a tokenizer trained on it, documents encoded and packed."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from simulations.pretraining.corpus import (
    SOURCES,
    Document,
    corpus,
    split,
)
from simulations.pretraining.recipe import (
    BOS,
    EOS,
    PAD,
    Recipe,
)

SPECIALS = ("<|pad|>", "<|bos|>", "<|eos|>")

Tokens = np.ndarray[Any, np.dtype[np.uint16]]


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the texts; digits stay single, and every text can be encoded."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=SPECIALS[PAD],
        bos_token=SPECIALS[BOS],
        eos_token=SPECIALS[EOS],
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def encode(documents: Sequence[Document], tokenizer: PreTrainedTokenizerFast) -> list[Tokens]:
    """Each document as BOS, its tokens, EOS."""
    rows = tokenizer.backend_tokenizer.encode_batch([document.text for document in documents])
    return [np.array([BOS, *row.ids, EOS], dtype=np.uint16) for row in rows]


def packed(rows: Sequence[Tokens], size: int, seed: int) -> Iterator[Tokens]:
    """Endless blocks of `size` tokens, the documents in a new order each epoch."""
    rest = np.empty(0, dtype=np.uint16)
    epoch = 0
    while True:
        order = np.random.default_rng((seed, epoch)).permutation(len(rows))
        stream = np.concatenate([rest, *(rows[i] for i in order)])
        whole = len(stream) // size
        yield from stream[: whole * size].reshape(whole, size)
        rest = stream[whole * size :]
        epoch += 1


def count(documents: Sequence[Document], rows: Sequence[Tokens]) -> dict[str, dict[str, int]]:
    """Documents, characters and tokens (with BOS and EOS) of each source."""
    documents_of: Counter[str] = Counter()
    characters: Counter[str] = Counter()
    tokens: Counter[str] = Counter()
    for document, row in zip(documents, rows, strict=True):
        documents_of[document.source] += 1
        characters[document.source] += len(document.text)
        tokens[document.source] += len(row)
    return {
        source: {
            "documents": documents_of[source],
            "characters": characters[source],
            "tokens": tokens[source],
        }
        for source in SOURCES
    }


@dataclass(frozen=True)
class Text:
    """The corpus as tokens: the training and held-out parts, and their sizes."""

    tokenizer: PreTrainedTokenizerFast
    train: list[Tokens]  # addresses as often as an epoch shows them
    held: list[Document]
    held_rows: list[Tokens]
    counts: dict[str, dict[str, dict[str, int]]]


def build_text(recipe: Recipe) -> Text:
    """Corpus, held-out split and tokenizer of a recipe."""
    documents = corpus(Path(recipe.wordnet), recipe.instruction_share, recipe.seed)
    train, held = split(documents, recipe.held_out, recipe.seed)
    times = [recipe.sotu_repeats if d.source == "sotu" else 1 for d in train]
    texts = [d.text for d, n in zip(train, times, strict=True) for _ in range(n)]
    tokenizer = train_tokenizer(texts, recipe.vocabulary)
    rows, held_rows = encode(train, tokenizer), encode(held, tokenizer)
    repeated = [row for row, n in zip(rows, times, strict=True) for _ in range(n)]
    counts = {"train": count(train, rows), "held_out": count(held, held_rows)}
    return Text(tokenizer, repeated, held, held_rows, counts)
