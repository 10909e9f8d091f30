"""F3, F7, I6 under federation: what is not sent is the same everywhere, bit by bit."""

import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from fedlora.core.seeding import torch_generator
from fedlora.core.types import Ranks
from fedlora.techniques.switchlora.init import SIDES
from fedlora.techniques.switchlora.replica import (
    ALTERNATE,
    PRODUCT,
    News,
    Replica,
    Timetable,
    extend_history,
    news,
    residual,
)
from fedlora.techniques.switchlora.technique import SwitchTraining as Switching
from tests.generators import ROOMY

SHAPES = {m.path: (m.d_out, m.d_in) for m in ROOMY}
RANKS = Ranks({m.path: 4 for m in ROOMY})
OFTEN = Switching(interval=10.0, ratio=10.0)
MODES = [ALTERNATE, PRODUCT]


def timetable(mode: str = ALTERNATE, switching: Switching = OFTEN) -> Timetable:
    return Timetable(mode, switching, steps=3, rounds=40, seed=3)


def replica(mode: str = ALTERNATE, switching: Switching = OFTEN) -> Replica:
    return Replica.begin(SHAPES, RANKS, 2.0, timetable(mode, switching))


def trained(of: Replica) -> dict[str, torch.Tensor]:
    """What a server might make of a round, by replica and round alone."""
    g = torch_generator(1, "test-round", of.round)
    found = {}
    for path, layer in of.layers.items():
        for side in of.timetable.sides(of.round):
            t = getattr(layer, side)
            found[f"{path}/{side}"] = t + 0.1 * torch.randn(t.shape, generator=g)
        if of.timetable.mode == PRODUCT:
            m, n = layer.weight.shape
            found[f"{path}/left"] = torch.randn(m, 2, generator=g)
            found[f"{path}/right"] = torch.randn(2, n, generator=g)
    return found


class Server:
    """A replica with a memory of what it sent."""

    def __init__(self, mode: str) -> None:
        self.replica, self.history = replica(mode), {}

    def round(self) -> dict[str, torch.Tensor]:
        result, done = trained(self.replica), self.replica.round
        self.replica.install(result)
        self.history = extend_history(self.replica.state() | self.history, done, result)
        return result

    def history_of(self, round: int) -> list[torch.Tensor]:
        return [t for k, t in self.history.items() if k.startswith(f"history/{round}/")]

    def news(self, known: int) -> News:
        return news(self.replica.state() | self.history, known)


@pytest.mark.parametrize("mode", MODES)
def test_everybody_holds_the_same_bits_and_the_base_has_moved(mode):
    server, clients = Server(mode), [replica(mode) for _ in range(2)]
    before = {p: x.weight.clone() for p, x in server.replica.layers.items()}
    for _ in range(12):
        result = server.round()
        for client in clients:
            client.install(result)
            assert client.digest() == server.replica.digest()
    for path, layer in server.replica.layers.items():
        assert not torch.equal(layer.weight, before[path])
        for side in SIDES:
            assert len(set(layer.ids[side])) == layer.rank


@pytest.mark.parametrize("mode", MODES)
def test_who_missed_rounds_catches_up_with_the_less_of_both(mode):
    server, late = Server(mode), replica(mode)
    whole = None
    for known in range(1, 40):
        server.round()
        found = server.news(0)
        if found.whole is not None:
            whole = known
            break
        lengths = [sum(t.nbytes for t in server.history_of(k)) for k in range(known)]
        assert found.bytes(4) == sum(lengths)
        copy = Replica.load(late.state(), 2.0, timetable(mode))
        assert copy.take(found).digest() == server.replica.digest()
    assert whole is not None and whole > 2, "a replay never costs more than the state"
    assert late.take(server.news(0)).digest() == server.replica.digest()
    stored = sum(t.nbytes for t in server.history.values())
    assert found.bytes(4) == sum(t.nbytes for t in server.replica.state().values())
    assert stored <= found.bytes(4), "the server keeps more than anybody would be sent"


@pytest.mark.parametrize("name", ["weight", "a", "b", "pool_a", "pool_b", "ids_a", "pointers"])
def test_a_corrupt_number_is_detected_and_repaired(name):
    server, client = Server(ALTERNATE), replica()
    client.install(server.round())
    assert client.digest() == server.replica.digest()
    state = client.state()
    key = f"layer/{ROOMY[1].path}/{name}"
    broken = state[key].clone()
    flat = broken.view(-1)
    flat[0] = flat[0] + 1 if not broken.is_floating_point() else flat[0] * (1 + 1e-6)
    client = Replica.load({**state, key: broken}, 2.0, timetable())
    assert client.digest() != server.replica.digest()
    whole = News(whole=server.replica.state())
    assert client.take(whole).digest() == server.replica.digest()


