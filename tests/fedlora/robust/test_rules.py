"""Robust averages: breakdown, invariances, owners of unequal ranks, Flower's rules as oracles."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedMedian, FedTrimmedAvg
from flwr.serverapp.strategy import Krum as FlowerKrum
from flwr.serverapp.strategy import MultiKrum as FlowerMultiKrum
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedlora.algebra.summand import Product, Summands, dense, norm, scaled
from fedlora.core.seeding import torch_generator
from fedlora.robust import coordinate, geometry
from fedlora.robust.bound import Bound, bounding
from fedlora.robust.coordinate import Median, Trimmed
from fedlora.robust.geometric import Geometric
from fedlora.robust.krum import Krum, MultiKrum, by_score
from fedlora.robust.rule import Rule, Term, capped
from tests.planted import planted

RULES: Mapping[str, Rule] = {
    "bound": Bound(),
    "median": Median(0.25),
    "trimmed": Trimmed(0.25),
    "krum": Krum(0.25),
    "multikrum": MultiKrum(attackers=0.25),
    "geometric": Geometric(),
}
SHAPES = {"u/a": (2, 5), "u/b": (6, 2), "v": (7,)}


def vectors(count: int, seed: int, spread: float = 1.0) -> list[Summands]:
    """Changes around a common one."""
    g = torch_generator(seed, "test-robust")

    def drawn(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    common = {name: drawn(shape) for name, shape in SHAPES.items()}
    return [
        {n: t + spread * drawn(tuple(t.shape)) for n, t in common.items()} for _ in range(count)
    ]


def products(count: int, seed: int) -> list[Summands]:
    """Products of unequal inner dimension."""
    g = torch_generator(seed, "test-products")
    found: list[Summands] = []
    for k in range(count):
        r = 1 + k % 3
        b = torch.randn(6, r, generator=g, dtype=torch.float64)
        found.append({"w": Product(b, torch.randn(r, 5, generator=g, dtype=torch.float64))})
    return found


def terms(xs: Sequence[Summands]) -> list[Term]:
    return [Term(x, 10, {}) for x in xs]


def centre(rule: Rule, xs: Sequence[Summands]) -> Tensor:
    return flat(rule.centre(terms(xs)).value)


def flat(x: Summands) -> Tensor:
    return torch.cat([dense(t).reshape(-1) for t in x.values()])


def close(one: Tensor, other: Tensor, tolerance: float = 1e-12) -> None:
    assert float((one - other).norm()) <= tolerance * max(1.0, float(other.norm()))


# --- laws ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RULES)
def test_equal_changes_give_that_change(name: str) -> None:
    for (x,) in (vectors(1, 3), products(1, 3)):
        close(centre(RULES[name], [x] * 8), flat(x), 1e-10)


def breakdown(rule: Rule, seed: int) -> None:
    honest = vectors(6, seed)
    lies = [scaled(x, 1e12 * (-1) ** seed) for x in vectors(2, seed + 1)]
    got, held = centre(rule, [*honest, *lies]), torch.stack([flat(x) for x in honest])
    low, high = held.amin(dim=0), held.amax(dim=0)
    assert bool(((low - 1e-9 <= got) & (got <= high + 1e-9)).all()), "left the honest range"


@pytest.mark.parametrize("name", ["median", "trimmed", "krum", "multikrum"])
@given(st.integers(0, 10**6))
def test_a_minority_does_not_leave_the_honest_range(name: str, seed: int) -> None:
    breakdown(RULES[name], seed)


def test_the_mean_is_broken_by_one() -> None:
    with pytest.raises(AssertionError, match="honest range"):
        breakdown(Trimmed(0.0), 1)


@given(st.integers(0, 10**6))
def test_the_geometric_median_is_not_moved_far(seed: int) -> None:
    honest = vectors(6, seed, 0.1)
    middle = flat(honest[0])
    got = centre(Geometric(steps=50), [*honest, *[scaled(x, -1e3) for x in honest[:2]]])
    assert float((got - middle).norm()) < 2.0


@pytest.mark.parametrize("name", RULES)
def test_the_order_of_clients_changes_nothing(name: str) -> None:
    for xs in (vectors(9, 4), products(9, 4)):
        close(centre(RULES[name], xs[::-1]), centre(RULES[name], xs), 1e-10)


def krum_selects(seed: int) -> None:
    xs, shift = vectors(9, seed), vectors(1, seed + 1)[0]
    got = Krum(0.25).centre(terms(xs))
    at = [k for k, v in enumerate(got.influence) if v > 0]
    assert len(at) == 1 and torch.equal(flat(got.value), flat(xs[at[0]])), "no input"
    moved = [{n: t + shift[n] for n, t in x.items()} for x in xs]  # type: ignore[operator]
    assert Krum(0.25).centre(terms(moved)).influence == got.influence, "a common shift decides"


@given(st.integers(0, 10**6))
def test_krum_takes_one_input_whatever_all_share(seed: int) -> None:
    krum_selects(seed)


@given(st.integers(0, 10**6), st.floats(0.01, 10))
def test_bound_moves_no_further_than_its_norm(seed: int, most: float) -> None:
    assert float(centre(Bound(norm=most), vectors(5, seed, 5)).norm()) <= most * (1 + 1e-12)
    xs = vectors(5, seed, 5)
    median = sorted(norm(x) for x in xs)[2]
    assert float(centre(Bound(), xs).norm()) <= median * (1 + 1e-12)


def test_trimming_nothing_is_the_mean() -> None:
    for xs in (vectors(7, 5), products(7, 5)):
        close(centre(Trimmed(0.0), xs), torch.stack([flat(x) for x in xs]).mean(dim=0))


@pytest.mark.parametrize("name", RULES)
def test_rules_of_products_do_not_see_the_gauge(name: str) -> None:
    xs = products(9, 6)
    turned: list[Summands] = []
    for k, x in enumerate(xs):
        p = x["w"]
        assert isinstance(p, Product)
        g = torch_generator(k, "gauge")
        q = torch.randn(p.b.shape[1], p.b.shape[1], generator=g, dtype=torch.float64)
        q = q + 3 * torch.eye(len(q), dtype=torch.float64)
        turned.append({"w": Product(p.b @ q, torch.linalg.solve(q, p.a))})
    close(centre(RULES[name], turned), centre(RULES[name], xs), 1e-10)


def test_a_mean_of_factors_sees_the_gauge() -> None:
    """What `max_factor_norm` is for: the same product, one client's factors rescaled."""
    xs = [{"b": torch.ones(4, 1).double(), "a": torch.ones(1, 3).double()} for _ in range(9)]
    xs[0] = {"b": 30 * xs[0]["b"], "a": xs[0]["a"] / 30}

    def product(rule: Rule) -> Tensor:
        got = rule.centre(terms(xs)).value
        return dense(got["b"]) @ dense(got["a"])

    assert float((product(Trimmed(0.0)) - 1).abs().max()) > 1
    assert float((product(Median(0.25)) - 1).abs().max()) < 1e-12


