"""The algebra that federated LoRA methods share: averages, stacked products, truncated SVDs.

Symbols: client ``k`` holds ``A_k [r_k, d_in]`` and ``B_k [d_out, r_k]`` with scale
``s_k = alpha / r_k`` and weighs ``p_k``. Stacking ``sqrt(p_k s_k)`` times the factors writes
``W = Σ_k p_k s_k B_k A_k`` as one product of rank ``R = Σ_k r_k``, from which a singular value
decomposition is found without ever building one dense matrix per client. Tensors keep the dtype
they come with; half precision is raised to float32.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.core.checks import one_of
from fedlora.core.seeding import torch_generator
from fedlora.core.types import (
    Adapter,
    Factors,
    Ranks,
    Update,
)

# ------------------------------------------------------------------------------------- weights


def normalize(weights: Sequence[float]) -> list[float]:
    """``p_k = w_k / Σ_j w_j``.

    Raises:
        ValueError: if a weight is negative or not finite, or if all are zero.
    """
    total = math.fsum(weights)
    if not (total > 0 and math.isfinite(total)) or min(weights) < 0:
        raise ValueError(f"weights {list(weights)[:8]} must be >= 0 and finite, and not all zero")
    return [w / total for w in weights]


def client_weights(updates: Sequence[Update], weights: str) -> list[float]:
    """Each update's weight in an average: by ``examples`` (``n_k``) or ``uniform`` (1)."""
    one_of("weights", weights, ("examples", "uniform"))
    return [1.0 if weights == "uniform" else float(u.num_examples) for u in updates]


def covered_weights(p: Sequence[float], ranks: Sequence[int]) -> list[Tensor]:
    """``[r_k]`` for each client: its fraction among the clients that have rank index ``i`` at all.

    The rank-partitioned weights of raFLoRA, arXiv:2602.13486: index ``i`` of client ``k`` weighs
    ``p_k / Σ_{j: r_j > i} p_j``, so that directions which few clients can hold do not fade.
    """
    cover = coverage(p, ranks)
    return [w / cover[:r].clamp_min(1e-300) for w, r in zip(p, ranks, strict=True)]


def coverage(p: Sequence[float], ranks: Sequence[int]) -> Tensor:
    """``[max rank]`` float64: the total weight of the clients whose rank exceeds ``i``."""
    out = torch.zeros(max(ranks), dtype=torch.float64)
    for w, r in zip(p, ranks, strict=True):
        out[:r] += w
    return out


# ------------------------------------------------------------------------ averages and products


def average(factors: Sequence[Factors], p: Sequence[float]) -> Factors:
    """``(Σ p_k A_k, Σ p_k B_k)``, each factor by itself. All ranks must be equal.

    Not the average of the products: ``s Σ p_k B_k A_k - s B̄ Ā = s Σ p_k (B_k - B̄)(A_k - Ā)``.
    """
    a = weighted_sum([f.a for f in factors], p)
    b = weighted_sum([f.b for f in factors], p)
    return Factors(a=a, b=b, alpha=factors[0].alpha)


def weighted_sum(tensors: Sequence[Tensor], p: Sequence[float]) -> Tensor:
    """``Σ_k p_k x_k`` of equally shaped tensors, in a dtype of at least float32."""
    shapes = {tuple(t.shape) for t in tensors}
    if len(shapes) != 1:
        raise ValueError(f"cannot average tensors of different shapes: {sorted(shapes)}")
    stacked = torch.stack([_raised(t) for t in tensors])
    total: Tensor = torch.tensordot(torch.tensor(p, dtype=stacked.dtype), stacked, dims=1)
    return total


