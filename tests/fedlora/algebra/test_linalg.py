"""Laws and numeric vectors of the shared algebra."""

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedlora.algebra.linalg import (
    BACKENDS,
    SPLITS,
    at_rank,
    average,
    backend_flops,
    cheapest_backend,
    client_weights,
    complete,
    covered_weights,
    delta_norm,
    exactness_gap,
    factors_of_rank,
    normalize,
    product_norm,
    singular_value_energy,
    spectra,
    stack,
    svd,
    svd_of_product,
    truncation_error,
    weighted_sum,
)
from fedlora.core.types import Factors, Ranks
from tests.generators import (
    ALPHA,
    VECTOR_EXAMPLES,
    factors,
    lone,
    numbers,
    seeds,
    shapes,
    stacks,
    vector_factors,
    vector_updates,
    weighted_delta,
)

EXACT = ("auto", "dense", "core")
close = torch.testing.assert_close


def V1() -> tuple[list[Factors], list[float]]:
    return [vector_factors(k, r) for k, r in enumerate((1, 2, 3))], normalize(VECTOR_EXAMPLES)


def V2() -> tuple[list[Factors], list[float]]:
    return [vector_factors(k, 2) for k in range(3)], normalize(VECTOR_EXAMPLES)


def filler(n: int, seed: int = 1) -> Tensor:
    return torch.rand(n, n, generator=torch.Generator().manual_seed(seed)).double() - 0.5


# ------------------------------------------------------------------------------------- vectors


def test_v1_heterogeneous_product_average() -> None:
    w = weighted_delta(*V1())
    first = "-0.583358943814 0.587801871186 0.383990546491 0.0431900695301 0.448445480245"
    close(w[0], numbers(first), rtol=1e-11, atol=0)
    assert float(w.square().sum()) == pytest.approx(5.61351370077, rel=1e-11)
    assert float(w[:5].trace()) == pytest.approx(-1.89209396929, rel=1e-11)
    assert float(w.sum()) == pytest.approx(1.52824766573, rel=1e-11)


@pytest.mark.parametrize("backend", EXACT)
def test_v1_singular_values_errors_and_norms(backend: str) -> None:
    b, a = stack(*V1())
    found = svd_of_product(b, a, backend)
    values = "1.87305825393 1.11329297658 0.876629740925 0.305229540457 0.0640347671188"
    close(found.s, numbers(values), rtol=1e-11, atol=0)
    errors = numbers("2.10516647814 0.865745226442 0.0972655237678 0.00410045139996")
    norms = numbers("0.468264563483 1.08946873226 1.76150208616 2.36841999007 2.96160685396")
    for r in range(1, 6):
        f = factors_of_rank(found, r, 4.0, "b", filler(5))
        assert float(f.b.norm()) == pytest.approx(float(norms[r - 1]), rel=1e-11)
        if r < 5:
            error = (b @ a - f.delta()).square().sum()
            assert float(error) == pytest.approx(float(errors[r - 1]), rel=1e-10)


def test_v1_without_the_scale_is_something_else() -> None:
    fs, p = V1()
    w = svd(weighted_delta([dataclasses.replace(f, alpha=float(f.rank)) for f in fs], p))
    assert float(w.s.norm()) == pytest.approx(1.81517737198, rel=1e-11)
    values = "1.53924245527 0.822160711272 0.490769586202 0.09320775963 0.010528404165"
    close(w.s, numbers(values), rtol=1e-10, atol=0)


def test_v2_factor_average_and_its_gap() -> None:
    fs, p = V2()
    mean = average(fs, p)
    products, gap = weighted_delta(fs, p), weighted_delta(fs, p) - mean.delta()
    assert float(products.norm()) == pytest.approx(2.22379199807, rel=1e-11)
    assert float(mean.delta().norm()) == pytest.approx(2.46166941035, rel=1e-11)
    assert float(gap.norm()) == pytest.approx(1.53511236412, rel=1e-11)
    assert float(gap.norm()) / 2 == pytest.approx(0.767556182062, rel=1e-11)  # FedEx residual
    found = svd(products)
    values = "1.944322274 1.07770131877 0.0465772371583 0.0353860708737"
    close(found.s, numbers(values), rtol=1e-9, atol=0)
    assert found.rank == 4
    uniform = weighted_delta(fs, [1 / 3] * 3)
    assert float(uniform.norm()) == pytest.approx(1.50429654474, rel=1e-11)


