"""SPP through PEFT's own extension points, and SPP adapters on disk.

PEFT lets a configuration name its own layer for a kind of module, and a layer its own variant of
the LoRA computation. `SppLinear` uses both: injection, dropout, scaling, saving, loading and
merging are PEFT's; ``lora_A.weight [r, d_in]`` is alpha and ``lora_B.weight [d_out, 1]`` is beta.
Neither point is a stable interface of PEFT, so tests compare it with our own layer.

PEFT does not save the mapping of layers: code that loads an adapter has to register it again
(`spp_config`). Without it the shapes do not fit, and PEFT refuses. PEFT does not store which base
the adapter was trained on either: ``load_spp(folder).mask`` is the `mask_identity` of its folder.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import LoraConfig
from peft.tuners import lora
from peft.tuners.lora.layer import LoraVariant
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedlora.core.errors import ModelError
from fedlora.core.reading import json_in, tensors_in
from fedlora.core.types import Factors
from fedlora.models.masks import (
    check_zeros,
)
from fedlora.models.modules import ModelInfo
from fedlora.techniques.lora.peft import WEIGHTS, mount_by_peft, write_peft
from fedlora.techniques.spp.layer import scaled_branch
from fedlora.techniques.spp.payload import MaskedScale, alpha_of, check_scale
from fedlora.techniques.spp.scale import factor, repeat_rows, scaled_weight

SPP = "spp.safetensors"
"""Beside PEFT's files, or in their place."""


