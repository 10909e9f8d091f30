"""Products that stay factored: norms, sums and differences against dense ones."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.algebra import summand
from fedlora.algebra.summand import Product, factor_changes, product_change
from fedlora.core.types import Factors
from tests.generators import factors, seeds, shapes, stacks


def product(m: int, n: int, j: int, seed: int) -> Product:
    f = factors(m, n, j, seed)
    return Product(f.b, f.a)


@given(shapes, st.integers(1, 12), seeds)
def test_norm_of_a_product_is_that_of_its_dense_matrix(
    shape: tuple[int, int], j: int, seed: int
) -> None:
    x = product(*shape, j, seed)
    whole = float(x.dense().norm())
    assert summand.norm({"w": x}) == pytest.approx(whole, rel=1e-10)


@given(seeds)
def test_norm_is_over_all_names_together(seed: int) -> None:
    x = {"w": product(6, 5, 2, seed), "v": torch.full((3, 2), 2.0)}
    flat = torch.cat([summand.dense(t).double().reshape(-1) for t in x.values()])
    assert summand.norm(x) == pytest.approx(float(flat.norm()), rel=1e-12)
    assert summand.norm(summand.scaled(x, -0.5)) == pytest.approx(float(flat.norm()) / 2)


@given(stacks())
def test_a_sum_of_products_is_their_dense_sum(drawn: tuple[list[Factors], list[float]]) -> None:
    fs, p = drawn
    got = summand.total([{"w": Product(f.b, f.a)} for f in fs], p)["w"]
    want = sum(w * (f.b @ f.a) for f, w in zip(fs, p, strict=True))
    assert isinstance(got, Product)
    assert torch.allclose(got.dense(), torch.as_tensor(want), rtol=1e-12, atol=1e-12)


def test_a_sum_of_tensors() -> None:
    x, y = torch.arange(6.0).view(2, 3), torch.ones(2, 3)
    got = summand.total([{"w": x}, {"w": y}], [2.0, -1.0])["w"]
    assert isinstance(got, torch.Tensor)
    assert torch.equal(got, 2 * x - y)


@given(shapes, st.floats(1e-6, 1.0), seeds)
def test_a_change_of_factors_as_a_product(shape: tuple[int, int], size: float, seed: int) -> None:
    """Also a small one, which the difference of two products would lose."""
    r = min(shape)
    start, other = factors(*shape, r, seed), factors(*shape, r, seed + 1)
    end = Factors(start.a + size * other.a, start.b + size * other.b, start.alpha)
    got = product_change("w", start, end)
    s, eps = start.scale, size
    want = s * eps * (other.b @ start.a + start.b @ other.a + eps * other.b @ other.a)
    assert float((got.dense() - want).norm()) <= 1e-9 * float(want.norm())
    assert summand.norm({"w": got}) == pytest.approx(float(got.dense().norm()), rel=1e-10)


def test_factors_that_did_not_move_change_nothing() -> None:
    f = factors(6, 5, 3, 1)
    assert not bool(product_change("w", f, f).dense().any())
    assert summand.norm(factor_changes("w", f, f)) == 0


def test_what_cannot_be_summed_is_refused() -> None:
    x, y = product(6, 5, 2, 1), product(5, 6, 2, 1)
    with pytest.raises(ValueError, match="nothing to sum"):
        summand.total([], [])
    with pytest.raises(ValueError, match="v is not in all"):
        summand.total([{"w": x}, {"w": x, "v": x}], [1.0, 1.0])
    with pytest.raises(
        ValueError, match=r"w: summands have different shapes: \[\(5, 6\), \(6, 5\)"
    ):
        summand.total([{"w": x}, {"w": y}], [1.0, 1.0])
    with pytest.raises(ValueError, match="some summands are products"):
        summand.total([{"w": x}, {"w": x.dense()}], [1.0, 1.0])
    with pytest.raises(ValueError, match=r"B \(6, 2\) and A \(3, 5\)"):
        Product(torch.zeros(6, 2), torch.zeros(3, 5))
    with pytest.raises(ValueError, match="w: a client sent rank 2, it started at 3"):
        product_change("w", factors(6, 5, 3, 1), factors(6, 5, 2, 1))
