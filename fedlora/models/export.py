"""What a run leaves: its final payload in a folder, and the base model with an update merged in."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fedlora.core.errors import ModelError
from fedlora.core.payload import Payload, payload_class, target_of
from fedlora.models.folder import MASKS
from fedlora.models.language_model import LanguageModel
from fedlora.models.layers import dense_weight
from fedlora.models.masks import (
    Masks,
    as_stored,
    identity,
    load_masks,
    save_masks,
)
from fedlora.models.modules import ModelInfo

KIND = "payload.json"
"""Which class can read a folder."""


def export(
    payload: Payload, run: Path, info: ModelInfo, base_name: str = "", dropout: float = 0.0
) -> str:
    """Write a run's final payload into the subfolder of its kind.

    Args:
        payload: to be written.
        run: the run's folder.
        info: of the base model.
        base_name: folder or hub id of the base model.
        dropout: what further training would use.

    Returns:
        What a user should know of it, if anything.
    """
    folder = run / payload.folder
    said = payload.export(folder, info, base_name, dropout)
    if folder.is_dir():
        remember(folder, type(payload))
    return said


def remember(folder: Path, kind: type[Payload]) -> None:
    """Note which class can read a folder."""
    text = json.dumps({"_target_": target_of(kind)})
    (folder / KIND).write_text(text + "\n", encoding="utf-8")


def forget(folder: Path) -> None:
    """The inverse: a folder in somebody else's format."""
    (folder / KIND).unlink(missing_ok=True)


def exported(folder: Path) -> type[Payload] | None:
    """Which class can read a folder; None: it does not say, as PEFT's do not.

    Raises:
        ModelError: if that is no payload class.
    """
    file = folder / KIND
    if not file.is_file():
        return None
    try:
        return payload_class(json.loads(file.read_text(encoding="utf-8"))["_target_"], load=True)
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{file}: {error}") from error


def load(run: Path, info: ModelInfo, otherwise: type[Payload]) -> Payload:
    """The final payload of a run.

    Args:
        run: its folder.
        info: of the base model.
        otherwise: who reads a folder that does not say what it holds.

    Raises:
        ModelError: if there is none, or it is of another base.
    """
    for name in ("adapter", "update"):
        kind = exported(run / name)
        if kind is not None:
            return kind.load(run / name, info)
    return otherwise.load(run / otherwise.folder, info)


def merge(model: LanguageModel, payload: Payload | None, folder: Path) -> None:
    """Write the base with an update added to its weights (``None``: as it is), in Hugging Face's
    layout of a plain model.

    What is mounted on the model does not matter and is not changed. Sums are rounded once to the
    type in which the base is held. A pruned base's masks go along while its zeros are where they
    say, which payloads that keep zeros guarantee (`Payload.keeps_zeros`).

    Raises:
        TypeError: if the base is quantised.
        ModelError: if an update that keeps zeros would move one of its pruned base, or make a
            weight infinite.
    """
    merged = model.base_state(payload)
    masks = _masks(model) if model.info.mask else {}
    try:
        _check_zeros(masks, merged)
    except ModelError:
        if payload is not None and payload.keeps_zeros:
            raise
        masks = {}
    config: Any = model.network.config
    config.use_cache = True
    try:
        model.network.save_pretrained(folder, state_dict=merged)
    finally:
        config.use_cache = False
    model.tokenizer.save_pretrained(str(folder))
    if masks:
        save_masks(masks, folder)
    else:
        (folder / MASKS).unlink(missing_ok=True)


def _masks(model: LanguageModel) -> Masks:
    """The masks of all pruned layers, whether they carry updates here or not."""
    if model.folder is not None:
        return load_masks(model.folder)
    masks = {p: (dense_weight(x.base) != 0).cpu() for p, x in model.layers.items()}
    if identity(masks) != model.info.mask:
        raise ModelError(
            f"{model.info.name} was loaded from no folder, and its adapted layers are not all that "
            "was pruned: its masks are nowhere"
        )
    return masks


def _check_zeros(masks: Masks, state: Mapping[str, Tensor]) -> None:
    for path, mask in masks.items():
        as_stored(mask, state[f"{path}.weight"], path, "merging")
