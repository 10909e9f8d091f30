"""How examples are divided over clients. Each function returns the members of every client.

`natural`, `iid` and `dirichlet` divide as the partitioners of `flwr-datasets` of these names do, so
a federation here is the one that other Flower projects get from the same data and seed. They are
written in NumPy because those build a table per client: seconds for a few thousand clients.
"""

import heapq
from collections.abc import Mapping, Sequence, Sized
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedlora.core.errors import ConfigError
from fedlora.core.seeding import generator

Indices: TypeAlias = NDArray[np.int64]

DRAWS = 11
"""How often `dirichlet` draws before it moves examples, as in `flwr-datasets`."""
EVEN = 1e15
"""A larger alpha is drawn as this one: fractions are equal to seven digits, and sums overflow near
the largest float."""


class Division(NamedTuple):
    """Examples divided over clients."""

    parts: list[list[int]]
    """The examples of each client."""
    moved: frozenset[int] = frozenset()
    """Those that a client was given only so that it has examples enough."""


def natural(labels: Sequence[str]) -> list[list[int]]:
    """One client per distinct label, in the order of the labels."""
    members: dict[str, list[int]] = {}
    for i, label in enumerate(labels):
        members.setdefault(label, []).append(i)
    return [members[label] for label in sorted(members)]


def iid(count: int, clients: int, seed: int) -> list[list[int]]:
    """`count` examples in random order, cut into `clients` parts; sizes differ by at most one.

    Raises:
        ConfigError: if there are more clients than examples.
    """
    enough(count, clients, "records")
    order = np.random.default_rng(seed).permutation(count)
    return [part.tolist() for part in np.array_split(order, clients)]


def dirichlet(
    labels: Sequence[str],
    clients: int,
    alpha: float,
    min_examples: int,
    seed: int,
    *,
    nearest: bool = False,
) -> Division:
    """Each client's fraction of every label is drawn from Dir(`alpha`).

    A draw in which some client has less than `min_examples` is drawn again. For small `alpha` no
    draw may do: with ``alpha=0.1`` three labels go to a handful of twenty clients. The last of
    `DRAWS` draws is then completed (`_complete`), which changes it as little as possible: exactly
    the missing examples move, and no other client falls below `min_examples`. The clients that
    were short end at `min_examples`, mostly of one label, and the sizes stay as uneven as
    otherwise drawn.

    Args:
        labels: one per example.
        clients: how many there are.
        alpha: small is uneven; the larger, the nearer every client is to the labels' frequencies.
        min_examples: of each client.
        seed: of the draws.
        nearest: round fractions of a label to the nearest example. `flwr-datasets` rounds down, so
            that the last client gets the rest: an example of nearly every label, however small
            `alpha` is.

    Raises:
        ConfigError: if there are too few examples to give every client `min_examples`.
    """
    enough(len(labels), clients, "records")
    if clients * min_examples > len(labels):
        raise ConfigError(
            f"data.min_examples={min_examples} for each of data.clients={clients} needs "
            f"{clients * min_examples} records, and there are {len(labels)}: lower one of the two"
        )
    names, of = np.unique(np.array(labels), return_inverse=True)
    rng = np.random.default_rng(seed)
    moved: list[int] = []
    for _ in range(DRAWS):
        owner = _draw(of, len(names), clients, alpha, rng, nearest)
        sizes = np.bincount(owner, minlength=clients)
        if sizes.min() >= min_examples:
            break
    else:
        moved = _complete(owner, of, sizes.tolist(), min_examples, rng)
    order = np.lexsort((of, owner))  # by client, then label, then place in the data
    ends = np.cumsum(np.bincount(owner, minlength=clients))[:-1]
    parts = [part.tolist() for part in np.split(order, ends)]
    for part in parts:
        rng.shuffle(part)
    return Division(parts, frozenset(moved))


