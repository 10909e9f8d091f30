"""What a run leaves: its final payload in a folder, and the base model with an update merged in."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedlora.core.errors import ModelError
from fedlora.core.files import RECORD, output_folder, output_record, require_own
from fedlora.core.payload import Payload, payload_class, target_of
from fedlora.models.headed import WithHead
from fedlora.models.language_model import LanguageModel
from fedlora.models.layers import dense_weight
from fedlora.models.loading import no_progress_bar
from fedlora.models.masks import (
    Masks,
    as_stored,
    identity,
    load_masks,
    save_masks,
)
from fedlora.models.modules import ModelInfo

SUBFOLDERS = ("adapter", "update")
"""Subfolders of a run folder for its final payload (`Payload.folder`)."""
TARGET, BASE = "_target_", "base"
"""Keys of an exported folder's record: the class that can read it, and its base's fingerprint."""


def about(kind: type[Payload], info: ModelInfo) -> dict[str, Any]:
    """What the record of a folder with a payload says (`fedlora.core.files.output_folder`)."""
    return {TARGET: target_of(kind), BASE: info.fingerprint, "base_name": info.name}


def save(
    payload: Payload, info: ModelInfo, folder: Path, base_name: str = "", dropout: float = 0.0
) -> str:
    """`Payload.export` into a folder of its own; an earlier payload there is replaced.

    Raises:
        ConfigError: if the folder holds anything else.
        ValueError: if the payload does not fit the model.
    """
    with output_folder(folder, about(type(payload), info)) as draft:
        return payload.export(draft, info, base_name, dropout)


def remove_exports(run: Path, keep: str = "") -> None:
    """Remove the payloads that a run has exported, but for one subfolder: they are of an earlier
    end of the run.

    Raises:
        ConfigError: if one of them holds anything else.
    """
    for name in SUBFOLDERS:
        require_own(run / name)
    for name in SUBFOLDERS:
        if name != keep:
            shutil.rmtree(run / name, ignore_errors=True)


def exported(folder: Path) -> type[Payload] | None:
    """Which class can read a folder; None: it does not say, as PEFT's do not.

    Raises:
        ModelError: if that is no payload class.
    """
    record = output_record(folder)
    if TARGET not in record:
        return None
    try:
        return payload_class(record[TARGET], load=True)
    except ValueError as error:
        raise ModelError(f"{folder / RECORD}: {error}") from error


def load(run: Path, info: ModelInfo, otherwise: type[Payload]) -> Payload:
    """The final payload of a run.

    Args:
        run: its folder.
        info: of the base model.
        otherwise: who reads a folder that does not say what it holds.

    Raises:
        ModelError: if there is none, or it is of another base.
    """
    found = [run / name for name in SUBFOLDERS if exported(run / name) is not None]
    return read(found[0] if found else run / otherwise.folder, info, otherwise)


def read(folder: Path, info: ModelInfo, otherwise: type[Payload]) -> Payload:
    """The payload in an exported folder.

    Raises:
        ModelError: if there is none, or it was trained on another base.
    """
    require_base(folder, info)
    kind = exported(folder) or (WithHead if info.classifies else otherwise)
    return kind.load(folder, info)


def require_base(folder: Path, info: ModelInfo) -> None:
    """Refuse a payload on a base that it was not trained on; one that names no base may go on any.

    Raises:
        ModelError: naming both bases.
    """
    record = output_record(folder)
    if record.get(BASE, info.fingerprint) != info.fingerprint:
        raise ModelError(
            f"{folder} was trained on the base {record.get('base_name')} ({record[BASE]}), and "
            f"{info.name} is another ({info.fingerprint}): an update is valid on its own base only"
        )


def merge(model: LanguageModel, payload: Payload | None, folder: Path) -> None:
    """`write_merged` into a folder of its own; an earlier merged model there is replaced.

    Raises:
        ConfigError: if the folder holds anything else.
    """
    with output_folder(folder, {BASE: model.info.fingerprint}) as draft:
        write_merged(model, payload, draft)


def write_merged(model: LanguageModel, payload: Payload | None, folder: Path) -> None:
    """Write the base with an update added to its weights (``None``: as it is), in Hugging Face's
    layout of a plain model, into an empty folder; transformers then reads every tensor back.

    What is mounted on the model does not matter and is not changed. Sums are rounded once to the
    type in which the base is held. A pruned base's masks go along while its zeros are where they
    say, which payloads that keep zeros guarantee (`Payload.keeps_zeros`).

    Raises:
        TypeError: if the base is quantised.
        ModelError: if an update that keeps zeros would move one of its pruned base, or make a
            weight infinite; if transformers reads another tensor than was written.
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
    _check_read_back(model, merged, folder)


def _check_read_back(model: LanguageModel, merged: Mapping[str, Tensor], folder: Path) -> None:
    """Refuse a folder of which transformers reads other tensors than those that were written."""
    kind: Any = type(model.network)
    with no_progress_bar():
        network, report = kind.from_pretrained(
            folder, dtype=model.network.dtype, local_files_only=True, output_loading_info=True
        )
    if report["missing_keys"] or report["unexpected_keys"] or report["mismatched_keys"]:
        wrong = sorted({*report["missing_keys"], *report["unexpected_keys"]})
        raise ModelError(f"merging {model.info.name}: transformers reads its files without {wrong}")
    found = network.state_dict()
    for name, tensor in merged.items():
        if name not in found or not torch.equal(found[name], tensor.to("cpu", found[name].dtype)):
            raise ModelError(
                f"merging {model.info.name}: transformers reads another {name} than was written "
                "(a weight that is tied to another cannot be updated alone): choose other "
                "model.targets, or use the adapter"
            )


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
