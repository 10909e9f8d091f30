r"""Averages over clients of unequal rank, index by index.

Every client has the first ``r_k`` of ``R`` rank indices, and moved them by ``x_k [r_k, n]``:

    x̄_i = Σ_{k: r_k > i} p_k x_{k,i} / h_i
    h_i = Σ_{k: r_k > i} p_k  (``covered``)  or  1  (``all``)

With ``covered`` an index moves by the mean of its owners: RBLA, arXiv:2408.08699, and FediLoRA,
arXiv:2509.06984. Changes are averaged, not values: an index of no client stays, and so does one
whose owners did not move. At equal ranks both are the plain mean.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedlora.algebra.linalg import coverage
from fedlora.core.checks import one_of
from fedlora.core.types import Client, Ranks, Setting

WEIGHTINGS = ("covered", "all")
SMALLEST, REFUSE = "smallest", "refuse"


def common_ranks(setting: Setting, heterogeneous: str, own: str) -> Ranks:
    """The ranks of the global factors of a method that averages factors, per module.

    Args:
        setting: of the run.
        heterogeneous: what becomes of unequal ranks: all clients train the ``smallest``, they are
            refused (``refuse``), or each client trains its ``own`` first rank indices.
        own: the method's word for the last.

    Raises:
        ValueError: if clients hold unequal ranks and that was to be refused.
    """
    one_of("strategy.heterogeneous", heterogeneous, (SMALLEST, own, REFUSE))
    patterns = setting.rank_patterns
    if heterogeneous == REFUSE and len(patterns) > 1:
        held = "; ".join(p.text for p in patterns)
        raise ValueError(
            f"strategy.heterogeneous=refuse wants one rank for all clients, these hold {held}: "
            f"choose ranks=homogeneous, strategy.heterogeneous=smallest or {own}, or a method "
            "for unequal ranks"
        )
    return setting.max_ranks if heterogeneous == own else setting.min_ranks


def at_ranks(client: Client, ranks: Ranks) -> Client:
    """The client at these ranks."""
    return client if ranks == client.ranks else replace(client, ranks=ranks)


def mean_change(
    changes: Sequence[Tensor], p: Sequence[float], rows: int, weighting: str = "covered"
) -> Tensor:
    """``x̄ [rows, n]``, in a dtype of at least float32.

    Args:
        changes: ``x_k [r_k, n]``, one per client, ``r_k <= rows``.
        p: weights, one per client, of sum 1.
        rows: ``R``.
        weighting: ``covered`` or ``all``.
    """
    one_of("weighting", weighting, WEIGHTINGS)
    dtype = torch.promote_types(changes[0].dtype, torch.float32)
    mean = torch.zeros(rows, changes[0].shape[1], dtype=dtype)
    for x, w in zip(changes, p, strict=True):
        mean[: len(x)] += w * x.to(dtype)
    if weighting == "covered":
        owned = coverage(p, [len(x) for x in changes])  # [largest r_k]
        mean[: len(owned)] /= owned[:, None].to(dtype)
    return mean
