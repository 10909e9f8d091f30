r"""Turns a client's factors towards those that it was sent, before factors are averaged.

``B A = (B R)(Rᵀ A)`` for every orthogonal ``R``: a turn leaves a client's update and moves the mean
of factors. The ``R`` that brings ``A_k`` (or ``B_k``) nearest to the reference follows from

    A_k A_refᵀ (or B_kᵀ B_ref) = U S Vᵀ        R* = U Vᵀ        ||R*ᵀ A_k - A_ref||_F is least

FedRot-LoRA, arXiv:2602.23638. A reflection is as good as a rotation. With a strength ``λ < 1``,
``R`` is the orthogonal matrix nearest to ``(1 - λ) I + λ R*``.
"""

import torch
from torch import Tensor

from fedlora.core.types import Factors


def nearest_orthogonal(m: Tensor, eps: float) -> Tensor:
    """The orthogonal matrix nearest to ``m [r, r]``; of several, the one nearest to the identity.

    There are several if ``m`` has null directions, on which it says nothing.

    Args:
        m: float64.
        eps: relative accuracy of what ``m`` was computed from.
    """
    u, s, vt = torch.linalg.svd(m)
    rank = int((s > 100 * eps * s[0]).sum())
    null_u, null_v = u[:, rank:], vt[rank:]  # [r, q], [q, r]
    p, _, qt = torch.linalg.svd(null_u.T @ null_v.T)
    nearest: Tensor = u[:, :rank] @ vt[:rank] + null_u @ (p @ qt) @ null_v
    return nearest


def rotation(mine: Tensor, reference: Tensor, strength: float = 1.0) -> Tensor:
    """``R [r, r]``, orthogonal, float64: ``Rᵀ mine`` is as near to the reference as ``λ`` asks.

    Args:
        mine: ``[r, n]``, a client's ``A`` or ``Bᵀ``.
        reference: ``[r, n]``, what the client was sent.
        strength: ``λ`` in [0, 1]; 0: ``R = I``.
    """
    hard = nearest_orthogonal(mine.double() @ reference.double().T, torch.finfo(mine.dtype).eps)
    part = (1 - strength) * torch.eye(len(mine), dtype=hard.dtype) + strength * hard
    return hard if strength == 1 else nearest_orthogonal(part, torch.finfo(part.dtype).eps)


def aligned(f: Factors, start: Factors, by: str, strength: float = 1.0) -> Factors:
    """The same update, whose factor ``by`` (``a`` or ``b``) is turned towards that of the start.

    A factor that did not move needs no turn, and gets none, bit for bit.
    """
    mine, reference = (f.a, start.a) if by == "a" else (f.b.T, start.b.T)
    if torch.equal(mine, reference):
        return f
    r = rotation(mine, reference, strength)
    return Factors((r.T @ f.a.double()).to(f.a.dtype), (f.b.double() @ r).to(f.b.dtype), f.alpha)
