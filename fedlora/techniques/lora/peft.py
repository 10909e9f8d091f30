"""Adapters on disk in PEFT's format, both ways.

PEFT describes unequal ranks by patterns: ``rank_pattern`` and ``alpha_pattern`` map module paths to
values that differ from ``r`` and ``lora_alpha``, so PEFT can hold any of our adapters.
"""

import dataclasses
import math
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file
from torch import Tensor

from fedlora.core.errors import ModelError
from fedlora.core.reading import json_in, tensors_in
from fedlora.core.types import Adapter, Factors
from fedlora.models.export import exported, require_base
from fedlora.models.headed import WithHead
from fedlora.models.modules import ModelInfo, check_adapter
from fedlora.models.qkv import join_adapter, split_adapter
from fedlora.techniques.lora.payload import LowRankPayload

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_PREFIX = "base_model.model."

# Keys of adapter_config.json that do not change the meaning of the two factors. The value of
# init_lora_weights shows PiSSA and similar methods, which change the base.
_NEUTRAL = {
    "auto_mapping",
    "base_model_name_or_path",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "alpha_pattern",
    "peft_type",
    "peft_version",
    "r",
    "rank_pattern",
    "revision",
    "target_modules",
    "task_type",
    "use_rslora",
}
_INITS_THAT_KEEP_THE_BASE = (True, False, None, "gaussian", "orthogonal", "eva")


def write_peft(
    adapter: Adapter, info: ModelInfo, folder: Path, base_name: str = "", dropout: float = 0.0
) -> None:
    """Write an adapter for ``PeftModel.from_pretrained``, whatever its ranks and scales.

    Factors of a split layer's parts are written as those of the whole layer, since PEFT mounts them
    on the model as its files have it: parts of ranks r_1, r_2, ... give one of rank r_1 + r_2 + ...

    Args:
        adapter: factors of the modules it updates, at least one.
        info: of the base model; what does not fit it is refused.
        folder: an empty one.
        base_name: folder or hub id of the base model, which PEFT's automatic classes look up.
        dropout: what further training with PEFT would use.

    Raises:
        ValueError: if the adapter is empty or does not fit the model, naming the module.
    """
    if not adapter:
        raise ValueError(f"an adapter without modules cannot be saved to {folder}")
    check_adapter(adapter, info)
    adapter = join_adapter(adapter, info.splits)
    ranks = {path: f.rank for path, f in adapter.items()}
    alphas = {path: _number(f.alpha) for path, f in adapter.items()}
    rank, alpha = _commonest(ranks), _commonest(alphas)
    config = LoraConfig(
        base_model_name_or_path=base_name or None,
        task_type="SEQ_CLS" if info.classifies else "CAUSAL_LM",
        inference_mode=True,
        target_modules=sorted(adapter),
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        rank_pattern={path: r for path, r in ranks.items() if r != rank},
        alpha_pattern={path: a for path, a in alphas.items() if a != alpha},
    )
    config.save_pretrained(str(folder))
    tensors = {}
    for path, f in adapter.items():
        tensors[f"{_PREFIX}{path}.lora_A.weight"] = f.a.detach().cpu().contiguous()
        tensors[f"{_PREFIX}{path}.lora_B.weight"] = f.b.detach().cpu().contiguous()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def load_peft(folder: Path, info: ModelInfo | None = None) -> LowRankPayload:
    """Read a LoRA adapter in PEFT's format, written by us or by another program.

    Args:
        folder: with the configuration and the factors.
        info: of the model that it will be mounted on, needed if that has split layers: factors of
            the whole layer are split (`fedlora.models.qkv.split_adapter`).

    Rank-stabilised LoRA scales by ``alpha / sqrt(r)``; the returned ``alpha`` is multiplied by
    ``sqrt(r)``, so that ``Factors.scale`` is right.

    Raises:
        ModelError: if files are missing, the adapter is more than two factors per linear layer, or
            it was trained on another base.
    """
    kind = exported(folder)
    if kind is not None and not issubclass(kind, LowRankPayload | WithHead):
        raise ModelError(
            f"{folder} holds {kind.noun}, which is more than LoRA's two factors per layer: read it "
            "with fedlora.models.export.load"
        )
    if info is not None:
        require_base(folder, info)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            there = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else "no folder"
            raise ModelError(f"adapter folder {folder} lacks {name}; it has: {there}")
    config = json_in(folder / CONFIG, "the adapter's configuration")
    _check(config, folder, info)
    beside = _head_names(info)
    with tensors_in(folder / WEIGHTS, "the adapter") as file:
        keys = [key for key in file.keys() if key not in beside]  # noqa: SIM118
        halves = _halves({key: file.get_tensor(key) for key in keys}, folder)
    adapter = {
        path: Factors(a=pair["A"], b=pair["B"], alpha=_alpha(config, path, pair["A"].shape[0]))
        for path, pair in halves.items()
    }
    return LowRankPayload(split_adapter(adapter, info.splits) if info else adapter)


