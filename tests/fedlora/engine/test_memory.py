"""The allocator setting is a matter of speed: same bits, and no error where it does not exist."""

import ctypes
import platform

import pytest
import torch

from fedlora.core.types import LocalPlan
from fedlora.engine.memory import keep_freed_memory
from fedlora.engine.sequential import Sequential
from tests.fedlora.engine.world import FakeStore, examples, job, model, start, vector


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")
def test_glibc_can_be_asked():
    assert keep_freed_memory()
    assert keep_freed_memory()


def test_another_c_library_is_no_error(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert not keep_freed_memory()


def test_numbers_do_not_change():
    found = []
    for reuse in (False, True):
        engine = Sequential(threads=0, reuse_memory=reuse).open(
            model(), FakeStore({0: examples(5)})
        )
        (update,) = engine.train([job(start(engine.model), LocalPlan(epochs=2))])
        found.append(vector(update.payload))
    assert torch.equal(*found)
