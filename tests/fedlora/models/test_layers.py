"""Dropout by 16-bit words: the right rate, unbiased, a function of its seed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.models.layers import dropout, dropout_bits

LAWS = settings(derandomize=True, deadline=None, max_examples=25)


def bits(n: int, seed: int = 0) -> torch.Tensor:
    (drawn,) = dropout_bits(n, [1], seed, torch.device("cpu"))
    return drawn


@LAWS
@given(p=st.floats(0.01, 0.9), seed=st.integers(0, 2**32))
def test_drops_its_share_and_keeps_the_mean(p, seed):
    n = 40_001  # no multiple of the four numbers in a word
    y = dropout(torch.ones(n, 1, dtype=torch.float64), p, bits(n, seed))
    spread = 5 * (p * (1 - p) / n) ** 0.5
    assert abs(float((y == 0).double().mean()) - p) < spread + 2**-16
    assert abs(float(y.mean()) - 1) < spread / (1 - p)
    assert len(y.unique()) == 2


def test_neighbours_drop_independently():
    n = 200_000
    gone = (dropout(torch.ones(n), 0.5, bits(n)) == 0).double()
    for lag in range(1, 9):
        both = float((gone[lag:] * gone[:-lag]).mean())
        assert abs(both - 0.25) < 0.006, lag


def test_a_gradient_passes_where_the_value_did():
    x = torch.ones(3, 5, dtype=torch.float64, requires_grad=True)
    y = dropout(x, 0.4, bits(15))
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


@pytest.mark.parametrize(("p", "expected"), [(0.0, 1.0), (1e-9, 1.0), (1.0, 0.0)])
def test_extreme_rates(p, expected):
    torch.testing.assert_close(dropout(torch.ones(4), p, bits(4)), torch.full((4,), expected))
