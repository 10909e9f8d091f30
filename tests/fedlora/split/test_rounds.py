"""A split round against the unsplit engine, and against itself by other ways."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch

from fedlora.core.types import Adapter, LocalPlan
from fedlora.models.language_model import LanguageModel
from fedlora.split.batches import ROUND
from fedlora.split.cost import client_part
from fedlora.split.noise import Noise
from fedlora.split.protocol import Cut, Down, Terms
from fedlora.split.rounds import Finished, run_exchanges
from fedlora.split.server import Rule
from fedlora.training.loop import optimise
from fedlora.wire.rows import Wire
from tests.fedlora.engine.world import SEED, example, examples
from tests.fedlora.split.world import (
    BLOCKS,
    DOUBLE,
    MODELS,
    SGD,
    Federation,
    Outcome,
    assert_equal,
    assert_near,
    assert_same,
    gradient,
    mean_of_factors,
    start,
)

PLAN = LocalPlan(lr=0.02, steps=5, batch_size=3, dropout=0.0, max_grad_norm=0.0, weight_decay=0.1)
DROPOUT = replace(PLAN, dropout=0.1)
CUTS = [Cut(2), Cut(0), Cut(BLOCKS), Cut(1, 1), Cut(2, 0), Cut(BLOCKS, 0)]
UNEQUAL = {0: Cut(1), 1: Cut(3), 2: Cut(2)}


def unsplit(
    model: LanguageModel, whole: Adapter, federation: Federation
) -> tuple[Adapter, list[float]]:
    """The sequential engine's loop on the first client."""
    i, plan = federation.clients[0], federation.plan
    parameters = model.mount(whole, dropout=plan.dropout)
    held = federation.held[i]
    trace = optimise(model, parameters, held, plan, seed=SEED, round=ROUND, client=i)
    payload = model.payload()
    model.unmount()
    return payload, list(trace.losses)


def alone_is_unsplit(model: LanguageModel, plan: LocalPlan, update: str, cut: Cut) -> None:
    whole = start(model)
    f = Federation(model, plan, whole, cuts={0: cut}, rule=Rule(update))
    outcome = f.play()
    want, losses = unsplit(model, whole, f)
    assert_same(outcome.whole(), want)
    metrics = outcome.client().metrics
    assert metrics["loss_first"] == losses[0]
    assert metrics["loss_last"] == losses[-1]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_one_client_split_is_the_client_unsplit(name: str, cut: Cut) -> None:
    """Bit by bit, in float32, with dropout: weights and losses, wherever the cut."""
    alone_is_unsplit(MODELS[name](double=False), DROPOUT, "concat", cut)


@pytest.mark.parametrize("update", ["concat", "sequential", "per_client"])
@pytest.mark.parametrize("cut", [Cut(2), Cut(1, 1)], ids=str)
def test_one_client_is_the_same_under_every_rule(update: str, cut: Cut) -> None:
    alone_is_unsplit(MODELS["gpt2"](double=False), PLAN, update, cut)


@pytest.mark.parametrize("plan", [replace(DROPOUT, optimizer="sgd", momentum=0.9), None])
def test_one_client_by_other_plans(plan: LocalPlan | None) -> None:
    """Another optimizer; mixed precision."""
    alone_is_unsplit(
        MODELS["llama"](double=False), plan or replace(PLAN, autocast="bf16"), "concat", Cut(1)
    )


# --- several clients ------------------------------------------------------------------------------


def joined(f: Federation, rule: Rule) -> Outcome:
    return replace(f, rule=rule).play()


