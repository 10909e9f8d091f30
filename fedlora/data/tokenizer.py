"""Reads the tokenizer of a model folder without loading the model's library.

`transformers` takes seconds to import; the statistics of a data set need two files and the package
`tokenizers`. The ids are the same: the same Rust code reads the same ``tokenizer.json``.
"""

from pathlib import Path
from typing import Any

from fedlora.core.errors import DataError, ModelError
from fedlora.core.reading import fault, json_in

_GPT2 = ("GPT2Tokenizer", "GPT2TokenizerFast")
_GPT2_BORDER = "<|endoftext|>"
"""Begins and ends a text where GPT-2's own files name no tokens: its class in transformers does."""
_SPECIAL = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
"""What a chat template may use by name."""


class FolderTokenizer:
    """The part of a Hugging Face tokenizer that a token store needs, and decoding."""

    bos_token_id: int | None
    eos_token_id: int | None

    def __init__(self, folder: Path) -> None:
        """Read ``tokenizer.json`` and ``tokenizer_config.json``.

        Raises:
            DataError: if the folder has no ``tokenizer.json``.
            ModelError: if a file cannot be read.
        """
        import tokenizers

        file = folder / "tokenizer.json"
        if not file.is_file():
            raise DataError(f"{folder} has no tokenizer.json")
        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the Rust library has no class of its own
            raise ModelError(
                f"the tokenizer {file} cannot be read: {fault(file, error)}"
            ) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        named = _read(folder / "tokenizer_config.json")
        self.chat_template = _chat_template(named, folder)
        border = _GPT2_BORDER if _is_gpt2(named, folder) else None
        self.bos_token_id = self._id(named.get("bos_token", border))
        self.eos_token_id = self._id(named.get("eos_token", border))
        texts = {name: _content(token) for name, token in named.items() if name in _SPECIAL}
        self.special_tokens_map = {name: text for name, text in texts.items() if text is not None}

    def _id(self, token: str | dict[str, Any] | None) -> int | None:
        content = _content(token)
        return None if content is None else self._tokenizer.token_to_id(content)

    def __len__(self) -> int:
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def __call__(
        self,
        text: list[str],
        text_pair: list[str] | None = None,
        *,
        add_special_tokens: bool = False,
        verbose: bool = False,
        return_offsets_mapping: bool = False,
    ) -> dict[str, list[Any]]:
        inputs = text if text_pair is None else list(zip(text, text_pair, strict=True))
        if not return_offsets_mapping:
            quick = self._tokenizer.encode_batch_fast(inputs, add_special_tokens=add_special_tokens)
            return {"input_ids": [e.ids for e in quick]}
        found = self._tokenizer.encode_batch(inputs, add_special_tokens=add_special_tokens)
        places = [e.offsets for e in found]
        return {"input_ids": [e.ids for e in found], "offset_mapping": places}

    def decode(self, ids: list[int]) -> str:
        """Tokens to text, special tokens included."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))


def _content(token: str | dict[str, Any] | None) -> str | None:
    return token["content"] if isinstance(token, dict) else token


def _chat_template(named: dict[str, Any], folder: Path) -> str | None:
    """The template that transformers would use: a file of its own before the configuration's."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    found = named.get("chat_template")
    if isinstance(found, list):  # several, by name
        found = {entry["name"]: entry["template"] for entry in found}.get("default")
    return found


def _is_gpt2(named: dict[str, Any], folder: Path) -> bool:
    """Whether transformers would read the folder with GPT-2's class of tokenizers."""
    if "tokenizer_class" in named:
        return named["tokenizer_class"] in _GPT2
    return _read(folder / "config.json").get("model_type") == "gpt2"


def _read(file: Path) -> dict[str, Any]:
    return json_in(file, "the tokenizer's configuration") if file.is_file() else {}
