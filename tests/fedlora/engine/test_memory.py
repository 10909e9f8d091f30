"""The allocator setting is a matter of speed: same bits, and no error where it does not exist."""

import ctypes
import platform
import subprocess
import sys

import pytest
import torch

from fedlora.core.types import LocalPlan
from fedlora.engine.memory import keep_freed_memory, limit_freed_memory
from fedlora.engine.sequential import Sequential
from tests.fedlora.engine.world import FakeStore, examples, job, model, start, vector


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")
def test_glibc_can_be_asked():
    assert keep_freed_memory()
    assert keep_freed_memory()


def test_another_c_library_is_no_error(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert not keep_freed_memory()
    assert not limit_freed_memory(keep=0)


def test_numbers_do_not_change():
    found = []
    for reuse in (False, True):
        engine = Sequential(threads=0, reuse_memory=reuse).open(
            model(), FakeStore({0: examples(5)})
        )
        (update,) = engine.train([job(start(engine.model), LocalPlan(epochs=2))])
        found.append(vector(update.payload))
    assert torch.equal(*found)


HOLES = """
import ctypes
from fedlora.engine.memory import keep_freed_memory, limit_freed_memory

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

if not keep_freed_memory() or not hasattr(ctypes.CDLL(None), "mallinfo2"):
    raise SystemExit(77)
blocks = [bytearray(b"x" * 2**20) for _ in range(200)]
del blocks[::2]  # every other: nothing lies free at the end of the heap
before = resident()
assert not limit_freed_memory(keep=2**30)
assert resident() > before - 2**23
assert limit_freed_memory(keep=2**25)
assert resident() < before - 60 * 2**20, (before, resident())
assert all(block == b"x" * 2**20 for block in blocks)
"""


def test_free_blocks_between_used_ones_go_back_to_the_kernel():
    words = [sys.executable, "-c", HOLES]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    if done.returncode == 77:
        pytest.skip("the C library does not tell what lies free")
    assert done.returncode == 0, done.stderr
