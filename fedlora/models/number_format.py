"""In which number format a base is held where ``model.dtype=auto`` leaves that to the machine."""

from pathlib import Path

import torch

AUTO = "auto"
FLAGS = ("amx_bf16", "avx512_bf16")
"""Flags in /proc/cpuinfo of processors that multiply bfloat16 matrices in one instruction."""
CPUINFO = Path("/proc/cpuinfo")


def number_format(device: torch.device) -> tuple[str, str]:
    """``bfloat16`` where the device multiplies it natively, else ``float32``.

    Elsewhere bfloat16 is emulated, and slower than float32.

    Returns:
        The number format, and the reason in a few words.
    """
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        what = "the GPU multiplies" if native else "the GPU does not multiply"
        return ("bfloat16" if native else "float32"), f"{what} bfloat16 natively"
    found = [flag for flag in FLAGS if flag in processor_flags()]
    if found:
        return "bfloat16", f"the processor has {found[0]}"
    return "float32", f"the processor has none of {', '.join(FLAGS)}"


def processor_flags() -> frozenset[str]:
    """The flags of the first processor; none where the system does not say."""
    try:
        lines = CPUINFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    flags = (line.partition(":")[2].split() for line in lines if line.startswith("flags"))
    return frozenset(next(flags, []))
