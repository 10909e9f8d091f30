"""F3, F7, I6 under federation: what is not sent is the same everywhere, bit by bit."""

import dataclasses

import pytest
import torch

from fedlora.seeding import torch_generator
from fedlora.switch.layer import SIDES
from fedlora.switch.replica import (
    ALTERNATE,
    PRODUCT,
    News,
    Replica,
    Timetable,
    news,
    remembered,
    residual,
)
from fedlora.types import Ranks, Switching
from tests.generators import ROOMY

RANKS = Ranks({m.path: 4 for m in ROOMY})
OFTEN = Switching(interval=10.0, ratio=10.0)
MODES = [ALTERNATE, PRODUCT]


def timetable(mode: str = ALTERNATE, switching: Switching = OFTEN) -> Timetable:
    return Timetable(mode, switching, steps=3, rounds=40, seed=3)


def replica(mode: str = ALTERNATE, switching: Switching = OFTEN) -> Replica:
    return Replica.begin(ROOMY, RANKS, 2.0, timetable(mode, switching))


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
        self.history = remembered(self.replica.state() | self.history, done, result)
        return result

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
        assert found.numbers == sum(server.news(k).numbers for k in range(known - 1, known)) + (
            server.news(0).numbers - server.news(known - 1).numbers
        )
        copy = Replica.load(late.state(), 2.0, timetable(mode))
        assert copy.take(found).digest() == server.replica.digest()
    assert whole is not None and whole > 2, "a replay never costs more than the state"
    assert late.take(server.news(0)).digest() == server.replica.digest()
    stored = sum(t.numel() for t in server.history.values())
    assert stored <= found.numbers, "the server keeps more than anybody would be sent"


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


@pytest.mark.parametrize("choice", ["ring", "random"])
def test_an_exchange_between_rounds_changes_no_layer(choice):
    of = replica(switching=dataclasses.replace(OFTEN, choice=choice))
    for layer in of.layers.values():
        layer.weight, layer.a, layer.b = (t.double() for t in (layer.weight, layer.a, layer.b))
        layer.pools = {side: pool.double() for side, pool in layer.pools.items()}
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