def test_a_state_is_complete_and_not_touched():
    one = replica()
    state = one.state()
    before = {k: t.clone() for k, t in state.items()}
    two = Replica.load(state, 2.0, timetable())
    two.install(trained(two))
    for name, t in state.items():
        assert torch.equal(t, before[name]), name
    one.install(trained(one))
    assert one.digest() == two.digest()


@pytest.mark.parametrize("r", [2, 3, 8, 16])
@pytest.mark.parametrize("mode", MODES)
def test_as_many_are_exchanged_as_the_schedule_says(mode, r):
    """I7 under federation: alone, the steps until a factor's next turn would exchange as many."""
    rounds, steps, ratio = 150, 3, 0.5
    turns = 2 if mode == ALTERNATE else 1
    most = max(1, r // 4)
    interval = turns * steps * r / (0.9 * most)
    plan = Timetable(mode, Switching(interval, ratio, freeze=0), steps, rounds, seed=5)
    names = [f"w{i}" for i in range(4)]
    of = Replica.begin(dict.fromkeys(names, (24, 20)), dict.fromkeys(names, r), 1.0, plan)
    for _ in range(rounds - 1):
        sides = plan.sides(of.round)
        of.install({f"{p}/{s}": getattr(x, s).clone() for p, x in of.layers.items() for s in sides})
    decay = [0.3 ** ((t * steps + 1) / (ratio * rounds * steps)) for t in range(rounds)]
    sides = 1 if mode == ALTERNATE else 2
    wanted = sides * len(names) * sum(0.9 * most * d for d in decay)
    spread = sides * (len(names) * rounds * 0.25) ** 0.5
    assert abs(of.exchanged - wanted) < 4 * spread
    assert abs(of.exchanged - wanted) < 0.2 * wanted


PROGRAM = """
from tests.fedlora.techniques.switchlora.test_replica import wide
print(wide().digest())
"""


def wide() -> Replica:
    """Some rounds of layers whose sides are no multiple of a vector register."""
    shapes = {"w": (203, 131), "v": (96, 160)}
    plan = Timetable(PRODUCT, Switching(10.0, 10.0), steps=20, rounds=9, seed=1)
    of, g = Replica.begin(shapes, {"w": 24, "v": 17}, 3.0, plan), np.random.default_rng(0)
    for _ in range(3):
        found = {}
        for path, layer in of.layers.items():
            sizes = {"a": layer.a.shape, "b": layer.b.shape}
            sizes |= {"left": (len(layer.b), 5), "right": (5, layer.a.shape[1])}
            for name, size in sizes.items():
                found[f"{path}/{name}"] = torch.from_numpy(g.random(tuple(size), np.float32))
        of.install(found)
    return of


def test_other_instruction_sets_give_the_same_bits():
    """A matrix product, a fused multiplication or PyTorch's uniform draws would not."""
    others = {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, **others},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == wide().digest()


@pytest.mark.parametrize("choice", ["ring", "random"])
def test_an_exchange_between_rounds_changes_no_layer(choice):
    of = replica(switching=dataclasses.replace(OFTEN, choice=choice))
    for layer in of.layers.values():
        layer.weight, layer.a, layer.b = (t.double() for t in (layer.weight, layer.a, layer.b))
        layer.candidates = {side: pool.double() for side, pool in layer.candidates.items()}
    moved = 0
    for _ in range(10):
        result = {k: t.double() for k, t in trained(of).items()}
        wanted = {}
        for path, layer in of.layers.items():
            a, b = (result.get(f"{path}/{s}", getattr(layer, s)) for s in SIDES)
            wanted[path] = layer.weight + layer.scale * b @ a
        ids = {p: dict(x.ids) for p, x in of.layers.items()}
        of.install(result)
        for path, layer in of.layers.items():
            assert float((layer.effective() - wanted[path]).abs().max()) < 1e-13
            moved += layer.ids != ids[path] or layer.pointers != {"a": 0, "b": 2}
    assert moved


def test_sides_alternate_and_counts_are_capped():
    table = timetable(switching=dataclasses.replace(OFTEN, freeze=0, interval=0.5))
    assert [table.sides(t) for t in range(3)] == [("a",), ("b",), ("a",)]
    assert timetable(PRODUCT).sides(5) == SIDES
    for layer in replica().layers.values():
        assert table.count(layer, 0) == 1  # a quarter of four slots


def test_a_residual_is_a_product_in_a_fixed_order():
    g = torch_generator(0, "test-rest")
    left, right = torch.randn(5, 3, generator=g), torch.randn(3, 4, generator=g)
    assert residual({"a": left}) is None
    torch.testing.assert_close(residual({"left": left, "right": right}), left @ right)
