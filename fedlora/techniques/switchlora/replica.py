r"""What a server and its clients hold alike without sending it: bases, factors, pools, slots.

All of it follows from the seed and from one result per round, the averaged factors. Whoever
installs the same results in the same order holds the same bits: the arithmetic is one product and
one sum per number. A round is

    exchange    by everybody, before training
    train       clients, the factors whose turn it is
    install     by everybody, what the server made of what was trained

`Replica` is that machine; the server's state is one, a client's another. Who missed rounds is sent
their results, or the whole state where that is less (`news`).
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.algebra.state import (
    State,
    integers,
    order,
    paths,
    prefixed,
    under,
)
from fedlora.core.checks import at_least, one_of
from fedlora.run.checkpoint import state_hash
from fedlora.techniques.switchlora.init import SIDES, Side
from fedlora.techniques.switchlora.layer import (
    SwitchLayer,
    begin,
    outer_sum,
)
from fedlora.techniques.switchlora.schedule import Switching, draw, expected

LAYER, HISTORY = "layer/", "history/"
ALTERNATE, PRODUCT = "sync_alternate", "sync_product"
DIGEST_BYTES = hashlib.sha256().digest_size
FLOAT = 4
"""Bytes of a number, where replay and whole state are compared."""


@dataclass(frozen=True)
class Timetable:
    """Which factors are exchanged and trained in which round, counted from 0."""

    mode: str
    """``sync_alternate``: A in even rounds, B in odd ones; ``sync_product``: both in each."""
    switching: Switching
    steps: int
    """Of a client in a round."""
    rounds: int
    """Of the run."""
    seed: int

    def __post_init__(self) -> None:
        one_of("mode", self.mode, (ALTERNATE, PRODUCT))
        at_least("steps", self.steps, 1)
        at_least("rounds", self.rounds, 1)

    def sides(self, round: int) -> tuple[Side, ...]:
        """The factors that are exchanged before a round and trained in it."""
        return SIDES if self.mode == PRODUCT else (SIDES[round % 2],)

    def count(self, layer: SwitchLayer, round: int) -> int:
        """How many vectors of each of these factors are exchanged before a round.

        As many as stand-alone training exchanges in the steps until the factor's next turn, but at
        most a quarter of the slots (one, of fewer than eight) and as many as are in no slot. Nobody
        is frozen between rounds, so the pointers' distance is no bound.
        """
        turns = 2 if self.mode == ALTERNATE else 1
        first, total = round * self.steps, self.rounds * self.steps
        mean = expected(self.switching, layer.rank, first, total, turns * self.steps)
        most = min(max(1, layer.rank // 4), layer.num_candidates - layer.rank)
        return min(draw(self.seed, layer.path, round, mean), most)


class Replica:
    """One copy of the shared state. Changed in place; `load` copies, so states stay what they are.

    Args:
        layers: by module path; their ``weight`` is what was added to the base's.
        timetable: of the run.
        round: the one to be trained next, for which everything is exchanged already.
        exchanged: vectors so far.
    """

    def __init__(
        self,
        layers: Mapping[str, SwitchLayer],
        timetable: Timetable,
        round: int,
        exchanged: int = 0,
    ) -> None:
        self.layers, self.timetable = dict(layers), timetable
        self.round, self.exchanged = round, exchanged

    @staticmethod
    def begin(
        shapes: Mapping[str, tuple[int, int]],
        ranks: Mapping[str, int],
        alpha: float,
        timetable: Timetable,
    ) -> "Replica":
        """The state before round 0, from the seed alone.

        Args:
            shapes: module path -> ``(d_out, d_in)``.
            ranks: module path -> slots.
            alpha: the scale is ``alpha / rank``.
            timetable: of the run.

        Raises:
            ValueError: for a rank that cannot switch.
        """
        layers = {}
        for path, (d_out, d_in) in shapes.items():
            weight = torch.zeros(d_out, d_in)
            a, b = torch.empty(ranks[path], d_in), torch.empty(d_out, ranks[path])
            layers[path] = begin(path, weight, a, b, alpha=alpha, seed=timetable.seed)
        made = Replica(layers, timetable, 0)
        made._switch()
        return made

    def install(self, result: Mapping[str, Tensor]) -> None:
        """End a round with what came of it, and exchange for the next.

        Args:
            result: ``<path>/a [r, d_in]`` or ``<path>/b [d_out, r]``, the averages of what was
                trained; of ``sync_product`` also ``<path>/left [d_out, q]`` and
                ``<path>/right [q, d_in]``, or their product ``<path>/rest``.
        """
        for path, layer in self.layers.items():
            for side in self.timetable.sides(self.round):
                _put(layer, side, result[f"{path}/{side}"])
            rest = residual(under(result, f"{path}/"))
            if rest is not None:
                layer.weight.add_(rest.to(layer.weight.dtype))
        self.round += 1
        self._switch()

    def _switch(self) -> None:
        timetable = self.timetable
        for layer in self.layers.values():
            count = timetable.count(layer, self.round)
            for side in timetable.sides(self.round):
                incoming = layer.choose(
                    side, count, timetable.switching.choice, timetable.seed, self.round
                )
                layer.switch(side, incoming, ordered=True)
                self.exchanged += count

    def state(self) -> dict[str, Tensor]:
        """Named tensors, from which `load` makes the same again."""
        whole = {
            "round": integers(self.round),
            "exchanged": integers(self.exchanged),
            f"{LAYER}order": order(self.layers),
        }
        for path, layer in self.layers.items():
            mine = {k: t for k, t in layer.state().items() if not k.startswith("frozen_")}
            whole |= prefixed(mine, f"{LAYER}{path}/")
        return whole

    @staticmethod
    def load(state: State, alpha: float, timetable: Timetable) -> "Replica":
        """The inverse of `state`."""
        layers = {}
        for path in paths(state, "weight", LAYER):
            mine = {k: t.clone() for k, t in under(state, f"{LAYER}{path}/").items()}
            pointers = mine["pointers"].tolist()
            layers[path] = SwitchLayer(
                path=path,
                weight=mine["weight"],
                a=mine["a"],
                b=mine["b"],
                scale=alpha / mine["a"].shape[0],
                candidates={side: mine[f"pool_{side}"] for side in SIDES},
                ids={side: mine[f"ids_{side}"].tolist() for side in SIDES},
                pointers=dict(zip(SIDES, pointers, strict=True)),
            )
        return Replica(layers, timetable, int(state["round"]), int(state["exchanged"]))

    def digest(self) -> str:
        """SHA-256 of everything: equal if and only if two replicas hold the same bits."""
        return state_hash(self.state())

    def take(self, news: "News") -> "Replica":
        """The replica after what it missed; this one is not to be used further."""
        if news.whole is not None:
            alpha = next(layer.scale * layer.rank for layer in self.layers.values())
            return Replica.load(news.whole, alpha, self.timetable)
        for result in news.results:
            self.install(result)
        return self


def _put(layer: SwitchLayer, side: Side, new: Tensor) -> None:
    """Install a factor; a wider type widens the layer."""
    if torch.promote_types(new.dtype, layer.weight.dtype) != layer.weight.dtype:
        layer.weight, layer.a, layer.b = (t.to(new.dtype) for t in (layer.weight, layer.a, layer.b))
        layer.candidates = {s: pool.to(new.dtype) for s, pool in layer.candidates.items()}
    getattr(layer, side).copy_(new)


def residual(result: Mapping[str, Tensor]) -> Tensor | None:
    """One layer's ``rest``, or ``left right`` as a sum of outer products in a fixed order."""
    if "rest" in result:
        return result["rest"]
    if "left" not in result:
        return None
    left, right = result["left"], result["right"]
    total = torch.zeros(left.shape[0], right.shape[1], dtype=left.dtype)
    outer_sum(total, left, right)
    return total