def _draw(
    labels: Indices,
    count: int,
    clients: int,
    alpha: float,
    rng: np.random.Generator,
    nearest: bool,
) -> Indices:
    """The client of every example: each label's examples are cut, in the order of the data, at the
    running sums of one draw from Dir(alpha).

    Args:
        labels: ``[examples]``, from 0 to ``count - 1``.
        count: of labels.
        clients: how many there are.
        alpha: the same for every client.
        rng: draws the fractions.
        nearest: cut at the nearest example, not at the one before.
    """
    owner = np.empty_like(labels)
    for label in range(count):
        (members,) = np.nonzero(labels == label)
        fractions = np.cumsum(rng.dirichlet(np.full(clients, min(alpha, EVEN))))
        ends = fractions[:-1] * len(members)
        cuts = (np.rint(ends) if nearest else ends).astype(np.int64)
        owner[members] = np.searchsorted(cuts, np.arange(len(members)), side="right")
    return owner


def _complete(
    owner: Indices, labels: Indices, sizes: list[int], least: int, rng: np.random.Generator
) -> list[int]:
    """Give examples to clients that hold less than ``least``, and return which.

    Such a client takes what it lacks one by one: of the label of which it holds most (without any,
    of a random one, by the labels' frequencies), from the client that then holds most of that
    label; of the next label when no client can spare any more of it.

    Args:
        owner: ``[examples]``, the client of each; changed in place.
        labels: ``[examples]``, from 0.
        sizes: examples by client; changed in place.
        least: what every client shall hold.
        rng: draws the order of labels.
    """
    frequency = np.bincount(labels)
    held: list[dict[int, list[int]]] = [{} for _ in sizes]
    for i, (k, y) in enumerate(zip(owner.tolist(), labels.tolist(), strict=True)):
        held[k].setdefault(y, []).append(i)
    givers: list[list[tuple[int, int]]] = [[] for _ in frequency]  # heaps of (-examples, client)
    for k, own in enumerate(held):
        for y, members in own.items():
            heapq.heappush(givers[y], (-len(members), k))
    moved: list[int] = []
    for k in [k for k, size in enumerate(sizes) if size < least]:
        own_counts = [len(held[k].get(y, ())) for y in range(len(frequency))]
        tie = rng.exponential(size=len(frequency)) / frequency
        order = iter(np.lexsort((tie, -np.array(own_counts))).tolist())
        y = next(order)
        while sizes[k] < least:
            while (source := _giver(givers[y], held, y, sizes, least)) is None:
                y = next(order)
            moved.append(held[source][y].pop())
            owner[moved[-1]] = k
            sizes[k], sizes[source] = sizes[k] + 1, sizes[source] - 1
            heapq.heappush(givers[y], (-len(held[source][y]), source))
    return moved


def _giver(
    heap: list[tuple[int, int]],
    held: Sequence[Mapping[int, Sized]],
    label: int,
    sizes: Sequence[int],
    least: int,
) -> int | None:
    """The client that holds most of a label among those with more than ``least`` examples; None:
    there is none. Entries that are out of date are dropped."""
    while heap:
        count, k = heap[0]
        if sizes[k] > least and 0 < -count == len(held[k][label]):
            return k
        heapq.heappop(heap)
    return None


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