def test_v5_rank_partitioned_weights() -> None:
    fs, p = V1()
    b, a = stack(fs, covered_weights(p, [f.rank for f in fs]))
    assert product_norm(b, a) == pytest.approx(4.02866748949, rel=1e-11)
    values = "3.69318152937 1.16150881572 1.05473191888 0.353365900861 0.0643608759977"
    close(svd_of_product(b, a).s, numbers(values), rtol=1e-11, atol=0)


# ------------------------------------------------------------------------- averages and products


@given(stacks())
def test_a_stack_is_the_sum_of_products(case: tuple[list[Factors], list[float]]) -> None:
    """Also FLoRA's stacked product (P20)."""
    fs, p = case
    want = sum((w * f.delta() for w, f in zip(p[1:], fs[1:], strict=True)), p[0] * fs[0].delta())
    close(weighted_delta(fs, p), want, rtol=1e-10, atol=1e-10)
    b = torch.cat([f.b for f in fs], dim=1)
    a = torch.cat([w * f.scale * f.a for w, f in zip(p, fs, strict=True)])
    close(b @ a, want, rtol=1e-10, atol=1e-10)


@given(stacks(same_rank=True))
def test_the_gap_of_factor_averages_is_the_covariance_of_the_factors(
    case: tuple[list[Factors], list[float]],
) -> None:
    """P10, and FedEx-LoRA's identity (P20): average plus residual is the average of products."""
    fs, p = case
    mean, products = average(fs, p), weighted_delta(fs, p)
    residual = products - mean.delta()
    covariance = torch.zeros_like(products)
    for w, f in zip(p, fs, strict=True):
        covariance += w * f.scale * (f.b - mean.b) @ (f.a - mean.a)
    close(residual, covariance, rtol=1e-9, atol=1e-9)
    close(mean.delta() + residual, products, rtol=1e-9, atol=1e-9)


@given(stacks(same_rank=True), st.booleans())
def test_factor_averages_are_exact_where_one_factor_is_shared(
    case: tuple[list[Factors], list[float]], share_a: bool
) -> None:
    """P10: FFA-LoRA's average of B over one frozen A is the average of the products."""
    fs, p = case
    same = [
        Factors(fs[0].a, f.b, f.alpha) if share_a else Factors(f.a, fs[0].b, f.alpha) for f in fs
    ]
    close(average(same, p).delta(), weighted_delta(same, p), rtol=1e-9, atol=1e-9)


@given(stacks(), st.floats(0.1, 10))
def test_only_alpha_times_b_matters(case: tuple[list[Factors], list[float]], c: float) -> None:
    """P7."""
    fs, p = case
    moved = [Factors(f.a, f.b / c, f.alpha * c) for f in fs]
    close(weighted_delta(moved, p), weighted_delta(fs, p), rtol=1e-9, atol=1e-9)


@given(stacks())
def test_rank_partitioned_weights(case: tuple[list[Factors], list[float]]) -> None:
    """Every rank index that somebody has is averaged with weights that sum to 1; with equal ranks
    they are the ordinary ones (P20)."""
    fs, p = case
    ranks = [f.rank for f in fs]
    found = covered_weights(p, ranks)
    for i in range(max(ranks)):
        assert sum(float(w[i]) for w in found if len(w) > i) == pytest.approx(1)
    equal = covered_weights(p, [ranks[0]] * len(p))
    for w, share in zip(equal, p, strict=True):
        close(w, torch.full((ranks[0],), share, dtype=torch.float64))