@dataclass(frozen=True)
class News:
    """What brings a replica up to date."""

    results: tuple[Mapping[str, Tensor], ...] = ()
    """Of the rounds it missed, in order."""
    whole: State | None = None
    """Or the whole state."""

    def tensors(self) -> Iterator[Tensor]:
        """What travels."""
        if self.whole is not None:
            yield from self.whole.values()
        for result in self.results:
            yield from result.values()

    def bytes(self, width: int) -> int:
        """How many bytes travel, with so many for each number that is not whole."""
        return sum(_bytes(t, width) for t in self.tensors())


def _bytes(t: Tensor, width: int) -> int:
    return t.numel() * (width if t.is_floating_point() else t.element_size())


def shared(state: State) -> dict[str, Tensor]:
    """The part of a server's state that a replica is made of."""
    own = ("round", "exchanged")
    return {k: t for k, t in state.items() if k in own or k.startswith(LAYER)}


def history(state: State) -> dict[int, dict[str, Tensor]]:
    """What a server remembers under ``history/``: round -> its result."""
    found: dict[int, dict[str, Tensor]] = {}
    for key, t in state.items():
        if key.startswith(HISTORY):
            round, name = key[len(HISTORY) :].split("/", 1)
            found.setdefault(int(round), {})[name] = t
    return found


def news(state: State, known: int) -> News:
    """What a replica that knows the results of the first rounds is sent to be where the server is.

    Args:
        state: of the server, with what it remembers of past rounds under ``history/``.
        known: how many results it knows; 0: those who have the seed know as much.
    """
    past = history(state)
    missed = [past.get(t, {}) for t in range(known, int(state["round"]))]
    whole = News(whole=shared(state))
    if not all(missed):
        return whole  # longer ago than the server remembers, because this is less
    replay = News(results=tuple(missed))
    return replay if replay.bytes(FLOAT) <= whole.bytes(FLOAT) else whole


def extend_history(state: State, round: int, result: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``history/`` with one more round, without what nobody would be sent any more."""
    rounds = history(state) | {round: dict(result)}
    budget = News(whole=shared(state)).bytes(FLOAT)
    found: dict[str, Tensor] = {}
    for t in sorted(rounds, reverse=True):
        budget -= News(results=(rounds[t],)).bytes(FLOAT)
        if budget < 0:
            break
        found |= prefixed(rounds[t], f"{HISTORY}{t}/")
    return found
