"""How examples are divided over clients.

The first three are the partitioners of `flwr-datasets`, so a federation here is the one that other
Flower projects get from the same data and seed. Each function returns the members of every client.
"""

import contextlib
import heapq
import io
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from fedlora.core.errors import DataError
from fedlora.core.seeding import generator


def natural(labels: Sequence[str]) -> list[list[int]]:
    """One client per distinct label, in the order of the labels."""
    from flwr_datasets.partitioner import NaturalIdPartitioner

    return _parts(_table(labels), NaturalIdPartitioner(partition_by="label"))


def iid(count: int, clients: int, seed: int) -> list[list[int]]:
    """`count` examples in random order, cut into `clients` parts; sizes differ by at most one.

    Raises:
        DataError: if there are more clients than examples.
    """
    from flwr_datasets.partitioner import IidPartitioner

    enough(count, clients, "records")
    table = _table([""] * count).shuffle(seed=seed)  # the partitioner cuts in order
    return _parts(table, IidPartitioner(num_partitions=clients))


def dirichlet(
    labels: Sequence[str], clients: int, alpha: float, min_examples: int, seed: int
) -> list[list[int]]:
    """Each client's fraction of every label is drawn from Dir(`alpha`).

    Raises:
        DataError: if there are more clients than examples, or if in ten draws some client always
            had less than `min_examples`.
    """
    from flwr_datasets.partitioner import DirichletPartitioner

    enough(len(labels), clients, "records")
    partitioner = DirichletPartitioner(
        num_partitions=clients,
        partition_by="label",
        alpha=alpha,
        min_partition_size=min_examples,
        seed=seed,
    )
    with _quiet():
        try:
            return _parts(_table(labels), partitioner)
        except ValueError as error:
            raise DataError(
                f"data.partition=dirichlet with clients={clients}, alpha={alpha}, "
                f"min_examples={min_examples}: {error}"
            ) from error


def balanced(sizes: Sequence[int], clients: int, seed: int, purpose: str) -> list[list[int]]:
    """Whole groups of the given sizes, so that clients become nearly equal.

    Groups go one by one to the client that holds least: a random half in random order, then the
    others, largest first, which evens out. No two clients differ by more than the largest group.
    Clients beyond the number of groups get none.

    Args:
        sizes: size of each group, at least 1.
        clients: how many there are.
        seed: seed of the draw.
        purpose: keeps draws of one seed apart, as in `fedlora.core.seeding.generator`.
    """
    order = generator(seed, purpose).permutation(len(sizes)).tolist()
    half = len(order) // 2
    order[half:] = sorted(order[half:], key=lambda i: -sizes[i])
    parts: list[list[int]] = [[] for _ in range(clients)]
    load = [(0, k) for k in range(clients)]
    for i in order:
        held, k = load[0]
        heapq.heapreplace(load, (held + sizes[i], k))
        parts[k].append(i)
    return [sorted(part) for part in parts]


def enough(count: int, clients: int, what: str) -> None:
    """Refuse more clients than there are things to give them."""
    if clients > count:
        raise DataError(f"data.clients={clients} is more than the {count} {what}")


def _table(labels: Sequence[str]) -> Any:
    import datasets

    return datasets.Dataset.from_dict({"row": list(range(len(labels))), "label": list(labels)})


def _parts(table: Any, partitioner: Any) -> list[list[int]]:
    partitioner.dataset = table
    with _quiet():
        count = partitioner.num_partitions
        return [[int(i) for i in partitioner.load_partition(k)["row"]] for k in range(count)]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the partitioners' progress bars and their warning at each new draw."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore", UserWarning)
        yield
