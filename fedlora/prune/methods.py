r"""Three ways to choose which weights of a layer go.

    magnitude   |W_ij|                                   (over the layer, or in groups of N:M)
    Wanda       |W_ij| · ‖X_j‖_2                         in each row; arXiv:2306.11695
    SparseGPT   W_ij² / (H⁻¹)_jj, the rest compensated   in blocks of columns; arXiv:2301.00774

``X [tokens, d_in]`` is the layer's input over the calibration text and ``H = (2/N) XᵀX``. The first
two leave the weights that stay as they are.
"""

import torch
from torch import Tensor

from fedlora.prune.pattern import Pattern

BLOCK = 128
"""Columns that SparseGPT decides at a time."""
DAMPING = 0.01
"""Added to the diagonal of ``H``, as a fraction of its mean."""


def wanda(weight: Tensor, squares: Tensor, pattern: Pattern) -> Tensor:
    """Which weights Wanda keeps.

    Args:
        weight: ``[d_out, d_in]``.
        squares: ``[d_in]``, ``Σ_t x_tj²``; a common factor changes nothing.
        pattern: how many weights become zero.

    Returns:
        ``[d_out, d_in]`` bool.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    return pattern.kept(weight.abs().to(wide) * squares.sqrt().to(weight.device, wide))


def magnitude(weight: Tensor, pattern: Pattern) -> Tensor:
    """Which weights stay when the smallest of the layer go, exactly as many as the pattern says.

    Args:
        weight: ``[d_out, d_in]``.
        pattern: how many weights become zero.

    Returns:
        ``[d_out, d_in]`` bool.
    """
    return pattern.kept(weight.abs(), compete="layer")


def sparsegpt(weight: Tensor, gram: Tensor, tokens: int, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Which weights SparseGPT keeps, and what they become to make up for those that go.

    Args:
        weight: ``[d_out, d_in]``.
        gram: ``[d_in, d_in]``, ``Σ_t x_t x_tᵀ``.
        tokens: number of terms of that sum.
        pattern: how many weights become zero.

    Returns:
        The kept ``[d_out, d_in]`` bool, and the new weight in the old one's type.
    """
    w = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
    h = (2 / max(tokens, 1) * gram).to(w.device, w.dtype)
    dead = h.diagonal() == 0
    h.diagonal()[dead] = 1
    w[:, dead] = 0
    h.diagonal().add_(DAMPING * h.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    u = torch.linalg.cholesky(inverse, upper=True)
    kept = torch.ones_like(w, dtype=torch.bool)
    step = BLOCK // pattern.group * pattern.group if pattern.group else BLOCK
    step = step or pattern.group
    for start in range(0, w.shape[1], step):
        at = slice(start, min(start + step, w.shape[1]))
        kept[:, at], errors = _prune_block(w[:, at], u[at, at], pattern)
        w[:, at.stop :] -= errors @ u[at, at.stop :]
    return kept, (w * kept).to(weight.dtype)


def _prune_block(w: Tensor, u: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Prune some columns in place, each making up for its loss in the later ones.

    Args:
        w: ``[d_out, c]``, a view that is changed.
        u: ``[c, c]``, upper Cholesky factor of the inverse of ``H`` at these columns.
        pattern: how many weights become zero.

    Returns:
        The kept ``[d_out, c]`` bool, and the scaled errors ``[d_out, c]``.
    """
    d = u.diagonal()
    errors = torch.zeros_like(w)
    kept = torch.ones_like(w, dtype=torch.bool)
    if not pattern.group:
        kept = pattern.kept((w / d).square(), compete="layer")
    for j in range(w.shape[1]):
        if pattern.group and j % pattern.group == 0:
            group = slice(j, j + pattern.group)
            kept[:, group] = pattern.kept((w[:, group] / d[group]).square())
        errors[:, j] = w[:, j] * ~kept[:, j] / d[j]
        w[:, j] *= kept[:, j]
        w[:, j + 1 :] -= errors[:, j, None] * u[j, j + 1 :]
    return kept, errors
