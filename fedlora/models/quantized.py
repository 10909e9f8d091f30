"""A frozen base in eight or four bits: what bitsandbytes and transformers need for it."""

from importlib.util import find_spec
from typing import Any

import torch

from fedlora.core.errors import ModelError


def require_bitsandbytes(quantization: str) -> None:
    """Check that the library is installed.

    Raises:
        ModelError: saying how to install it.
    """
    if find_spec("bitsandbytes") is None:
        raise ModelError(
            f"model.quantization={quantization} needs bitsandbytes (pip install bitsandbytes); "
            "without it use model.quantization=none"
        )


def placement(quantization: str, dtype: str, device: torch.device) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` that quantise and place a network.

    Args:
        quantization: ``none`` (then there are none), ``int8`` or ``int4``.
        dtype: number format that 4-bit weights are computed in.
        device: of the network.
    """
    if quantization == "none":
        return {}
    from transformers import BitsAndBytesConfig

    eight = quantization == "int8"
    schema: Any = BitsAndBytesConfig
    config = schema(
        load_in_8bit=eight,
        load_in_4bit=not eight,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )
    return {"quantization_config": config, "device_map": {"": device}}
