"""Replies as changes: what rounding loses of them, and what is kept of what it lost."""

import pytest
import torch
from torch import Tensor

from fedlora.wire.change import change, corrected, residual, restored

ROWS, WIDTH = 8, 576


def bf16(t: Tensor) -> Tensor:
    return t.bfloat16().float()


def start_and_change(seed: int = 0) -> tuple[Tensor, Tensor]:
    """``A [8, 576]`` of rows of norm 1 and a change of 0.001 per number."""
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(ROWS, WIDTH, generator=g) / WIDTH**0.5
    return a, 1e-3 * torch.randn(ROWS, WIDTH, generator=g)


def loss(got: Tensor, a: Tensor, d: Tensor) -> float:
    """Relative error of the change that the server sees."""
    return float((got.double() - a.double() - d.double()).norm() / d.double().norm())


def test_bfloat16_loses_little_of_a_change_and_much_of_it_in_a_value() -> None:
    a, d = start_and_change()
    received = bf16(a)  # by the client, which trains from there
    value = bf16(received + d)
    sent = {"w": bf16(change({"w": received + d}, {"w": received})["w"])}
    assert loss(value, a, d) > 0.07
    assert loss(restored(sent, {"w": a})["w"], a, d) < 0.003
    # Added to the rounded start, the way down alone would cost as much as a value does.
    assert loss(restored(sent, {"w": received})["w"], a, d) > 0.05


def test_what_the_start_has_not_is_sent_as_it_is() -> None:
    t = torch.arange(6.0).view(2, 3)
    for start in ({}, {"w": torch.ones(2, 2)}, {"w": torch.ones(6)}):
        assert torch.equal(change({"w": t}, start)["w"], t)
        assert torch.equal(restored({"w": t}, start)["w"], t)


def test_a_pruned_client_sends_the_change_of_its_leading_block() -> None:
    start = {"w/a": torch.randn(4, 5), "w/b": torch.randn(6, 4)}
    sent = {"w/a": torch.randn(2, 5), "w/b": torch.randn(6, 2)}
    moved = change(sent, start)
    assert torch.equal(moved["w/a"], sent["w/a"] - start["w/a"][:2])
    assert torch.equal(moved["w/b"], sent["w/b"] - start["w/b"][:, :2])
    # A number near zero has lost up to the rounding of the change, which is not small beside it.
    assert all(torch.allclose(t, sent[k], atol=1e-6) for k, t in restored(moved, start).items())


@pytest.mark.parametrize("rounds", [1, 7, 40])
def test_what_was_sent_and_what_is_left_is_all_that_was_learnt(rounds: int) -> None:
    g = torch.Generator().manual_seed(rounds)
    e: dict[str, Tensor] = {}
    sent, learnt = torch.zeros(3, 4).double(), torch.zeros(3, 4).double()
    for _ in range(rounds):
        x = {"w": 1e-3 * torch.randn(3, 4, generator=g, dtype=torch.float64)}
        c = {"w": corrected(x, e)["w"].bfloat16().double()}
        e = residual(e, x, c)
        sent, learnt = sent + c["w"], learnt + x["w"]
    assert float((sent + e["w"] - learnt).norm()) <= 1e-12 * float(learnt.norm())


def test_small_changes_add_up_with_feedback_and_are_lost_without() -> None:
    """One number is much larger than the others, and the format has one scale for all."""

    def coarse(t: Tensor) -> Tensor:
        return (t / t.abs().max() * 7).round() * t.abs().max() / 7

    x = {"w": torch.tensor([1.0, 0.02])}
    plain, fed, e = torch.zeros(2), torch.zeros(2), {}
    for _ in range(100):
        plain = plain + coarse(x["w"])
        c = {"w": coarse(corrected(x, e)["w"])}
        e, fed = residual(e, x, c), fed + c["w"]
    assert float(plain[1]) == 0
    assert float(fed[1]) == pytest.approx(2.0, abs=0.2)


def test_what_a_round_does_not_train_is_kept() -> None:
    e = {"w/a": torch.ones(2, 3)}
    after = residual(e, {"w/b": torch.full((2, 2), 1.5)}, {"w/b": torch.ones(2, 2)})
    assert torch.equal(after["w/a"], e["w/a"])
    assert torch.equal(after["w/b"], torch.full((2, 2), 0.5))
