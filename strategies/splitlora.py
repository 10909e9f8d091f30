r"""SplitLoRA: clients hold the first blocks of the model and their adapters, the server the rest.

    step        client i:  z_i = blocks_{<c}(x_i)            activations and labels go up
                server:    L = Σ_i w_i L_i(blocks_{>=c}(z_i)), a step on its own adapters
                           g_i = ∂L_i/∂z_i                    goes down
                client i:  z_i.backward(g_i), a step on its adapters
    every I     the clients' adapters are averaged; the server's adapters do not change

Lin et al., "SplitLoRA: A Split Parameter-Efficient Fine-Tuning Framework for Large Language
Models", arXiv:2407.00952. Any method for whole adapters can average the clients' adapters
(`aggregator`): FedIT averages factors, as the paper does; FlexLoRA and HeteroLoRA take unequal
ranks. Unequal cuts, as in HSplitLoRA (arXiv:2505.02795): a block that some clients hold and the
server holds for the others is averaged over all who hold it. Where the authors' code and paper
differ, see docs/fidelity.md.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from itertools import pairwise

from torch import Tensor

from fedlora.algebra.init import initial_factors
from fedlora.algebra.linalg import at_rank
from fedlora.algebra.state import (
    Kept,
    State,
    integers,
    order,
    paths,
    prefixed,
    scalar,
    under,
    unpack,
)
from fedlora.algebra.summand import Summand, Summands
from fedlora.core.checks import at_least
from fedlora.core.payload import Payload
from fedlora.core.types import Adapter, Client, Factors, LocalPlan, Ranks, Setting, TrainJob, Update
from fedlora.models.stages import block_of, blocks_of
from fedlora.server.method import ClientChannel, RoundOutcome, Setup
from fedlora.split.config import SplitConfig
from fedlora.split.protocol import Cut
from fedlora.split.run_round import (
    COPIES,
    HOST,
    SERVER,
    SplitRound,
    server_state,
)
from fedlora.techniques.lora.payload import LowRankPayload
from strategies.base import LoRAStrategy

MODULES = "modules/"


@dataclass(frozen=True)
class Part:
    """Consecutive blocks that the same clients hold."""

    start: int
    stop: int
    shared: bool = False
    """Whether the server holds them too, for clients with a smaller cut."""
    home: int = 0
    """First block of the part that these blocks belong to; it names their average."""

    @property
    def prefix(self) -> str:
        """The prefix of its average in the state."""
        return f"part{self.home}/"

    def of(self, adapter: Mapping[str, Factors]) -> dict[str, Factors]:
        """The factors of an adapter that lie in these blocks."""
        return {p: f for p, f in adapter.items() if self.holds(p)}

    def ranks(self, ranks: Ranks) -> Ranks:
        """The part of a rank pattern that lies in these blocks."""
        return Ranks({p: r for p, r in ranks.items() if self.holds(p)})

    def holds(self, path: str) -> bool:
        """Whether a module lies in these blocks."""
        block = block_of(path)
        return block is not None and self.start <= block < self.stop


@dataclass(frozen=True, eq=False, kw_only=True)
class SplitLoRA(SplitConfig, LoRAStrategy):
    aggregator: LoRAStrategy
    """Averages clients' adapters."""
    cut: int = -1
    """Blocks that a client holds; -1: a quarter of them, rounded up."""
    tier_cuts: Mapping[str, int] = field(default_factory=dict)
    """Blocks held by clients of a tier, where they differ from `cut`."""
    server_rank: int = 0
    """Rank of the server's adapters; 0: the largest rank that any client holds."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("strategy.cut", self.cut, -1)
        for tier, cut in self.tier_cuts.items():
            at_least(f"strategy.tier_cuts.{tier}", cut, 0)
        at_least("strategy.server_rank", self.server_rank, 0)

    def check(self, setup: Setup) -> None:
        super().check(setup)
        plan = setup.client
        if 0 < plan.micro_batch_size < plan.batch_size:
            raise ValueError(
                f"client.micro_batch_size={plan.micro_batch_size}: a step of a split client is one "
                f"forward; choose client.batch_size <= {plan.micro_batch_size}, or 0"
            )
        if self.average_every and plan.steps % self.average_every:
            raise ValueError(
                f"strategy.average_every={self.average_every} does not divide the round's "
                f"{plan.steps} steps (client.steps): a round ends with an average"
            )
        if setup.error_feedback:
            raise ValueError(
                "federation.error_feedback=true with strategy=splitlora: clients of a split send "
                "their adapters whole; use federation.error_feedback=false"
            )
        if setup.classifies:
            raise ValueError(
                "model.task=classification with strategy=splitlora: the cut model ends in a "
                "vocabulary; use another strategy, or model.task=causal_lm"
            )
        if setup.faults and self.transport == "local":
            raise ValueError(
                "engine=faulty with strategy.transport=local: no worker takes part in the training "
                "of this split, so none can fail; use strategy.transport=messages"
            )
        if plan.term is not None:
            raise ValueError(
                "client.term with strategy=splitlora: a local objective has no term of its own "
                "where the server computes the loss; use client/term=none"
            )

    # --- hooks ----------------------------------------------------------------------------------

    def init_state(self, setting: Setting) -> State:
        blocks = 1 + max(blocks_of(setting.modules).values())
        cuts = sorted({self._cut(c, blocks).first for c in setting.clients})
        if cuts[-1] + max(self.tail, 0) > blocks:
            raise ValueError(
                f"strategy.cut: a client cannot hold the first {cuts[-1]} and the last "
                f"{max(self.tail, 0)} of {blocks} blocks (strategy.cut, tier_cuts, tail)"
            )
        if cuts[0] + max(self.tail, 0) == 0:
            raise ValueError(
                f"strategy.cut: a client that holds none of the {blocks} blocks has nothing to "
                "train; let it hold one or more (strategy.cut, tier_cuts, tail)"
            )
        top = setting.max_ranks
        if self.server_rank:
            top = Ranks({m.path: min(self.server_rank, m.max_rank) for m in setting.modules})
        state: dict[str, Tensor] = {
            "alpha": scalar(setting.alpha),
            "blocks": integers(blocks),
            "cuts": integers(cuts),
            "steps": integers(0),
            "done": integers([0] * len(setting.clients)),
            f"{MODULES}order": order(top),
        } | {f"{MODULES}{path}/r": integers(r) for path, r in top.items()}
        for part in self._parts(state):
            mine = _within(setting, part)
            if not mine.modules:
                raise ValueError(
                    f"strategy.cut: no layer of blocks {part.start}..{part.stop - 1}, which "
                    "clients hold, carries an adapter, and every client of a split trains: choose "
                    "model.layers or model.targets among them"
                )
            nested = self.aggregator.init_state(mine)
            first = self.aggregator.enlist(nested, mine.clients[0])
            if not isinstance(self.aggregator.client_start(nested, first), Mapping):
                raise ValueError(
                    f"strategy.aggregator={type(self.aggregator).__name__} begins with sparse "
                    "updates, cores or a moved base; the stages of a split train low-rank factors "
                    "over a frozen one: choose fedit, flexlora or heterolora"
                )
            state |= prefixed(nested, part.prefix)
        whole = initial_factors(setting, top)
        own: dict[str, Factors] = {p: f for p, f in whole.items() if self._is_served(state, p)}
        for part in self._parts(state):
            if part.shared:
                own |= self._start(state, part, self._host(state, part))
        return state | server_state(own)

    def enlist(self, state: State, client: Client) -> Client:
        """The client with the modules of its own blocks, at the ranks that the average gives it."""
        cut = self._cut(client, int(state["blocks"]))
        ranks: dict[str, int] = {}
        for part in self._held(state, cut):
            mine = replace(client, ranks=part.ranks(client.ranks))
            ranks |= self.aggregator.enlist(under(state, part.prefix), mine).ranks
        return replace(client, ranks=Ranks({p: ranks[p] for p in client.ranks if p in ranks}))

    def evaluated_ranks(self, state: State, client: Client) -> Ranks:
        return self._whole_ranks(state, self.enlist(state, client))

    def client_start(self, state: State, client: Client, kept: Kept | None = None) -> Adapter:
        found: dict[str, Factors] = {}
        for part in self._parts(state):
            mine = part.ranks(client.ranks)
            if mine:
                found |= self._start(state, part, replace(client, ranks=mine), kept)
        return {p: found[p] for p in client.ranks}

    def plan(self, state: State, client: Client, base: LocalPlan) -> LocalPlan:
        for part in self._parts(state):
            mine = part.ranks(client.ranks)
            planned = base
            if mine:
                nested = under(state, part.prefix)
                planned = self.aggregator.plan(nested, replace(client, ranks=mine), base)
            changed = list(_changed(planned, base, "client"))
            if changed:
                raise ValueError(
                    f"strategy.aggregator={type(self.aggregator).__name__} changes what a client "
                    f"does ({', '.join(changed)}), which a split client cannot do; "
                    "with heterolora, set strategy.aggregator.prune=false; else use fedit or "
                    "flexlora"
                )
        return base

    def aggregate(self, state: State, updates: Sequence[Update]) -> State:
        """Averages adapters part by part; the server's own adapters stay as the round trained
        them."""
        new = {k: t for k, t in state.items() if not k.startswith(COPIES)}
        server = unpack(state, float(state["alpha"]), SERVER)
        for part in self._parts(state):
            mine = self._part_updates(state, part, updates, server)
            if not mine:
                continue
            nested = self.aggregator.aggregate(under(state, part.prefix), mine)
            new = {k: t for k, t in new.items() if not k.startswith(part.prefix)}
            new |= prefixed(nested, part.prefix)
            if part.shared:
                server |= self._start(new, part, self._host(new, part))
        return new | server_state(server)

    @property
    def inexact(self) -> str:
        return self.aggregator.inexact

    @property
    def beyond_average(self) -> str:
        return self.aggregator.beyond_average

    @property
    def needs_updates(self) -> str:
        if self.average_every:
            return (
                f"strategy.average_every={self.average_every} averages whole adapters within a "
                "round, where no summand is looked at; choose strategy.average_every=0"
            )
        if self.rule.update == "per_client" or self.tier_cuts:
            return (
                "with strategy.rule.update=per_client or unequal cuts (strategy.tier_cuts) the "
                "server's adapters count in the average, by the examples of the clients that it "
                "serves; choose "
                "strategy.rule.update=concat and one strategy.cut"
            )
        return self.aggregator.needs_updates

    def adds(self, state: State, start: Payload, update: Update) -> Summands | None:
        """What ``aggregator`` adds, part by part; ``None`` if the server's own adapters count in a
        part, that is with unequal cuts or with one copy per client."""
        parts = self._parts(state)
        if self.rule.update == "per_client" or any(part.shared for part in parts):
            return None
        assert isinstance(start, Mapping)
        found: dict[str, Summand] = {}
        for part in parts:
            who = replace(update.client, ranks=part.ranks(update.client.ranks))
            mine = replace(update, client=who, payload=LowRankPayload(part.of(update.adapter)))
            nested = under(state, part.prefix)
            added = self.aggregator.adds(nested, LowRankPayload(part.of(start)), mine)
            if added is None:
                return None
            found |= {f"{part.prefix}{name}": x for name, x in added.items()}
        return found

    def absorb(self, state: State, total: Summands, weight: float) -> State:
        new = {k: t for k, t in state.items() if not k.startswith(COPIES)}
        for part in self._parts(state):
            n = len(part.prefix)
            mine = {k[n:]: x for k, x in total.items() if k.startswith(part.prefix)}
            nested = self.aggregator.absorb(under(state, part.prefix), mine, weight)
            new = {k: t for k, t in new.items() if not k.startswith(part.prefix)}
            new |= prefixed(nested, part.prefix)
        return new

    def kept(
        self, state: State, client: Client, before: Kept | None, start: Payload, update: Update
    ) -> Kept | None:
        """What ``aggregator`` lets the client keep, part by part under the part's prefix."""
        assert isinstance(start, Mapping)
        found: dict[str, Tensor] = {}
        for part in self._parts(state):
            ranks = part.ranks(client.ranks)
            if not ranks:
                continue
            who = replace(client, ranks=ranks)
            mine = replace(update, client=who, payload=LowRankPayload(part.of(update.adapter)))
            began = LowRankPayload(part.of(start))
            old = _kept_in(before, part)
            new = self.aggregator.kept(under(state, part.prefix), who, old, began, mine)
            found |= prefixed(new or {}, part.prefix)
        return dict(before or {}) | found if found else None

    def reference_weights(self, updates: Sequence[Update]) -> list[float]:
        return self.aggregator.reference_weights(updates)

    def global_update(self, state: State, ranks: Ranks | None = None) -> Adapter:
        server = unpack(state, float(state["alpha"]), SERVER)
        wanted = paths(state, "r", MODULES) if ranks is None else list(ranks)
        found: dict[str, Factors] = {}
        for part in self._parts(state):
            mine = Ranks({}) if ranks is None else part.ranks(ranks)
            if ranks is None or mine:
                nested = under(state, part.prefix)
                adapter = self.aggregator.global_update(nested, None if ranks is None else mine)
                assert isinstance(adapter, Mapping)
                found |= adapter
        for path in wanted:
            if path not in found:
                f = server[path]
                found[path] = f if ranks is None else at_rank(f, ranks[path])
        return {path: found[path] for path in wanted}

    # --- blocks and parts -----------------------------------------------------------------------

    def _cut(self, client: Client, blocks: int) -> Cut:
        default = math.ceil(blocks / 4) if self.cut < 0 else self.cut
        return Cut(self.tier_cuts.get(client.tier, default), self.tail)

    def _parts(self, state: State) -> list[Part]:
        """The parts that are averaged, in the order of their blocks."""
        blocks, cuts = int(state["blocks"]), state["cuts"].tolist()
        if self.rule.update == "per_client":
            return [Part(0, blocks)]
        edges, last = [0, *cuts], blocks - max(self.tail, 0)
        parts = [Part(a, b, shared=cuts[0] < b, home=a) for a, b in pairwise(edges) if a < b]
        return parts + ([Part(last, blocks, home=last)] if self.tail > 0 else [])

    def _held(self, state: State, cut: Cut) -> list[Part]:
        """The parts of a client, limited to the blocks that it holds itself."""
        blocks = int(state["blocks"])
        if self.rule.update != "per_client":
            return [p for p in self._parts(state) if cut.owns(p.start, blocks)]
        own = [Part(0, cut.first)] if cut.first else []
        return own + ([Part(blocks - cut.tail, blocks)] if cut.tail > 0 else [])

    def _whole_ranks(self, state: State, client: Client) -> Ranks:
        """An enlisted client's ranks, and the server's ranks for modules that it does not hold."""
        names = paths(state, "r", MODULES)
        return Ranks({p: client.ranks.get(p, int(state[f"{MODULES}{p}/r"])) for p in names})

    def cut_of(self, state: State, client: Client) -> Cut:
        """Which blocks a client holds."""
        return self._cut(client, int(state["blocks"]))

    def _is_served(self, state: State, path: str) -> bool:
        """Whether the server holds a module for some client."""
        block, blocks = block_of(path), int(state["blocks"])
        lowest = int(state["cuts"].min())
        return block is not None and not Cut(lowest, self.tail).owns(block, blocks)

    def _start(
        self, state: State, part: Part, client: Client, kept: Kept | None = None
    ) -> dict[str, Factors]:
        """What an enlisted client starts from in one part.

        Args:
            state: of the whole strategy.
            part: one average.
            client: with the ranks of this part only.
            kept: what the client kept of the whole model; ``None``: nothing.
        """
        nested = under(state, part.prefix)
        start = self.aggregator.client_start(nested, client, _kept_in(kept, part))
        assert isinstance(start, Mapping)
        return {p: start[p] for p in client.ranks}

    def _host(self, state: State, part: Part, examples: int = 1) -> Client:
        """The server as one more client of a part, enlisted."""
        own = [p for p in paths(state, "r", MODULES) if part.holds(p)]
        ranks = Ranks({p: int(state[f"{MODULES}{p}/r"]) for p in own})
        host = Client(HOST, ranks, examples, "server")
        return self.aggregator.enlist(under(state, part.prefix), host)

    def _part_updates(
        self, state: State, part: Part, updates: Sequence[Update], server: Adapter
    ) -> list[Update]:
        """The updates that are averaged in a part.

        The server's adapters count as one more client, with the examples of all clients that the
        server serves there.
        """
        if self.rule.update == "per_client":
            return [self._complete(state, u) for u in updates]
        mine, served = [], 0
        for u in updates:
            ranks = part.ranks(u.client.ranks)
            if ranks:
                who = replace(u.client, ranks=ranks)
                mine.append(replace(u, client=who, payload=LowRankPayload(part.of(u.adapter))))
            else:
                served += u.num_examples
        if part.shared and served:
            host = self._host(state, part, served)
            own = LowRankPayload({p: server[p] for p in host.ranks})
            mine.insert(0, Update(host, own, served))
        return mine

    def _complete(self, state: State, update: Update) -> Update:
        """A client's update, completed by its copy of the server's adapters (``per_client``)."""
        copy = self._copy_of(state, update.client)
        ranks = dict(update.client.ranks) | {p: f.rank for p, f in copy.items()}
        own = dict(update.adapter) | copy
        order_ = [p for p in paths(state, "r", MODULES) if p in own]
        who = replace(update.client, ranks=Ranks({p: ranks[p] for p in order_}))
        return replace(update, client=who, payload=LowRankPayload({p: own[p] for p in order_}))

    def _copy_of(self, state: State, client: Client) -> dict[str, Factors]:
        """The server's adapters of one client under ``per_client``: as trained, or the average."""
        prefix = f"{COPIES}{client.id}/"
        trained = unpack(state, float(state["alpha"]), prefix)
        if trained:
            return trained
        part = self._parts(state)[0]
        whole = replace(client, ranks=self._whole_ranks(state, client))
        nested = under(state, part.prefix)
        found = self._start(state, part, self.aggregator.enlist(nested, whole))
        return {p: f for p, f in found.items() if p not in client.ranks}

    # --- a round --------------------------------------------------------------------------------

    def run_round(
        self, state: State, jobs: Sequence[TrainJob], channel: ClientChannel
    ) -> RoundOutcome:
        """Train one round: activations and gradients are exchanged at every step.

        Raises:
            ModelError: if the model cannot be cut there.
        """
        return SplitRound(
            config=self,
            method=self,
            state=state,
            jobs=jobs,
            channel=channel,
            cuts={j.client.id: self.cut_of(state, j.client) for j in jobs},
            copy_of=self._copy_of,
        ).run()


def _within(setting: Setting, part: Part) -> Setting:
    """The setting restricted to the modules of one part."""
    return replace(
        setting,
        modules=tuple(m for m in setting.modules if part.holds(m.path)),
        clients=tuple(replace(c, ranks=part.ranks(c.ranks)) for c in setting.clients),
    )


def _kept_in(kept: Kept | None, part: Part) -> Kept | None:
    """What a client keeps for one part; ``None``: nothing."""
    return under(kept or {}, part.prefix) or None


def _changed(a: object, b: object, name: str) -> Iterator[str]:
    """The fields in which two values of one dataclass differ, those of its parts too."""
    if not is_dataclass(a) or type(a) is not type(b):
        if a != b:
            yield name
        return
    for f in fields(a):
        yield from _changed(getattr(a, f.name), getattr(b, f.name), f"{name}.{f.name}")
