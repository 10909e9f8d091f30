"""I8: the scale of what is drawn; ranks that cannot switch are refused."""

import math

import pytest
import torch

from fedlora.techniques.switchlora import init
from fedlora.techniques.switchlora.init import (
    GAIN,
    check_rank,
    deviations,
    draw_candidates,
    first_ids,
)
from tests import doctests


@pytest.mark.parametrize(("m", "n", "r", "alpha"), [(384, 512, 64, 1.0), (512, 300, 32, 16.0)])
def test_the_product_has_the_scale_of_a_linear_layer(m, n, r, alpha):
    pool_a, pool_b = draw_candidates(0, "w", m, n, r, alpha=alpha)
    product = alpha / r * pool_b[:r].t() @ pool_a[:r]
    assert 0.95 < float(product.std()) * math.sqrt(3 * n) < 1.05
    sigma_a, sigma_b = deviations(m, n, r, alpha)
    assert sigma_a / sigma_b == pytest.approx((m / n) ** 0.25)
    for pool, sigma in ((pool_a, sigma_a), (pool_b, sigma_b)):
        assert float(pool.abs().max()) <= math.sqrt(3) * sigma * (1 + 1e-6)
        assert float(pool.std()) == pytest.approx(sigma, rel=0.02)


def test_the_paper_s_example():
    a, b = deviations(2048, 768, 128)
    assert (round(a, 3), round(b, 3)) == (0.549, 0.429)
    assert pytest.approx(1 / math.sqrt(3)) == GAIN


def test_pools_are_a_function_of_seed_path_and_turn(tmp_path):
    one = draw_candidates(3, "w", 6, 9, 2)
    for x, y in zip(one, draw_candidates(3, "w", 6, 9, 2, folder=tmp_path / "pools"), strict=True):
        assert torch.equal(x, y)
    assert len(list((tmp_path / "pools").iterdir())) == 2
    for others in (draw_candidates(4, "w", 6, 9, 2), draw_candidates(3, "v", 6, 9, 2)):
        assert not torch.equal(one[0], others[0])
    assert not torch.equal(one[0], draw_candidates(3, "w", 6, 9, 2, turn=1)[0])


def test_the_first_vectors_are_the_last_of_the_pool():
    assert first_ids(7, 4) == ([3, 4, 5, 6], [5, 6, 3, 4])


@pytest.mark.parametrize(("rank", "why"), [(1, "one slot"), (6, "all are in slots"), (9, "6")])
def test_ranks_that_cannot_switch_are_refused(rank, why):
    with pytest.raises(ValueError, match=f"w: rank {rank} cannot switch.*{why}.*2..5"):
        check_rank("w", 6, 9, rank)


def test_examples_in_docstrings():
    assert doctests.run(init) == 1
