"""Measures the bytes that a forward pass saves for its backward pass."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Saved:
    """What autograd has saved so far: distinct storages that are not there anyway."""

    sizes: dict[int, int] = field(default_factory=dict)
    """Address of a storage -> its bytes."""

    @property
    def bytes(self) -> int:
        """All of them."""
        return sum(self.sizes.values())


@contextmanager
def saved_bytes(own: Iterable[Tensor] = ()) -> Iterator[Saved]:
    """Measure what the forward passes inside save for a backward pass.

    Keep their results until the end: a graph that is freed gives its addresses to the next.

    Args:
        own: tensors that are there anyway and do not count: parameters, mounted factors, buffers.
    """
    known = {t.untyped_storage().data_ptr() for t in own}
    saved = Saved()

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved.sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved
