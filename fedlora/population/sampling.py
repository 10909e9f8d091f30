"""Who the clients are and who takes part in a round. Pure: a seed in, clients out."""

import heapq
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fedlora.core.checks import at_least, fraction
from fedlora.core.errors import ConfigError
from fedlora.core.seeding import generator
from fedlora.core.types import Client, Module
from fedlora.population.ranks import RankDistribution, Tier, module_ranks, quotas


class Shard(Protocol):
    """What the population needs to know of one client's data."""

    @property
    def id(self) -> int: ...
    @property
    def category(self) -> str: ...
    @property
    def num_train(self) -> int: ...
    def holds(self, split: str) -> tuple[int, int]:
        """How many examples of a split it has, and of how many tokens together."""

    def trains(self, loss: str) -> int:
        """How many training examples have a token with a loss (`LocalPlan.loss`)."""


@dataclass(frozen=True)
class Population:
    """Who takes part, and who is held out to measure generalisation."""

    clients: int = 0
    """How many of the data's clients exist (the first n); 0: all."""
    fraction: float = 0.05
    """Fraction of the population that trains in a round: ``max(1, floor(fraction * N))``. A product
    such as ``0.29 * 100`` counts as the whole number it means, not as the float just below."""
    per_round: int = 0
    """If positive, exactly so many instead."""
    unseen_fraction: float = 0.1
    """Fraction of the clients that never trains: ``unseen_random``."""
    unseen_categories: tuple[str, ...] = ()
    """Categories (such as tasks) whose clients never train: ``unseen_task``."""
    seed: int | None = None
    """Seed of the tiers and of ``unseen_random``; None: the run's. A study that fixes it compares
    runs of several seeds on the same clients."""

    def __post_init__(self) -> None:
        at_least("population.seed", self.seed or 0, 0)
        at_least("population.clients", self.clients, 0)
        at_least("population.per_round", self.per_round, 0)
        fraction("population.unseen_fraction", self.unseen_fraction)
        if not 0 < self.fraction <= 1:
            raise ValueError(f"population.fraction={self.fraction!r} must lie in (0, 1]")

    def drawn_by(self, seed: int) -> int:
        """The seed of its draws in a run of a seed."""
        return seed if self.seed is None else self.seed


@dataclass(frozen=True)
class Roster:
    """The population of one run."""

    clients: tuple[Client, ...]
    """``clients[i].id == i``."""
    trainable: tuple[int, ...]
    """Ids that may be sampled for training."""
    groups: Mapping[str, tuple[int, ...]]
    """Evaluation groups: ``seen`` (= trainable), ``unseen_random``, ``unseen_task``."""
    per_round: int
    shards: tuple[Shard, ...]
    """What the clients hold, ``shards[i].id == i``: tells how long they will work."""
    seed: int
    """By which tiers and held-out clients were drawn; panels are too, unless told otherwise."""

    def tier_counts(self) -> dict[str, int]:
        """Clients per tier, for logs and reports."""
        return dict(sorted(Counter(c.tier for c in self.clients).items()))

    def rank_counts(self) -> dict[str, int]:
        """Clients per label of the ranks that they hold, for records and reports."""
        return dict(Counter(c.ranks.label for c in self.clients).most_common())


def enroll(
    population: Population,
    ranks: RankDistribution,
    shards: Sequence[Shard],
    modules: Sequence[Module],
    model_parameters: int,
    seed: int,
    loss: str = "full",
    *,
    assigned: Sequence[str | None] | None = None,
) -> Roster:
    """Give every client its tier, and set apart those who never train.

    Args:
        population: the rules.
        ranks: of the tiers.
        shards: of all clients that the data has.
        modules: that carry adapters.
        model_parameters: parameters of the base model.
        seed: of the run; ``population.seed`` is used instead where it is given.
        loss: which tokens have a loss (`LocalPlan.loss`): a client that has none never trains.
        assigned: the name of each client's tier, by id, where devices decide
            (`fedlora.devices.ranks`), of at least one; None in its place: the client never trains,
            and is evaluated at the smallest ranks of those that do. None: tiers are drawn.

    Raises:
        ConfigError: if more clients are asked for than there are, a category does not exist, no
            client is left to train, or a module cannot hold a rank.
    """
    shards = members(population, shards)
    total = len(shards)
    tiers = ranks.resolve(modules, model_parameters)
    patterns = {t.name: module_ranks(t, modules, clamp=ranks.clamp) for t in tiers}
    drawn_by = population.drawn_by(seed)
    names = assigned or _assign(tiers, total, ranks.quotas, drawn_by)
    smallest = next(t.name for t in tiers if t.name in names)
    clients = tuple(
        Client(s.id, patterns[smallest if name is None else name], s.num_train, name or "")
        for s, name in zip(shards, names, strict=True)
    )
    task, unseen = held_out(population, shards, seed)
    apart = task | unseen
    trainable = tuple(
        s.id
        for s, name in zip(shards, names, strict=True)
        if s.id not in apart and s.trains(loss) and name is not None
    )
    if not trainable:
        raise ConfigError(
            f"no client is left to train: of {total}, {len(task)} are held out by category, "
            f"{len(unseen)} by population.unseen_fraction={population.unseen_fraction}, and the "
            f"others hold no training example with a token that has a loss (client.loss={loss})"
            f"{' or have a device that cannot train' if assigned else ''}"
        )
    wanted = population.per_round or max(1, math.floor(population.fraction * total + 1e-9))
    if wanted > len(trainable) and population.per_round:
        raise ConfigError(
            f"population.per_round={wanted} must be at most {len(trainable)}: of the {total} "
            f"clients, {len(apart)} are held out (population.unseen_fraction and "
            f"population.unseen_categories) and {total - len(apart) - len(trainable)} others have "
            "nothing to train on"
        )
    groups = {
        "seen": trainable,
        "unseen_random": tuple(sorted(unseen)),
        "unseen_task": tuple(sorted(task)),
    }
    per_round = min(wanted, len(trainable))
    return Roster(clients, trainable, groups, per_round, tuple(shards), drawn_by)


def members(population: Population, shards: Sequence[Shard]) -> Sequence[Shard]:
    """The data's clients that exist for a population.

    Raises:
        ConfigError: if it asks for more than the data has.
    """
    total = population.clients or len(shards)
    if total > len(shards):
        raise ConfigError(
            f"population.clients={total} must be at most {len(shards)}, the clients that the data "
            "has, or 0 for all of them"
        )
    return shards[:total]


def held_out(
    population: Population, shards: Sequence[Shard], seed: int
) -> tuple[set[int], set[int]]:
    """Ids of those who never train: by category, and drawn at random from those who can be
    evaluated, which hold examples of the eval or the test split (where no client does, from all).

    Args:
        population: the rules.
        shards: of its `members`.
        seed: of the run; ``population.seed`` is used instead where it is given.

    Raises:
        ConfigError: for a category that does not exist.
    """
    task = _in_categories(shards, population.unseen_categories)
    others = [s for s in shards if s.id not in task]
    judged = [s.id for s in others if s.holds("test")[0] or s.holds("eval")[0]]
    rest = judged or [s.id for s in others]
    held = round(population.unseen_fraction * len(shards))
    random = generator(population.drawn_by(seed), "unseen")
    drawn = random.choice(len(rest), min(held, len(rest)), replace=False)
    return task, {rest[i] for i in drawn.tolist()}


def _assign(tiers: Sequence[Tier], total: int, how: str, seed: int) -> Sequence[str | None]:
    names, fractions = [t.name for t in tiers], [t.fraction for t in tiers]
    rng = generator(seed, "tiers")
    if how == "iid":
        drawn = rng.choice(len(names), total, p=np.asarray(fractions) / sum(fractions))
    else:
        drawn = rng.permutation(np.repeat(np.arange(len(names)), quotas(fractions, total)))
    return [names[i] for i in drawn]


def _in_categories(shards: Sequence[Shard], categories: Sequence[str]) -> set[int]:
    """Clients whose category is one of these, running numbers such as ``" 12.json"`` ignored."""

    def group(category: str) -> str:
        head, _, tail = category.rpartition(" ")
        return head if head and tail.removesuffix(".json").isdigit() else category

    present = {group(s.category) for s in shards}
    missing = sorted(set(categories) - present)
    if missing:
        raise ConfigError(
            f"population.unseen_categories: {missing} are not in the data; "
            f"it has {sorted(present)[:12]}{' ...' if len(present) > 12 else ''}"
        )
    return {s.id for s in shards if group(s.category) in set(categories)}


