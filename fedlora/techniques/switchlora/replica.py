r"""The state that a server and its clients share without sending it: bases, factors, candidate
vectors, slots.

The state follows from the seed and from one result per round, the averaged factors. Replicas that
install the same results in the same order are bitwise identical: the arithmetic is one product and
one sum per entry. A round is

    switch      server and all clients, before training
    train       clients, the factors whose turn it is
    install     server and all clients, the server's average of what was trained

`Replica` is one copy of the state; the server has one, each client another. A client that missed
rounds is sent their results, or the whole state if that is smaller (`news`).
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
"""Bytes of a scalar, where the sizes of replay and whole state are compared."""


@dataclass(frozen=True)
class Timetable:
    """Which factors are switched and trained in which round, counted from 0."""

    mode: str
    """``sync_alternate``: A in even rounds, B in odd ones; ``sync_product``: both in each."""
    switching: Switching
    steps: int
    """Optimizer steps of a client in a round."""
    rounds: int
    """Rounds of the run."""
    seed: int

    def __post_init__(self) -> None:
        one_of("mode", self.mode, (ALTERNATE, PRODUCT))
        at_least("steps", self.steps, 1)
        at_least("rounds", self.rounds, 1)

    def sides(self, round: int) -> tuple[Side, ...]:
        """The factors that are switched before a round and trained in it."""
        return SIDES if self.mode == PRODUCT else (SIDES[round % 2],)

    def count(self, layer: SwitchLayer, round: int) -> int:
        """The number of vectors of each of these factors that are switched before a round.

        Stand-alone training would switch as many in the steps until the factor's next turn. The
        upper bounds are a quarter of the slots (one if there are fewer than eight) and the number
        of candidate vectors that are in no slot. Vectors are not frozen between rounds, so the
        distance of the pointers is no bound.
        """
        # Steps until the factor's next turn: those of two rounds if the factors alternate.
        turns = 2 if self.mode == ALTERNATE else 1
        first, total = round * self.steps, self.rounds * self.steps
        mean = expected(self.switching, layer.rank, first, total, turns * self.steps)
        most = min(max(1, layer.rank // 4), layer.num_candidates - layer.rank)
        return min(draw(self.seed, layer.path, round, mean), most)


class Replica:
    """One copy of the shared state. It is changed in place; `load` copies, so that the state it
    was loaded from does not change.

    Args:
        layers: by module path; their ``weight`` is the sum of what was added to the base's weight.
        timetable: of the run.
        round: the round that is trained next; its switches are done already.
        exchanged: the number of vectors that have been switched so far.
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
        """End a round with its result, and switch vectors for the next round.

        Args:
            result: ``<path>/a [r, d_in]`` or ``<path>/b [d_out, r]``, the averages of what was
                trained; under ``sync_product`` also ``<path>/left [d_out, q]`` and
                ``<path>/right [q, d_in]``, or their product ``<path>/rest``.
        """
        for path, layer in self.layers.items():
            # The averaged factors replace the layer's own. The product of averages is not the
            # average of products; the rest [d_out, d_in] of that, if sent, moves the base.
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
        """Named tensors, from which `load` builds an equal replica."""
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
        # Each layer from copies of its own tensors, with the prefix of its path removed.
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
        """SHA-256 of the state: equal if and only if two replicas are bitwise identical."""
        return state_hash(self.state())

    def take(self, news: "News") -> "Replica":
        """The replica after the rounds it missed. Use the returned one, not this one."""
        if news.whole is not None:
            alpha = next(layer.scale * layer.rank for layer in self.layers.values())
            return Replica.load(news.whole, alpha, self.timetable)
        for result in news.results:
            self.install(result)
        return self


def _put(layer: SwitchLayer, side: Side, new: Tensor) -> None:
    """Install a factor ``[r, d_in]`` or ``[d_out, r]``; a wider type widens the layer."""
    # All tensors of a layer have one type: convert the weight, both factors and the candidates.
    if torch.promote_types(new.dtype, layer.weight.dtype) != layer.weight.dtype:
        layer.weight, layer.a, layer.b = (t.to(new.dtype) for t in (layer.weight, layer.a, layer.b))
        layer.candidates = {s: pool.to(new.dtype) for s, pool in layer.candidates.items()}
    getattr(layer, side).copy_(new)


def residual(result: Mapping[str, Tensor]) -> Tensor | None:
    """One layer's ``rest [d_out, d_in]``: as sent, or ``left right`` as a sum of outer products in
    a fixed order; None: there is none."""
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
    """What is sent to bring a replica up to date."""

    results: tuple[Mapping[str, Tensor], ...] = ()
    """Results of the rounds it missed, in order."""
    whole: State | None = None
    """The whole state; None: the results are sent."""

    def tensors(self) -> Iterator[Tensor]:
        """All tensors that are sent."""
        if self.whole is not None:
            yield from self.whole.values()
        for result in self.results:
            yield from result.values()

    def bytes(self, width: int) -> int:
        """The bytes that are sent, with ``width`` bytes for each floating-point scalar."""
        return sum(_bytes(t, width) for t in self.tensors())


def _bytes(t: Tensor, width: int) -> int:
    return t.numel() * (width if t.is_floating_point() else t.element_size())


def shared(state: State) -> dict[str, Tensor]:
    """The part of a server's state that a replica is made of."""
    own = ("round", "exchanged")
    return {k: t for k, t in state.items() if k in own or k.startswith(LAYER)}


def history(state: State) -> dict[int, dict[str, Tensor]]:
    """The results that a server keeps under ``history/``: round -> its result."""
    found: dict[int, dict[str, Tensor]] = {}
    for key, t in state.items():
        if key.startswith(HISTORY):
            round, name = key[len(HISTORY) :].split("/", 1)
            found.setdefault(int(round), {})[name] = t
    return found


def news(state: State, known: int) -> News:
    """What is sent to a replica that knows the results of the first rounds, so that it equals the
    server's.

    Args:
        state: of the server, with the results of past rounds under ``history/``.
        known: the number of results that the replica knows; 0: it has only the seed.
    """
    # The results of the missed rounds, or the whole state if that is smaller.
    past = history(state)
    missed = [past.get(t, {}) for t in range(known, int(state["round"]))]
    whole = News(whole=shared(state))
    if not all(missed):
        return whole  # a result is not kept any more, because the whole state is smaller
    replay = News(results=tuple(missed))
    return replay if replay.bytes(FLOAT) <= whole.bytes(FLOAT) else whole


def extend_history(state: State, round: int, result: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``history/`` with one more round, without results that would not be sent to any client.

    Results are kept from the newest backwards while all of them together are no larger than the
    whole state, which would be sent instead.
    """
    rounds = history(state) | {round: dict(result)}
    budget = News(whole=shared(state)).bytes(FLOAT)
    found: dict[str, Tensor] = {}
    for t in sorted(rounds, reverse=True):
        budget -= News(results=(rounds[t],)).bytes(FLOAT)
        if budget < 0:
            break
        found |= prefixed(rounds[t], f"{HISTORY}{t}/")
    return found
