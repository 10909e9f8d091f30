"""SPP through PEFT's own extension points, and SPP adapters on disk.

PEFT lets a configuration name its own layer for a kind of module, and a layer its own variant of
the LoRA computation. `SppLinear` uses both: injection, dropout, scaling, saving, loading and
merging are PEFT's; ``lora_A.weight [r, d_in]`` is alpha and ``lora_B.weight [d_out, 1]`` is beta.
Neither point is a stable interface of PEFT, hence the tests that hold it to our own layer.

The mapping of layers is not part of what PEFT saves: whoever loads has to register it again
(`spp_config`). Without it the shapes do not fit, and PEFT refuses.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners import lora
from peft.tuners.lora.layer import LoraVariant
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from fedlora.models.export import SPP, save_peft
from fedlora.models.folder import ModelError
from fedlora.models.modules import ModelInfo, check_scale
from fedlora.spp import alpha_of, borders, factor
from fedlora.types import Factors, MaskedScale, payload_tensors


class SppVariant(LoraVariant):
    """What PEFT's LoRA layer asks of a variant, for ``W ∘ (1 + s F)``."""

    def supports_lora_conversion(self) -> bool:
        """It is no sum of a weight and a low-rank matrix."""
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
        """The layer's output with the branch added, block by block."""
        alpha, beta = _factors(module, active_adapter)
        weight = _dense(module).to(alpha.dtype)
        x = module.lora_dropout[active_adapter](x.to(alpha.dtype))
        at = borders(len(beta), len(alpha))
        parts = [
            functional.linear(x * row, weight[at[g] : at[g + 1]]) for g, row in enumerate(alpha)
        ]
        branch = torch.cat(parts, dim=-1) * beta * float(module.scaling[active_adapter])
        return result + branch

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """The merged weight; the old one is kept for `unmerge`."""
        module.spp_unmerged = orig_weight.detach().clone()
        return _merged(module, active_adapter, orig_weight)

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        """The same in place."""
        new = SppVariant.merge_safe(module, active_adapter, orig_weight.data)
        orig_weight.data.copy_(new)

    @staticmethod
    def unmerge(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """The weight before merging, bit by bit: dividing would not give it back."""
        weight: Tensor = module.spp_unmerged
        module.spp_unmerged = None
        return weight


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
    """The configuration with SPP's layers registered, for ``get_peft_model`` or, loaded from a
    folder, for ``PeftModel.from_pretrained(base, folder, config=...)``."""
    config._register_custom_module({nn.Linear: SppLinear, Conv1D: SppLinear})
    return config


def save_spp(
    payload: MaskedScale, info: ModelInfo, folder: Path, base_name: str = "", dropout: float = 0.0
) -> None:
    """Write an SPP adapter: ``spp.safetensors`` with all of it, and PEFT's files where they can
    hold it and cannot be taken for LoRA: nothing was merged into the base on the way, and no
    module has rank 1, where the shapes of alpha and beta are those of A and B.

    Args:
        payload: of the modules it scales, at least one.
        info: of the pruned base; what does not fit it is refused.
        folder: made if it does not exist.
        base_name: folder or hub id of the pruned base.
        dropout: what further training with PEFT would use.

    Raises:
        ValueError: as `fedlora.models.modules.check_scale`.
    """
    check_scale(payload, info)
    alpha = {p: alpha_of(payload, p) for p in payload.beta}
    whole = replace(payload, alpha=alpha, tied={}, change={}, trains="both", seed=-1)
    folder.mkdir(parents=True, exist_ok=True)
    if not whole.merges and min(len(a) for a in alpha.values()) > 1:
        factors = {
            p: Factors(alpha[p], beta[:, None].expand(-1, len(alpha[p])), payload.lora_alpha)
            for p, beta in payload.beta.items()
        }
        save_peft(factors, info, folder, base_name, dropout)
        _write_peft(whole, folder)
    tensors = {name: t.detach().cpu().clone().contiguous() for name, t in payload_tensors(whole)}
    about = {"mask": whole.mask, "lora_alpha": whole.lora_alpha, "blocks": dict(whole.blocks)}
    about |= {"order": list(whole.beta), "merges": len(whole.merges)}
    save_file(tensors, folder / SPP, metadata={"spp": json.dumps(about)})


def load_spp(folder: Path) -> MaskedScale:
    """The inverse of `save_spp`.

    Raises:
        ModelError: if the folder holds no SPP adapter.
    """
    if not (folder / SPP).is_file():
        raise ModelError(f"{folder} holds no {SPP}: it is no SPP adapter")
    with safe_open(folder / SPP, framework="pt") as file:
        about = json.loads((file.metadata() or {})["spp"])
        found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    order = about["order"]
    return MaskedScale(
        mask=about["mask"],
        lora_alpha=about["lora_alpha"],
        blocks=about["blocks"],
        alpha={p: found[f"{p}/alpha"] for p in order},
        beta={p: found[f"{p}/beta"] for p in order},
        merges=tuple(
            {p: (found[f"{p}/merges/{i}/alpha"], found[f"{p}/merges/{i}/beta"]) for p in order}
            for i in range(about["merges"])
        ),
    )


def _write_peft(payload: MaskedScale, folder: Path) -> None:
    """Alpha and beta under PEFT's names."""
    tensors = {}
    for path, beta in payload.beta.items():
        name = f"base_model.model.{path}"
        tensors[f"{name}.lora_A.weight"] = payload.alpha[path].detach().cpu().contiguous()
        tensors[f"{name}.lora_B.weight"] = beta.detach().cpu()[:, None].contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _factors(module: Any, adapter: str) -> tuple[Tensor, Tensor]:
    """Alpha ``[r, d_in]`` and beta ``[d_out]``."""
    return module.lora_A[adapter].weight, module.lora_B[adapter].weight[:, 0]


def _dense(module: Any) -> Tensor:
    weight: Tensor = module.get_base_layer().weight
    return weight.T if module.fan_in_fan_out else weight


def _merged(module: Any, adapter: str, weight: Tensor) -> Tensor:
    f = factor(*_factors(module, adapter)) * module.scaling[adapter]
    f = f.T if module.fan_in_fan_out else f
    wide = weight.to(torch.promote_types(weight.dtype, f.dtype))
    return torch.addcmul(wide, wide, f.to(wide.dtype)).to(weight.dtype)
