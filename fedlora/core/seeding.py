"""Every random stream is a function of (seed, purpose, keys): resuming or reordering changes none.

No global generator is ever seeded. A purpose is a word ("cohort", "order", "dropout", ...); its
CRC keeps streams of different purposes apart even when all other arguments agree.
"""

import zlib
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


def _entropy(seed: int, purpose: str, *keys: int) -> np.random.SeedSequence:
    return np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), *keys])


def generator(seed: int, purpose: str, *keys: int) -> np.random.Generator:
    """A NumPy generator for one purpose, for example ``generator(seed, "cohort", round)``."""
    return np.random.default_rng(_entropy(seed, purpose, *keys))


def torch_seed(seed: int, purpose: str, *keys: int) -> int:
    """A 63-bit seed for a torch generator."""
    return _torch_seed(seed, purpose, keys)


@lru_cache(maxsize=2**16)  # every start of a client asks for the seeds of the same tensors
def _torch_seed(seed: int, purpose: str, keys: tuple[int, ...]) -> int:
    return int(_entropy(seed, purpose, *keys).generate_state(1, np.uint64)[0] >> np.uint64(1))


def torch_generator(seed: int, purpose: str, *keys: int) -> torch.Generator:
    """A CPU torch generator for one purpose."""
    return torch.Generator().manual_seed(torch_seed(seed, purpose, *keys))


def dropout_seeds(seed: int, round: int, client: int) -> Iterator[int]:
    """The seeds of a client's dropout masks in one round, one for each forward pass.

    A mask is a function of (client, forward, module), whatever else runs beside it and whether or
    not it is computed twice.
    """
    stream = generator(seed, "dropout", round, client)
    while True:
        yield int(stream.integers(2**63))


def mask_noise(seed: int, path: str, d_out: int, d_in: int) -> Tensor:
    """Uniform noise ``[d_out, d_in]`` of one module, the same in every process.

    A sparse mask of density ``d`` is ``mask_noise(...) < d``, so masks are nested in ``d``.
    """
    g = torch_generator(seed, "mask", zlib.crc32(path.encode()))
    return torch.rand(d_out, d_in, generator=g)
