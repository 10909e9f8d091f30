"""In which number format a base is held where ``model.dtype=auto`` leaves that to the machine."""

import time
from functools import cache
from pathlib import Path

import torch

AUTO = "auto"
FLAGS = ("amx_bf16", "avx512_bf16")
"""Flags in /proc/cpuinfo of processors that multiply bfloat16 matrices in one instruction."""
CPUINFO = Path("/proc/cpuinfo")
WORTH = 1.2
"""How many times faster than float32 bfloat16 has to be on a processor, which loses bits by it."""


def number_format(device: torch.device) -> tuple[str, str]:
    """``bfloat16`` where the device multiplies it natively and faster, else ``float32``.

    Elsewhere bfloat16 is emulated, and slower than float32. A processor's flag alone does not say
    that it is faster: of two with AVX-512-BF16 and no AMX, one multiplied bfloat16 at twice the
    speed of float32 and one at half of it.

    Returns:
        The number format, and the reason in a few words.
    """
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        what = "the GPU multiplies" if native else "the GPU does not multiply"
        return ("bfloat16" if native else "float32"), f"{what} bfloat16 natively"
    found = [flag for flag in FLAGS if flag in processor_flags()]
    if not found:
        return "float32", f"the processor has none of {', '.join(FLAGS)}"
    faster = speed() >= WORTH
    said = "and multiplies bfloat16 faster" if faster else "but multiplies bfloat16 no faster"
    return ("bfloat16" if faster else "float32"), f"the processor has {found[0]}, {said}"


@cache
def speed(size: int = 512, repeats: int = 5) -> float:
    """The time of a product of matrices ``[size, size]`` in float32 over that in bfloat16, on one
    thread; the least of some repeats in turns, so that other work on the machine does not count.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        least = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
        ones = {dtype: torch.ones(size, size, dtype=dtype) for dtype in least}
        for _ in range(repeats + 1):  # the first of each prepares
            for dtype, x in ones.items():
                begun = time.perf_counter()
                torch.mm(x, x)
                least[dtype] = min(least[dtype], time.perf_counter() - begun)
    finally:
        torch.set_num_threads(threads)
    return least[torch.float32] / least[torch.bfloat16]


def processor_flags() -> frozenset[str]:
    """The flags of the first processor; none where the system does not say."""
    try:
        lines = CPUINFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    flags = (line.partition(":")[2].split() for line in lines if line.startswith("flags"))
    return frozenset(next(flags, []))