def gram_is_that_of_dense(seed: int) -> None:
    xs = products(5, seed)
    rows = torch.stack([flat(x) for x in xs])
    close(geometry.gram(xs), rows @ rows.T)


@given(st.integers(0, 10**6))
def test_inner_products_are_those_of_dense_matrices(seed: int) -> None:
    gram_is_that_of_dense(seed)
    xs = products(7, seed)
    plain = [{"w": dense(x["w"])} for x in xs]
    for rule in RULES.values():
        close(centre(rule, xs), centre(rule, plain), 1e-9)


def test_blocks_bound_what_is_dense() -> None:
    want = [centre(RULES[n], products(9, 2)) for n in ("median", "trimmed")]
    with mock.patch.object(geometry, "BLOCK_BYTES", 8 * 9 * 5 * 2):  # two rows of nine clients
        assert len(geometry.blocks(6, 9, 5)) == 3
        got = [centre(RULES[n], products(9, 2)) for n in ("median", "trimmed")]
    for one, other in zip(got, want, strict=True):
        close(one, other)


@pytest.mark.parametrize("name", RULES)
def test_influence_sums_to_one(name: str) -> None:
    got = RULES[name].centre(terms(vectors(9, 1)))
    assert math.isclose(sum(got.influence), 1) and min(got.influence) >= 0


# --- unequal ranks ------------------------------------------------------------------------------


def owners(rule: Rule) -> None:
    """Nine clients, three of which own the second row; all that own an element send the same."""
    xs, held = [], []
    for k in range(9):
        large = k < 3
        x = torch.ones(2, 4, dtype=torch.float64)
        x[1] *= 5.0 * large
        xs.append(x)
        held.append({} if large else {"x": torch.tensor([[True] * 4, [False] * 4])})
    of = [Term({"x": x}, 1, o) for x, o in zip(xs, held, strict=True)]
    got = dense(rule.centre(of).value["x"])
    close(got[0], torch.ones(4).double())
    close(got[1], 5 * torch.ones(4).double())