def stack(
    factors: Sequence[Factors], weights: Sequence[float] | Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """``(Bs [d_out, R], As [R, d_in])`` with ``Bs As = Σ_k w_k s_k B_k A_k``; ranks may differ.

    A weight is a number, or a tensor ``[r_k]`` with one weight per rank index. Both factors get
    its square root, which balances them and keeps the conditioning of either.
    """
    b, a = [], []
    for f, w in zip(factors, weights, strict=True):
        root = (torch.as_tensor(w, dtype=torch.float64) * f.scale).sqrt()
        b.append(_raised(f.b) * root.to(_raised(f.b).dtype))
        a.append(_raised(f.a) * root.to(_raised(f.a).dtype).reshape(-1, 1))
    return torch.cat(b, dim=1), torch.cat(a)


def product_norm(b: Tensor, a: Tensor) -> float:
    """``||B A||_F``.

    By ``||BA||² = <BᵀB, AAᵀ>`` where that is cheaper than the product itself, then in float64, for
    it cancels: a result below ``1e-8`` of the factors' norms means nothing.
    """
    b, a = _raised(b), _raised(a)
    (m, r), n = b.shape, a.shape[1]
    if r * (m + n) >= m * n:
        return float((b @ a).norm())
    b, a = b.double(), a.double()
    return math.sqrt(max(0.0, float(((b.T @ b) * (a @ a.T)).sum())))


def delta_norm(f: Factors) -> float:
    """``||s B A||_F``."""
    return f.scale * product_norm(f.b, f.a)


def _raised(t: Tensor) -> Tensor:
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


# ------------------------------------------------------------------------------------------ SVD


@dataclass(frozen=True)
class SVD:
    """``W = U diag(s) V``, singular values descending, all of them above rounding noise."""

    u: Tensor
    """``[d_out, k]``, orthonormal columns"""
    s: Tensor
    """``[k]``"""
    v: Tensor
    """``[k, d_in]``, orthonormal rows"""

    @property
    def rank(self) -> int:
        """How many singular values are not rounding noise."""
        return int(self.s.shape[0])

    def dense(self) -> Tensor:
        """``W``."""
        return (self.u * self.s) @ self.v


BACKENDS = ("auto", "dense", "core", "gram", "random")


def svd(matrix: Tensor) -> SVD:
    """The thin SVD of a dense matrix, deterministic in sign, trimmed to its numerical rank.

    Each right vector's largest entry is positive. Runs in the matrix's dtype and falls back to
    float64 if LAPACK does not converge.

    Raises:
        ValueError: if an entry is not finite (LAPACK's own message would mislead).
    """
    return _trimmed(*_thin_svd(_raised(matrix)))


def svd_of_product(b: Tensor, a: Tensor, backend: str = "auto", rank: int = 0) -> SVD:
    """The SVD of ``B A`` for ``B [d_out, R]`` and ``A [R, d_in]``.

    Args:
        b: left factor.
        a: right factor.
        backend: ``dense`` multiplies first; ``core`` decomposes the small product of the QR
            factors' triangles; ``gram`` takes eigenvectors of Gram matrices in float64, which
            squares the condition number (singular values below about 1e-8 of the largest are
            noise); ``random`` sketches the leading ``rank`` directions and drops the rest;
            ``auto`` takes the cheaper of ``dense`` and ``core``, which are exact.
        rank: how many directions ``random`` keeps; 0: all that there can be.
    """
    one_of("backend", backend, BACKENDS)
    b, a = _raised(b), _raised(a)
    (m, inner), n = b.shape, a.shape[1]
    if backend == "auto":
        backend = cheapest_backend(m, n, inner, min(rank or inner, m, n))
    if backend == "dense":
        return svd(b @ a)
    if backend == "core":
        return _core_svd(b, a)
    if backend == "gram":
        return _gram_svd(b, a)
    return _random_svd(b, a, min(rank or inner, m, n))


def svd_flops(m: int, n: int) -> float:
    """A thin SVD, by the better of the two classical algorithms (Golub and Van Loan, 8.6)."""
    p, q = max(m, n), min(m, n)
    return min(14.0 * p * q**2 + 8.0 * q**3, 6.0 * p * q**2 + 20.0 * q**3)


def backend_flops(backend: str, m: int, n: int, inner: int, rank: int) -> float:
    """Estimated cost of the leading ``rank`` directions of an ``[m, inner] @ [inner, n]`` product.

    ``gram`` counts double, for it runs in float64.
    """
    if backend == "dense":
        return 2.0 * m * n * inner + svd_flops(m, n)
    if backend == "core":
        left, right = min(m, inner), min(n, inner)
        qr = sum(4.0 * side * inner**2 for side in (m, n) if side > inner)
        back = sum(2.0 * side * inner * rank for side in (m, n) if side > inner)
        return qr + 2.0 * left * inner * right + svd_flops(left, right) + back
    if backend == "gram":
        return 2 * (2.0 * (m + n) * inner**2 + 18.0 * inner**3 + 2.0 * (m + n) * inner * rank)
    one_of("backend", backend, BACKENDS[1:])
    sketch = min(rank + _OVERSAMPLE, m, n)
    passes = 2 * (_POWER_STEPS + 1) * 2.0 * (m + n) * inner * sketch
    return passes + 2.0 * m * sketch**2 + svd_flops(sketch, n)


def cheapest_backend(m: int, n: int, inner: int, rank: int) -> str:
    """``dense`` or ``core``: whichever is estimated to be cheaper. Both are exact."""
    return min(("dense", "core"), key=lambda name: backend_flops(name, m, n, inner, rank))


def _thin_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    finite = torch.isfinite(matrix)
    if not bool(finite.all()):
        bad = int((~finite).sum())
        raise FloatingPointError(f"SVD of {tuple(matrix.shape)}: {bad} entries are not finite")
    if not bool(matrix.any()):  # empty, or zero as in the first round: LAPACK would take its time
        k, (m, n) = 0, matrix.shape
        return matrix.new_zeros(m, k), matrix.new_zeros(k), matrix.new_zeros(k, n)
    u: Tensor
    s: Tensor
    v: Tensor
    try:
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    except RuntimeError:  # torch.linalg.LinAlgError: no convergence
        u, s, v = (x.to(matrix.dtype) for x in torch.linalg.svd(matrix.double(), False))
    return u, s, v


def _trimmed(u: Tensor, s: Tensor, v: Tensor, relative: float = 0.0) -> SVD:
    """Fix the signs and cut singular values below rounding noise of the larger dimension."""
    noise = max(relative, torch.finfo(s.dtype).eps * math.sqrt(max(u.shape[0], v.shape[1])))
    k = int((s > noise * s[:1]).sum()) if s.numel() else 0
    u, s, v = u[:, :k], s[:k], v[:k]
    if k:
        sign = torch.sign(v.gather(1, v.abs().argmax(dim=1, keepdim=True)))
        u, v = u * sign.T, v * sign
    return SVD(u=u.contiguous(), s=s.contiguous(), v=v.contiguous())


def _core_svd(b: Tensor, a: Tensor) -> SVD:
    """``B = Qb Rb``, ``Aᵀ = Qa Ra``; the SVD of ``Rb Raᵀ`` rotates the Qs. A wide side stays."""
    inner = a.shape[0]
    qb, rb = torch.linalg.qr(b) if b.shape[0] > inner else (None, b)
    qa, ra = torch.linalg.qr(a.T) if a.shape[1] > inner else (None, a.T)
    u, s, v = _thin_svd(rb @ ra.T)
    return _trimmed(u if qb is None else qb @ u, s, v if qa is None else v @ qa.T)


def _gram_svd(b: Tensor, a: Tensor) -> SVD:
    """With ``BᵀB = Q L Qᵀ`` and ``M = L^½ Qᵀ(AAᵀ)Q L^½ = P S² Pᵀ``: ``V = S⁻¹ Pᵀ L^½ Qᵀ A``."""
    x, y = b.double(), a.double()
    eigenvalues, q = torch.linalg.eigh(x.T @ x)
    half = q * eigenvalues.clamp_min(0).sqrt()
    squares, p = torch.linalg.eigh(half.T @ (y @ y.T) @ half)
    k = min(b.shape[0], a.shape[1], a.shape[0])
    s = squares.flip(0)[:k].clamp_min(0).sqrt()
    k = int((s > 1e-8 * s[:1]).sum())
    s = s[:k]
    v = (half @ p.flip(1)[:, :k]).T @ y / s[:, None]
    u = x @ (y @ v.T) / s
    kept = _trimmed(u, s, v, relative=1e-8)
    return SVD(*(t.to(a.dtype) for t in (kept.u, kept.s, kept.v)))


_OVERSAMPLE = 10
_POWER_STEPS = 2


def _random_svd(b: Tensor, a: Tensor, rank: int) -> SVD:
    """Halko, Martinsson and Tropp, arXiv:0909.4061, algorithm 5.1 with power iterations."""
    columns = min(rank + _OVERSAMPLE, b.shape[0], a.shape[1])
    g = torch_generator(0, "sketch", *b.shape, *a.shape)
    omega = torch.randn(a.shape[1], columns, generator=g, dtype=torch.float64).to(a.dtype)
    q: Tensor
    q, _ = torch.linalg.qr(b @ (a @ omega))
    for _ in range(_POWER_STEPS):
        z, _ = torch.linalg.qr(a.T @ (b.T @ q))
        q, _ = torch.linalg.qr(b @ (a @ z))
    u, s, v = _thin_svd((q.T @ b) @ a)
    return _trimmed((q @ u)[:, :rank], s[:rank], v[:rank])


# ------------------------------------------------------------------------------- redistribution


def complete(v: Tensor, filler: Tensor) -> Tensor:
    """Orthonormal rows ``v [k, n]`` continued to as many rows as ``filler [q, n]`` has.

    The new rows span what is left of the filler's row space in the complement of ``v``, so they
    are orthonormal to ``v`` and to each other. Nothing is added if ``k >= q``.
    """
    missing = filler.shape[0] - v.shape[0]
    if missing <= 0:
        return v
    rest = filler.to(v.dtype)
    for _ in range(2):  # once is not orthogonal to working precision when the filler lies near v
        rest = rest - (rest @ v.T) @ v
    _, _, rows = _thin_svd(rest)
    rows = rows[:missing]
    rows = rows - (rows @ v.T) @ v
    q, r = torch.linalg.qr(rows.T)
    return torch.cat([v, (q * torch.sign(torch.diagonal(r))).T])


SPLITS = ("b", "balanced", "a")


def factors_of_rank(w: SVD, rank: int, alpha: float, split: str, filler: Tensor) -> Factors:
    """``T_rank(W)``, the best approximation of that rank, as factors: ``s B A = T_rank(W)``.

    With ``s = alpha / rank``, the singular values go into ``b`` (``A`` orthonormal), into ``a``
    (``B`` orthonormal) or half into each. Beyond the rank of ``W`` the columns of ``B`` are zero
    and the rows of ``A`` are ``filler``'s: never zero in both, for such a direction could never
    learn again.

    Args:
        w: the update.
        rank: of the result.
        alpha: LoRA's numerator.
        split: ``b``, ``balanced`` or ``a``.
        filler: ``[>= rank, d_in]``: the rows of ``A`` beyond the rank of ``W``, at their places.
    """
    one_of("svd_split", split, SPLITS)
    k = min(rank, w.rank)
    s = w.s[:k] / (alpha / rank)
    in_b, in_a = {
        "b": (s, torch.ones_like(s)),
        "balanced": (s.sqrt(), s.sqrt()),
        "a": (torch.ones_like(s), s),
    }[split]
    b = w.u.new_zeros(w.u.shape[0], rank)
    b[:, :k] = w.u[:, :k] * in_b
    a = torch.cat([in_a[:, None] * w.v[:k], filler[k:rank].to(w.v.dtype)])
    return Factors(a=a, b=b, alpha=alpha)


def at_rank(f: Factors, rank: int) -> Factors:
    """The same update at another rank: truncated by SVD below, padded and rescaled above.

    Padding adds zero columns to ``B`` and orthonormal rows to ``A``, and multiplies ``B`` by
    ``rank / r``, which undoes the smaller scale.
    """
    if rank == f.rank:
        return f
    if rank < f.rank:
        w = svd_of_product(*stack([f], [1.0]))
        return factors_of_rank(w, rank, f.alpha, "b", f.a)
    basis = svd(f.a).v
    extra = complete(basis, torch.eye(rank, f.a.shape[1], dtype=basis.dtype))[basis.shape[0] :]
    missing = rank - f.rank
    b = torch.cat([f.b * (rank / f.rank), f.b.new_zeros(f.b.shape[0], missing)], dim=1)
    return Factors(a=torch.cat([f.a, extra[:missing].to(f.a.dtype)]), b=b, alpha=f.alpha)


# ---------------------------------------------------------------------------------- diagnostics


def exactness_gap(
    updates: Sequence[Update], weights: Sequence[float], global_update: Adapter
) -> dict[str, float]:
    """How far the new global model is from the average of what the clients trained.

    ``gap = ||s B A - Σ_k p_k s_k B_k A_k||_F`` over all modules together, ``norm`` that of the
    average, and ``relative`` their ratio (0 where both are zero).
    """
    p = normalize(weights)
    gap = norm = 0.0
    for path, g in global_update.items():
        b, a = stack([u.adapter[path] for u in updates], p)
        mine_b, mine_a = (t.to(b.dtype) for t in stack([g], [1.0]))
        norm += product_norm(b, a) ** 2
        gap += product_norm(torch.cat([b, -mine_b], dim=1), torch.cat([a, mine_a])) ** 2
    gap, norm = math.sqrt(gap), math.sqrt(norm)
    return {"gap": gap, "norm": norm, "relative": gap / norm if norm > 0 else 0.0}


def spectra(adapter: Adapter) -> dict[str, Tensor]:
    """The singular values of every module's update, descending, without rounding noise."""
    return {path: _singular_values(*stack([f], [1.0])) for path, f in adapter.items()}


def _singular_values(b: Tensor, a: Tensor) -> Tensor:
    """The singular values of ``B A``; without a decomposition where both factors are orthogonal."""
    lengths = []
    for gram in (b.T @ b, a @ a.T):
        length = gram.diagonal().clamp_min(0).sqrt()
        angle = gram / (length[:, None] * length).clamp_min(torch.finfo(gram.dtype).tiny)
        if bool((angle - angle.diagonal().diag()).abs().max() > 1e-3):  # cosines: error ~ 1e-6
            return svd_of_product(b, a).s
        lengths.append(length)
    s = (lengths[0] * lengths[1]).sort(descending=True).values
    return s[s > 0]


def singular_value_energy(spectra: Mapping[str, Tensor], ranks: Sequence[int]) -> dict[int, float]:
    """Rank ``r`` -> the fraction of ``Σ_modules ||W||_F²`` in the leading ``r`` directions."""
    squares = [s.double().square() for s in spectra.values()]
    total = sum(float(x.sum()) for x in squares)
    return {
        r: sum(float(x[:r].sum()) for x in squares) / total if total > 0 else 1.0 for r in ranks
    }


def truncation_error(spectra: Mapping[str, Tensor], patterns: Sequence[Ranks]) -> dict[str, float]:
    """Label of each rank pattern -> ``||W - T_r(W)||_F / ||W||_F`` over all modules together."""
    squares = {path: s.double().square() for path, s in spectra.items()}
    total = sum(float(x.sum()) for x in squares.values())
    out: dict[str, float] = {}
    for ranks in patterns:
        tail = sum(float(x[ranks[path] :].sum()) for path, x in squares.items())
        out[ranks.label] = math.sqrt(tail / total) if total > 0 else 0.0
    return out
