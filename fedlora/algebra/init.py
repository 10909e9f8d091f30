"""The factors every client of every method starts from: one common A per module, and B = 0.

Factor averages mean nothing when clients start from different ``A``; with a common one, methods are
also comparable seed by seed. The bound depends on the fan-in alone, so a prefix of ``A`` is
distributed as it should be for any smaller rank.
"""

import math
import zlib
from functools import lru_cache

import torch
from torch import Tensor

from fedlora.core.checks import one_of
from fedlora.core.seeding import torch_generator
from fedlora.core.types import (
    Factors,
    Module,
    Ranks,
    Setting,
)


def initial_a(seed: int, module: Module, rank: int) -> Tensor:
    """``[rank, d_in]`` from ``U(-1/sqrt(d_in), 1/sqrt(d_in))``, float32.

    Kaiming-uniform with ``a = sqrt(5)``, as LoRA layers are usually initialised. Rows of a smaller
    rank are the first rows of a larger one.
    """
    if not 1 <= rank <= module.max_rank:
        raise ValueError(f"rank {rank} of {module.path} is not in 1..{module.max_rank}")
    return sample_a(seed, module.path, rank, module.d_in)


def sample_a(seed: int, path: str, rank: int, d_in: int) -> Tensor:
    """`initial_a` for callers that know only a module's path and ``d_in``; ``[rank, d_in]``."""
    g = torch_generator(seed, "init", zlib.crc32(path.encode()))
    bound = 1 / math.sqrt(d_in)
    return torch.empty(rank, d_in).uniform_(-bound, bound, generator=g)


INITS = ("kaiming", "orthonormal")


def orthonormal(a: Tensor) -> Tensor:
    """Orthonormal rows of which the first ``r`` span what the first ``r`` rows of ``a`` do.

    Args:
        a: ``[r, n]`` of rank ``r``; computed in float64, returned in its dtype.
    """
    q, r = torch.linalg.qr(a.double().T)  # [n, r], [r, r]
    rows: Tensor = (q * torch.sign(torch.diagonal(r))).T
    return rows.contiguous().to(a.dtype)


@lru_cache(maxsize=4096)  # two for each module, rank, and form in which it is asked for
def orthonormal_rows(
    seed: int, name: str, rank: int, d: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """``[rank, d]``: orthonormal rows of a random direction; not to be written to.

    Rows of `sample_a` by classical Gram-Schmidt, twice, in float64. A row depends on those before
    it alone, so rows of a smaller rank are, bit for bit, the first rows of a larger one.

    Args:
        seed: of the run.
        name: of the stream: a module's path, and what the rows are for.
        rank: at most ``d``.
        d: length of a row.
        dtype: of the result, which is rounded to float32 first.
        device: of the result.

    Raises:
        ValueError: if the rank exceeds ``d``.
    """
    if not 1 <= rank <= d:
        raise ValueError(f"{name}: {rank} orthonormal rows of {d} entries: expected 1..{d} rows")
    rows = sample_a(seed, name, rank, d).double()
    for i, row in enumerate(rows):
        for _ in range(2):  # the second pass removes what the first one has left by rounding
            row -= (rows[:i] @ row) @ rows[:i]
        row /= row.norm()
    return rows.float().to(device, dtype)


def initial_factors(setting: Setting, ranks: Ranks, init_a: str = "kaiming") -> dict[str, Factors]:
    """``A`` as `initial_a` draws it and ``B = 0``, for every module, at these ranks.

    Args:
        setting: of the run.
        ranks: per module.
        init_a: ``kaiming``: as drawn; ``orthonormal``: made so from the first row on.
    """
    one_of("strategy.init_a", init_a, INITS)
    found = {}
    for m in setting.modules:
        a = initial_a(setting.seed, m, ranks[m.path])
        a = orthonormal(a) if init_a == "orthonormal" else a
        found[m.path] = Factors(a, torch.zeros(m.d_out, ranks[m.path]), setting.alpha)
    return found
