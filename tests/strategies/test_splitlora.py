"""SplitLoRA through a session and a grid, on a random model of four blocks."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message, MessageType

import fedlora.split.run_round
from fedlora.algebra.state import Kept, State, unpack
from fedlora.core.errors import ModelError
from fedlora.core.types import Client, Factors, LocalPlan, Ranks, Setting, Update
from fedlora.data.batches import collate, step_indices
from fedlora.models.forward import supervised_logits
from fedlora.models.stages import Span, block_of
from fedlora.population.sampling import Roster
from fedlora.run.checkpoint import state_hash
from fedlora.run.tracking import Trackers
from fedlora.server.flower import FederatedRun
from fedlora.server.method import Setup
from fedlora.server.schedule import EvaluationSchedule, Rounds
from fedlora.server.session import Session
from fedlora.split.codec import decode_downs, encode_ups
from fedlora.split.context import RunContext
from fedlora.split.run_round import SERVER
from fedlora.split.server import Rule
from fedlora.split.worker import SplitWorker
from fedlora.techniques.lora.payload import LowRankPayload
from fedlora.wire.messages import encode_results
from fedlora.wire.rows import Wire
from simulations.app.grid import InProcessGrid
from strategies.fedit import FedIT
from strategies.flexlora import FlexLoRA
from strategies.heterolora import HeteroLoRA
from strategies.slora import SLoRA
from strategies.splitlora import SplitLoRA
from tests.fedlora.engine.world import FakeStore, example, examples
from tests.fedlora.split.world import BLOCKS, MODELS
from tests.generators import as_payload
from tests.strategies.test_base import Shard

SEED = 3
HELD = {0: 7, 1: 4, 2: 9}
PLAN = LocalPlan(
    lr=0.02, steps=2, batch_size=3, dropout=0.1, max_grad_norm=1.0, schedule="constant"
)
TIERS = ("T1", "T2", "T3")


@dataclass
class World:
    """Three clients of three tiers, and what may differ."""

    folder: Path
    ranks: tuple[int, int, int] = (2, 2, 2)
    nodes: int = 2
    plan: LocalPlan = PLAN
    rounds: dict[str, Any] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)
    broken: Any = None
    """Called with every request to a node."""

    def __post_init__(self) -> None:
        self.model = MODELS["llama"](double=False)
        held = {i: examples(n, seed=i) for i, n in HELD.items()}
        self.store = FakeStore(held)
        self.context = RunContext(self.model, self.store)  # type: ignore[arg-type]
        other = RunContext(MODELS["llama"](double=False), self.store)  # type: ignore[arg-type]
        workers = [SplitWorker(g.stages, g.examples) for g in (self.context, other)]
        served = iter(range(10**6))

        def app(message: Message, context: Any) -> Message:
            if message.metadata.message_type == MessageType.TRAIN:  # no jobs: set the worker up
                return Message(encode_results([], wire="float32"), reply_to=message)
            request = decode_downs(message.content)
            if self.broken is not None:
                self.broken(request)
            n = next(served)
            answers = workers[n * n // 3 % 2].answer(request, context.state)
            return Message(
                encode_ups(answers, wire=request.wire, nonce=request.nonce), reply_to=message
            )

        self.app = app

    @property
    def setting(self) -> Setting:
        modules = self.model.info.modules
        ranks = [Ranks({m.path: r for m in modules}) for r in self.ranks]
        clients = tuple(
            Client(i, ranks[i], n, tier) for (i, n), tier in zip(HELD.items(), TIERS, strict=True)
        )
        return Setting(modules, 1000, 12.0, clients, SEED)

    def run(self, method: SplitLoRA, rounds: int = 2, resume: bool = False) -> Session:
        setting, ids = self.setting, tuple(HELD)
        session = Session(
            method=method,
            setting=setting,
            roster=Roster(setting.clients, ids, {"seen": ids}, 3, tuple(Shard(i) for i in ids), 3),
            plan=self.plan,
            schedule=EvaluationSchedule(every=0),
            rounds=Rounds(**{"rounds": rounds, "min_success": 0.1, **self.rounds}),
            workers=1,
            folder=self.folder,
            tracker=Trackers(()),
            emit=self.said.append,
        )
        if resume:
            assert session.resume()
        run = FederatedRun(session, worker="{}", source="")
        run.start(InProcessGrid(self.app, self.nodes))  # type: ignore[arg-type]
        return session


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    def make(**more: Any) -> World:
        made = World(tmp_path / str(len(list(tmp_path.iterdir()))), **more)
        made.folder.mkdir()
        monkeypatch.setattr(fedlora.split.run_round, "run_context", lambda _: made.context)
        return made

    return make


def method(**more: Any) -> SplitLoRA:
    return SplitLoRA(**{"aggregator": FedIT(), "cut": 2, **more})


def equal(a: State, b: State) -> None:
    assert a.keys() == b.keys()
    for key, t in a.items():
        assert torch.equal(t, b[key]), key


CUTS = {"T1": 1, "T2": 3, "T3": 2}
UNEQUAL = {"ranks": (1, 2, 3)}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "an average each step": ({"average_every": 1}, {}),
    "U-shape": ({"tail": 1, "cut": 1, "average_every": 1}, {}),
    "turns": ({"rule": Rule("sequential", order="shuffle"), "tail": 0}, {}),
    "copies": ({"rule": Rule("per_client"), "average_every": 1}, {}),
    "unequal cuts": ({"tier_cuts": CUTS, "average_every": 1}, {}),
    "unequal ranks": ({"tier_cuts": CUTS, "aggregator": FlexLoRA()}, UNEQUAL),
    "padded ranks": ({"tier_cuts": CUTS, "aggregator": HeteroLoRA(prune=False)}, UNEQUAL),
    "copies of unequal ranks": ({"aggregator": FlexLoRA(), "rule": Rule("per_client")}, UNEQUAL),
    "coarse": ({"activations": Wire("int8", stochastic=True), "gradients": Wire("bf16")}, {}),
    "fresh": ({"memory": "fresh", "average_every": 1, "server_lr": 0.1, "server_rank": 3}, {}),
    "a long schedule": (
        {"horizon": 8, "client_schedule": "constant"},
        {"plan": replace(PLAN, schedule="linear", warmup=0.25)},
    ),
}


SELDOM = {"turns", "padded ranks", "copies of unequal ranks", "coarse", "an average each step"}
MARKED = [pytest.param(c, marks=pytest.mark.slow if c in SELDOM else ()) for c in CASES]


@pytest.mark.parametrize("case", MARKED)
def test_messages_give_the_same_state_and_so_does_a_run_that_went_on(world: Any, case: str) -> None:
    """Bit by bit: two rounds here; two rounds through messages, interrupted after the first."""
    options, setting = CASES[case]
    here = world(**setting).run(method(**options), 2)
    there = world(**setting)
    told = method(transport="messages", keep_graphs=case == "U-shape", **options)
    there.run(told, 1)
    equal(there.run(told, 2, resume=True).state, here.state)
    assert here.done == 2


@pytest.mark.parametrize("nodes", [1, 3])
def test_nodes_do_not_change_the_result(world: Any, nodes: int) -> None:
    two = world().run(method(transport="messages"))
    other = world(nodes=nodes).run(method(transport="messages"))
    assert state_hash(two.state) == state_hash(other.state)


@pytest.mark.parametrize("options", [{}, {"tail": 1, "cut": 1}, {"tier_cuts": CUTS}], ids=str)
def test_two_rounds_are_one_with_an_average_in_it(world: Any, options: dict[str, Any]) -> None:
    two = world().run(method(**options), 2)
    one = world(plan=replace(PLAN, steps=4)).run(method(average_every=2, **options), 1)
    equal(one.state, two.state)


def test_one_client_alone_is_an_unsplit_client(world: Any) -> None:
    """A round of one client is its training, cut or not: the path from the session to the stages
    adds nothing."""
    from fedlora.split.batches import ROUND
    from fedlora.training.loop import optimise

    w = world(plan=replace(PLAN, max_grad_norm=0.0))
    m = method()
    setting = w.setting
    state = m.init_state(setting)
    start = as_payload(m.global_update(state))
    w.store.held = {0: w.store.held[0], 1: [], 2: []}
    session = w.run(m, 1)
    parameters = w.model.mount(start, dropout=w.plan.dropout)
    optimise(w.model, parameters, w.store.held[0], w.plan, seed=SEED, round=ROUND, client=0)
    want = w.model.payload()
    w.model.unmount()
    got = m.global_update(session.state)
    assert isinstance(want, LowRankPayload)
    for path, f in want.items():
        assert torch.equal(got[path].a, f.a), path
        assert torch.equal(got[path].b, f.b), path
    text = "\n".join(w.said)
    assert "client 1 has nothing to train on" in text
    assert "client 2 has nothing to train on" in text


# --- averages -------------------------------------------------------------------------------------


def random_like(adapter: Any, seed: int) -> dict[str, Factors]:
    g = torch.Generator().manual_seed(seed)
    return {
        p: Factors(
            torch.randn(f.a.shape, generator=g), torch.randn(f.b.shape, generator=g), f.alpha
        )
        for p, f in adapter.items()
    }


def updates_of(m: SplitLoRA, state: State, setting: Setting) -> list[Update]:
    found = []
    for c in setting.clients:
        who = m.enlist(state, c)
        start = m.client_start(state, who)
        found.append(Update(who, random_like(start, c.id), c.num_examples))
    return found


def test_a_block_is_averaged_over_all_who_hold_it(world: Any) -> None:
    """By its index in the model; the server votes with the examples of those whom it serves there,
    and everybody goes on with the average."""
    m = method(tier_cuts=CUTS)
    setting = world().setting
    state = dict(m.init_state(setting))
    server = random_like(unpack(state, 12.0, SERVER), 9)
    for path, f in server.items():
        state[f"{SERVER}{path}/a"], state[f"{SERVER}{path}/b"] = f.a, f.b
    updates = updates_of(m, state, setting)
    after = m.aggregate(state, updates)
    cuts = [CUTS[c.tier] for c in setting.clients]
    now = unpack(after, 12.0, SERVER)
    for module in setting.modules:
        path, block = module.path, block_of(module.path)
        assert block is not None
        votes = [(HELD[i], u.adapter[path].a) for i, u in enumerate(updates) if cuts[i] > block]
        served = sum(n for (i, n) in HELD.items() if cuts[i] <= block)
        if block >= min(cuts):
            votes.append((served, server[path].a))
        want = sum(n * a for n, a in votes) / sum(n for n, _ in votes)
        if block >= max(cuts):
            assert torch.equal(now[path].a, server[path].a)  # the server's alone
            continue
        got = [
            m.client_start(after, m.enlist(after, c))[path].a
            for c in setting.clients
            if CUTS[c.tier] > block
        ]
        got += [now[path].a] if path in now else []
        assert len(got) == len(votes)
        for a in got:
            torch.testing.assert_close(a, want, rtol=1e-5, atol=1e-6)
            assert torch.equal(a, got[0])
        assert torch.equal(m.global_update(after)[path].a, got[0])


def test_keys_are_apart_and_cover_the_model(world: Any) -> None:
    for options in ({}, {"tier_cuts": CUTS}, {"tail": 1, "cut": 1}):
        m, setting = method(**options), world().setting
        state = m.init_state(setting)
        served = set(unpack(state, 12.0, SERVER))
        for c in setting.clients:
            own = set(m.enlist(state, c).ranks)
            cut = m.cut_of(state, c)
            blocks = {b for p in own if (b := block_of(p)) is not None}
            assert blocks == {b for b in range(BLOCKS) if cut.owns(b, BLOCKS)}
            assert own | served == {x.path for x in setting.modules}


@pytest.mark.parametrize("options", [{}, {"tier_cuts": CUTS}, {"tail": 1, "cut": 1}], ids=str)
def test_the_global_update_unsplit_computes_what_the_stages_compute(
    world: Any, options: dict[str, Any]
) -> None:
    w, m = world(), method(**options)
    state = w.run(m).state
    batch = collate(w.store.held[0], "full")
    stages, blocks = w.context.stages, BLOCKS
    with torch.no_grad():
        w.model.mount(as_payload(m.global_update(state)))
        want = supervised_logits(w.model.network, batch)
        w.model.unmount()
        for c in w.setting.clients:
            cut = m.cut_of(state, c)
            own = as_payload(m.client_start(state, m.enlist(state, c))).updates(w.model)
            server = as_payload(unpack(state, 12.0, SERVER)).updates(w.model)
            last = blocks - max(cut.tail, 0)
            parts = [(Span(0, cut.first, embeds=True), own)]
            parts.append((Span(cut.first, last, heads=not cut.u_shaped), server))
            parts += [(Span(last, blocks, heads=True), own)] if cut.u_shaped else []
            x = batch.inputs
            for span, updates in parts:
                stage = stages[span]
                stage.mount(updates)
                x = stage.logits(x, batch.positions) if span.heads else stage.hidden(x)
                stage.mount({})
            assert torch.equal(x, want), f"client {c.id}"


def test_two_clients_with_unequal_ranks_average_their_products(world: Any) -> None:
    m = method(aggregator=FlexLoRA(), tier_cuts={"T3": 1})
    setting = world(**UNEQUAL).setting
    state = m.init_state(setting)
    updates = updates_of(m, state, setting)
    after = m.aggregate(state, updates)
    path = next(iter(updates[2].adapter))
    total = sum(HELD.values())
    want = sum(HELD[i] / total * u.adapter[path].delta() for i, u in enumerate(updates))
    torch.testing.assert_close(m.global_update(after)[path].delta(), want, rtol=1e-4, atol=1e-4)


# --- what goes wrong ------------------------------------------------------------------------------


def test_a_node_that_errs_costs_its_clients_a_step(world: Any) -> None:
    count: list[int] = []

    def broken(request: Any) -> None:
        if 1 in request.downs:
            count.append(1)
            if len(count) == 2:
                raise OSError("no space left")

    w = world(broken=broken, nodes=3, plan=replace(PLAN, steps=3))
    session = w.run(method(transport="messages"), 1)
    text = "\n".join(w.said)
    assert "client 1 loses step 1: WorkerError" in text
    assert "no space left" in text
    assert session.done == 1
    assert int(session.state["done"][1]) == 3


def test_a_client_lost_before_an_average_is_not_part_of_it(world: Any) -> None:
    def broken(request: Any) -> None:
        if 1 in request.downs:
            raise OSError("gone")

    w = world(broken=broken, nodes=3)
    session = w.run(method(transport="messages", average_every=1), 1)
    assert "client 1 sends no adapters and is out for the round" in "\n".join(w.said)
    assert session.state["done"].tolist() == [2, 0, 2]
    assert not any(k.startswith("memory/1/") for k in session.state)
    without = world()
    without.store.held[1] = []
    equal(without.run(method(average_every=1), 1).state, session.state)


def test_a_client_that_raises_is_named_and_the_round_goes_on(world: Any) -> None:
    w = world()
    w.store.held[2] = [example([1, 39, 77, 0])] * 9
    session = w.run(method(), 1)
    text = "\n".join(w.said)
    assert "client 2 loses step 1 and is out for the round: IndexError" in text
    assert session.state["done"].tolist() == [2, 2, 0]


def test_an_average_must_end_the_round(world: Any) -> None:
    with pytest.raises(ValueError, match=r"average_every=3 does not divide the round's 2 steps"):
        world().run(method(average_every=3))


def test_an_aggregator_that_trains_otherwise_is_refused(world: Any) -> None:
    setting = world().setting
    sparse = method(aggregator=SLoRA(aggregator=FedIT()))
    with pytest.raises(ValueError, match="aggregator=SLoRA begins with sparse updates"):
        sparse.init_state(setting)
    pruning = method(aggregator=HeteroLoRA())
    state = pruning.init_state(setting)
    client = pruning.enlist(state, setting.clients[0])
    with pytest.raises(
        ValueError, match=r"HeteroLoRA changes .*client\.technique\.self_prune.*prune=false"
    ):
        pruning.plan(state, client, PLAN)
    with pytest.raises(ValueError, match=r"client\.micro_batch_size=1: a step of a split client"):
        method().check(Setup(replace(PLAN, micro_batch_size=1)))


@pytest.mark.parametrize("options", [{"cut": 5}, {"tier_cuts": {"T2": 5}}, {"cut": 3, "tail": 2}])
def test_a_cut_outside_the_model_is_refused_at_once(world: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"a client cannot hold the first \d and the last \d of 4"):
        method(**options).init_state(world().setting)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cut": -2}, r"strategy\.cut=-2 must be >= -1"),
        ({"tier_cuts": {"T1": -1}}, r"strategy\.tier_cuts\.T1=-1 must be >= 0"),
        ({"transport": "pigeon"}, r"transport='pigeon' is not one of"),
        ({"label_smoothing": 1.0}, r"label_smoothing=1\.0 must be in"),
        ({"memory": "some"}, r"memory='some' is not one of"),
        ({"rule": Rule(gradient="joint"), "tail": 1}, r"a tail learns from its client's own mean"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        method(**options)


def test_a_tail_without_adapters_is_refused(world: Any) -> None:
    """The blocks of a model are counted by its adapters before it is loaded."""
    w = world()
    m = method(cut=1, tail=1)
    setting = w.setting
    modules = tuple(x for x in setting.modules if block_of(x.path) != BLOCKS - 1)
    fewer = Ranks({x.path: 2 for x in modules})
    clients = tuple(replace(c, ranks=fewer) for c in setting.clients)
    state = m.init_state(replace(setting, modules=modules, clients=clients))
    assert int(state["blocks"]) == BLOCKS - 1
    jobs: Any = [
        type("Job", (), {"client": c, "seed": SEED, "plan": PLAN, "start": {}}) for c in clients
    ]
    channel: Any = type("Channel", (), {"worker": "{}", "wire": "float32"})
    with pytest.raises(ModelError, match=r"last adapter of the model lies in block 2 of 4"):
        m.run_round(state, jobs, channel)


def test_a_client_part_without_adapters_is_refused(world: Any) -> None:
    setting = world().setting
    modules = tuple(x for x in setting.modules if block_of(x.path) == BLOCKS - 1)
    top = Ranks({x.path: 2 for x in modules})
    clients = tuple(replace(c, ranks=top) for c in setting.clients)
    with pytest.raises(ValueError, match=r"no layer of blocks 0\.\.0, .* choose model\.layers"):
        method(cut=1).init_state(replace(setting, modules=modules, clients=clients))


def test_rates_run_over_rounds(world: Any) -> None:
    """A schedule over the run's steps; a server's peak of its own; clients at a constant rate."""
    from fedlora.core.rates import learning_rates
    from fedlora.split.run_round import SplitRound

    plan = replace(PLAN, schedule="linear", warmup=0.25)
    m = method(horizon=8, client_schedule="constant", server_lr=0.5)
    w = world(plan=plan)
    state = w.run(m, 2).state
    play: Any = object.__new__(SplitRound)
    play.config, play.state = m, state
    assert play._rates(2, plan) == learning_rates(8, plan)[4:6]
    assert int(state["steps"]) == 4


def test_steps_go_on_where_the_last_round_ended(world: Any) -> None:
    """Data are seen epoch by epoch across rounds, not from the front each time."""
    from fedlora.split.batches import ROUND, Order

    order = Order(7, PLAN, seed=SEED, client=0)
    seen = [i for step in range(3) for i in order[step]]
    assert sorted(seen) == list(range(7))
    unsplit = step_indices(7, replace(PLAN, steps=8), seed=SEED, round=ROUND, client=0)
    for step, want in enumerate(unsplit):
        assert np.array_equal(order[step], want)
    assert order[1] == Order(7, PLAN, seed=SEED, client=0)[1]


@dataclass(frozen=True, eq=False, kw_only=True)
class Remembering(FedIT):
    """Clients keep a count of their rounds per part and see it in the scale of A."""

    def client_start(self, state: State, client: Client, kept: Kept | None = None):
        start = super().client_start(state, client)
        times = 0.0 if kept is None else float(kept["rounds"])
        return {p: Factors(f.a * (1 + times), f.b, f.alpha) for p, f in start.items()}

    def kept(self, state, client, before, start, update):
        assert set(client.ranks) == set(start) == set(update.adapter)
        return {"rounds": torch.tensor(1.0) + (0 if before is None else before["rounds"])}


def test_what_clients_keep_reaches_the_aggregator_part_by_part(tmp_path):
    w = World(tmp_path)
    method = SplitLoRA(aggregator=Remembering(), tier_cuts={"T3": 2})
    state = method.init_state(w.setting)
    client = method.enlist(state, w.setting.clients[2])
    start = as_payload(method.client_start(state, client))
    kept = None
    for times in (1, 2):
        kept = method.kept(state, client, kept, start, Update(client, start, 1))
        assert {k: float(t) for k, t in kept.items()} == {
            "part0/rounds": times,
            "part1/rounds": times,
        }
        for path, f in method.client_start(state, client, kept).items():
            assert torch.equal(f.a, start[path].a * (1 + times))
