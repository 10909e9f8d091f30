"""Imports of large packages without the garbage collector, which would look again and again at
hundreds of thousands of objects of which nothing is garbage: a fifth of their time."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collection() -> Iterator[None]:
    """Collect no garbage in the block, nor ever what it has made."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if before:
            gc.enable()
