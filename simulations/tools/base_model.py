"""The base model of a finished run, found again: an adapter is valid only for its own base."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from fedlora.core.config import build
from fedlora.core.errors import ConfigError
from fedlora.core.reading import json_in
from fedlora.models.number_format import AUTO
from fedlora.models.spec import ModelSpec
from fedlora.prune.spec import ABOUT, Pruned
from simulations.app.identity import MODEL


def base_of(
    run: Path, model: DictConfig | Mapping[str, Any], emit: Callable[[str], object]
) -> ModelSpec:
    """The base model of a run.

    Args:
        run: the run folder.
        model: the group ``model`` of its configuration.
        emit: shows one line if a pruned base has to be made again.

    Raises:
        ConfigError: if its weights are others, or pruned elsewhere, than they were then.
        ModelError, DataError: if it is gone and cannot be made again.
    """
    spec = build(model, ModelSpec, "model")  # type: ignore[type-abstract]
    file = run / MODEL
    about = json_in(file, "the description of the run's base model") if file.is_file() else {}
    if spec.classifies:
        spec = spec.with_labels(about.get("labels", ()), about.get("head_seed", 0))
    if spec.dtype == AUTO and "dtype" in about:
        spec = dataclasses.replace(spec, dtype=about["dtype"])
    mask = about.get("mask", "")
    if mask and isinstance(spec, Pruned) and not spec.path:
        there = Path(about["folder"])
        if (there / ABOUT).is_file():
            spec = dataclasses.replace(spec, path=str(there))
        else:
            emit(f"{there}, the run's pruned base, is gone: it is looked for, or made, again")
    info = spec.describe()
    if about and info.mask != mask:
        found = f"the mask {info.mask}" if info.mask else "no mask: it is dense"
        raise ConfigError(
            f"{run} was trained on a base pruned with the mask {mask or '(none: dense)'}, and "
            f"{spec.folder()} has {found}: bring back the folder of then ({about['folder']}), or "
            f"set model.path in {run / 'config.yaml'}"
        )
    if about and about.get("fingerprint", info.fingerprint) != info.fingerprint:
        raise ConfigError(
            f"{run} was trained on the base {about.get('name')} ({about['fingerprint']}), and "
            f"{spec.folder()} holds another ({info.fingerprint}): bring back the folder of then "
            f"({about.get('folder')}), or set model.path in {run / 'config.yaml'}"
        )
    return spec


def language_model_of(
    run: Path, model: DictConfig | Mapping[str, Any], emit: Callable[[str], object]
) -> ModelSpec:
    """The same for who wants text of it.

    Raises:
        ConfigError: if it is a classifier.
    """
    spec = base_of(run, model, emit)
    if spec.classifies:
        raise ConfigError(
            f"{run} has trained a classifier (model.task=classification), which writes no text: "
            "its accuracy is in the run's report, and fedlora merge writes a plain model"
        )
    return spec