def pathological(
    labels: Sequence[str], clients: int, classes_per_client: int, seed: int
) -> list[list[int]]:
    """Each client holds examples of ``classes_per_client`` labels and of no other.

    Clients choose one after another, at random among the labels chosen least so far, so that every
    label has nearly equally many holders; its examples are divided evenly over them.

    Raises:
        ConfigError: if there are fewer labels, if some would be on no client, or if a label has
            fewer examples than holders and one of them holds nothing else.
    """
    names, of = np.unique(np.array(labels), return_inverse=True)
    if not 1 <= classes_per_client <= len(names):
        raise ConfigError(
            f"data.classes_per_client={classes_per_client} must lie between 1 and the "
            f"{len(names)} labels of the data"
        )
    if clients * classes_per_client < len(names):
        raise ConfigError(
            f"data.clients={clients} with data.classes_per_client={classes_per_client} can hold "
            f"{clients * classes_per_client} of the {len(names)} labels: raise one of the two"
        )
    rng = generator(seed, "pathological")
    holders: list[list[int]] = [[] for _ in names]
    for k in range(clients):
        rank = np.lexsort((rng.random(len(names)), np.array([len(h) for h in holders])))
        for y in rank[:classes_per_client].tolist():
            holders[y].append(k)
    parts: list[list[int]] = [[] for _ in range(clients)]
    for y, own in enumerate(holders):
        members = rng.permutation(np.flatnonzero(of == y))
        order = rng.permutation(own).tolist()
        for k, part in zip(order, np.array_split(members, len(order)), strict=True):
            parts[k] += part.tolist()
    if not all(parts):
        raise ConfigError(
            f"data.clients={clients} with data.classes_per_client={classes_per_client} leaves "
            f"client {parts.index([])} without examples: its labels have too few; lower "
            "data.clients or raise data.classes_per_client"
        )
    return parts


def by_group(groups: Sequence[str], clients: int, seed: int) -> list[list[int]]:
    """Each client holds examples of one group, a random part of them; with fewer clients than
    groups, each holds whole groups.

    Clients are given to groups one by one, to the one whose clients are the largest so far.

    Raises:
        ConfigError: if there are more clients than examples.
    """
    enough(len(groups), clients, "records")
    members = natural(groups)
    if clients <= len(members):
        parts = balanced([len(m) for m in members], clients, seed, "groups")
        return [[i for group in part for i in members[group]] for part in parts]
    queue = [(-float(len(m)), y, 1) for y, m in enumerate(members)]  # (-mean size, group, parts)
    heapq.heapify(queue)
    for _ in range(clients - len(members)):
        _, y, n = queue[0]
        heapq.heapreplace(queue, (-len(members[y]) / (n + 1), y, n + 1))
    rng = generator(seed, "groups")
    return [
        part.tolist()
        for _, y, n in sorted(queue, key=lambda entry: entry[1])
        for part in np.array_split(rng.permutation(members[y]), n)
    ]


def follow(
    labels: Sequence[str],
    like: Sequence[str],
    parts: Sequence[Sequence[int]],
    seed: int,
    purpose: str,
) -> list[list[int]]:
    """Divide further examples, so that each client's labels are in the proportions that it has.

    The examples of a label go to clients in proportion to how many of ``like`` with that label each
    holds, rounded to whole ones by largest remainders; of a label that no client holds, in
    proportion to all that they hold.

    Args:
        labels: of the examples to divide.
        like: labels of those that are divided already.
        parts: positions in ``like``, by client.
        seed: draws which example goes where, and equal remainders.
        purpose: keeps draws of one seed apart, as in `fedlora.core.seeding.generator`.

    Returns:
        Positions in ``labels`` by client, ascending.
    """
    sizes = np.array([len(part) for part in parts])
    weights = {label: np.zeros(len(parts), dtype=np.int64) for label in set(like)}
    for k, part in enumerate(parts):
        for i in part:
            weights[like[i]][k] += 1
    rng = generator(seed, purpose)
    divided: list[list[int]] = [[] for _ in parts]
    for members in natural(labels):
        weight = weights.get(labels[members[0]], sizes)
        counts, rest = np.divmod(weight * len(members), weight.sum())
        left = len(members) - int(counts.sum())
        counts[np.lexsort((rng.random(len(parts)), -rest))[:left]] += 1
        ends = np.cumsum(counts)[:-1]
        for own, given in zip(divided, np.split(rng.permutation(members), ends), strict=True):
            own += given.tolist()
    return [sorted(own) for own in divided]


def enough(count: int, clients: int, what: str) -> None:
    """Refuse more clients than there are things to give them."""
    if clients > count:
        raise ConfigError(f"data.clients={clients} is more than the {count} {what} of the data")
