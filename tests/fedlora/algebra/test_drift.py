"""Laws of norms and cosines of clients' changes, and planted faults."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given

from fedlora.algebra import drift as module
from fedlora.algebra.drift import (
    as_product,
    difference,
    drift,
    factor_change,
    gram,
    spread,
)
from fedlora.algebra.summand import Product, Summand, dense
from fedlora.core.types import Factors
from tests.fedlora.algebra.test_spectrum import regauged
from tests.generators import factors, seeds, shapes, stacks
from tests.planted import planted


def changes_of(fs: list[Factors]) -> list[dict[str, Summand]]:
    """Two modules each, of which the first has another shape."""
    return [{"w": as_product(f), "u": as_product(f).dense().T.contiguous()} for f in fs]


@given(stacks())
def test_inner_products_are_those_of_the_dense_changes(given_) -> None:
    fs, _ = given_
    xs = changes_of(fs)
    flat = torch.stack([torch.cat([dense(t).reshape(-1) for t in x.values()]) for x in xs])
    assert torch.allclose(gram(xs), flat @ flat.T, rtol=1e-10)


@given(stacks())
def test_both_ways_to_inner_products_agree(given_) -> None:
    fs, _ = given_
    terms = [as_product(f) for f in fs]
    m, n = terms[0].shape
    whole = module._gram_of_rows(terms, m, n)
    assert torch.allclose(module._gram_of_products(terms), whole, rtol=1e-9)


def test_rows_are_taken_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    terms = [as_product(factors(9, 5, 2, k)) for k in range(3)]
    whole = module._gram_of_rows(terms, 9, 5)
    monkeypatch.setattr(module, "BLOCK", 31)  # two rows of three clients
    assert torch.allclose(module._gram_of_rows(terms, 9, 5), whole)


@given(stacks())
def test_norms_and_cosines_are_those_of_the_dense_changes(given_) -> None:
    fs, p = given_
    found = drift(gram([{"w": as_product(f)} for f in fs]), p)
    xs = [f.delta() for f in fs]
    mean = sum(w * x for w, x in zip(p, xs, strict=True))
    assert isinstance(mean, torch.Tensor)
    assert found.norms == pytest.approx([float(x.norm()) for x in xs])
    along = [float((x * mean).sum() / (x.norm() * mean.norm())) for x in xs]
    assert found.cosines == pytest.approx(along, abs=1e-8)
    pairs = [float((x * y).sum() / (x.norm() * y.norm())) for x in xs for y in xs if x is not y]
    if pairs:
        assert found.pairs == pytest.approx(sum(pairs) / len(pairs), abs=1e-8)
    size = sum(w * float(x.square().sum()) for w, x in zip(p, xs, strict=True))
    assert found.diversity == pytest.approx(size / float(mean.square().sum()))
    assert found.diversity >= 1 - 1e-9


@given(shapes, seeds)
def test_identical_clients_have_cosine_one(shape: tuple[int, int], seed: int) -> None:
    f = factors(*shape, min(shape), seed)
    found = drift(
        gram([{"w": as_product(regauged(f, seed + k))} for k in range(3)]), [0.2, 0.3, 0.5]
    )
    assert found.cosines == pytest.approx([1, 1, 1])
    assert found.pairs == pytest.approx(1)
    assert found.diversity == pytest.approx(1)
    assert found.norms == pytest.approx([float(f.delta().norm())] * 3)


@given(shapes, seeds)
def test_a_change_does_not_depend_on_the_gauge(shape: tuple[int, int], seed: int) -> None:
    """Of the start, of the end, and of ranks that differ."""
    start = factors(*shape, max(1, min(shape) - 1), seed)
    for end in (factors(*shape, start.rank, seed + 1), factors(*shape, min(shape), seed + 2)):
        wanted = end.delta() - start.delta()
        for s, e in ((start, end), (regauged(start, seed), end), (start, regauged(end, seed))):
            found = factor_change({"w": s}, {"w": e})["w"]
            assert torch.allclose(found.dense(), wanted, atol=1e-8 * float(wanted.norm()))


def test_a_client_that_did_not_move_has_no_direction() -> None:
    f = factors(5, 4, 2, 0)
    still = factor_change({"w": f}, {"w": f})
    moved = factor_change({"w": f}, {"w": factors(5, 4, 2, 1)})
    found = drift(gram([still, moved]), [0.5, 0.5])
    assert found.norms[0] == 0
    assert math.isnan(found.cosines[0])
    assert found.cosines[1] == pytest.approx(1)
    assert math.isnan(found.pairs)
    assert spread(found.cosines) == (pytest.approx(1), 0)
    nobody = drift(gram([still, still]), [0.5, 0.5])
    assert math.isnan(nobody.diversity)
    assert spread(nobody.cosines) is None


def test_opposite_clients_cancel() -> None:
    x = as_product(factors(5, 4, 2, 0))
    found = drift(gram([{"w": x}, {"w": Product(-x.b, x.a)}]), [0.75, 0.25])
    assert found.cosines == pytest.approx([1, -1])
    assert found.pairs == pytest.approx(-1)
    assert found.diversity == pytest.approx(4)
    cancelled = drift(gram([{"w": x}, {"w": Product(-x.b, x.a)}]), [0.5, 0.5])
    assert all(math.isnan(c) for c in cancelled.cosines)


def test_a_client_without_a_module_has_not_changed_it() -> None:
    x, y = as_product(factors(5, 4, 2, 0)), as_product(factors(6, 3, 2, 1))
    lacking = gram([{"a": x, "b": y}, {"a": x}])
    whole = gram([{"a": x, "b": y}, {"a": x, "b": torch.zeros(6, 3, dtype=torch.float64)}])
    assert torch.allclose(lacking, whole)


@given(stacks())
def test_differences_are_those_of_dense_ones(given_) -> None:
    fs, _ = given_
    x, y = as_product(fs[0]), as_product(fs[-1])
    wanted = x.dense() - y.dense()
    for one, other in ((x, y), (x, y.dense()), (x.dense(), y)):
        assert torch.allclose(dense(difference({"w": one}, {"w": other})["w"]), wanted)


THREE = [factors(6, 5, r, r) for r in (1, 3, 2)]


def norms_alone() -> None:
    test_norms_and_cosines_are_those_of_the_dense_changes.hypothesis.inner_test(
        (THREE, [0.5, 0.3, 0.2])
    )


def both_ways_alone() -> None:
    test_both_ways_to_inner_products_agree.hypothesis.inner_test((THREE, []))


def gauge_alone() -> None:
    test_a_change_does_not_depend_on_the_gauge.hypothesis.inner_test((6, 5), 3)


def blocks_alone() -> None:
    with pytest.MonkeyPatch.context() as patch:
        test_rows_are_taken_in_blocks(patch)


FAULTS: dict[str, tuple[Callable[..., object], str, str, Callable[[], object]]] = {
    "weights forgotten": (
        drift,
        "inner @ weights",
        "inner.mean(dim=1)",
        norms_alone,
    ),
    "squares for norms": (
        drift,
        "squares.sqrt(), inner",
        "squares, inner",
        norms_alone,
    ),
    "factors compared by themselves": (
        module._gram_of_products,
        "(b.T @ b) * (a @ a.T)",
        "(b.T @ b) + (a @ a.T)",
        both_ways_alone,
    ),
    "the start forgotten": (
        module._minus,
        "-y.b",
        "0 * y.b",
        gauge_alone,
    ),
    "the last block lost": (
        module._gram_of_rows,
        "range(0, m, step)",
        "range(0, m - 1, step)",
        blocks_alone,
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught(name: str) -> None:
    function, right, wrong, law = FAULTS[name]
    law()
    with planted(function, right, wrong), pytest.raises((AssertionError, RuntimeError)):
        law()
