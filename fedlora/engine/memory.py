"""Keep freed memory within the process, if the C library supports it.

A training step allocates and frees the same large activations again and again. By default glibc
returns blocks of more than a few hundred KiB to the kernel at once, which then hands out zeroed
pages, one fault at a time: a fifth of a small model's training time on a CPU.
"""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_KEEP = 512 << 20  # bytes of free memory that a process may hold on to
_BLOCK = 1 << 30  # blocks below this come from the heap


def keep_freed_memory() -> bool:
    """Ask the C library to reuse freed blocks; whether it supports that (only glibc does)."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library, or Windows
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _BLOCK)) and bool(mallopt(_M_TRIM_THRESHOLD, _KEEP))
