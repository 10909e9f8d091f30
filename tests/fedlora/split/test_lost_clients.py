"""Clients that fail, are silent or talk nonsense: they lose a step and are named, nobody else
notices."""

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch

from fedlora.core.types import Adapter, Factors, Failure, LocalPlan
from fedlora.split.batches import Labels, Shape
from fedlora.split.protocol import Cut, Down, Terms, Up
from fedlora.split.rounds import Finished, Link, run_exchanges
from fedlora.split.server import Rule
from fedlora.wire.rows import Wire
from tests.fedlora.engine.world import SEED
from tests.fedlora.split.world import (
    MODELS,
    Federation,
    Outcome,
    assert_equal,
    assert_near,
    assert_same,
    assert_same_state,
    mean_of_factors,
    start,
)

PLAN = LocalPlan(lr=0.02, steps=4, batch_size=3, dropout=0.1, schedule="constant")
BAD = 1
Fault = Callable[[Up], Up | Failure | None]


@dataclass
class Faulty:
    """A link on which the answers of client `BAD` to some exchanges are spoiled."""

    link: Link
    fault: Fault
    when: Callable[[int, Down], bool]
    """By the number of the exchange and what was sent."""
    asked: list[Down] = field(default_factory=list)

    @property
    def wire(self) -> str:
        return self.link.wire

    def exchange(self, downs: Mapping[int, Down]) -> Mapping[int, Up | Failure]:
        answers: dict[int, Up | Failure] = dict(self.link.exchange(downs))
        if BAD in downs:
            up = answers[BAD]
            n = len(self.asked)
            self.asked.append(downs[BAD])
            if self.when(n, downs[BAD]) and isinstance(up, Up):
                spoiled = self.fault(up)
                del answers[BAD]
                if spoiled is not None:
                    answers[BAD] = spoiled
        return answers


def federation(**more: object) -> Federation:
    model = MODELS["gpt2"](double=False)
    f = Federation(model, PLAN, start(model), (0, BAD, 2))
    return replace(f, **more)  # type: ignore[arg-type]


def spoiled(f: Federation, fault: Fault, when: Callable[[int, Down], bool]) -> Outcome:
    f.said.clear()
    return f.play(Faulty(f.local(), fault, when))  # type: ignore[arg-type]


def raises(up: Up) -> Failure:
    return Failure(federation_client(), "MemoryError", "no room")


def federation_client():  # type: ignore[no-untyped-def]
    return federation().init(BAD).client


def hidden(change: Callable[[np.ndarray], np.ndarray]) -> Fault:
    def fault(up: Up) -> Up:
        assert up.hidden is not None
        return replace(up, hidden={"values": change(np.array(up.hidden["values"]))})

    return fault


def nan(values: np.ndarray) -> np.ndarray:
    values[0, 0] = np.nan
    return values


def labels(change: Callable[[Labels], Labels]) -> Fault:
    def fault(up: Up) -> Up:
        assert up.labels is not None
        return replace(up, labels=change(up.labels))

    return fault


def long(up: Up) -> Up:
    """Rows of as many tokens in all, longer than the model's context."""
    assert up.shape is not None
    n = up.shape.tokens
    return replace(up, shape=Shape((n + 40, -40)))


FAULTS: dict[str, tuple[Fault, str]] = {
    "it raises": (raises, "MemoryError: no room"),
    "silence": (lambda up: None, "NoReply: no answer came"),
    "another step": (
        lambda up: replace(up, step=7),
        "ValueError: client 1 answered step 7, was asked for 0",
    ),
    "nothing": (lambda up: replace(up, hidden=None), "client 1 sent no activations"),
    "another wire": (hidden(lambda v: v.astype(np.float64)), "float32"),
    "NaN": (hidden(nan), "not finite"),
    "a row less": (hidden(lambda v: v[:-1]), "client 1 sent activations"),
    "too long": (long, r"the model takes 1\.\.32 in a row"),
    "no rows": (lambda up: replace(up, shape=Shape(())), "rows of "),
    "more rows than a step has": (
        lambda up: replace(up, shape=Shape((1,) * up.shape.tokens)),
        "rows: a step has at most 3 of them",
    ),
    "no labels": (lambda up: replace(up, labels=None), "sent no labels"),
    "a label less": (labels(lambda x: replace(x, targets=x.targets[:-1])), "labels do not fit"),
    "foreign labels": (
        labels(lambda x: replace(x, targets=x.targets + 40)),
        r"a label is not in 0\.\.39",
    ),
    "another count": (lambda up: replace(up, tokens=3), "says that 3 of its tokens have a loss"),
}


