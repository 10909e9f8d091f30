"""A base model as a folder on disk: where it is, whether it is whole, and what identifies it."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from fedlora.core import variables
from fedlora.core.errors import ModelError
from fedlora.core.package import places
from fedlora.core.reading import fault, json_in, pointer, tensors_in

WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
MASKS = "masks.safetensors"
"""Beside the weights of a pruned model, and none of them (`fedlora.models.masks`)."""
TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
TOKENIZER_PARTS = (
    *TOKENIZER,
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)

_SAMPLES, _SAMPLE_BYTES = 64, 4096  # of a weight file, enough to tell two trainings apart


def _asset_folders() -> Iterator[Path]:
    """The folders in which assets may be: Flower ships an app without them."""
    if root := os.environ.get(variables.ASSETS):
        yield Path(root).expanduser()
    yield from places("fedlora/models/assets")


def find_assets(name: str) -> Path:
    """The absolute folder of a model that ships with fedlora.

    Raises:
        ModelError: naming every folder that was tried.
    """
    tried = list(dict.fromkeys(folder.absolute() / name for folder in _asset_folders()))
    for folder in tried:
        if (folder / "config.json").is_file():
            return folder
    raise ModelError(
        f"the model {name!r} that ships with fedlora is in none of {[str(t) for t in tried]}; "
        f"install fedlora from a checkout (pip install -e .) or set {variables.ASSETS} to its "
        "fedlora/models/assets"
    )


def weight_files(folder: Path) -> list[Path]:
    """Files of weights, safetensors before pickles (which transformers reads with care)."""
    for pattern in WEIGHTS:
        if files := sorted(p for p in folder.glob(pattern) if p.name != MASKS):
            return files
    return []


def check(folder: Path, *, weights: bool = True) -> None:
    """Refuse a folder that cannot hold a model with its tokenizer.

    Raises:
        ModelError: naming the folder, what is missing and what is there.
    """
    if not folder.is_dir():
        raise ModelError(f"model.path: {folder} is not a folder")
    missing = []
    if not (folder / "config.json").is_file():
        missing.append("config.json")
    if weights and not weight_files(folder):
        missing.append("weights (*.safetensors)")
    if not any((folder / name).is_file() for name in TOKENIZER):
        missing.append("a tokenizer (tokenizer.json)")
    missing += _absent_shards(folder) if weights else []
    if missing:
        there = sorted(p.name for p in folder.iterdir())
        listing = ", ".join(there[:20]) + (", ..." if len(there) > 20 else "") or "nothing"
        raise ModelError(f"model folder {folder} lacks {', '.join(missing)}; it has: {listing}")
    for file in weight_files(folder) if weights else []:
        check_weights(file)


def check_weights(file: Path) -> None:
    """Refuse a file that cannot hold weights: a Git LFS pointer, one that is cut short.

    Reads headers alone; values are looked at when they are loaded.

    Raises:
        ModelError: naming the file and what is wrong with it.
    """
    if file.suffix == ".safetensors":
        with tensors_in(file, "the weights of the base model"):
            return
    if not file.stat().st_size or pointer(file):
        why = "it is empty" if not file.stat().st_size else fault(file, ValueError())
        raise ModelError(f"the weights of the base model {file} cannot be read: {why}")


def _absent_shards(folder: Path) -> list[str]:
    """The files that an index of weights names and the folder does not have."""
    found: set[str] = set()
    for index in sorted(folder.glob("*.safetensors.index.json")):
        named = json_in(index, "the index of the base model's weights").get("weight_map")
        if not isinstance(named, dict):
            raise ModelError(f"{index} has no weight_map: it is damaged")
        found |= {str(name) for name in named.values()}
    return sorted(name for name in found if not (folder / name).is_file())


def tokenizer_id(folder: Path) -> str:
    """Hash of the tokenizer's files: equal ids make equal tokens, wherever the folder is."""
    digest = hashlib.sha256()
    for name in sorted(TOKENIZER_PARTS):
        if (folder / name).is_file():
            digest.update(f"{name}\0".encode() + (folder / name).read_bytes())
    return digest.hexdigest()[:16]


def fingerprint(folder: Path) -> str:
    """Identity of configuration and weights, in milliseconds.

    Of each file of weights it reads size, header and evenly spaced samples: enough to tell two
    models or two trainings apart, not to detect a flipped bit. Of a pruned model's masks it reads
    their identity: their file holds the same masks in several ways.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    digest.update(mask_identity(folder).encode())
    for path in sorted(weight_files(folder)):
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}".encode())
        with path.open("rb") as file:
            for i in range(_SAMPLES):
                file.seek(max(0, size - _SAMPLE_BYTES) * i // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def mask_identity(folder: Path) -> str:
    """Identity of the masks in a model folder; empty: it has none. Reads a header."""
    if not (folder / MASKS).is_file():
        return ""
    with tensors_in(folder / MASKS, "the masks of a pruned model") as file:
        return str((file.metadata() or {}).get("identity", ""))