@given(stacks())
def test_norms_by_the_trace_identity(case: tuple[list[Factors], list[float]]) -> None:
    """P13."""
    fs, p = case
    b, a = stack(fs, p)
    assert product_norm(b, a) == pytest.approx(float((b @ a).norm()), rel=1e-9, abs=1e-9)
    assert product_norm(b, a) == pytest.approx(float(svd_of_product(b, a).s.norm()), rel=1e-9)
    thin = factors(40, 30, 2, seed=1)
    by_trace = ((thin.b.T @ thin.b) * (thin.a @ thin.a.T)).sum().sqrt()
    assert product_norm(thin.b, thin.a) == pytest.approx(float(by_trace), rel=1e-12)
    assert delta_norm(thin) == pytest.approx(float(thin.delta().norm()), rel=1e-12)


def test_normalize() -> None:
    assert normalize([1, 3]) == [0.25, 0.75]
    for bad in ([0, 0], [-1, 2], [math.nan, 1], [math.inf, 1]):
        with pytest.raises(ValueError, match="weights"):
            normalize(bad)
    updates = vector_updates((1, 2, 3))
    for weights, want in (("examples", list(VECTOR_EXAMPLES)), ("uniform", [1, 1, 1])):
        assert client_weights(updates, weights) == want
    with pytest.raises(ValueError, match="weights='tokens'"):
        client_weights(updates, "tokens")


def test_averages_of_different_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="different shapes"):
        weighted_sum([torch.zeros(2, 3), torch.zeros(3, 3)], [0.5, 0.5])


def test_half_precision_is_raised() -> None:
    f = factors(4, 3, 2, seed=0)
    half = Factors(f.a.bfloat16(), f.b.bfloat16(), ALPHA)
    assert average([half], [1.0]).a.dtype == torch.float32
    assert weighted_delta([half], [1.0]).dtype == torch.float32
    assert svd(half.delta()).s.dtype == torch.float32


# ------------------------------------------------------------------------------------------ SVD


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "auto"])
@given(case=stacks())
def test_backends_agree(backend: str, case: tuple[list[Factors], list[float]]) -> None:
    """P5, P6, P11: same singular values and product; orthonormal; descending; rank at most R."""
    b, a = stack(*case)
    want, got = svd(b @ a), svd_of_product(b, a, backend)
    loose = backend == "gram"
    n = min(want.rank, got.rank)
    tolerance = 1e-6 if loose else 1e-10
    close(got.s[:n], want.s[:n], rtol=tolerance, atol=tolerance * float(want.s[0]))
    close(got.dense(), b @ a, rtol=tolerance, atol=tolerance * float(want.s[0]))
    assert got.rank <= min(b.shape[0], a.shape[1], a.shape[0])
    if not loose:
        eye = torch.eye(got.rank, dtype=torch.float64)
        close(got.u.T @ got.u, eye, rtol=0, atol=1e-9)
        close(got.v @ got.v.T, eye, rtol=0, atol=1e-9)
    assert bool((got.s.diff() <= 0).all())


@given(shapes, seeds)
def test_signs_are_fixed(shape: tuple[int, int], seed: int) -> None:
    found = svd(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double())
    largest = found.v.gather(1, found.v.abs().argmax(dim=1, keepdim=True))
    assert bool((largest > 0).all())


def test_sketching_keeps_the_leading_directions() -> None:
    f = factors(40, 30, 20, seed=2)
    decay = torch.logspace(0, -6, 20, dtype=torch.float64)
    b = torch.linalg.qr(f.b)[0] * decay
    a = torch.linalg.qr(f.a.T)[0].T
    found = svd_of_product(b, a, "random", rank=5)
    assert found.rank == 5
    close(found.s, decay[:5], rtol=1e-6, atol=0)


