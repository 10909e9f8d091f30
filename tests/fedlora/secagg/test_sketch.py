"""Sums of products by sketches: exact where the rank allows, linear, of one size for all ranks."""

import pytest
import torch

from fedlora.algebra.summand import Product, dense, norm, total
from fedlora.secagg.config import SecAgg
from fedlora.secagg.sketch import Sketch, sketch_of
from fedlora.secagg.vector import Layout

M, N = 40, 32


def products(ranks, seed=0, common=0.0):
    """Clients' changes around a common signal, beside a plain tensor."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    b, a, spread = draw(M, max(ranks)), draw(max(ranks), N), common or 1.0
    found = []
    for r in ranks:
        signal = 1.0 if common else 0.0
        own = Product(signal * b[:, :r] + spread * draw(M, r), signal * a[:r] + spread * draw(r, N))
        found.append({"w": own, "bias": draw(N)})
    return found


def sketched(kind, terms, width):
    """The sum by sketches, without rounding."""
    sketch = Sketch(kind, 3, 2, {"w": width} if kind != "none" else {})
    weights = [1.0] * len(terms)
    sums, bases = {}, {}
    for exchange in range(sketch.exchanges):
        parts = [sketch.tensors(x, exchange, bases) for x in terms]
        sums |= {n: dense(t) for n, t in total(parts, weights).items()}
        bases = sketch.bases(sums)
    return sketch.summed(sums, terms[0])


@pytest.mark.parametrize("kind", ["one", "two"])
def test_a_sum_of_low_rank_is_exact(kind):
    terms = products([1, 2, 4])
    want = total(terms, [1.0] * 3)
    got = sketched(kind, terms, 7)
    assert torch.allclose(dense(got["w"]), dense(want["w"]), atol=1e-10)
    assert torch.allclose(dense(got["bias"]), dense(want["bias"]), atol=1e-12)
    assert isinstance(got["w"], Product)
    assert got["w"].b.shape == (M, 7)


@pytest.mark.parametrize("kind", ["one", "two"])
def test_a_sketch_too_narrow_loses_what_it_cannot_hold(kind):
    terms = products([4, 4, 4])
    lost = dense(sketched(kind, terms, 6)["w"]) - dense(total(terms, [1.0] * 3)["w"])
    assert float(lost.norm()) > 1.0


def test_two_exchanges_are_nearer_than_one_and_wider_is_nearer():
    """Relative to the best approximation, as in the measurements of the specification."""
    terms = products([1, 2, 4, 4, 2, 4, 1, 4], common=0.3)
    whole = dense(total(terms, [1.0] * len(terms))["w"])
    error = {
        (kind, width): float((dense(sketched(kind, terms, width)["w"]) - whole).norm())
        for kind in ("one", "two")
        for width in (4, 12)
    }
    assert error["two", 4] < error["one", 4]
    assert error["two", 12] < error["two", 4]
    assert error["one", 12] < error["one", 4]


@pytest.mark.parametrize("kind", ["none", "one", "two"])
def test_sizes_do_not_show_ranks(kind):
    sketch = Sketch(kind, 0, 1, {} if kind == "none" else {"w": 6})
    layouts = {Layout.of(sketch.tensors(x)) for x in products([1, 3, 8])}
    assert len(layouts) == 1


@pytest.mark.parametrize("kind", ["one", "two"])
def test_no_sketch_is_longer_than_its_product(kind):
    (x,) = products([3])
    size = norm({"w": x["w"]})
    sketch = Sketch(kind, 0, 1, {"w": 5})
    bases = {"w": torch.linalg.qr(torch.randn(M, 5, dtype=torch.float64)).Q}
    parts = sketch.tensors(x) | (sketch.tensors(x, 1, bases) if kind == "two" else {})
    for name, t in parts.items():
        if name != "bias":
            assert float(t.norm()) <= size * (1 + 1e-12), name


def test_widths_follow_the_largest_rank_and_never_exceed_the_matrix():
    (x,) = products([3])
    config = SecAgg(sketch="two", width=3.0)
    assert sketch_of(config, x, {"w": 4}, 0, 1).widths == {"w": 12}
    assert sketch_of(config, x, {"w": 99}, 0, 1).widths == {"w": min(M, N)}
    assert sketch_of(config, {"bias": x["bias"]}, {"w": 4}, 0, 1).exchanges == 1


def test_another_round_has_other_directions():
    (x,) = products([3])
    one, two = (Sketch("one", 0, r, {"w": 5}).tensors(x) for r in (1, 2))
    assert not torch.allclose(one["w|y"], two["w|y"])
