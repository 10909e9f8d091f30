"""Who the clients are: exact quotas, reproducible cohorts, disjoint holdouts, clear refusals."""

from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from fedlora.core.types import Module
from fedlora.population.ranks import (
    FRACTIONS,
    RankDistribution,
    quotas,
    scaled_ranks,
)
from fedlora.population.sampling import (
    Population,
    cohort,
    deal,
    enroll,
    held_out,
    panel,
)

SMOLLM2 = [
    Module(f"layers.{i}.{name}", kind, out, into)
    for i in range(30)
    for name, kind, out, into in [
        ("q_proj", "attention", 576, 576),
        ("k_proj", "attention", 192, 576),
        ("v_proj", "attention", 192, 576),
        ("o_proj", "attention", 576, 576),
        ("gate_proj", "mlp", 1536, 576),
        ("up_proj", "mlp", 1536, 576),
        ("down_proj", "mlp", 576, 1536),
    ]
]
PARAMETERS = 134_515_008
laws = settings(derandomize=True, deadline=None, max_examples=40)


@dataclass
class Shard:
    id: int
    category: str = "a 0.json"
    num_train: int = 8

    def holds(self, split):
        return self.num_train, 20 * self.num_train

    def trains(self, loss):
        return self.num_train


def shards(n):
    return [Shard(i, f"{'ab'[i % 5 == 0]} {i}.json", 0 if i == 3 else 8) for i in range(n)]


def roster(n=1600, population=None, ranks=None, seed=5):
    return enroll(
        population or Population(),
        ranks or RankDistribution("heavy_tail_strong", preset="paper"),
        shards(n),
        SMOLLM2,
        PARAMETERS,
        seed,
    )


def test_fractions_are_exact_not_expected():
    counts = Counter(c.tier for c in roster().clients)
    assert counts == {"T1": 80, "T2": 80, "T3": 160, "T4": 1280}


@laws
@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=6), st.integers(0, 2000))
def test_quotas_sum_and_are_nearest(shares, total):
    got = quotas(shares, total)
    assert sum(got) == total
    assert all(abs(g - s / sum(shares) * total) < 1 for g, s in zip(got, shares, strict=True))


def test_every_distribution_sums_to_one_and_normal_differs_from_its_code():
    for variants in FRACTIONS.values():
        for shares in variants.values():
            assert abs(sum(shares) - 1) < 1e-12
    paper, code = (FRACTIONS["normal"][v] for v in ("paper", "code"))
    assert [round(x, 4) for x in paper] == [0.0575, 0.4425, 0.4425, 0.0575]
    assert [round(x, 4) for x in code] == [0.0575, 0.0575, 0.4425, 0.4425]


def test_scaled_ranks_keep_the_papers_shares():
    assert scaled_ranks(SMOLLM2, PARAMETERS) == [(2, 2), (9, 9), (9, 58), (61, 61)]


def test_ranks_are_clamped_to_the_module():
    strong = next(c for c in roster().clients if c.tier == "T4")
    assert strong.ranks["layers.0.q_proj"] == 200
    assert strong.ranks["layers.0.k_proj"] == 192


def test_tiers_have_a_rank_per_module_type():
    t3 = next(c for c in roster().clients if c.tier == "T3")
    assert (t3.ranks["layers.0.q_proj"], t3.ranks["layers.0.up_proj"]) == (30, 200)


def test_heterogeneity_is_real():
    assert len({c.ranks for c in roster().clients}) == 4


def test_a_cohort_depends_on_seed_and_round_alone():
    r = roster()
    assert r.per_round == 80
    assert cohort(r, 3, 7) == cohort(r, 3, 7)
    assert cohort(r, 3, 7) != cohort(r, 3, 8)
    assert cohort(r, 3, 7) != cohort(r, 4, 7)
    assert len({c.id for c in cohort(r, 3, 7)}) == 80