class SppVariant(LoraVariant):
    """The methods that PEFT's LoRA layer calls on a variant, for ``W ∘ (1 + s F)``."""

    def supports_lora_conversion(self) -> bool:
        """No: the layer is not the sum of a weight and a low-rank matrix."""
        return False

    @staticmethod
    def init(module: Any, adapter_name: str, **_: Any) -> None:
        """Alpha as PEFT draws ``lora_A``, beta zero."""
        a = module.lora_A[adapter_name].weight
        b = nn.Linear(1, module.out_features, bias=False, device=a.device, dtype=a.dtype)
        nn.init.zeros_(b.weight)
        module.lora_B[adapter_name] = b

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        """The layer's output with the branch added."""
        alpha, beta = _factors(module, active_adapter)
        x = module.lora_dropout[active_adapter](x)
        scale = float(module.scaling[active_adapter])
        return result + scaled_branch(x, _dense(module), alpha, beta, scale)

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """The merged weight; the one before any merge is kept for `unmerge`.

        Raises:
            ModelError: if a zero would move or a weight would not be finite; nothing has changed.
        """
        merged = list(module.merged_adapters)
        before = module.spp_unmerged if merged else orig_weight.detach().clone()
        new = _merged(module, before, [*merged, active_adapter])
        module.spp_unmerged = before
        return new

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        """The same in place."""
        new = SppVariant.merge_safe(module, active_adapter, orig_weight.data)
        orig_weight.data.copy_(new)

    @staticmethod
    def unmerge(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """The weight with the adapters that are still merged. With none it is bitwise identical to
        the weight before merging, which was kept: dividing would not restore it."""
        before: Tensor = module.spp_unmerged
        if module.merged_adapters:
            return _merged(module, before, module.merged_adapters)
        module.spp_unmerged = None
        return before


class SppLinear(lora.Linear):
    """PEFT's LoRA layer over ``nn.Linear`` or ``Conv1D``, computing SPP."""

    def resolve_lora_variant(self, **_: Any) -> SppVariant:
        """Always SPP."""
        return SppVariant()

    def get_delta_weight(self, adapter: str) -> Tensor:
        """``s W ∘ F``, as the layer stores its weight."""
        f = _dense(self) * factor(*_factors(self, adapter)) * float(self.scaling[adapter])
        return f.T if self.fan_in_fan_out else f


def spp_config(config: LoraConfig) -> LoraConfig:
    """Register SPP's layers in a configuration and return it.

    It is for ``get_peft_model`` or, loaded from a folder, for
    ``PeftModel.from_pretrained(base, folder, config=...)`` on the pruned base that the adapter was
    trained on. A loaded configuration for GPT-2 also needs ``fan_in_fan_out = True``.
    """
    config._register_custom_module({nn.Linear: SppLinear, Conv1D: SppLinear})
    return config


def mount_spp(network: Any, folder: Path) -> Any:
    """The pruned base with an SPP adapter on it, as PEFT reads the folder."""
    config = LoraConfig.from_pretrained(str(folder))
    config.fan_in_fan_out = any(isinstance(layer, Conv1D) for layer in network.modules())
    return mount_by_peft(network, folder, spp_config(config))


def write_spp(
    payload: MaskedScale, info: ModelInfo, folder: Path, base_name: str = "", dropout: float = 0.0
) -> None:
    """Write an SPP adapter: ``spp.safetensors`` holds the whole payload.

    PEFT's files are written too if they can hold the payload and cannot be mistaken for LoRA's:
    nothing was merged into the base during training, and no module has rank 1, where the shapes of
    alpha and beta equal those of A and B.

    Args:
        payload: scales at least one module.
        info: describes the pruned base; a payload that does not fit it is refused.
        folder: an empty one.
        base_name: folder or hub id of the pruned base.
        dropout: what further training with PEFT would use.

    Raises:
        ValueError: as `fedlora.techniques.spp.payload.check_scale`.
    """
    check_scale(payload, info)
    alpha = {p: alpha_of(payload, p) for p in payload.beta}
    whole = replace(payload, alpha=alpha, tied={}, change={}, trains="both", seed=-1)
    if not whole.merges and min(payload.blocks[p] for p in alpha) > 1:
        rows = {p: repeat_rows(a, payload.blocks[p]) for p, a in alpha.items()}
        factors = {
            p: Factors(rows[p], beta[:, None].expand(-1, len(rows[p])), payload.lora_alpha)
            for p, beta in payload.beta.items()
        }
        write_peft(factors, info, folder, base_name, dropout)
        _write_peft(replace(whole, alpha=rows), folder)
    tensors = {name: t.detach().cpu().clone().contiguous() for name, t in whole.tensors()}
    stated = {"mask": whole.mask, "lora_alpha": whole.lora_alpha, "blocks": dict(whole.blocks)}
    stated |= {"order": list(whole.beta), "merges": len(whole.merges)}
    save_file(tensors, folder / SPP, metadata={"spp": json.dumps(stated)})


def load_spp(folder: Path) -> MaskedScale:
    """The inverse of `write_spp`.

    Raises:
        ModelError: if the folder holds no SPP adapter.
    """
    if not (folder / SPP).is_file():
        raise ModelError(f"{folder} holds no {SPP}: it is no SPP adapter")
    with tensors_in(folder / SPP, "the adapter") as file:
        text = (file.metadata() or {}).get("spp", "{}")
        stated = json_in(folder / SPP, "the adapter", text=text)
        if not {"mask", "lora_alpha", "blocks", "order", "merges"} <= stated.keys():
            raise ModelError(f"{folder / SPP} is no SPP adapter: it does not say what it holds")
        order, tensor = stated["order"], file.get_tensor
        return MaskedScale(
            mask=stated["mask"],
            lora_alpha=stated["lora_alpha"],
            blocks=stated["blocks"],
            alpha={p: tensor(f"{p}/alpha") for p in order},
            beta={p: tensor(f"{p}/beta") for p in order},
            merges=tuple(
                {
                    p: (tensor(f"{p}/merges/{i}/alpha"), tensor(f"{p}/merges/{i}/beta"))
                    for p in order
                }
                for i in range(stated["merges"])
            ),
        )


def _write_peft(payload: MaskedScale, folder: Path) -> None:
    """Alpha and beta under PEFT's names."""
    tensors = {}
    for path, beta in payload.beta.items():
        name = f"base_model.model.{path}"
        tensors[f"{name}.lora_A.weight"] = payload.alpha[path].detach().cpu().contiguous()
        tensors[f"{name}.lora_B.weight"] = beta.detach().cpu()[:, None].contiguous()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def _factors(module: Any, adapter: str) -> tuple[Tensor, Tensor]:
    """Alpha ``[r, d_in]`` and beta ``[d_out]``."""
    return module.lora_A[adapter].weight, module.lora_B[adapter].weight[:, 0]


def _dense(module: Any) -> Tensor:
    weight: Tensor = module.get_base_layer().weight
    return weight.T if module.fan_in_fan_out else weight


def _merged(module: Any, weight: Tensor, adapters: Sequence[str]) -> Tensor:
    """``W ∘ (1 + Σ s F)`` as the layer stores it, rounded once, its zeros where they were."""
    dense = weight.T if module.fan_in_fan_out else weight
    first, *others = (
        scaled_weight(dense, *_factors(module, name), float(module.scaling[name]))
        for name in adapters
    )
    merged = sum((other - dense for other in others), first).to(weight.dtype)
    name = " and ".join(adapters)
    check_zeros({name: (dense != 0).cpu()}, lambda _: merged, "merging by PEFT")
    return (merged.T if module.fan_in_fan_out else merged).contiguous()