@functools.cache
def silent() -> Outcome:
    """A round whose client `BAD` does not answer the first time."""
    return spoiled(federation(), FAULTS["silence"][0], lambda n, _: n == 0)


@pytest.mark.parametrize("kind", FAULTS)
def test_a_bad_answer_costs_its_client_that_step(kind: str) -> None:
    """Whatever is wrong with the first answer: the rest of the round is the same, bit by bit, and
    the others' is as if the client had not been there in that step."""
    f = federation()
    fault, text = FAULTS[kind]
    outcome = spoiled(f, fault, lambda n, _: n == 0)
    (line,) = f.said
    assert line.startswith("client 1 loses step 0: ")
    assert re.search(text, line), line
    assert_equal(outcome, silent())
    assert [outcome.client(i).metrics["dropped_steps"] for i in f.clients] == [0, 1, 0]
    assert [outcome.client(i).metrics["steps"] for i in f.clients] == [4, 3, 4]


@pytest.mark.parametrize("update", ["concat", "sequential", "per_client"])
@pytest.mark.parametrize("cut", [Cut(2), Cut(1, 1)], ids=str)
def test_the_others_go_on_as_if_it_had_never_been_there(update: str, cut: Cut) -> None:
    f = federation(cuts=dict.fromkeys((0, 1, 2), cut), rule=Rule(update))
    outcome = spoiled(f, raises, lambda n, _: True)
    assert isinstance(outcome.found[BAD], Failure)
    assert [line.split(":")[0] for line in f.said] == [
        "client 1 loses step 0",
        "client 1 loses step 1 and is out for the round",
    ]
    without = replace(f, clients=(0, 2)).play()
    for i in (0, 2):
        assert_same(outcome.client(i).adapter, without.client(i).adapter)
        assert_same_state(outcome.client(i).optimizer_state, without.client(i).optimizer_state)
        assert outcome.client(i).metrics == without.client(i).metrics
    for key, trainable in without.server.trainables.items():
        assert_same(outcome.server.trainables[key].adapter(), trainable.adapter())


TAILS: dict[str, Fault] = {
    "it raises": raises,
    "silence": lambda up: None,
    "NaN loss": lambda up: replace(up, loss=float("nan")),
    "NaN": hidden(nan),
    "another shape": hidden(lambda v: v.T.copy()),
    "no gradient": lambda up: replace(up, hidden=None),
}


@pytest.mark.parametrize("kind", TAILS)
def test_a_tail_that_fails_leaves_the_joint_loss_to_the_others(kind: str) -> None:
    """They weigh what they would weigh without it; it is out after two steps, not after four."""
    double = MODELS["gpt2"]()
    terms = Terms(SEED, activations=Wire("fp64"), gradients=Wire("fp64"))
    cuts = dict.fromkeys((0, 1, 2), Cut(1, 1))
    f = federation(model=double, whole=start(double), cuts=cuts, terms=terms)
    outcome = spoiled(f, TAILS[kind], lambda _, down: down.middle is not None)
    assert isinstance(outcome.found[BAD], Failure)
    assert len(f.said) == 2
    without = replace(f, clients=(0, 2)).play()
    for i in (0, 2):
        assert_near(outcome.client(i).adapter, without.client(i).adapter, 1e-9)
    ends = [o.server.trainables[-1].adapter() for o in (outcome, without)]
    assert_near(ends[0], ends[1], 1e-9)


def test_a_client_returns_after_one_miss_and_is_out_after_two_in_a_row() -> None:
    f = federation()
    alternate = spoiled(f, raises, lambda n, _: n in (0, 2))
    assert alternate.client(BAD).metrics["steps"] == 2
    assert isinstance(spoiled(f, raises, lambda n, _: n in (1, 2)).found[BAD], Failure)


