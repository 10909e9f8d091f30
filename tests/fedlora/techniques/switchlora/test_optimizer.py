"""I4, I5, I9: AdamW by vector."""

import pytest
import torch
from torch import nn

from fedlora.core.seeding import torch_generator
from fedlora.techniques.switchlora.optimizer import RowAdamW

SHAPES = {"a": (4, 7), "b": (6, 4), None: (5,)}


def parameters(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    g = torch_generator(0, "test-rows")
    return [nn.Parameter(torch.randn(s, generator=g, dtype=dtype)) for s in SHAPES.values()]


def rows(ps: list[nn.Parameter], **options) -> RowAdamW:
    return RowAdamW(
        [{"params": [p], "side": s} for p, s in zip(ps, SHAPES, strict=True)], **options
    )


def give_gradients(ps: list[nn.Parameter], t: int) -> None:
    g = torch_generator(t, "test-gradients")
    for p in ps:
        p.grad = torch.randn(p.shape, generator=g, dtype=torch.float64).to(p.dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_without_resets_it_is_adamw(dtype, tolerance, decay):
    mine, theirs = parameters(dtype), parameters(dtype)
    one = rows(mine, lr=0.02, weight_decay=decay)
    two = torch.optim.AdamW(theirs, lr=0.02, weight_decay=decay)
    for t in range(20):
        for ps, optimizer in ((mine, one), (theirs, two)):
            give_gradients(ps, t)
            optimizer.step()
    for p, q in zip(mine, theirs, strict=True):
        assert float((p - q).detach().abs().max()) < tolerance


@pytest.mark.parametrize(("which", "side"), [(0, "a"), (1, "b")])
def test_a_reset_is_of_these_vectors_alone(which, side):
    ps = parameters()
    optimizer = rows(ps, lr=0.02)
    for t in range(3):
        give_gradients(ps, t)
        optimizer.step()
    before = {k: v.clone() for k, v in optimizer.state[ps[which]].items()}
    optimizer.reset(ps[which], side, [1, 3])
    for name, t in optimizer.state[ps[which]].items():
        now, was = (x if side == "a" else x.t() for x in (t, before[name]))
        assert not now[[1, 3]].any(), name
        assert torch.equal(now[[0, 2]], was[[0, 2]]), name


@pytest.mark.parametrize("held", [False, True])
def test_the_first_steps_after_a_freeze(held):
    """Steps that are counted while frozen damp the first real ones; a constant gradient of 1."""
    p = nn.Parameter(torch.zeros(2, 1, dtype=torch.float64))
    optimizer = RowAdamW([{"params": [p], "side": "a"}], lr=1.0)
    optimizer.reset(p, "a", [0])
    moves = []
    for t in range(9):
        before = float(p[0].detach())
        p.grad = torch.tensor([[0.0 if t < 5 else 1.0], [1.0]], dtype=torch.float64)
        if held and t < 5:
            optimizer.hold(p, "a", [0])
        optimizer.step()
        moves.append(before - float(p[0].detach()))
    assert moves[:5] == [0.0] * 5
    extra = 0 if held else 5
    first = [(1 - 0.9**j) / (1 - 0.9 ** (j + extra)) for j in range(1, 5)]
    second = [(1 - 0.999**j) / (1 - 0.999 ** (j + extra)) for j in range(1, 5)]
    assert moves[5:] == pytest.approx([m / v**0.5 for m, v in zip(first, second, strict=True)])
    assert float(p[1].detach()) == pytest.approx(-9.0, abs=1e-6)


def test_its_state_goes_round():
    ps = parameters()
    optimizer = rows(ps, lr=0.02)
    give_gradients(ps, 0)
    optimizer.step()
    again = rows([nn.Parameter(p.detach().clone()) for p in ps], lr=0.02)
    again.load_state_dict(optimizer.state_dict())
    for one, two in zip(optimizer.state.values(), again.state.values(), strict=True):
        for name, t in one.items():
            assert torch.equal(t, two[name])
            assert t.dtype == two[name].dtype