def test_holdouts_are_disjoint_and_never_train():
    r = roster(200, Population(unseen_fraction=0.1, unseen_categories=("b",)))
    seen, random, task = (set(r.groups[g]) for g in ("seen", "unseen_random", "unseen_task"))
    assert task == set(range(0, 200, 5))
    assert len(random) == 20
    assert not seen & random
    assert not seen & task
    assert not random & task
    assert 3 not in seen  # it has no training examples
    for t in range(30):
        assert {c.id for c in cohort(r, 1, t)} <= seen
    assert [c.id for c in panel(r, "unseen_task", 7, 1, "test")] == sorted(
        c.id for c in panel(r, "unseen_task", 7, 1, "test")
    )


@laws
@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(1, 9))
def test_dealing_keeps_every_card_and_evens_the_load(weights, hands):
    dealt = deal(weights, hands)
    assert sorted(i for hand in dealt for i in hand) == list(range(len(weights)))
    loads = [sum(weights[i] for i in hand) for hand in dealt]
    assert max(loads) <= sum(weights) / hands + max(weights)


@laws
@given(st.lists(st.integers(0, 50), min_size=1, max_size=60), st.integers(1, 9), st.integers(1, 9))
def test_a_hand_holds_no_more_than_it_may(weights, hands, most):
    """However unequal the weights; there are more hands only if these cannot hold everything."""
    dealt = deal(weights, hands, most)
    assert sorted(i for hand in dealt for i in hand) == list(range(len(weights)))
    assert max(len(hand) for hand in dealt) <= most
    assert len(dealt) <= max(hands, -(-len(weights) // most))


def test_cards_without_weight_are_spread_as_well():
    assert sorted(len(hand) for hand in deal([0.0] * 12, 4)) == [3, 3, 3, 3]


def test_own_tiers():
    mine = RankDistribution(
        "custom",
        tiers=(
            {"name": "phone", "rank": 2, "fraction": 0.75},
            {"name": "server", "attention": 4, "mlp": 16, "fraction": 0.25},
        ),
    )
    r = roster(8, ranks=mine, population=Population(per_round=2, unseen_fraction=0))
    assert r.tier_counts() == {"phone": 6, "server": 2}


def test_a_share_of_the_population_is_the_whole_number_it_means():
    """0.29 of 100 clients are 29, although 0.29 * 100 is a float below it."""
    for percent in range(1, 100):
        r = roster(100, Population(fraction=percent / 100, unseen_fraction=0))
        assert r.per_round == percent
    assert roster(99, Population(fraction=0.29)).per_round == 28  # of 28.71
    assert roster(9, Population(fraction=0.01)).per_round == 1


def test_tiers_that_nobody_is_in_are_not_asked_for():
    """A small homogeneous rank is not refused because of tiers of fraction zero."""
    small = RankDistribution("homogeneous", rank=4, clamp=False)
    assert [(t.name, t.attention, t.mlp) for t in small.resolve(SMOLLM2, PARAMETERS)] == [
        ("T1", 4, 4)
    ]
    assert {c.ranks.label for c in roster(50, ranks=small).clients} == {"4"}
    rows = ({"rank": 2, "fraction": 1.0}, {"rank": 9999, "fraction": 0.0})
    own = RankDistribution("custom", tiers=rows, clamp=False)
    assert roster(50, ranks=own).tier_counts() == {"T1": 50}
    for distribution in set(FRACTIONS) - {"homogeneous"}:
        with pytest.raises(ValueError, match="rank 200 is above 192"):
            roster(ranks=RankDistribution(distribution, preset="paper", clamp=False))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RankDistribution("zipf"), "'zipf' is not one of"),
        (lambda: RankDistribution("uniform", rank=4), "needs ranks.distribution=homogeneous"),
        (lambda: RankDistribution("custom"), "needs ranks.tiers"),
        (
            lambda: RankDistribution("custom", tiers=({"rank": 0, "fraction": 1.0},)),
            "attention rank=0 must be >= 1",
        ),
        (
            lambda: RankDistribution("custom", tiers=({"rank": 2, "fraction": 0.5},)),
            "sum to 0.5, not 1",
        ),
        (
            lambda: RankDistribution("custom", tiers=({"rank": 2, "share": 1.0},)),
            r"ranks\.tiers\.share is ranks\.tiers\.fraction since",
        ),
        (
            lambda: RankDistribution("custom", tiers=({"rnk": 2, "fraction": 1.0},)),
            "unknown keys",
        ),
        (
            lambda: roster(ranks=RankDistribution("homogeneous", rank=300, clamp=False)),
            "rank 300 is above 192 = min",
        ),
        (lambda: roster(4, Population(clients=5)), "clients=5 must be at most 4"),
        (lambda: roster(4, Population(unseen_fraction=1.0)), "no client is left to train"),
        (
            lambda: roster(9, Population(per_round=9)),
            "per_round=9 must be at most 7: of the 9 clients, 1 are held out",
        ),
        (lambda: roster(9, Population(unseen_categories=("zz",))), "not in the data"),
        (lambda: Population(fraction=0), "fraction=0 must lie in"),
        (lambda: panel(roster(9), "old", 0, 0, "test"), "'old' is not one of"),
    ],
)
def test_impossible_wishes_are_refused(make, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        make()


@dataclass
class Uneven:
    """A client's examples by split, and how many of the training ones keep a response."""

    id: int
    num_train: int
    responding: int
    evals: int
    tests: int
    category: str = "a"

    def holds(self, split):
        examples = {"train": self.num_train, "eval": self.evals, "test": self.tests}[split]
        return examples, 20 * examples

    def trains(self, loss):
        return self.responding if loss == "response" else self.num_train


UNEVEN = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 1), st.integers(0, 1)),
    min_size=3,
    max_size=30,
)