def mount_by_peft(network: Any, folder: Path, config: PeftConfig | None = None) -> Any:
    """A plain network with an adapter on it, as PEFT reads the folder, in evaluation mode.

    Args:
        network: changed in place.
        folder: in PEFT's format.
        config: in place of the folder's own.

    Raises:
        ModelError: if PEFT finds no factors for a layer that it adapts.
    """
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        mounted = PeftModel.from_pretrained(network, str(folder), config=config)
    lost = [re.search(r"missing adapter keys.*?'([^']+)'", str(w.message)) for w in said]
    if first := next(filter(None, lost), None):
        raise ModelError(f"it adapts layers that the folder has no factors for ({first[1]})")
    return mounted.eval()


def _number(alpha: float) -> Any:
    """PEFT declares ``lora_alpha`` an integer and divides it as a number."""
    return int(alpha) if float(alpha).is_integer() else float(alpha)


def _commonest(values: Mapping[str, Any]) -> Any:
    return Counter(values.values()).most_common(1)[0][0]


def _head_names(info: ModelInfo | None) -> set[str]:
    """Names in PEFT's file of a classifier's head, which `fedlora.models.headed.WithHead` reads."""
    return set() if info is None else {f"{_PREFIX}{h.name}" for h in info.head}


def _check(config: Mapping[str, Any], folder: Path, info: ModelInfo | None) -> None:
    """Refuse a configuration that means more than the two factors per layer, and beside them the
    head of a classifier for a classifier."""
    task, classifies = config.get("task_type"), info is not None and info.classifies
    if info is not None and task in ("SEQ_CLS", "CAUSAL_LM") and classifies != (task == "SEQ_CLS"):
        use = "classification" if task == "SEQ_CLS" else "causal_lm"
        raise ModelError(
            f"{folder / CONFIG}: task_type={task}, and {info.name} was loaded with "
            f"model.task={info.task}: use model.task={use}"
        )
    if config.get("peft_type") != "LORA":
        raise ModelError(f"{folder / CONFIG}: peft_type={config.get('peft_type')!r}; only LORA")
    init = config.get("init_lora_weights", True)
    if init not in _INITS_THAT_KEEP_THE_BASE:
        raise ModelError(
            f"{folder / CONFIG}: init_lora_weights={init!r} changes the base weights; convert it "
            "with path_initial_model_for_weight_conversion of PEFT's save_pretrained first"
        )
    plain = dataclasses.asdict(LoraConfig())
    more = {
        key: value
        for key, value in config.items()
        if key not in _NEUTRAL and value and value != plain.get(key)
        if not (classifies and key == "modules_to_save")
    }
    if more:
        raise ModelError(f"{folder / CONFIG}: {more} is more than LoRA's two factors per layer")


def _halves(tensors: Mapping[str, Tensor], folder: Path) -> dict[str, dict[str, Tensor]]:
    """Module path -> its factors under ``A`` and ``B``."""
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        path, _, rest = key.removeprefix(_PREFIX).rpartition(".lora_")
        half, _, tail = rest.partition(".")
        if not path or half not in ("A", "B") or tail not in ("weight", "default.weight"):
            raise ModelError(f"{folder / WEIGHTS}: {key!r} is no factor of a linear layer")
        halves.setdefault(path, {})[half] = tensor
    for path, pair in halves.items():
        if set(pair) != {"A", "B"}:
            raise ModelError(f"{folder / WEIGHTS}: {path} has lora_{next(iter(pair))} alone")
    return halves


def _alpha(config: Mapping[str, Any], path: str, rank: int) -> float:
    patterns = config.get("alpha_pattern") or {}
    key = get_pattern_key(list(patterns), path)
    alpha = float(patterns.get(key, config["lora_alpha"]))
    return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha
