"""The clip bounds and is differentiated, the noise is a constant, and no ε is claimed in vain."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.core.config import build
from fedlora.core.errors import ConfigError
from fedlora.core.seeding import torch_generator
from fedlora.privacy import account
from fedlora.split import noise
from fedlora.split.noise import NOT_COVERED, Noise, clip_rows
from tests.generators import seeds

needs_library = pytest.mark.skipif(
    account.library() is None, reason="dp-accounting is not installed: pip install fedlora[privacy]"
)


def hidden(seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    g = torch_generator(seed, "test-hidden")
    return scale * torch.randn(3, 4, 6, generator=g, dtype=torch.float64)


def generator(seed: int = 0) -> torch.Generator:
    return torch_generator(seed, "test-noise")


@given(seeds, st.floats(1e-3, 1e3), st.floats(1e-2, 1e2))
def test_no_row_is_longer_than_the_clip_and_short_rows_stay(seed: int, scale: float, clip: float):
    h = hidden(seed, scale)
    norm = h.norm(dim=-1)
    got = clip_rows(h, clip)
    assert (got.norm(dim=-1) <= clip * (1 + 1e-12)).all()
    assert torch.equal(got[norm < clip], h[norm < clip])
    assert torch.allclose(torch.cosine_similarity(got, h, dim=-1), torch.ones_like(norm))


@pytest.mark.parametrize("clip", [0.5, 2.4, 100.0])
def test_the_gradient_goes_through_the_clip_and_not_through_the_noise(clip: float):
    """gradcheck: analytic against numerical, with the noise drawn anew from one seed each time."""
    h = hidden().requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x: Noise(clip, 0.7)(x, generator()), (h,))
    (plain,) = torch.autograd.grad(clip_rows(h, clip).pow(3).sum(), h)
    seed = (3 * clip_rows(h, clip) ** 2).detach()
    (noisy,) = torch.autograd.grad(Noise(clip, 0.7)(h, generator()), h, seed)
    assert torch.allclose(plain, noisy)


def test_a_row_of_zeros_has_a_gradient():
    h = torch.zeros(2, 3, requires_grad=True)
    Noise(1.0, 0.0)(h).sum().backward()
    assert torch.equal(h.grad, torch.ones(2, 3))


def test_off_is_the_same_tensor():
    h = hidden()
    assert Noise()(h) is h


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_has_its_size_and_is_a_function_of_the_seed(dtype: torch.dtype):
    h = torch.zeros(400, 250, dtype=dtype)
    sent = Noise(clip=3.0, sigma=0.5)(h, generator(1))
    assert sent.dtype == dtype
    assert float(sent.std()) == pytest.approx(1.5, rel=5 / math.sqrt(2e5))
    assert abs(float(sent.mean())) < 5 * 1.5 / math.sqrt(1e5)
    assert torch.equal(sent, Noise(3.0, 0.5)(h, generator(1)))
    assert not torch.equal(sent, Noise(3.0, 0.5)(h, generator(2)))


def test_noise_asks_for_its_generator():
    with pytest.raises(ValueError, match=r"noise\.sigma"):
        Noise(1.0, 1.0)(hidden())


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"clip": -1}, "clip"),
        ({"clip": 1, "sigma": -1}, "sigma"),
        ({"sigma": 1}, "clip"),
        ({"delta": 0}, "delta"),
        ({"delta": 1}, "delta"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, float], what: str):
    with pytest.raises(ConfigError, match=what):
        build({"_target_": "fedlora.split.noise.Noise"} | settings, Noise, "noise")


# ------------------------------------------------------------------------------------- what is said


def test_without_the_library_sigma_stands_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "dp_accounting", None)  # as if it were not installed
    privacy = Noise(2.0, 4.0).privacy(releases=5, rows=10)
    assert privacy.row_epsilon is None and privacy.example_epsilon is None
    assert privacy.accountant == ""
    assert "No epsilon is stated" in privacy.text and "dp-accounting" in privacy.text
    assert "sigma=4" in privacy.text and "epsilon <=" not in privacy.text
    assert NOT_COVERED in privacy.text


@pytest.mark.parametrize("plan", [Noise(), Noise(clip=1.0)])
def test_without_noise_nothing_is_guaranteed(plan: Noise):
    privacy = plan.privacy(releases=5, rows=10)
    assert privacy.row_epsilon is None and "no privacy guarantee" in privacy.text


def test_the_accountant_is_asked_about_sensitivity_2c_and_every_release(
    monkeypatch: pytest.MonkeyPatch,
):
    asked = []

    class Accountant:
        def compose(self, event: float, count: int) -> None:
            asked.append((event, count))

        def get_epsilon(self, delta: float) -> float:
            assert delta == 1e-6
            return float(asked[-1][1])

    fake = SimpleNamespace(
        rdp=SimpleNamespace(RdpAccountant=Accountant), GaussianDpEvent=lambda multiplier: multiplier
    )
    monkeypatch.setitem(sys.modules, "dp_accounting", fake)
    monkeypatch.setattr(noise, "version", lambda name: "0")
    privacy = Noise(clip=2.0, sigma=4.0, delta=1e-6).privacy(releases=5, rows=10)
    assert asked == [(2.0, 5), (2.0, 50)]
    assert (privacy.row_epsilon, privacy.example_epsilon) == (5.0, 50.0)
    for part in (
        "Unit row",
        "Releases of each row: 5",
        "Unit example (10 rows)",
        "delta=1e-06",
        NOT_COVERED,
    ):
        assert part in privacy.text
    nothing = Noise(clip=2.0, sigma=4.0).privacy(releases=0, rows=10)
    assert nothing.row_epsilon == 0.0 and "Nothing was released" in nothing.text


@needs_library
@pytest.mark.parametrize(("sigma", "releases", "rows"), [(8.0, 1, 1), (40.0, 30, 12)])
def test_the_bound_lies_just_above_the_exact_epsilon(sigma: float, releases: int, rows: int):
    """``n`` Gaussian releases are one of ``sqrt(n)`` times the sensitivity (Dong, Roth and Su)."""
    import dp_accounting

    privacy = Noise(1.0, sigma).privacy(releases, rows)
    for found, count in (
        (privacy.row_epsilon, releases),
        (privacy.example_epsilon, releases * rows),
    ):
        exact = dp_accounting.get_epsilon_gaussian(sigma / 2 / math.sqrt(count), 1e-5)
        assert exact <= found <= 1.3 * exact


@needs_library
def test_epsilon_grows_with_releases_and_falls_with_noise():
    few, many = (Noise(1.0, 10.0).privacy(n, 5).row_epsilon for n in (1, 100))
    quiet = Noise(1.0, 20.0).privacy(100, 5).row_epsilon
    assert few < many and quiet < many
    assert Noise(1.0, 10.0).privacy(3, 1).row_epsilon == Noise(9.0, 10.0).privacy(3, 1).row_epsilon
