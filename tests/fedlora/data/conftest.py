import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from fedlora.data import Record, Source
from fedlora.data.tokenizer import FolderTokenizer

TEXTS = [
    "### Task\nTranslate into French.\n\n### Input\nThe cat sat.\n\n### Answer\nLe chat",
    "We, the people, hold these truths to be self-evident. Übermaß, naïve, 東京, 42.",
] * 20


@dataclass(frozen=True, kw_only=True)
class Listed(Source):
    """A source of given records that counts how often it is read."""

    name: ClassVar[str] = "listed"
    reads: ClassVar[list[str]] = []

    rows: tuple[Record, ...]
    mark: str = "a"

    def fingerprint(self) -> str:
        return self.mark

    def records(self) -> Iterator[Record]:
        self.reads.append(self.mark)
        yield from self.rows


@dataclass(frozen=True)
class CharacterTokenizer:
    """One token per character, but a stop before a blank line is one token with it."""

    bos_token_id: int | None = 1
    eos_token_id: int | None = 2
    size: int = 2**21

    def __len__(self) -> int:
        return self.size

    def __call__(
        self, text: list[str], *, add_special_tokens: bool, verbose: bool = False
    ) -> dict[str, list[list[int]]]:
        assert not add_special_tokens
        merged = [t.replace(".\n\n", chr(0x10FFFF)) for t in text]
        return {"input_ids": [[ord(c) + 3 for c in t] for t in merged]}


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<bos>", "<eos>"]
    bpe.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=special,
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    bpe.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": {"__type": "AddedToken", "content": "<eos>"},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> FolderTokenizer:
    return FolderTokenizer(tokenizer_folder)


def shared_file(name: str) -> Path:
    """A file of the development data, or a skipped test."""
    root = Path(__file__).parents[3]
    folder = Path(os.environ.get("FEDLORA_SHARED", root.parent / "shared" / "data"))
    if not (folder / name).is_file():
        pytest.skip(f"needs {name} in {folder} (set FEDLORA_SHARED)")
    return folder / name


@pytest.fixture(scope="session")
def shared() -> Path:
    return shared_file("ni1613_capped.parquet").parent
