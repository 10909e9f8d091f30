"""Keep freed memory within the process, and not too much of it, if the C library supports it.

A training step allocates and frees the same large activations again and again. By default glibc
returns blocks of more than a few hundred KiB to the kernel at once, which then hands out zeroed
pages, one fault at a time: a fifth of a small model's training time on a CPU.

Blocks that are still in use pin the heap: what lies free between them is kept whatever glibc's own
threshold says, and grows from round to round, for new blocks of other sizes do not fit. That is
given back between messages.
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


class _MallInfo(ctypes.Structure):
    """``struct mallinfo2`` of malloc.h."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    ]


def limit_freed_memory(keep: int = _KEEP) -> bool:
    """Give the pages of freed blocks back to the kernel if there are more than `keep_freed_memory`
    means to keep; whether that was done.

    Args:
        keep: bytes of freed blocks that may stay.
    """
    try:
        library = ctypes.CDLL(None)
        told, trim = library.mallinfo2, library.malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library, or glibc before 2.33
        return False
    told.restype = _MallInfo
    if told().fordblks <= keep:
        return False
    return bool(trim(0))
