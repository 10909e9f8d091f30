from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.core.errors import DataError
from fedlora.data.partition import balanced, dirichlet, iid, natural

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


def test_a_partitioner_gives_every_example_to_one_client():
    pytest.importorskip("flwr_datasets")
    labels = ["b", "a", "c", "a", "b", "b", "a"] * 3
    assert natural(labels)[1] == [i for i, label in enumerate(labels) if label == "b"]
    for parts in (natural(labels), iid(21, 4, 0), dirichlet(labels, 4, 1.0, 2, 0)):
        assert sorted(chain(*parts)) == list(range(21))
    assert {len(part) for part in iid(21, 4, 0)} == {5, 6}
    assert min(len(part) for part in dirichlet(labels, 4, 1.0, 2, 0)) >= 2


@pytest.mark.parametrize(
    "divide", [lambda: iid(3, 4, 0), lambda: dirichlet(["a"] * 3, 4, 1.0, 1, 0)]
)
def test_more_clients_than_records_are_refused(divide):
    pytest.importorskip("flwr_datasets")
    with pytest.raises(DataError, match=r"data\.clients=4 is more than the 3 records"):
        divide()