@laws
@given(UNEVEN, st.sampled_from(["full", "response"]), st.integers(0, 3))
def test_nobody_is_drawn_for_what_it_cannot_do(rows, loss, seed):
    """No cohort holds a client without a token to learn from, no panel one without examples of its
    split, and nobody is held out for evaluation who cannot be evaluated, if others can."""
    held = [Uneven(i, n, min(n, r), e, t) for i, (n, r, e, t) in enumerate(rows)]
    rules = Population(fraction=0.5, unseen_fraction=0.3)
    try:
        drawn = enroll(rules, RankDistribution(), held, SMOLLM2, PARAMETERS, seed, loss)
    except ValueError:
        reject()  # no client is left to train
    assert all(held[c.id].trains(loss) for r in range(3) for c in cohort(drawn, seed, r))
    for group in drawn.groups:
        for split in ("train", "eval", "test"):
            for size in (0, 2):
                found = panel(drawn, group, size, seed, split)
                able = [i for i in drawn.groups[group] if held[i].holds(split)[0]]
                assert len(found) == (min(size, len(able)) if size else len(able))
                assert all(c.id in able for c in found)
    if any(s.evals or s.tests for s in held):
        assert all(held[i].evals or held[i].tests for i in drawn.groups["unseen_random"])


def test_a_fixed_population_does_not_depend_on_the_seed_of_the_run():
    """Runs of several seeds are compared on the same clients, tiers and panels; unless told so, the
    run's seed draws them."""

    def people(population, seed):
        r = roster(400, population, seed=seed)
        panels = [[c.id for c in panel(r, g, 9, r.seed, "test")] for g in r.groups]
        return r.clients, r.groups, panels

    fixed = Population(seed=7)
    assert people(fixed, 1) == people(fixed, 2) == people(Population(), 7)
    assert people(Population(), 1) != people(Population(), 2)
    assert held_out(fixed, shards(400), 1) == held_out(fixed, shards(400), 2)
