"""I2, I3, I6 on one layer in float64, and what half precision would do to it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.core.seeding import torch_generator
from fedlora.techniques.switchlora.init import SIDES
from fedlora.techniques.switchlora.layer import (
    SwitchLayer,
    begin,
    other,
)


def layer(m: int, n: int, r: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> SwitchLayer:
    g = torch_generator(seed, "test-switch")
    weight = 0.02 * torch.randn(m, n, generator=g, dtype=dtype)
    a, b = torch.empty(r, n, dtype=dtype), torch.empty(m, r, dtype=dtype)
    return begin("w", weight, a, b, alpha=1.0, seed=seed)


def play(of: SwitchLayer, steps: int, choice: str, freeze: int, wanted) -> int:
    """Exchange, move what is not frozen; the number of vectors exchanged."""
    g, done = torch_generator(1, "test-moves"), 0
    for t in range(steps):
        count = min(wanted(t), of.max_switches())
        for side in SIDES:
            due = of.next_slots(side, count)
            assert not set(due) & set(of.frozen_slots(side)), "a frozen vector is exchanged"
            assert of.switch(side, of.choose(side, count, choice, 1, t), freeze) == due
        done += 2 * count
        for side in SIDES:
            move = 0.05 * torch.randn(of.vectors(side).shape, generator=g, dtype=of.a.dtype)
            move[of.frozen_slots(side)] = 0.0
            of.vectors(side).add_(move)
        of.thaw()
    return done


shapes = st.tuples(st.integers(4, 14), st.integers(4, 14))


@settings(max_examples=30, deadline=None)
@given(shapes, st.data(), st.sampled_from(["ring", "random"]), st.integers(0, 3), st.booleans())
def test_exchanges_change_nothing_and_lose_nothing(shape, data, choice, freeze, ordered):
    r = data.draw(st.integers(2, min(shape) - 1))
    of = layer(*shape, r)
    g = torch_generator(2, "test-wanted")
    for t in range(30):  # around the ring several times, often at the cap
        before, ids = of.effective().clone(), {s: list(of.ids[s]) for s in SIDES}
        pools = {s: of.candidates[s].clone() for s in SIDES}
        count = min(int(torch.randint(0, r + 2, (), generator=g)), of.max_switches())
        for side in SIDES:
            mine = of.vectors(side).clone()
            vectors = of.choose(side, count, choice, 1, t)
            slots = of.switch(side, vectors, freeze, ordered=ordered)
            assert len(set(of.ids[side])) == r
            for slot in slots:  # what was trained is in the pool, what is in the slot came from it
                assert torch.equal(of.candidates[side][ids[side][slot]], mine[slot])
                assert torch.equal(of.vectors(side)[slot], pools[side][of.ids[side][slot]])
            gone = {ids[side][slot] for slot in slots}
            for i in set(range(of.num_candidates)) - gone:
                assert torch.equal(of.candidates[side][i], pools[side][i])
        error = (of.effective() - before).abs().max()
        assert float(error) < 1e-14 * max(1.0, float(before.norm()))
        for side in SIDES:
            of.vectors(side).add_(0.05 * torch.randn(of.vectors(side).shape, generator=g))
        of.thaw()


def test_no_frozen_vector_is_exchanged():
    for r in (2, 3, 8, 9):
        of = layer(20, 24, r)
        assert play(of, 200, "ring", 5, lambda t: t % 4) > 0


def test_the_gradient_of_what_is_exchanged_stays_and_its_partner_s_does_not():
    of = layer(12, 15, 6)
    upstream = torch.randn(12, 15, generator=torch_generator(0, "test-gradient")).double()

    def gradients():
        return {
            "a": of.scale * of.b.t() @ upstream,
            "b": (of.scale * upstream @ of.a.t()).t(),
        }

    for side in SIDES:
        before = gradients()
        slots = of.switch(side, of.choose_in_order(side, 2), 5)
        after = gradients()
        assert torch.equal(before[side], after[side])
        changed = (before[other(side)] != after[other(side)]).any(dim=1).nonzero().flatten()
        assert changed.tolist() == sorted(slots)


def test_a_vector_comes_back_as_it_was_trained():
    of = layer(6, 7, 4)
    of.vectors("a")[0] = 7.0
    of.switch("a", of.choose_in_order("a", 1))
    came = []
    for _ in range(2 * of.num_candidates):
        (slot,) = of.switch("a", of.choose_in_order("a", 1))
        came.append(bool((of.vectors("a")[slot] == 7.0).all()))
    assert any(came)


def test_what_is_in_a_slot_cannot_come_in():
    of = layer(6, 7, 4)
    with pytest.raises(ValueError, match=r"w: \[3\] are in slots"):
        of.switch("a", [3])


@pytest.mark.parametrize(
    ("dtype", "low", "high"), [(torch.float32, 0.0, 1e-5), (torch.bfloat16, 0.02, 1.0)]
)
def test_planted_fault_compensation_in_half_precision(monkeypatch, dtype, low, high):
    """What the refusal is for: 500 exchanges on a layer of 96."""
    monkeypatch.setattr("fedlora.techniques.switchlora.layer.check_type", lambda path, dtype: None)
    of = layer(96, 96, 24, dtype=dtype)

    def effective():
        return of.weight.double() + of.scale * of.b.double() @ of.a.double()

    before = effective()
    for _ in range(250):
        for side in SIDES:
            of.switch(side, of.choose_in_order(side, 1))
    drift = float((effective() - before).norm() / before.norm())
    assert low <= drift <= high, drift


def test_a_base_in_half_precision_is_refused():
    with pytest.raises(ValueError, match=r"w: the base is torch.bfloat16.*model.dtype=float32"):
        layer(6, 7, 3, dtype=torch.bfloat16)


def test_state_goes_round():
    one, two = layer(9, 8, 4, seed=1), layer(9, 8, 4, seed=2)
    play(one, 9, "ring", 3, lambda t: 1)
    two.load({k: t.clone() for k, t in one.state().items()})
    for name, t in one.state().items():
        assert torch.equal(t, two.state()[name]), name
    assert two.max_switches() == one.max_switches()
    with pytest.raises(ValueError, match="w: weight is"):
        layer(9, 7, 4).load(one.state())
