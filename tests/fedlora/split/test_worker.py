"""Clients behind messages compute what clients in this process do, wherever they are served."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedlora.core.types import Failure, LocalPlan
from fedlora.models.stages import Stages
from fedlora.split.batches import Seeds
from fedlora.split.client import SplitClient
from fedlora.split.link import MessageLink
from fedlora.split.noise import Noise
from fedlora.split.protocol import Cut, Down, Terms
from fedlora.split.rounds import Finished, Link, run_exchanges
from fedlora.split.server import Rule
from fedlora.wire.rows import Wire
from tests.fedlora.engine.world import SEED, FakeExample, example, examples
from tests.fedlora.split.world import (
    MODELS,
    FakeChannel,
    Federation,
    assert_equal,
    assert_same,
    mean_of_factors,
    start,
)

PLAN = LocalPlan(lr=0.02, steps=3, batch_size=3, dropout=0.1, max_grad_norm=1.0, weight_decay=0.1)
IDS = (0, 1)
COARSE = Terms(
    SEED,
    activations=Wire("int8", group=8, stochastic=True),
    gradients=Wire("bf16"),
    noise=Noise(clip=2.0, sigma=0.1),
    smoothing=0.1,
)


def federation(name: str = "gpt2", **more: object) -> Federation:
    model = MODELS[name](double=False)
    f = Federation(model, PLAN, start(model), IDS, average_after=frozenset({2}))
    return replace(f, **more)  # type: ignore[arg-type]


def others(f: Federation, n: int) -> list:  # type: ignore[type-arg]
    """The model as other processes have it."""
    name = "gpt2" if f.model.network.config.model_type == "gpt2" else "llama"
    return [MODELS[name](double=False) for _ in range(n)]


CASES = {
    "plain": {},
    "U-shape": {"cuts": dict.fromkeys(IDS, Cut(1, 1))},
    "U-shape, turns": {"cuts": dict.fromkeys(IDS, Cut(2, 0)), "rule": Rule("sequential")},
    "copies": {"rule": Rule("per_client")},
    "unequal": {"cuts": {0: Cut(0), 1: Cut(3)}, "average_after": frozenset()},
    "coarse": {"terms": COARSE},
    "coarse U-shape": {"terms": COARSE, "cuts": dict.fromkeys(IDS, Cut(1, 1))},
    "mixed precision": {"plan": replace(PLAN, autocast="bf16")},
    "llama": {"name": "llama"},
}


BOTH = ("plain", "U-shape")
WAYS = [(c, keep) for c in CASES for keep in ((False, True) if c in BOTH else (False,))]


@pytest.mark.parametrize(("case", "keep"), WAYS)
def test_messages_change_no_bit(case: str, keep: bool) -> None:
    """Two nodes, two processes that take turns, answers in another order."""
    f = federation(**CASES[case])  # type: ignore[arg-type]
    here = f.play()
    f.terms = replace(f.terms, keep_graphs=keep)
    assert_equal(f.play(f.messages(others(f, 2), nodes=2)), here)
    assert f.said == []


@pytest.mark.parametrize("cut", [Cut(2), Cut(1, 1)], ids=str)
def test_a_graph_that_is_kept_is_not_computed_again(
    cut: Cut, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    forward = SplitClient._forward

    def counted(self: SplitClient, *args: object) -> object:
        calls.append(1)
        return forward(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(SplitClient, "_forward", counted)
    f = federation(cuts=dict.fromkeys(IDS, cut), terms=Terms(SEED, keep_graphs=True))
    f.play(f.messages())
    assert len(calls) == 3 * 2
    f.terms = Terms(SEED)
    f.play(f.messages())
    assert len(calls) == 3 * 2 + 2 * 3 * 2


def test_a_process_does_not_take_a_client_of_an_earlier_round_for_that_of_now() -> None:
    """It kept a graph of a round that ended elsewhere; the next round's client has as many
    exchanges behind it, and even the same steps, since the first one was lost."""
    f = federation(clients=(0,), terms=Terms(SEED, keep_graphs=True))
    link = f.messages(others(f, 2))
    channel = link.channel
    assert isinstance(channel, FakeChannel)
    channel.turn = lambda n: 1 if n == 1 else 0
    link.exchange({0: Down(0, forward=True)})
    again = replace(f, whole=start(f.model, seed=5))
    assert_equal(again.play(MessageLink(channel, again.inits)), again.play())


def test_a_client_goes_on_elsewhere_bit_by_bit() -> None:
    f = federation(average_after=frozenset())
    live = SplitClient(f.stages, f.held[0], f.init(0))
    up = live.receive(Down(0, forward=True))
    answer = f.server()
    answer.store(0, answer.activations(0, up))
    gradient = answer.learn({0: up}, 0.1)[0].gradient
    down = Down(1, gradient=gradient, of=0, rate=0.1, upload=True)
    other = SplitClient(Stages(others(f, 1)[0]), f.held[0], f.init(0))
    other.resume(0, {}, forward=True)
    want, got = live.receive(down), other.receive(down)
    assert want.adapter is not None and got.adapter is not None
    assert_same(want.adapter, got.adapter)
    assert want.grad_norm == got.grad_norm > 0
    planted = SplitClient(f.stages, f.held[0], f.init(0))
    planted._seeds = Seeds(seed=SEED + 1, client=0)
    planted.resume(0, {}, forward=True)
    assert planted.receive(down).grad_norm != want.grad_norm, "other masks would not be seen"


def broken(at: int) -> list[FakeExample]:
    """Examples of a client that raises in one step of its first epoch."""
    return [*examples(at, seed=1), example([1, 39, 99, 5, 0]), *examples(5 - at, seed=2)]


@pytest.mark.parametrize("cut", [Cut(2), Cut(1, 1)], ids=str)
@pytest.mark.parametrize("keep", [False, True], ids=["computed again", "kept"])
def test_a_client_that_raises_is_the_same_client_afterwards(cut: Cut, keep: bool) -> None:
    """It has learned what came with the exchange; the paths do not part."""
    plan = replace(PLAN, steps=6)
    held = {0: examples(9), 1: broken(3)}
    terms = Terms(SEED, keep_graphs=keep)
    f = federation(plan=plan, held=held, terms=terms, cuts=dict.fromkeys(IDS, cut))
    here = f.play()
    told = list(f.said)
    assert any("client 1 loses step" in line for line in told)
    f.said.clear()
    assert_equal(f.play(f.messages(others(f, 2), nodes=2)), here)
    assert f.said == told
    assert here.client(1).metrics["dropped_steps"] == len(told)


def test_a_client_that_no_node_has_opened_fails_alone() -> None:
    f = federation()
    link = f.messages()
    link._opened |= {1}
    answers = link.exchange({i: Down(0, forward=True) for i in IDS})
    assert isinstance(answers[1], Failure)
    assert "client 1 has not been opened on this node" in answers[1].message
    assert not isinstance(answers[0], Failure)


def test_a_node_that_errs_costs_its_clients_that_step() -> None:
    f = federation(average_after=frozenset())
    link = f.messages(nodes=2)
    channel = link.channel
    assert isinstance(channel, FakeChannel)
    asked, count = channel.exchange, []

    def flaky(clients, action, content):  # type: ignore[no-untyped-def]
        count.append(1)
        answers = asked(clients, action, content)
        if len(count) == 2:
            lost = [any(c.id == 1 for c in who) for who, _ in answers]
            found = zip(answers, lost, strict=True)
            answers = [(who, "MemoryError: no" if x else a) for (who, a), x in found]
        return answers

    channel.exchange = flaky  # type: ignore[method-assign]
    outcome = f.play(link)
    assert f.said == ["client 1 loses step 1: WorkerError: MemoryError: no"]
    assert [outcome.client(i).metrics["dropped_steps"] for i in IDS] == [0, 1]
    assert all(np.isfinite(outcome.client(i).metrics["loss"]) for i in IDS)


# --- privacy of what is sent ----------------------------------------------------------------------

SECRET = [37, 21, 33, 29, 38]
"""Tokens of a response that no other example holds in this order."""


def searched(link: Link, pattern: list[int]) -> bool:
    """Whether the tokens cross in any integer type, in any record, either way."""
    assert isinstance(link, MessageLink) and isinstance(link.channel, FakeChannel)
    types = (np.int64, np.int32, np.int16, np.int8)
    needles = [np.array(pattern, dtype=t).tobytes() for t in types]
    needles.append(", ".join(map(str, pattern)).encode())
    assert link.channel.records
    for record in link.channel.records:
        for array in record.array_records["arrays"].values():
            if any(n in array.data for n in needles):
                return True
        for value in record.config_records["split"].values():
            if any(n in str(value).encode() for n in needles):
                return True
    return False


@pytest.mark.parametrize("loss", ["full", "response"])
@pytest.mark.parametrize("cut", [Cut(2), Cut(1, 1), Cut(2, 0)], ids=str)
def test_with_a_u_shape_no_label_leaves_a_client_and_prompts_never_do(cut: Cut, loss: str) -> None:
    """On the bytes of every message. A full loss makes labels of the prompt."""
    plan = replace(PLAN, loss=loss, dropout=0.0)
    asked, answered = [1, 39, 36, 34, 39, 31], SECRET
    held = {0: [example([*asked, *answered, 0], len(asked))] * 3}
    f = federation(clients=(0,), cuts={0: cut}, plan=plan, held=held)
    link = f.messages()
    f.play(link)
    assert searched(link, answered) == (not cut.u_shaped)
    assert searched(link, asked[1:]) == (not cut.u_shaped and loss == "full")
    assert isinstance(link.channel, FakeChannel)
    names = {n for r in link.channel.records for n in r.array_records["arrays"]}
    assert any("labels" in n for n in names) == (not cut.u_shaped)
    assert not searched(link, asked)  # the first token is nobody's label


@pytest.mark.parametrize("cut", [Cut(2), Cut(1, 1)], ids=str)
def test_bytes_that_are_counted_are_those_that_cross(cut: Cut) -> None:
    """The arrays of activations, labels, gradients and averages; what remains is what a node
    that is anybody's needs: starts, optimizers' memory, and headers."""
    f = federation(cuts=dict.fromkeys(IDS, cut))
    link = f.messages()
    outcome = f.play(link)
    assert isinstance(link.channel, FakeChannel)
    up, down = 0, 0
    for n, record in enumerate(link.channel.records):
        for name, array in record.array_records["arrays"].items():
            kind = name.split("/")[1]
            if kind in ("start", "optimizer"):
                continue
            if n % 2:
                up += array.numpy().nbytes
            else:
                down += array.numpy().nbytes
    counted = [outcome.client(i).metrics for i in IDS]
    last = sum(
        4 * t.numel() for i in IDS for x in outcome.client(i).adapter.values() for t in (x.a, x.b)
    )
    assert sum(m["exchanged_up"] for m in counted) == up - last  # an update is counted as one
    assert sum(m["exchanged_down"] for m in counted) == down


def test_states_are_complete() -> None:
    """Nothing that matters stays in a process: each message meets a new one."""
    f = federation()
    here = f.play()
    link = f.messages()
    channel = link.channel
    assert isinstance(channel, FakeChannel)
    fresh = [f.messages().channel.workers[0] for _ in range(16)]  # type: ignore[attr-defined]
    channel.workers = fresh
    assert_equal(f.play(link), here)


def test_an_adapters_wire_rounds_alike_on_both_paths() -> None:
    f = federation()
    here, there = f.local(), f.messages(others(f, 2), nodes=2)
    here = type(here)(f.stages, f.inits, here.examples, "bfloat16")
    assert isinstance(there.channel, FakeChannel)
    there.channel.wire = "bfloat16"
    outcomes = [
        run_exchanges(x, f.server(), f.round_plan(), mean_of_factors) for x in (here, there)
    ]
    for i in IDS:
        a, b = outcomes[0][i], outcomes[1][i]
        assert isinstance(a, Finished) and isinstance(b, Finished)
        assert_same(a.adapter, b.adapter)
        assert a.metrics == b.metrics
        rounded = {p: x.a.to(torch.bfloat16).to(x.a) for p, x in a.adapter.items()}
        assert all(torch.equal(rounded[p], x.a) for p, x in a.adapter.items())
