import contextlib
import sys
from collections import Counter
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.core.errors import ConfigError
from fedlora.data.partition import (
    _complete,
    balanced,
    by_group,
    dirichlet,
    follow,
    iid,
    natural,
    pathological,
)

LAW = settings(derandomize=True, deadline=None, max_examples=50)


@LAW
@given(
    sizes=st.lists(st.integers(1, 50), max_size=40),
    clients=st.integers(1, 9),
    seed=st.integers(0, 3),
)
def test_groups_are_dealt_once_and_nobody_is_ahead_by_more_than_one_group(sizes, clients, seed):
    parts = balanced(sizes, clients, seed, "law")
    assert len(parts) == clients
    assert sorted(chain(*parts)) == list(range(len(sizes)))
    held = [sum(sizes[i] for i in part) for part in parts]
    assert max(held) - min(held) <= max(sizes, default=0)
    assert all(parts) or len(sizes) < clients
    assert parts == balanced(sizes, clients, seed, "law")


def test_dealing_depends_on_seed_and_purpose():
    dealt = [balanced([1] * 20, 2, s, p) for s in (0, 1) for p in ("a", "b")]
    assert all(dealt[i] != dealt[j] for i in range(4) for j in range(i))


LABELS = st.lists(st.sampled_from("abcdefg"), min_size=1, max_size=120)


def by_flwr(labels, partitioner):
    """The same division by `flwr-datasets`, and whether it gave up."""
    datasets = pytest.importorskip("datasets")
    rows = {"row": list(range(len(labels))), "label": list(labels)}
    partitioner.dataset = datasets.Dataset.from_dict(rows)
    return [partitioner.load_partition(k)["row"][:] for k in range(partitioner.num_partitions)]


@pytest.mark.filterwarnings("ignore:The specified min_partition_size")
@settings(LAW, max_examples=10)
@given(labels=LABELS, clients=st.integers(1, 8), seed=st.integers(0, 3))
def test_flwr_datasets_divides_alike(labels, clients, seed):
    flwr = pytest.importorskip("flwr_datasets.partitioner")
    clients = min(clients, len(labels))
    natural_ids = flwr.NaturalIdPartitioner(partition_by="label")
    assert natural(labels) == by_flwr(labels, natural_ids)
    shuffled = [str(i) for i in np.random.default_rng(seed).permutation(len(labels))]
    cut = by_flwr(shuffled, flwr.IidPartitioner(num_partitions=clients))
    assert iid(len(labels), clients, seed) == [[int(shuffled[i]) for i in part] for part in cut]
    drawn = flwr.DirichletPartitioner(clients, "label", 5.0, min_partition_size=1, seed=seed)
    with contextlib.suppress(ValueError):  # it gives up where this project completes a draw
        assert dirichlet(labels, clients, 5.0, 1, seed).parts == by_flwr(labels, drawn)


@LAW
@given(
    labels=LABELS,
    clients=st.integers(1, 40),
    alpha=st.sampled_from([5e-324, 1e-9, 0.01, 0.1, 1.0, 100.0]),
    least=st.integers(1, 4),
    seed=st.integers(0, 5),
    nearest=st.booleans(),
)
def test_a_dirichlet_partition_is_a_partition_at_any_alpha(
    labels, clients, alpha, least, seed, nearest
):
    """Every example exactly once, no client with less than it must have, the same for a seed."""
    if clients * least > len(labels):
        with pytest.raises(ConfigError, match=r"data\.clients=|data\.min_examples="):
            dirichlet(labels, clients, alpha, least, seed, nearest=nearest)
        return
    parts, moved = dirichlet(labels, clients, alpha, least, seed, nearest=nearest)
    assert moved <= set(range(len(labels)))
    assert len(parts) == clients
    assert sorted(chain(*parts)) == list(range(len(labels)))
    assert min(map(len, parts)) >= least
    assert (parts, moved) == dirichlet(labels, clients, alpha, least, seed, nearest=nearest)


@pytest.mark.parametrize(
    ("clients", "labels", "alpha"),
    [(20, 3, 0.1), (20, 3, 0.01), (30, 77, 0.01), (100, 3, 0.01), (100, 3, 0.1)],
)
def test_uneven_draws_are_completed_and_stay_uneven(clients, labels, alpha):
    """What `flwr-datasets` gives up: nearly all examples of a label stay with a few clients, and a
    client that was short holds examples of one label."""
    names = [f"l{i % labels}" for i in range(40 * clients)]
    parts = dirichlet(names, clients, alpha, 2, 0).parts
    assert min(map(len, parts)) >= 2
    shares = [max(Counter(names[i] for i in part).values()) / len(part) for part in parts]
    even = [
        max(Counter(names[i] for i in part).values()) / 40 for part in iid(len(names), clients, 0)
    ]
    assert np.mean(shares) > 2 * np.mean(even) or np.mean(shares) > 0.9


def test_completing_moves_no_more_than_what_is_missing():
    """The clients that had enough before keep what they had, but for what the others lack."""
    labels = np.repeat([0, 1, 2], [50, 30, 20])
    owner = np.repeat([0, 1, 2], [50, 30, 20])
    before, sizes = owner.copy(), np.bincount(owner, minlength=12).tolist()
    _complete(owner, labels, sizes, 3, np.random.default_rng(0))
    assert (owner != before).sum() == 9 * 3
    assert np.bincount(owner, minlength=12).tolist() == sizes
    assert all(len(set(labels[owner == k])) == 1 for k in range(12))


