"""Exactly as many go as were asked for, and nothing lower than what went has stayed."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.core.errors import ModelError
from fedlora.prune.pattern import Pattern

RATIOS = st.integers(1, 99).map(lambda percent: f"0.{percent:02d}")


def scores(seed: int, m: int, n: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 6, (m, n), generator=g).double()  # many equal ones


@given(RATIOS, st.integers(1, 7), st.integers(1, 40), st.integers(0, 99))
def test_a_share_of_every_row(ratio: str, m: int, n: int, seed: int) -> None:
    s = scores(seed, m, n)
    kept = Pattern.parse(ratio).kept(s)
    count = math.floor(Fraction(ratio) * n)
    assert ((~kept).sum(1) == count).all()
    for row, keep in zip(s, kept, strict=True):
        if count and count < n:
            assert row[~keep].max() <= row[keep].min()


@given(RATIOS, st.integers(1, 7), st.integers(1, 40), st.integers(0, 99))
def test_a_share_of_the_layer(ratio: str, m: int, n: int, seed: int) -> None:
    kept = Pattern.parse(ratio).kept(scores(seed, m, n), compete="layer")
    assert int((~kept).sum()) == math.floor(Fraction(ratio) * m * n)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (2, 8), (1, 4)])
@pytest.mark.parametrize("compete", ["row", "layer"])
def test_n_of_every_m_stay(n: int, m: int, compete: str) -> None:
    s = scores(1, 5, 3 * m)
    kept = Pattern.parse(f"{n}:{m}").kept(s, compete=compete)
    groups = kept.view(5, 3, m)
    assert (groups.sum(-1) == n).all()
    for g, k in zip(s.view(-1, m), groups.reshape(-1, m), strict=True):
        assert g[~k].max() <= g[k].min()


@pytest.mark.parametrize(
    "text",
    [
        "0",
        "0.0",
        "1",
        "1.5",
        "-0.1",
        "4:2",
        "4:4",
        "0:4",
        "2:",
        ":4",
        "half",
        "2:4:8",
        "nan",
        "1/0",
    ],
)
def test_impossible_patterns_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"pattern=.* must be the fraction .* or N:M"):
        Pattern.parse(text)


def test_a_group_must_divide_the_inputs() -> None:
    with pytest.raises(ModelError, match=r"down_proj: 172 inputs .* groups of 8 \(pattern 2:8\)"):
        Pattern.parse("2:8").check("down_proj", 172)