@pytest.mark.parametrize("weights", ["uniform", "examples", "tokens"])
@pytest.mark.parametrize(
    "cuts",
    [{}, UNEQUAL, {i: Cut(1, 0) for i in range(3)}],
    ids=["equal", "unequal", "U-shape"],
)
def test_the_joint_gradient_is_the_sum_of_the_clients(weights: str, cuts: dict[int, Cut]) -> None:
    """With the shares of the joint loss; what a client gets back is as if it were alone, or that
    times its share. Rows of unequal cuts enter where they belong, padding or not."""
    model = MODELS["llama"]()
    whole = start(model)
    plan = replace(SGD, dropout=0.2)
    f = Federation(model, plan, whole, (0, 1, 2), cuts, Rule(weights=weights), DOUBLE)
    both = {g: joined(f, Rule(weights=weights, gradient=g)) for g in ("own_mean", "joint")}
    lone = {i: replace(f, clients=(i,), held={i: f.held[i]}).play() for i in f.clients}
    size = {
        i: {"uniform": 1.0, "examples": len(f.held[i]), "tokens": x.client(i).metrics["tokens"]}
        for i, x in lone.items()
    }
    total = sum(s[weights] for s in size.values())
    share = {i: s[weights] / total for i, s in size.items()}
    got = gradient(whole, both["joint"].server.trainables[-1].adapter())
    parts = {i: gradient(whole, x.server.trainables[-1].adapter()) for i, x in lone.items()}
    for name, g in got.items():
        want = sum(share[i] * parts[i][name] for i in f.clients if name in parts[i])
        torch.testing.assert_close(g, want, rtol=1e-10, atol=1e-13)
    for i, x in lone.items():
        own = gradient(whole, x.client(i).adapter)
        for g, factor in (("own_mean", 1.0), ("joint", share[i])):
            sent = gradient(whole, both[g].client(i).adapter)
            for name, t in sent.items():
                torch.testing.assert_close(t, factor * own[name], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("cuts", [{}, UNEQUAL, {i: Cut(2, 1) for i in range(3)}], ids=str)
def test_cutting_the_joint_batch_changes_rounding_alone(cuts: dict[int, Cut]) -> None:
    model = MODELS["gpt2"]()
    f = Federation(model, DROPOUT, start(model), (0, 1, 2), cuts, terms=DOUBLE)
    whole = joined(f, Rule(tokens=0))
    for tokens in (1, 60):  # a client by itself, and two of the three together
        cut = joined(f, Rule(tokens=tokens))
        for i in f.clients:
            assert_near(cut.client(i).adapter, whole.client(i).adapter, 1e-9)
        near = cut.server.trainables[-1].adapter(), whole.server.trainables[-1].adapter()
        assert_near(*near, 1e-9)


def three() -> tuple[Federation, Federation]:
    """Three clients with three examples each, and one with all nine."""
    model = MODELS["gpt2"]()
    whole = start(model)
    held = {i: examples(3, seed=40 + i) for i in range(3)}
    rule = Rule(weights="tokens", gradient="joint")
    split = Federation(model, SGD, whole, (0, 1, 2), rule=rule, terms=DOUBLE, held=held)
    together = [e for own in held.values() for e in own]
    plan = replace(SGD, batch_size=9)
    return split, Federation(model, plan, whole, terms=DOUBLE, held={0: together})


def test_clients_gradients_add_up_to_that_of_the_joint_batch() -> None:
    split, central = three()
    want = gradient(central.whole, unsplit(central.model, central.whole, central)[0])
    outcome = split.play()
    got = gradient(split.whole, outcome.server.trainables[-1].adapter())
    each = [gradient(split.whole, outcome.client(i).adapter) for i in split.clients]
    got |= {name: sum(g[name] for g in each) for name in each[0]}
    assert got.keys() == want.keys()
    for name, t in got.items():
        torch.testing.assert_close(t, want[name], rtol=1e-9, atol=1e-13)


def test_clients_at_n_times_the_rate_average_to_the_central_step() -> None:
    split, central = three()
    want, _ = unsplit(central.model, central.whole, central)
    round_plan = replace(split.round_plan(), client_rates=[3.0])
    found = run_exchanges(split.local(), split.server(), round_plan, mean_of_factors)
    own = {i: end.adapter for i, end in found.items() if isinstance(end, Finished)}
    mean = mean_of_factors(own)[0]
    assert_near(mean, {p: want[p] for p in mean}, 1e-12)


def test_sequential_is_one_round_after_another_at_the_server() -> None:
    """A step per client in its turn, each client's gradient by the server that it meets."""
    model = MODELS["llama"]()
    whole = start(model)
    plan = replace(SGD, lr=0.1)
    f = Federation(model, plan, whole, (0, 1, 2), rule=Rule("sequential"), terms=DOUBLE)
    outcome, server = f.play(), None
    for i in f.clients:
        alone = replace(f, clients=(i,), held={i: f.held[i]})
        alone.adapters = {} if server is None else {-1: server}
        turn = alone.play()
        server = turn.server.trainables[-1].adapter()
        assert_near(outcome.client(i).adapter, turn.client(i).adapter, 1e-12)
    assert server is not None
    assert_near(outcome.server.trainables[-1].adapter(), server, 1e-12)


def test_turns_are_fixed_or_shuffled_by_step() -> None:
    model = MODELS["llama"]()
    f = Federation(model, PLAN, start(model), (3, 1, 2), rule=Rule("sequential", order="shuffle"))
    server = f.server()
    orders = {tuple(i for (i,) in server.groups([3, 1, 2], step)) for step in range(20)}
    assert len(orders) > 1
    assert {tuple(sorted(o)) for o in orders} == {(1, 2, 3)}
    fixed = replace(f, rule=Rule("sequential")).server()
    assert fixed.groups([3, 1, 2], 7) == [[1], [2], [3]]


@pytest.mark.parametrize("update", ["concat", "sequential", "per_client"])
@pytest.mark.parametrize("cut", [Cut(2), Cut(1, 1)], ids=str)
def test_an_average_within_a_round_is_a_round_that_ends_there(update: str, cut: Cut) -> None:
    """Bit by bit: optimizers go on with what they remember, data and masks go on, and everybody
    starts again from the same adapters."""
    model = MODELS["gpt2"](double=False)
    plan = replace(DROPOUT, schedule="constant", steps=2)
    ids = (0, 1, 2)
    f = Federation(model, plan, start(model), ids, dict.fromkeys(ids, cut), Rule(update))
    first = f.play()
    own = {i: first.client(i).adapter for i in ids}
    trainables = first.server.trainables.items()
    keys = {k: -1 - k if update == "per_client" else -1 for k, _ in trainables}
    second = replace(
        f,
        done={i: first.client(i).done for i in ids},
        adapters=mean_of_factors(own) | {keys[k]: p.adapter() for k, p in trainables},
        optimizer_states={i: first.client(i).optimizer_state for i in ids}
        | {keys[k]: p.optimizer_state() for k, p in trainables},
    )
    end = second.play()
    whole = replace(f, plan=replace(plan, steps=4), average_after=frozenset({2})).play()
    for i in ids:
        assert_same(whole.client(i).adapter, end.client(i).adapter)
        assert whole.client(i).done == end.client(i).done == 4
    for key, trainable in whole.server.trainables.items():
        assert_same(trainable.adapter(), end.server.trainables[key].adapter())


def test_everybody_holds_the_average_afterwards() -> None:
    """Those who go on, and those whose last step it was, though others have more; each counts
    once."""
    model = MODELS["llama"]()
    plan = replace(PLAN, steps=0, epochs=1)
    held = {0: examples(3), 1: examples(6, seed=1), 2: examples(12, seed=2)}
    asked = []

    def average(adapters: Mapping[int, Adapter]) -> Mapping[int, Adapter]:
        asked.append(sorted(adapters))
        return mean_of_factors(adapters)

    f = Federation(model, plan, start(model), (0, 1, 2), terms=DOUBLE, held=held)
    f.average_after = frozenset({2})
    round_plan = replace(f.round_plan(), client_rates=[0.1, 0.1, 0.0, 0.0])
    found = run_exchanges(f.local(), f.server(), round_plan, average)
    assert asked == [[0, 1, 2]]
    ends = [end.adapter for end in found.values() if isinstance(end, Finished)]
    assert len(ends) == 3
    assert_same(ends[0], ends[1])
    assert_same(ends[0], ends[2])
    assert f.said == []


def test_the_parties_hold_every_adapter_once_and_an_average_leaves_the_server_alone() -> None:
    model = MODELS["llama"]()
    f = Federation(model, PLAN, start(model), (0, 1))
    server = f.server()
    seen = []

    def average(adapters: Mapping[int, Adapter]) -> Mapping[int, Adapter]:
        assert all(set(a).isdisjoint(server.trainables[-1].updates) for a in adapters.values())
        assert all(
            set(a) | set(server.trainables[-1].updates) == set(model.layers)
            for a in adapters.values()
        )
        seen.append(server.trainables[-1].adapter())
        return mean_of_factors(adapters)

    round_plan = replace(f.round_plan(), server_rates=[0.1] * 3 + [0.0] * 2)
    run_exchanges(f.local(), server, replace(round_plan, average_after=frozenset({3})), average)
    assert_same(seen[0], server.trainables[-1].adapter())


# --- what is sent ---------------------------------------------------------------------------------

KINDS = [Wire("fp16"), Wire("bf16"), Wire("int8", group=8), Wire("topk", k=12)]
BOUNDS = {"fp16": 0.003, "bf16": 0.015, "int8": 0.05, "topk": 0.8}


@pytest.mark.parametrize("cut", [Cut(2), Cut(1, 1)], ids=str)
@pytest.mark.parametrize("wire", KINDS, ids=lambda w: w.kind)
def test_a_coarser_wire_costs_a_bounded_error(wire: Wire, cut: Cut) -> None:
    """Of the first gradient, with activations, gradients or both on it."""
    model = MODELS["gpt2"](double=False)
    ids = (0, 1)
    f = Federation(model, SGD, start(model), ids, dict.fromkeys(ids, cut))
    exact = {i: f.play().client(i).adapter for i in ids}
    for up, down in ((wire, Wire()), (Wire(), wire), (wire, wire)):
        coarse = replace(f, terms=Terms(SEED, activations=up, gradients=down)).play()
        for i in ids:
            want = gradient(f.whole, exact[i])
            got = gradient(f.whole, coarse.client(i).adapter)
            flat = [torch.cat([g[n].reshape(-1) for n in want]) for g in (want, got)]
            error = float((flat[0] - flat[1]).norm() / flat[0].norm())
            assert 0 < error < BOUNDS[wire.kind], f"{error:.3g}"


@pytest.mark.parametrize(
    "wire", [Wire(), Wire("int8", group=8), Wire("bf16")], ids=lambda w: w.kind
)
@pytest.mark.parametrize("cut", [Cut(2), Cut(1, 1)], ids=str)
def test_bytes_are_those_of_the_formula(wire: Wire, cut: Cut) -> None:
    """Beside labels: four bytes for each, eight for where a row ends and its labels begin. An
    average within the round is the client's adapters once more."""
    model = MODELS["llama"](double=False)
    terms = Terms(SEED, activations=wire, gradients=wire)
    f = Federation(model, replace(PLAN, steps=2), start(model), (0,), {0: cut}, terms=terms)
    part = client_part(model.network, dict.fromkeys(model.layers, 2), cut)
    order = f.local()
    order.exchange({0: Down(step=0, forward=True)})
    steps = [order.clients[0]._step(k) for k in range(2)]
    due = [part.traffic(s.shape.tokens, wire, wire) for s in steps]
    adapters = part.adapter * 4
    rows, labels = sum(len(s.shape.lengths) for s in steps), sum(s.batch.tokens for s in steps)
    beside = 4 * rows if cut.u_shaped else 8 * rows + 4 * labels
    for averages in (0, 1):
        f.average_after = frozenset({1} if averages else ())
        metrics = f.play().client().metrics
        more = averages * adapters
        assert metrics["exchanged_up"] == sum(up for up, _ in due) + beside + more
        assert metrics["exchanged_down"] == sum(down for _, down in due) + more


def test_noise_is_of_the_client_and_the_step_alone() -> None:
    model = MODELS["gpt2"](double=False)
    terms = Terms(SEED, noise=Noise(clip=1.0, sigma=0.3))
    f = Federation(model, PLAN, start(model), (0, 1), terms=terms)
    noisy = f.play()
    assert_equal(noisy, f.play())
    quiet = replace(f, terms=Terms(SEED, noise=Noise(clip=1.0))).play()
    assert noisy.client().metrics["loss"] != quiet.client().metrics["loss"]
    wide = replace(f, terms=Terms(SEED, noise=Noise(clip=1e6))).play()
    assert_near(wide.client().adapter, replace(f, terms=Terms(SEED)).play().client().adapter, 1e-6)


def test_labels_are_smoothed_in_training_alone() -> None:
    """The loss that is reported has none of it; both shapes of the split agree."""
    model = MODELS["gpt2"]()
    whole = start(model)
    f = Federation(model, SGD, whole, terms=replace(DOUBLE, smoothing=0.1))
    plain = replace(f, terms=DOUBLE).play()
    two, u = f.play(), replace(f, cuts={0: Cut(2, 1)}).play()
    assert two.client().metrics["loss"] == plain.client().metrics["loss"]
    assert_near(two.whole(), u.whole(), 1e-12)
    moved = gradient(plain.whole(), two.whole())
    assert max(float(t.abs().max()) for t in moved.values()) > 1e-6


def test_a_token_that_the_model_lacks_costs_a_client_its_step() -> None:
    model = MODELS["llama"](double=False)
    held = {0: examples(6), 1: [*examples(5, seed=1), example([1, 39, 40, 0])]}
    f = Federation(model, PLAN, start(model), (0, 1), held=held)
    outcome = f.play()
    assert any("client 1 loses step" in line and "IndexError" in line for line in f.said)
    assert outcome.client(0).metrics["dropped_steps"] == 0