@LAW
@given(
    counts=st.lists(st.integers(1, 60), min_size=1, max_size=6),
    clients=st.integers(1, 12),
    alpha=st.sampled_from([1e12, 1.7e308]),
)
def test_in_the_limit_of_large_alpha_all_clients_have_the_labels_frequencies(
    counts, clients, alpha
):
    labels = [f"l{y}" for y, n in enumerate(counts) for _ in range(n)]
    if clients > len(labels):
        return
    short = max(0, clients - min(counts))  # those may be short, and the others give
    for part in dirichlet(labels, clients, alpha, 1, 0).parts:
        held = Counter(labels[i] for i in part)
        for y, n in enumerate(counts):
            assert abs(held[f"l{y}"] - n / clients) <= 1 + short


@pytest.mark.parametrize(
    "divide", [lambda: iid(3, 4, 0), lambda: dirichlet(["a"] * 3, 4, 1.0, 1, 0)]
)
def test_more_clients_than_records_are_refused(divide):
    with pytest.raises(ConfigError, match=r"data\.clients=4 is more than the 3 records"):
        divide()


def test_more_clients_than_the_records_suffice_for_are_refused():
    with pytest.raises(ConfigError, match=r"needs 12 records, and there are 10"):
        dirichlet(["a", "b"] * 5, 4, 1.0, 3, 0)


@pytest.mark.parametrize(
    "divide",
    [
        lambda n: natural([f"c{i % (n // 2)}" for i in range(n)]),
        lambda n: iid(n, n // 2, 0),
        lambda n: dirichlet([f"l{i % 3}" for i in range(n)], n // 2, 0.1, 1, 0),
    ],
)
def test_dividing_over_many_clients_is_linear_in_calls(divide):
    """A population of 100,000 clients starts: no table, scan or sort for each of them."""

    def calls(n):
        count = 0

        def on_event(frame, event, arg):
            nonlocal count
            count += event in ("call", "c_call")

        sys.setprofile(on_event)
        try:
            divide(n)
        finally:
            sys.setprofile(None)
        return count

    divide(10)  # what is imported and cached on the first call
    assert calls(4000) < 5 * calls(1000)
    assert calls(4000) < 60 * 4000


# --- by label ------------------------------------------------------------------------------------


@LAW
@given(labels=LABELS, clients=st.integers(1, 30), classes=st.integers(1, 7), seed=st.integers(0, 3))
def test_pathological_clients_hold_so_many_labels(labels, clients, classes, seed):
    """Every example once, nobody without, and all labels with nearly equally many holders."""
    labels, known = labels * 30, len(set(labels))  # no label has fewer examples than holders
    if classes > known or clients * classes < known:
        with pytest.raises(ConfigError, match=r"data\.classes_per_client="):
            pathological(labels, clients, classes, seed)
        return
    parts = pathological(labels, clients, classes, seed)
    assert sorted(chain(*parts)) == list(range(len(labels)))
    held = [{labels[i] for i in part} for part in parts]
    assert {len(own) for own in held} == {classes}
    assert parts == pathological(labels, clients, classes, seed)
    holders = Counter(chain(*held))
    assert len(holders) == known and max(holders.values()) - min(holders.values()) <= 1


@LAW
@given(groups=LABELS, clients=st.integers(1, 40), seed=st.integers(0, 3))
def test_clients_of_a_group_hold_no_other(groups, clients, seed):
    """Nobody without examples; and no client could be given to another group to better use."""
    clients = min(clients, len(groups))
    parts = by_group(groups, clients, seed)
    assert sorted(chain(*parts)) == list(range(len(groups))) and all(parts)
    held = [{groups[i] for i in part} for part in parts]
    if clients < len(set(groups)):
        assert sum(map(len, held)) == len(set(groups))
        return
    assert {len(own) for own in held} == {1}
    size, own = Counter(groups), Counter(min(h) for h in held)
    largest = max(size[g] / own[g] for g in size)
    assert all(size[g] / (own[g] - 1) >= largest for g in size if own[g] > 1)


@LAW
@given(labels=LABELS, like=LABELS, clients=st.integers(1, 9), seed=st.integers(0, 3))
def test_further_examples_follow_the_labels(labels, like, clients, seed):
    """Each once; per label within one of the exact proportion; none where the label is not."""
    parts = iid(len(like), min(clients, len(like)), seed)
    found = follow(labels, like, parts, seed, "law")
    assert sorted(chain(*found)) == list(range(len(labels)))
    assert all(part == sorted(part) for part in found)
    assert found == follow(labels, like, parts, seed, "law")
    for label, n in Counter(labels).items():
        weights = [sum(like[i] == label for i in part) for part in parts]
        if not any(weights):
            weights = [len(part) for part in parts]
        for own, weight in zip(found, weights, strict=True):
            exact = n * weight / sum(weights)
            held = sum(labels[i] == label for i in own)
            assert abs(held - exact) < 1 and (weight or not held)


def test_of_small_alpha_no_client_holds_a_bit_of_everything():
    """Rounding down gives the last client an example of nearly every label."""
    labels = [f"l{i % 77}" for i in range(8957)]
    down, nearest = (
        len({labels[i] for i in dirichlet(labels, 30, 0.05, 1, 0, nearest=n).parts[-1]})
        for n in (False, True)
    )
    assert 2 * nearest < down > 50