def test_float32_loses_no_more_than_rounding() -> None:
    f = factors(96, 64, 12, seed=3)
    b, a = f.b.float(), f.a.float()
    for backend in EXACT:
        error = (svd_of_product(b, a, backend).dense() - b @ a).norm() / (b @ a).norm()
        assert float(error) < 1e-5


def test_nothing_that_is_not_finite_is_decomposed() -> None:
    w = torch.ones(3, 4)
    w[1, 2] = math.nan
    w[0, 0] = math.inf
    with pytest.raises(FloatingPointError, match=r"\(3, 4\): 2 entries are not finite"):
        svd(w)


def test_zero_has_rank_zero() -> None:
    assert svd(torch.zeros(3, 4)).rank == 0
    for backend in BACKENDS:
        found = svd_of_product(torch.zeros(3, 2), torch.zeros(2, 4), backend, rank=2)
        assert found.rank == 0
        assert torch.equal(found.dense(), torch.zeros(3, 4))


def test_float64_takes_over_when_float32_does_not_converge(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = torch.linalg.svd

    def stubborn(x: Tensor, full_matrices: bool = True) -> object:
        if x.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return right(x, full_matrices)

    w = factors(5, 4, 2, seed=0).delta().float()
    monkeypatch.setattr(torch.linalg, "svd", stubborn)
    found = svd(w)
    assert found.s.dtype == torch.float32
    close(found.dense(), w, rtol=1e-5, atol=1e-4)


def test_the_cheapest_backend_follows_the_costs() -> None:
    """For a square layer the break-even of the exact backends lies at R = 0.9 d."""
    d = 1000
    rank_one = [backend_flops(b, d, d, 896, 0) for b in ("core", "dense")]
    assert rank_one[0] == pytest.approx(rank_one[1], rel=0.02)
    assert cheapest_backend(576, 576, 180, 32) == "core"
    assert cheapest_backend(1536, 576, 180, 32) == "core"
    assert cheapest_backend(576, 576, 2350, 64) == "dense"
    assert cheapest_backend(192, 576, 5400, 64) == "dense"
    for backend in BACKENDS[1:]:
        assert backend_flops(backend, 576, 192, 100, 8) > 0
    assert backend_flops("random", 2048, 2048, 2048, 8) < backend_flops(
        "dense", 2048, 2048, 2048, 8
    )
    with pytest.raises(ValueError, match="backend='fast'"):
        svd_of_product(torch.ones(2, 1), torch.ones(1, 3), "fast")


# ------------------------------------------------------------------------------- redistribution


@pytest.mark.parametrize("split", SPLITS)
@given(case=stacks())
def test_truncation_is_the_best_of_its_rank(
    split: str, case: tuple[list[Factors], list[float]]
) -> None:
    """P1, P2, P3: Eckart and Young in both norms, lossless from the rank of W on, for any split."""
    w = weighted_delta(*case)
    found, n = svd(w), min(w.shape)
    errors = []
    for r in range(1, n + 1):
        f = factors_of_rank(found, r, ALPHA, split, filler(w.shape[1]))
        error = f.delta() - w
        errors.append(float(error.norm()))
        assert error.square().sum() == pytest.approx(float(found.s[r:].square().sum()), abs=1e-9)
        spectral = float(found.s[r]) if r < found.rank else 0.0
        assert float(torch.linalg.matrix_norm(error, 2)) == pytest.approx(spectral, abs=1e-9)
    assert _descending(errors)
    assert errors[-1] < 1e-9


def _descending(values: list[float]) -> bool:
    return all(y <= x + 1e-9 for x, y in itertools.pairwise(values))


@given(stacks())
def test_ranks_are_nested(case: tuple[list[Factors], list[float]]) -> None:
    """P4, P6: prefixes of one another up to the scale; A orthonormal, B orthogonal, descending."""
    w = weighted_delta(*case)
    found = svd(w)
    rows = complete(found.v, filler(w.shape[1])[: min(w.shape)])
    big = factors_of_rank(found, min(w.shape), ALPHA, "b", rows)
    close(big.a @ big.a.T, torch.eye(big.rank, dtype=torch.float64), rtol=0, atol=1e-9)
    gram = big.b.T @ big.b
    close(gram, torch.diag(torch.diagonal(gram)), rtol=0, atol=1e-9)
    assert _descending(torch.diagonal(gram).tolist())
    for r in range(1, big.rank):
        small = factors_of_rank(found, r, ALPHA, "b", rows)
        assert torch.equal(small.a, big.a[:r])
        close(small.scale * small.b, big.scale * big.b[:, :r], rtol=1e-12, atol=1e-12)


def test_completion_is_orthonormal_even_if_the_filler_lies_in_the_span() -> None:
    rows = filler(7)[:5]
    v = torch.linalg.qr(rows[:3].T)[0].T
    full = complete(v, rows)
    assert torch.equal(full[:3], v)
    close(full @ full.T, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-12)
    assert complete(v, rows[:2]) is v
    v32 = v.float()
    full32 = complete(v32, rows.float())
    close(full32 @ full32.T, torch.eye(5), rtol=0, atol=1e-5)


@given(stacks())
def test_any_rank_above_is_lossless_and_below_the_best(
    case: tuple[list[Factors], list[float]],
) -> None:
    f = case[0][0]
    for r in range(1, min(f.b.shape[0], f.a.shape[1]) + 1):
        other = at_rank(f, r)
        assert other.rank == r
        tail = svd(f.delta()).s[r:].norm()
        assert float((other.delta() - f.delta()).norm()) == pytest.approx(float(tail), abs=1e-9)
        alive = other.a.norm(dim=1) + other.b.norm(dim=0)
        assert bool((alive > 1e-9).all())


# ---------------------------------------------------------------------------------- diagnostics


def test_exactness_gap() -> None:
    updates = vector_updates((2, 2, 2))
    fs, p = V2()
    mean = {"w": average(fs, p)}
    found = exactness_gap(updates, VECTOR_EXAMPLES, mean)
    assert found["gap"] == pytest.approx(1.53511236412, rel=1e-9)
    assert found["norm"] == pytest.approx(2.22379199807, rel=1e-9)
    assert found["relative"] == pytest.approx(1.53511236412 / 2.22379199807, rel=1e-9)
    exact = {"w": factors_of_rank(svd(weighted_delta(fs, p)), 4, 4.0, "b", filler(5))}
    assert exactness_gap(updates, VECTOR_EXAMPLES, exact)["gap"] < 1e-7
    still = [lone("w", Factors(f.a, 0 * f.b, f.alpha)) for f in fs]
    nothing = {"w": Factors(fs[0].a, 0 * fs[0].b, 4.0)}
    assert exactness_gap(still, [1, 1, 1], nothing) == {"gap": 0, "norm": 0, "relative": 0}


def test_energy_and_truncation_error() -> None:
    f = factors_of_rank(svd(weighted_delta(*V1())), 5, 4.0, "b", filler(5))
    values = spectra({"w": f})
    close(values["w"], svd(weighted_delta(*V1())).s)
    total = 5.61351370077
    energy = singular_value_energy(values, [1, 2, 5])
    assert energy[1] == pytest.approx(1 - 2.10516647814 / total, rel=1e-9)
    assert energy[5] == pytest.approx(1)
    error = truncation_error(values, [Ranks({"w": 2}), Ranks({"w": 5})])
    assert error["2"] == pytest.approx(math.sqrt(0.865745226442 / total), rel=1e-9)
    assert error["5"] == 0
    skew = vector_factors(1, 3)
    close(spectra({"w": skew})["w"], svd(skew.delta()).s)
    assert spectra({"w": Factors(skew.a, 0 * skew.b, 4.0)})["w"].numel() == 0
    zero = {"w": torch.zeros(0)}
    assert singular_value_energy(zero, [1]) == {1: 1.0}
    assert truncation_error(zero, [Ranks({"w": 1})]) == {"1": 0.0}
