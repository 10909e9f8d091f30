r"""The arithmetic of SPP: factors that scale the weights of a pruned layer and keep its zeros.

    F[i, j] = beta[i] alpha[g(i), j]      g(i) = floor(i r / d_out): r blocks of neighbouring rows
    W' = W ∘ (1 + s F)                    s = lora_alpha / r

Lu et al., "SPP: Sparsity-Preserved Parameter-Efficient Fine-Tuning for Large Language Models",
arXiv:2405.16057. ``F = B alpha`` where ``B [d_out, r]`` holds ``beta[i]`` in column ``g(i)`` of row
``i`` and zeros elsewhere, so every operation that is linear in LoRA's factors is linear in these.
An ``F`` of rank ``r`` is also an ``F`` of any multiple of ``r``, with the rows of ``alpha``
repeated. An example with ``d_out = 4`` and ``r = 2``:

>>> alpha, beta = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), torch.tensor([1.0, 2, 3, 4])
>>> blocks(4, 2).tolist()
[0, 0, 1, 1]
>>> place_in_blocks(beta, 2).tolist()
[[1.0, 0.0], [2.0, 0.0], [0.0, 3.0], [0.0, 4.0]]
>>> torch.equal(place_in_blocks(beta, 2) @ alpha, factor(alpha, beta))
True
>>> torch.equal(factor(repeat_rows(alpha, 4), beta), factor(alpha, beta))
True
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def blocks(d_out: int, r: int, device: torch.device | None = None) -> Tensor:
    """``[d_out]`` int64: the row of alpha that scales each output; any ``r <= d_out``."""
    return torch.arange(d_out, device=device) * r // d_out


def place_in_blocks(beta: Tensor, r: int) -> Tensor:
    """``B [..., d_out, r]``: every entry of ``beta [..., d_out]`` in the column of its block."""
    # One row per output, with a one in the column of its block: [d_out, r].
    column = blocks(beta.shape[-1], r, beta.device)
    one = torch.nn.functional.one_hot(column, r).to(beta.dtype)
    return beta.unsqueeze(-1) * one  # [..., d_out, 1] * [d_out, r]


def factor(alpha: Tensor, beta: Tensor) -> Tensor:
    """``F [d_out, d_in]``, of rank at most ``r``.

    Args:
        alpha: ``[r, d_in]``.
        beta: ``[d_out]``.
    """
    # Row g(i) of alpha for every output i, [d_out, d_in], times the output's own beta.
    return beta[:, None] * alpha[blocks(len(beta), len(alpha), beta.device)]


def repeat_rows(alpha: Tensor, r: int) -> Tensor:
    """Repeat the rows of a smaller rank to ``r`` rows: ``factor`` gives the same ``F``.

    Args:
        alpha: ``[k, d_in]``.
        r: a multiple of ``k``.

    Raises:
        ValueError: if ``r`` is not a multiple of ``k``.
    """
    if r % len(alpha):
        raise ValueError(
            f"rank {len(alpha)} does not divide {r}: blocks of rank {r} do not lie within blocks "
            f"of rank {len(alpha)}"
        )
    return alpha.repeat_interleave(r // len(alpha), dim=0)


def mean_factor(alphas: Sequence[Tensor], betas: Sequence[Tensor], p: Sequence[float]) -> Tensor:
    """``Σ_k p_k F_k``, ``[d_out, d_in]``. Ranks may differ if each divides the largest.

    Args:
        alphas: ``[r_k, d_in]`` each.
        betas: ``[d_out]`` each.
        p: the weight of each client.
    """
    # All alphas at the largest rank, [k, top, d_in]; the weights go into beta, [k, d_out].
    top = max(len(a) for a in alphas)
    weighted = torch.stack([w * b for w, b in zip(p, betas, strict=True)])
    return sum_factors(torch.stack([repeat_rows(a, top) for a in alphas]), weighted)


def sum_factors(alpha: Tensor, beta: Tensor) -> Tensor:
    """``Σ_k F_k`` as one product: alpha ``[k, r, d_in]``, beta ``[k, d_out]``."""
    # The B of all clients side by side, [k, d_out, r] as [d_out, k r], times their alphas one
    # below the other, [k r, d_in].
    b = place_in_blocks(beta, alpha.shape[1]).transpose(0, 1).flatten(1)
    wide = torch.promote_types(b.dtype, alpha.dtype)
    return b.to(wide) @ alpha.flatten(0, 1).to(wide)


def scaled_weight(
    weight: Tensor, alpha: Tensor, beta: Tensor, s: float, before: Tensor | None = None
) -> Tensor:
    """``W ∘ before ∘ (1 + s F)``, ``[d_out, d_in]``, in float32, or in the type of ``W`` if that is
    wider. The caller rounds it once, when it stores it.

    Args:
        weight: ``[d_out, d_in]``.
        alpha: ``[r, d_in]``.
        beta: ``[d_out]``.
        s: the scale.
        before: ``[d_out, d_in]``, what earlier merges have multiplied ``W`` by; None: nothing.
    """
    # Products in the wide type: in bfloat16 a small change of W would be rounded away.
    wide = torch.promote_types(weight.dtype, torch.float32)
    weight = weight.to(wide) if before is None else weight.to(wide) * before.to(wide)
    return weight * (1 + s * factor(alpha.to(wide), beta.to(wide)))


def nested_rank(rank: int, top: int) -> int:
    """The largest rank up to ``rank`` that divides ``top``."""
    return max(r for r in range(1, min(rank, top) + 1) if top % r == 0)
