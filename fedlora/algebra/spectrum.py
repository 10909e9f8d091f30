r"""The singular values of an update as numbers: energy by rank index, effective and stable rank.

Symbols: module ``m`` of the update has singular values ``σ_{m,1} ≥ σ_{m,2} ≥ ...``. Its energy is
``Σ_i σ_{m,i}² = ||ΔW_m||_F²``. All functions take module path -> singular values, descending, as
`fedlora.algebra.linalg.spectra` and `dense_spectra` give them, and compute in float64.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedlora.core.types import Ranks

Spectra = Mapping[str, Tensor]
"""Module path -> singular values, descending."""
REST = "rest"
"""The label of the rank indices beyond all ranges."""


def dense_spectra(updates: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The singular values of dense updates ``[d_out, d_in]``, in a dtype of at least float32."""
    found = {}
    for path, w in updates.items():
        wide = w.to(torch.promote_types(w.dtype, torch.float32))
        found[path] = torch.linalg.svdvals(wide) if bool(wide.any()) else wide.new_zeros(0)
    return found


def index_ranges(ranks: Sequence[int]) -> list[tuple[int, int]]:
    """Ranges ``(first, last)`` of rank indices, counted from 1, up to the largest of these ranks.

    They end at 1, 2, 3, 4, 6, 8, 12, 16, 24 and so on, two to an octave, and at each of the ranks:
    few enough to record, and no range holds indices that clients of some rank have and indices that
    they lack.

    Args:
        ranks: of the population, at least one.
    """
    largest = max(ranks)
    octaves = range(largest.bit_length() + 1)
    ends = {1, *ranks, *(2**n for n in octaves), *(3 * 2**n for n in octaves)}
    last = sorted(end for end in ends if end <= largest)
    return list(zip([1, *(end + 1 for end in last)], last, strict=False))


def range_label(first: int, last: int) -> str:
    """``5-6``, or ``5`` for one index."""
    return str(first) if first == last else f"{first}-{last}"


def energy_by_index(spectra: Spectra, ranges: Sequence[tuple[int, int]]) -> dict[str, float]:
    """Label of each range, and `REST` -> its fraction of ``Σ_m ||ΔW_m||_F²``.

    The fractions sum to 1; of an update that is zero there is none.

    Args:
        spectra: of all modules.
        ranges: adjacent ones from index 1 on (`index_ranges`).
    """
    squares = [s.double().square() for s in spectra.values()]
    total = math.fsum(float(x.sum()) for x in squares)
    if not total > 0:
        return {}
    shares = {
        range_label(first, last): math.fsum(float(x[first - 1 : last].sum()) for x in squares)
        for first, last in ranges
    }
    shares[REST] = math.fsum(float(x[ranges[-1][1] :].sum()) for x in squares)
    return {label: share / total for label, share in shares.items()}


def geometric(first: Tensor, coverage: Sequence[Tensor], *, refilled: bool) -> Tensor:
    r"""The singular values that averages of cut products predict, without their vectors.

    A client of rank r sends the leading r directions of what it was sent, so index i of the average
    keeps the weight ``π_i`` of the clients whose rank is at least i. Without training,
    ``σ_i(t) = π_i(t) σ_i(t-1)``: geometric decay (rank collapse, raFLoRA, arXiv:2602.13486).
    Refilled, each of these clients adds in every round what one of them added in the first, in the
    same direction: ``σ_i(t) = π_i(t) (σ_i(t-1) + σ_i(1) / π_i(1))``, which stays below
    ``σ_i(1) / (1 - π_i)`` for a constant ``π_i < 1`` and grows in proportion to t for ``π_i = 1``.

    Args:
        first: ``[indices]``, after round 1, which began with zero.
        coverage: of each round from 1 on, ``[indices]``: ``π_i``.
        refilled: whether clients train after round 1.

    Returns:
        ``[rounds, indices]`` float64. An index that no client of round 1 covers is zero, or NaN if
        refilled.
    """
    pi = [c.double() for c in coverage]
    rows = [first.double()]
    added = rows[0] / pi[0] if refilled else torch.zeros_like(rows[0])
    for of_round in pi[1:]:
        rows.append(of_round * (rows[-1] + added))
    return torch.stack(rows)


def effective_rank(s: Tensor) -> float:
    """``exp(-Σ_i q_i ln q_i)`` with ``q_i = σ_i / Σ_j σ_j`` (Roy and Vetterli, 2007); 0 of zero.

    Between 1 and the rank, which it reaches where all singular values are equal.
    """
    q = s.double() / s.double().sum()
    q = q[q > 0]
    return float(torch.special.entr(q).sum().exp()) if q.numel() else 0.0


def stable_rank(s: Tensor) -> float:
    """``||ΔW||_F² / ||ΔW||_2² = Σ_i σ_i² / σ_1²`` (Rudelson and Vershynin, 2007); 0 of zero.

    Between 1 and the rank.
    """
    squares = s.double().square()
    top = float(squares.max()) if squares.numel() else 0.0
    return float(squares.sum()) / top if top > 0 else 0.0


def mean_ranks(spectra: Spectra) -> dict[str, float]:
    """``effective_rank`` and ``stable_rank``, each the plain mean over the modules whose update is
    not zero; none if all are."""
    moved = [s for s in spectra.values() if bool(s.any())]
    if not moved:
        return {}
    return {
        "effective_rank": math.fsum(map(effective_rank, moved)) / len(moved),
        "stable_rank": math.fsum(map(stable_rank, moved)) / len(moved),
    }


def tail(spectra: Spectra, ranks: Ranks) -> float:
    """``||ΔW - T_r(ΔW)||_F / ||ΔW||_F`` of all modules together, the least that any update of these
    ranks is off (Eckart and Young, 1936); 0 of zero.

    Args:
        spectra: of some of the modules of ``ranks``.
        ranks: 0 at full rank.
    """
    squares = {path: s.double().square() for path, s in spectra.items()}
    total = math.fsum(float(x.sum()) for x in squares.values())
    lost = math.fsum(float(x[ranks[path] :].sum()) for path, x in squares.items())
    return math.sqrt(lost / total) if total > 0 else 0.0