@pytest.mark.parametrize("rule", [Median(0.1), Trimmed(0.1)])
def test_elements_are_taken_over_their_owners(rule: Rule) -> None:
    owners(rule)


@pytest.mark.parametrize("rule", [Median(0.3), Trimmed(0.3)])
def test_too_few_owners_are_bounded(rule: Rule) -> None:
    """With f = 3 a row of three owners is the bounded mean of all nine."""
    x = [torch.ones(2, 1).double() * torch.tensor([[1.0], [float(k < 3)]]) for k in range(9)]
    x[0] = x[0] * 1e9
    mask = torch.tensor([[True], [False]])
    of = [Term({"x": t}, 1, {} if k < 3 else {"x": mask}) for k, t in enumerate(x)]
    got = dense(rule.centre(of).value["x"])
    assert 0 < float(got[1]) < 3 / 9 + 1e-9


# --- Flower's rules -----------------------------------------------------------------------------


@dataclass
class Reply:
    """What Flower's strategies read of a message."""

    content: RecordDict

    def has_error(self) -> bool:
        return False


def replies(xs: Sequence[Summands]) -> list[Any]:
    found = []
    for x in xs:
        arrays = ArrayRecord([dense(t).numpy() for t in x.values()])
        metrics = MetricRecord({"num-examples": 10})
        found.append(Reply(RecordDict({"arrays": arrays, "metrics": metrics})))
    return found


@pytest.mark.parametrize("seed", range(3))
def test_equal_ranks_agree_with_flower(seed: int) -> None:
    xs = vectors(9, seed)
    for rule, theirs in (
        (Median(0.25), FedMedian()),
        (Trimmed(0.25), FedTrimmedAvg(beta=3 / 9 + 1e-9)),
        (Krum(0.25), FlowerKrum(num_malicious_nodes=3)),
        (MultiKrum(attackers=0.25), FlowerMultiKrum(num_malicious_nodes=3, num_nodes_to_select=6)),
    ):
        arrays, _ = theirs.aggregate_train(1, replies(xs))
        assert arrays is not None
        want = torch.from_numpy(np.concatenate([a.reshape(-1) for a in arrays.to_numpy_ndarrays()]))
        close(centre(rule, xs), want, 1e-6)


# --- configuration ------------------------------------------------------------------------------


def test_weights_are_capped_or_equal() -> None:
    assert capped([1, 50, 10**9], 100) == [0.01, 0.5, 1.0]
    assert capped([1, 50], 0) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("rule", "clients", "message"),
    [
        (Krum(0.4), 6, r"robust=Krum needs at least 9 clients.*there are 6"),
        (Median(0.4), 3, r"robust=Median needs at least 5 clients"),
    ],
)
def test_small_cohorts_are_refused(rule: Rule, clients: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rule.check(clients)


def test_a_majority_of_attackers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"robust.attackers=0.5 must be below 0.5"):
        Median(0.5)


# --- planted faults -----------------------------------------------------------------------------


def bounded(seed: int = 1) -> None:
    assert float(centre(Bound(norm=0.5), vectors(5, seed, 5)).norm()) <= 0.5 * (1 + 1e-12)


FAULTS = {
    "padding is a value": (
        coordinate._Elementwise._block,
        "owners = owned.sum(dim=0)",
        "owners = torch.full((d,), k)",
        lambda: owners(Median(0.1)),
    ),
    "one side is trimmed by one less": (
        Trimmed.window,
        "torch.full_like(owners, f)",
        "torch.full_like(owners, f - 1)",
        lambda: [breakdown(Trimmed(0.25), seed) for seed in (1, 2)],
    ),
    "the furthest wins": (
        by_score,
        "argsort(scores,",
        "argsort(-scores,",
        lambda: breakdown(Krum(0.25), 1),
    ),
    "every change is long": (bounding, "1.0 if n <= most else most / n", "1.0", bounded),
    "the other factor's Gram matrix": (
        geometry._gram_of_products,
        "x.a.double() @ rows.T",
        "x.a.double() @ rows.abs().T",
        lambda: gram_is_that_of_dense(1),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(fault: str) -> None:
    function, right, wrong, law = FAULTS[fault]
    law()
    with planted(function, right, wrong), pytest.raises(AssertionError):
        law()