def cohort(
    roster: Roster,
    seed: int,
    round: int,
    *,
    among: Sequence[int] | None = None,
    count: int | None = None,
) -> list[Client]:
    """The clients of one round, uniformly without replacement: a function of the arguments.

    Args:
        roster: the population.
        seed: of the run.
        round: of the draw, counted from 1.
        among: ids from which they are drawn; None: all that can train.
        count: how many, at most as many as there are; None: as many as a round needs.
    """
    rng = generator(seed, "cohort", round)
    ids = roster.trainable if among is None else among
    chosen = rng.choice(len(ids), roster.per_round if count is None else count, replace=False)
    return [roster.clients[ids[i]] for i in sorted(chosen)]


def poisson(roster: Roster, seed: int, round: int, rate: float, groups: int = 1) -> list[Client]:
    """The clients of one round, each by itself with a probability; perhaps none. A function of
    (seed, round).

    Args:
        roster: the population.
        seed: of the run.
        round: counted from 1.
        rate: the probability with which a client that may take part does.
        groups: into which clients are dealt once; they may take part by turns.
    """
    total = len(roster.trainable)
    taken = generator(seed, "poisson", round).random(total) < rate
    if groups > 1:
        group = generator(seed, "poisson_groups").permutation(total) % groups
        taken &= group == (round - 1) % groups
    return [roster.clients[roster.trainable[i]] for i in np.flatnonzero(taken)]


def outside(others: int, rate: float, least: int, most: int) -> float:
    """A bound of the probability that one client decides whether a sampled cohort has from
    ``least`` to ``most`` clients: without it, fewer than ``least`` or at least ``most`` are drawn.

    Args:
        others: clients that are drawn, each by itself.
        rate: the probability of each.
        least: at least 1.
        most: above ``rate * others``, or the bound is 1.
    """
    few = range(min(least, others + 1))
    low = math.fsum(math.comb(others, j) * rate**j * (1 - rate) ** (others - j) for j in few)
    if most > others:
        return low
    a = most / others
    if a <= rate:
        return 1.0
    rest = (1 - a) * math.log((1 - a) / (1 - rate)) if a < 1 else 0.0
    return low + math.exp(-others * (a * math.log(a / rate) + rest))  # Chernoff's bound


def panel(roster: Roster, group: str, size: int, seed: int, split: str) -> list[Client]:
    """A fixed evaluation cohort of one group, by id.

    Args:
        roster: the population.
        group: a key of ``roster.groups``.
        size: how many clients; 0: all that can be evaluated.
        seed: of the draw.
        split: whose examples are measured; clients without any are not drawn.

    Raises:
        ValueError: for an unknown group.
    """
    if group not in roster.groups:
        raise ValueError(f"evaluation group {group!r} is not one of {sorted(roster.groups)}")
    ids = tuple(i for i in roster.groups[group] if roster.shards[i].holds(split)[0])
    if 0 < size < len(ids):
        chosen = generator(seed, "panel", sorted(roster.groups).index(group)).choice(
            len(ids), size, replace=False
        )
        ids = tuple(ids[i] for i in sorted(chosen))
    return [roster.clients[i] for i in ids]


def deal(weights: Sequence[float], hands: int, most: int = 0) -> list[list[int]]:
    """Deal indices over ``hands`` so that sums are even: longest processing time first.

    Empty hands are dropped; within a hand indices ascend.

    Args:
        weights: of what is dealt, none negative.
        hands: at most so many, unless they cannot hold everything.
        most: how many indices a hand can hold; 0: any number.
    """
    hands = max(1, hands, math.ceil(len(weights) / most) if most else 0)
    dealt: list[list[int]] = [[] for _ in range(hands)]
    open_hands = [(0.0, 0, h) for h in range(hands)]  # load, size, hand: a heap, lightest first
    for i in sorted(range(len(weights)), key=lambda i: (-weights[i], i)):
        load, size, h = heapq.heappop(open_hands)
        dealt[h].append(i)
        if size + 1 != most:
            heapq.heappush(open_hands, (load + weights[i], size + 1, h))
    return [sorted(hand) for hand in dealt if hand]
