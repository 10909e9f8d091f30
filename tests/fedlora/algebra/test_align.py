"""Turning factors: updates stay, turned copies meet again, and nothing turns further than asked."""

import itertools

import pytest
import torch

from fedlora.algebra import align
from fedlora.algebra.align import aligned, nearest_orthogonal, rotation
from fedlora.algebra.linalg import average
from fedlora.core.types import Factors
from tests.generators import ALPHA, factors
from tests.strategies.laws import close

SIDES, EPS = ("a", "b"), torch.finfo(torch.float64).eps
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


def orthogonal(r: int, seed: int) -> torch.Tensor:
    """Every second one is a reflection."""
    q, _ = torch.linalg.qr(torch.randn(r, r, generator=gen(seed), dtype=torch.float64))
    q[:, 0] *= torch.det(q).sign() * (1 if seed % 2 else -1)
    return q


def gen(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def turned(f: Factors, q: torch.Tensor) -> Factors:
    return Factors(q.T @ f.a, f.b @ q, f.alpha)


def side(f: Factors, by: str) -> torch.Tensor:
    return f.a if by == "a" else f.b.T


def products_stay() -> None:
    """ROT-1, ROT-5."""
    for seed in range(6):
        f, start = factors(9, 7, 3, seed), factors(9, 7, 3, seed + 50)
        for by in SIDES:
            for strength in STRENGTHS:
                close(aligned(f, start, by, strength).delta(), f.delta(), 1e-13)


def turned_copies_are_averaged_exactly() -> None:
    """ROT-2."""
    start = factors(9, 7, 3, 1)
    copies = [turned(start, orthogonal(3, seed)) for seed in range(5)]
    for by in SIDES:
        mean = average([aligned(f, start, by) for f in copies], [0.1, 0.3, 0.2, 0.15, 0.25])
        close(mean.a, start.a)
        close(mean.b, start.b)


def no_other_turn_comes_nearer() -> None:
    """ROT-3."""
    f, start = factors(9, 7, 3, 2), factors(9, 7, 3, 3)
    for by in SIDES:
        least = float((side(aligned(f, start, by), by) - side(start, by)).norm())
        for seed in range(100):
            other = turned(f, orthogonal(3, seed))
            assert least <= float((side(other, by) - side(start, by)).norm()) + 1e-12


def a_larger_strength_comes_nearer() -> None:
    """From no turn to the best one."""
    for seed in range(6):
        f, start = factors(9, 7, 3, seed), factors(9, 7, 3, seed + 50)
        for by in SIDES:
            gaps = [
                float((side(aligned(f, start, by, x), by) - side(start, by)).norm())
                for x in STRENGTHS
            ]
            assert gaps[0] == pytest.approx(float((side(f, by) - side(start, by)).norm()))
            assert all(x >= y - 1e-12 for x, y in itertools.pairwise(gaps)), gaps
            assert gaps[0] - gaps[-1] > 1e-3


INVARIANTS = [
    products_stay,
    turned_copies_are_averaged_exactly,
    no_other_turn_comes_nearer,
    a_larger_strength_comes_nearer,
]


@pytest.mark.parametrize("invariant", INVARIANTS, ids=lambda f: f.__name__)
def test_invariants(invariant):
    invariant()


def transposed(mine, reference, strength):
    return rotation(mine, reference, strength).T


def least_where_most_is_asked(mine, reference, strength):
    return rotation(mine, reference, 1 - strength)


def mixed_and_not_orthogonal(mine, reference, strength):
    hard = rotation(mine, reference)
    return (1 - strength) * torch.eye(len(hard), dtype=hard.dtype) + strength * hard


def without_reflections(mine, reference, strength):
    u, _, vt = torch.linalg.svd(mine @ reference.T)
    signs = torch.ones(len(u), dtype=u.dtype)
    signs[-1] = torch.det(u @ vt).sign()
    return u * signs @ vt


@pytest.mark.parametrize(
    "wrong",
    [transposed, least_where_most_is_asked, mixed_and_not_orthogonal, without_reflections],
    ids=lambda f: f.__name__,
)
def test_a_planted_fault_is_caught(wrong, monkeypatch):
    monkeypatch.setattr(align, "rotation", wrong)
    caught = []
    for invariant in INVARIANTS:
        try:
            invariant()
        except AssertionError:
            caught.append(invariant.__name__)
    assert caught


def test_null_directions_are_not_turned():
    """Where the reference says nothing (B = 0 before round 1), R is as near I as it can be."""
    f = factors(9, 7, 3, 4)
    still = Factors(f.a, torch.zeros_like(f.b), ALPHA)
    for strength in STRENGTHS:
        close(rotation(f.b.T, still.b.T, strength), torch.eye(3, dtype=torch.float64))
    basis = orthogonal(3, 1)
    known = torch.outer(basis[0], basis[1])  # a matrix of rank 1
    r = nearest_orthogonal(known, EPS)
    close(r @ r.T, torch.eye(3, dtype=torch.float64))
    close(basis[0] @ r, basis[1])
    trace = float(r.trace())
    for angle in torch.linspace(0, 6.2, 60, dtype=torch.float64):
        for flip in (1.0, -1.0):
            c, s = angle.cos(), angle.sin()
            q = torch.stack([torch.stack([c, -flip * s]), torch.stack([s, flip * c])])
            u, _, vt = torch.linalg.svd(known)
            other = torch.outer(u[:, 0], vt[0]) + u[:, 1:] @ q @ vt[1:]
            assert float(other.trace()) <= trace + 1e-9


def test_what_did_not_move_is_not_turned():
    """Bit for bit; and half a reflection is none."""
    f = factors(9, 7, 3, 5)
    moved = Factors(f.a, f.b + 1, ALPHA)
    assert aligned(moved, f, "a") is moved
    mirror = torch.diag(torch.tensor([-1.0, 1.0, 1.0], dtype=torch.float64))
    close(rotation(mirror @ f.a, f.a, 0.5), torch.eye(3, dtype=torch.float64))
    close(rotation(mirror @ f.a, f.a, 1.0), mirror)


def test_a_change_of_basis_that_is_no_turn_is_not_undone():
    """ROT-4."""
    f = factors(9, 7, 3, 6)
    g = torch.randn(3, 3, generator=gen(6), dtype=torch.float64) + 2 * torch.eye(3).double()
    other = Factors(torch.linalg.solve(g, f.a), f.b @ g, ALPHA)
    close(other.delta(), f.delta())
    mean = average([f, aligned(other, f, "a")], [0.5, 0.5])
    assert float((mean.delta() - f.delta()).norm() / f.delta().norm()) > 0.01