def test_a_failure_in_every_step_of_a_short_round_is_said_at_its_end() -> None:
    f = federation(plan=replace(PLAN, steps=1))
    outcome = spoiled(f, raises, lambda n, _: n == 0)
    failure = outcome.found[BAD]
    assert isinstance(failure, Failure)
    assert failure.kind == "NoStep"


def test_a_lost_last_gradient_leaves_what_came_before() -> None:
    """The adapters are asked for once more."""
    f = federation(plan=replace(PLAN, steps=1))
    outcome = spoiled(f, raises, lambda n, _: n == 1)
    assert f.said == ["client 1 loses the gradient of step 0: MemoryError: no room"]
    assert outcome.client(BAD).metrics["grad_norm"] == 0
    assert outcome.client(BAD).metrics["steps"] == 1


def fill(value: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda values: np.full_like(values, value)


@pytest.mark.parametrize("update", ["concat", "sequential", "per_client"])
@pytest.mark.parametrize("cut", [Cut(2), Cut(1, 1)], ids=str)
def test_numbers_that_spoil_the_servers_step_cost_their_client_alone(update: str, cut: Cut) -> None:
    """Finite activations whose squares are not: the others take the step without that client."""
    f = federation(cuts=dict.fromkeys((0, 1, 2), cut), rule=Rule(update))
    outcome = spoiled(f, hidden(fill(3e38)), lambda _, down: down.forward)
    assert isinstance(outcome.found[BAD], Failure)
    assert re.search("client 1 is out for the round: .*client 1", "\n".join(f.said))
    without = replace(f, clients=(0, 2)).play()
    for i in (0, 2):
        assert_same(outcome.client(i).adapter, without.client(i).adapter)
    for key, trainable in without.server.trainables.items():
        assert_same(outcome.server.trainables[key].adapter(), trainable.adapter())


STATES: dict[str, Callable[[Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]]] = {
    "NaN": lambda s: {n: t * float("nan") for n, t in s.items()},
    "1e30": lambda s: {n: t + 1e30 for n, t in s.items()},
    "negative": lambda s: {n: -1 - t.abs() for n, t in s.items()},
    "int64": lambda s: {n: t.to(torch.int64) for n, t in s.items()},
    "short": lambda s: {n: t.reshape(-1)[:0] for n, t in s.items()},
    "another name": lambda s: {f"{n}/x": t for n, t in s.items()},
}


@pytest.mark.parametrize("kind", STATES)
def test_an_optimizer_state_that_is_none_is_not_stored(kind: str) -> None:
    def fault(up: Up) -> Up:
        assert up.optimizer_state is not None
        return replace(up, optimizer_state=STATES[kind](up.optimizer_state))

    outcome = spoiled(federation(), fault, lambda _, down: down.upload)
    assert isinstance(outcome.found[BAD], Failure)
    assert not isinstance(outcome.found[0], Failure)


def test_a_far_move_does_not_reach_an_average_within_the_round() -> None:
    """Of three clients one sends its change a thousandfold."""
    f = federation(average_after=frozenset({2}), norm_factor=50.0)
    starts = f.init(BAD).adapter

    def fault(up: Up) -> Up:
        assert up.adapter is not None
        far = {
            p: Factors(x.a + 1e3 * (x.a - starts[p].a), x.b + 1e3 * (x.b - starts[p].b), x.alpha)
            for p, x in up.adapter.items()
        }
        return replace(up, adapter=far)

    outcome = spoiled(f, fault, lambda _, down: down.upload)
    failure = outcome.found[BAD]
    assert isinstance(failure, Failure)
    assert failure.kind == "RejectedUpdate"
    assert "the median of its round" in failure.message


def spoil(adapter: Adapter | None, kind: str) -> Adapter:
    assert adapter is not None
    path, f = next(iter(adapter.items()))
    if kind == "NaN":
        return {**adapter, path: Factors(f.a * float("nan"), f.b, f.alpha)}
    if kind == "rank":
        return {**adapter, path: Factors(f.a[:1], f.b[:, :1], f.alpha)}
    return {p: x for p, x in adapter.items() if p != path}


@pytest.mark.parametrize("kind", ["NaN", "rank", "missing"])
def test_adapters_that_cannot_be_averaged_do_not_reach_the_average(kind: str) -> None:
    """In the middle of a round; the client is out, and the others' average is their own."""
    f = federation(average_after=frozenset({2}))
    asked = []

    def average(adapters: Mapping[int, Adapter]) -> Mapping[int, Adapter]:
        asked.append(sorted(adapters))
        return mean_of_factors(adapters)

    def fault(up: Up) -> Up:
        return replace(up, adapter=spoil(up.adapter, kind))

    link = Faulty(f.local(), fault, lambda _, down: down.upload)
    found = run_exchanges(link, f.server(), f.round_plan(), average, f.said.append)
    assert asked == [[0, 2]]
    assert isinstance(found[BAD], Failure)
    assert "RejectedUpdate" in f.said[0]
    assert all(isinstance(found[i], Finished) for i in (0, 2))


def test_an_average_that_was_not_delivered_is_sent_again() -> None:
    """A client that missed the exchange after an average still starts from it."""
    plan = replace(PLAN, lr=0.05)
    f = federation(plan=plan, average_after=frozenset({2}))
    delivered: list[Adapter | None] = []

    class Deaf(Faulty):
        def exchange(self, downs: Mapping[int, Down]) -> Mapping[int, Up | Failure]:
            lost = BAD in downs and downs[BAD].adapter is not None and not delivered
            if lost:
                delivered.append(downs[BAD].adapter)
                downs = {i: d for i, d in downs.items() if i != BAD}
            elif BAD in downs and downs[BAD].adapter is not None:
                delivered.append(downs[BAD].adapter)
            return self.link.exchange(downs)

    f.play(Deaf(f.local(), raises, lambda n, _: False))  # type: ignore[arg-type]
    first, second = delivered
    assert first is not None and second is not None
    assert_same(first, second)
    assert f.said == ["client 1 loses step 2: NoReply: no answer came"]


def test_what_was_not_asked_for_is_not_trained_on() -> None:
    """Activations beside the last adapters."""
    f = federation()
    kept: list[Up] = []

    def fault(up: Up) -> Up:
        kept.append(up)
        return replace(up, hidden=kept[0].hidden, shape=kept[0].shape, labels=kept[0].labels)

    outcome = spoiled(f, fault, lambda n, down: n == 0 or not down.forward)
    assert f.said == []
    want = f.play()
    assert_same(outcome.server.trainables[-1].adapter(), want.server.trainables[-1].adapter())


def test_a_client_with_nothing_to_train_on_is_out_and_named() -> None:
    f = federation(held={0: federation().held[0], BAD: [], 2: federation().held[2]})
    round_plan = replace(f.round_plan(), steps=dict.fromkeys(f.clients, 4))
    found = run_exchanges(f.local(), f.server(), round_plan, mean_of_factors, f.said.append)
    failure = found[BAD]
    assert isinstance(failure, Failure)
    assert "client 1 has nothing to train on" in failure.message
    assert isinstance(found[0], Finished)


def test_a_gradient_for_another_step_is_refused() -> None:
    f = federation()
    link = f.local()
    up = link.exchange({0: Down(0, forward=True)})[0]
    assert isinstance(up, Up)
    wrong = link.exchange({0: Down(1, gradient=up.hidden, of=3)})[0]
    assert isinstance(wrong, Failure)
    assert "was sent the gradient of step 3, but step 0 waits for one" in wrong.message
    again = link.exchange({0: Down(1, gradient=up.hidden, of=0)})[0]
    assert isinstance(again, Failure)
    assert "none waits" in again.message


def test_a_loss_that_is_no_number_names_the_client() -> None:
    f = federation(clients=(BAD,))
    server = f.server()
    up = f.local().exchange({BAD: Down(0, forward=True)})[BAD]
    assert isinstance(up, Up)
    server.store(BAD, server.activations(BAD, up))
    server._leaves[BAD].data *= float("inf")
    with pytest.raises(FloatingPointError, match="loss on client 1 is nan"):
        server.learn({BAD: up}, 0.1)
