"""Epsilon against a closed form and against another library's accountant, and how it moves."""

import math

import pytest

from fedlora.privacy import account
from fedlora.privacy.account import Releases, calibrated, gaussian_epsilon

pytestmark = pytest.mark.skipif(
    account.library() is None, reason="dp-accounting is not installed: pip install fedlora[privacy]"
)
DELTA = 1e-5


def balle_wang(z: float, delta: float) -> float:
    """``ε`` of one Gaussian release: the root of ``δ = Φ(1/2z - εz) - e^ε Φ(-1/2z - εz)`` (Balle
    and Wang, ICML 2018, Theorem 8)."""
    phi = lambda x: 0.5 * math.erfc(-x / math.sqrt(2))

    def spent(e: float) -> float:
        return phi(0.5 / z - e * z) - math.exp(e) * phi(-0.5 / z - e * z)

    low, high = 0.0, 100.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) > delta else (low, middle)
    return high


@pytest.mark.parametrize("z", [0.7, 1.0, 4.0])
def test_one_release_to_all_is_the_closed_form(z: float) -> None:
    releases, exact = Releases(z, 1.0), balle_wang(z, DELTA)
    assert exact - 1e-9 <= releases.epsilon(1, DELTA) <= exact * (1 + 1e-4)
    fine = account._epsilon(releases, 1, DELTA, 1e-4)
    assert exact - 1e-9 <= fine <= exact * (1 + 1e-6)


def opacus(z: float, q: float, count: int) -> float:
    prv = pytest.importorskip("opacus.accountants").PRVAccountant()
    prv.history = [(z, q, count)]
    return float(prv.get_epsilon(DELTA, eps_error=1e-3, delta_error=1e-8))


def agree(z: float, q: float, count: int) -> None:
    """Both bound the same number from above; opacus states its own error."""
    found, other = Releases(z, q).epsilon(count, DELTA), opacus(z, q, count)
    assert other - 2.5e-3 <= found <= other * (1 + 1e-3)


def test_a_second_accountant_agrees() -> None:
    agree(1.0, 0.25, 20)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("z", [0.8, 1.0, 2.0])
@pytest.mark.parametrize("q", [0.01, 1 / 18])
@pytest.mark.parametrize("count", [20, 200])
def test_a_second_accountant_agrees_everywhere(z: float, q: float, count: int) -> None:
    agree(z, q, count)
    dp = account.required()
    rdp = dp.rdp.RdpAccountant()
    rdp.compose(dp.PoissonSampledDpEvent(q, dp.GaussianDpEvent(z)), count)
    assert rdp.get_epsilon(DELTA) >= Releases(z, q).epsilon(count, DELTA)


def test_the_numbers_of_the_specification() -> None:
    assert Releases(1.0, 80 / 1440).epsilon(200, DELTA) == pytest.approx(5.32344, abs=2e-4)
    fixed = Releases(1.0, 80 / 1440, (1440, 80))
    assert fixed.epsilon(200, DELTA) == pytest.approx(68.2, rel=0.01)


def test_epsilon_falls_with_noise_and_grows_with_rate_and_rounds() -> None:
    def of(z: float, q: float, count: int) -> float:
        return Releases(z, q).epsilon(count, DELTA)

    base = of(1.0, 0.2, 10)
    assert of(1.1, 0.2, 10) < base < of(1.0, 0.25, 10)
    assert base < of(1.0, 0.2, 11)
    assert of(1.0, 0.2, 0) == 0
    assert math.isinf(of(0.0, 0.2, 3))
    assert gaussian_epsilon(1.0, 1, DELTA) >= of(1.0, 1.0, 1)


def test_the_calibrated_noise_is_the_least_that_keeps_the_target() -> None:
    z = calibrated(Releases(0.0, 0.25), 10, 2.0, DELTA)
    assert Releases(z, 0.25).epsilon(10, DELTA) <= 2.0
    assert Releases(z - 3e-3, 0.25).epsilon(10, DELTA) > 2.0
