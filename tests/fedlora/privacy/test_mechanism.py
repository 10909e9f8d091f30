"""Noise, sampling, the adaptive clip and the accounts, each against its formula."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.core.config import build
from fedlora.core.errors import ConfigError, RunError
from fedlora.core.types import Client, Ranks
from fedlora.population.sampling import poisson
from fedlora.privacy.adaptive import Adaptive, counted
from fedlora.privacy.client import ClientLevel, ClientPrivacy, Release, StandsFor
from fedlora.privacy.noise import Noise, coefficients, noised, shapes_of
from fedlora.server.postprocess import Moment
from tests.fedlora.privacy.rosters import roster

HERE = Path("unused")
FIXED_CLIP = ClientLevel(epsilon=0, sigma=1.0, clip=0.5, adaptive=None)
ZERO = {"a": torch.zeros(700, 900), "b": torch.zeros(400, 925, dtype=torch.float64)}


def privacy(
    spec: ClientLevel = FIXED_CLIP, trainable: int = 12, per_round: int = 4, folder: Path = HERE
) -> ClientPrivacy:
    return ClientPrivacy(spec, roster(trainable, per_round, apart=3), 7, 10, folder)


def released(run: ClientPrivacy, round: int) -> torch.Tensor:
    """All the noise of a round that no client took part in, as one row."""
    release = run.release(round)
    found = release.whole(ZERO, release.weight(0.0), Moment(7, round))
    return torch.cat([found[n].double().reshape(-1) for n in sorted(found)])


# --- noise ------------------------------------------------------------------------


def test_noise_has_the_moments_of_its_formula_and_is_a_function_of_the_round() -> None:
    one, two = (released(privacy(), t) for t in (1, 2))
    std, n = 0.5, len(one)
    assert n == 10**6
    for x in (one, two):
        assert float(x.std()) == pytest.approx(std, rel=0.005)
        assert abs(float(x.mean())) <= 4 * std / math.sqrt(n)
        assert float(((x / std) ** 4).mean()) == pytest.approx(3, abs=0.02)
    assert abs(float(torch.corrcoef(torch.stack([one, two]))[0, 1])) <= 4 / math.sqrt(n)
    assert torch.equal(one, released(privacy(), 1))  # a run that was resumed draws it again
    other = ClientPrivacy(FIXED_CLIP, roster(), 8, 10, HERE)
    assert not torch.equal(one, released(other, 1))


def test_the_mean_of_a_run_that_stands_for_a_larger_one_has_the_larger_ones_noise() -> None:
    spec = replace(FIXED_CLIP, stands_for=StandsFor(cohort=5000, population=1_000_000))
    run = privacy(spec)
    mean = released(run, 1) / run.release(1).weight(0.0)
    assert float(mean.std()) == pytest.approx(1.0 * 0.5 / 5000, rel=0.005)
    assert run.releases.rate == 0.005
    assert "as if 5,000 of 1,000,000" in "".join(run.statement(lambda: ZERO)).lower()
    plain = privacy()
    assert plain.releases.rate == 4 / 12  # of those that can train, not of all 15


def test_dtype_and_names_of_a_sum_stay() -> None:
    total = {"z": torch.ones(2, 3), "a": torch.ones(2, dtype=torch.float64)}
    found = noised(total, Noise(1).of(1, shapes_of(total)), 0.1)
    assert list(found) == ["z", "a"]
    assert all(found[n].dtype == t.dtype and found[n].shape == t.shape for n, t in total.items())


# --- banded noise ------------------------------------------------------------------------


def matrix(bands: int, rounds: int) -> np.ndarray:
    c = coefficients(bands) + [0.0] * rounds
    return np.array([[c[t - s] if s <= t else 0.0 for s in range(rounds)] for t in range(rounds)])


@pytest.mark.parametrize("bands", [1, 3, 4])
def test_banded_noise_is_the_inverse_of_its_matrix(bands: int) -> None:
    """Every round is ``(C⁻¹ Z)_t`` of the same ``Z``, and a resumed run draws the same."""
    rounds, shapes = 9, (("x", (5, 2)),)
    c = matrix(bands, rounds)
    assert np.allclose(np.linalg.norm(c, axis=0)[: rounds - bands + 1], 1)
    assert all(not c[:, s] @ c[:, t] for s in range(rounds) for t in range(s + bands, rounds))
    z = torch.stack([dict(Noise(4).of(t, shapes))["x"] for t in range(1, rounds + 1)])
    want = torch.einsum("ts,sij->tij", torch.from_numpy(np.linalg.inv(c)), z)
    whole = Noise(4, bands)
    got = torch.stack([dict(whole.of(t, shapes))["x"].clone() for t in range(1, rounds + 1)])
    assert torch.allclose(got, want, rtol=1e-12, atol=1e-12)
    assert torch.equal(dict(Noise(4, bands).of(7, shapes))["x"], got[6])
    if bands == 1:
        assert torch.equal(got, z)


def test_the_covariance_of_banded_noise_over_rounds_is_that_of_the_matrix() -> None:
    rounds, noise = 4, Noise(2, 3)
    shapes = (("x", (400_000,)),)
    y = torch.stack([dict(noise.of(t, shapes))["x"].clone() for t in range(1, rounds + 1)])
    c = matrix(3, rounds)
    want = np.linalg.inv(c.T @ c)
    got = torch.cov(y).numpy()
    assert np.abs(got - want).max() <= 0.02 * want.max()


def test_bands_refuse_changes_of_other_shapes() -> None:
    noise = Noise(2, 3)
    dict(noise.of(1, (("a", (2,)),)))
    with pytest.raises(RunError, match="noise=gaussian"):
        dict(noise.of(2, (("b", (2,)),)))


def test_under_bands_a_client_takes_part_every_so_many_rounds_at_most() -> None:
    spec = replace(FIXED_CLIP, noise="banded", bands=3)
    run = privacy(spec, trainable=30, per_round=5)
    assert run.actual_rate == 0.5
    assert run.cohort_size == 5
    rounds = [{c.id for c in run.cohort(run.roster, 7, t)} for t in range(1, 31)]
    assert all(a.isdisjoint(b | c) for a, b, c in zip(rounds, rounds[1:], rounds[2:], strict=False))
    assert 3 <= sum(map(len, rounds)) / 30 <= 7
    assert (run.releases.rate, run._events(9)) == (0.5, 3)
    assert privacy(spec, trainable=12, per_round=5).cohort_size == 4  # a third of all, each time


# --- sampling ------------------------------------------------------------------------


def test_clients_are_sampled_independently_at_the_rate() -> None:
    people, rate, rounds = roster(20, 5, apart=4), 0.25, 4000
    taken = np.zeros((rounds, 24))
    for t in range(rounds):
        taken[t, [c.id for c in poisson(people, 3, t + 1, rate)]] = 1
    assert not taken[:, 20:].any()
    taken = taken[:, :20]
    deviation = math.sqrt(rate * (1 - rate) / rounds)
    assert np.abs(taken.mean(0) - rate).max() <= 4 * deviation
    pairs = np.cov(taken.T)[~np.eye(20, dtype=bool)]
    assert np.abs(pairs).max() <= 4.5 * rate * (1 - rate) / math.sqrt(rounds)
    sizes = taken.sum(1)
    assert sizes.mean() == pytest.approx(5, abs=4 * math.sqrt(3.75 / rounds))
    assert sizes.var() == pytest.approx(3.75, rel=0.15)
    assert sizes.min() < 5 < sizes.max()


# --- the adaptive clip ------------------------------------------------------------------------


@pytest.mark.parametrize("first", [0.1, 10.0])
@pytest.mark.parametrize("quantile", [0.5, 0.8])
def test_the_clip_reaches_the_quantile_of_the_norms(first: float, quantile: float) -> None:
    rng, clip = np.random.default_rng(0), first
    norms = np.exp(rng.normal(0, 0.5, 400))
    adaptive = Adaptive(quantile=quantile)
    for t in range(200):
        drawn = rng.choice(norms, 80, replace=False)
        clip = adaptive.moved(clip, counted(clip, drawn), 80, 0.0, seed=1, round=t + 1)
    assert (norms <= clip).mean() == pytest.approx(quantile, abs=0.06)


def test_a_client_that_is_missing_counts_as_neither_short_nor_long() -> None:
    def after(*norms: float) -> float:
        return Adaptive(quantile=0.5).moved(1.0, counted(1.0, norms), 10, 0.0, 1, 1)

    assert after() == 1.0
    assert after(0.5, 2.0) == 1.0
    assert after(0.5) == pytest.approx(math.exp(-0.2 * 0.05))
    assert after(0.5) < 1 < after(2.0)


@given(st.floats(0.3, 5), st.integers(4, 500))
@settings(derandomize=True, max_examples=30)
def test_count_and_changes_together_are_one_gaussian_of_the_multiplier(z: float, m: int) -> None:
    adaptive = Adaptive()
    sigma, left = adaptive.noise(z, m), adaptive.left_for_changes(z, m)
    assert left**-2 + (2 * sigma) ** -2 == pytest.approx(z**-2)
    assert left <= 1.04 * z


def test_the_spec_of_the_page_costs_half_a_percent() -> None:
    assert Adaptive().left_for_changes(0.824, 80) == pytest.approx(0.8284, abs=1e-3)


# --- the books ------------------------------------------------------------------------


def test_a_resumed_run_goes_on_with_its_clip_its_noise_and_its_epsilon(tmp_path: Path) -> None:
    spec = ClientLevel(epsilon=4.0, clip=1.0)
    whole, norms = privacy(spec, folder=tmp_path), [0.1, 0.4, 3.0]

    def step(run: ClientPrivacy, t: int) -> tuple[float, dict[str, float | int | str]]:
        release = run.release(t)
        for i, n in enumerate(norms):
            release.each({"x": torch.full((1,), n)}, Client(i, Ranks({"q": 1}), 1), Moment(7, t))
        run.released(release)
        return release.std, run.record(t)

    seen = [step(whole, t) for t in (1, 2, 3)]
    cut = ClientPrivacy(spec, whole.roster, 7, 20, tmp_path)  # asked for more rounds
    assert cut.multiplier > whole.multiplier
    first = privacy(spec, folder=tmp_path)
    assert step(first, 1) == seen[0]
    cut.restore(first.saved())
    assert [step(cut, t) for t in (2, 3)] == seen[1:]
    assert 0 < seen[0][1]["privacy/epsilon"] < seen[2][1]["privacy/epsilon"] <= 4.0  # type: ignore[operator]
    assert len({clip for clip, _ in seen}) == 3


def test_the_run_ends_before_the_round_that_would_exceed_the_budget(tmp_path: Path) -> None:
    run = privacy(replace(FIXED_CLIP, max_epsilon=6.0), folder=tmp_path)
    done = next(t for t in range(100) if run.exhausted(t))
    assert run.epsilon(done) <= 6.0 < run.epsilon(done + 1)
    assert done > 1
    assert "above 6" in run.exhausted(done)
    run.aborted()
    assert run.exhausted(done - 1)
    assert run.record(1)["privacy/epsilon"] == run.epsilon(2)
    later = privacy(replace(FIXED_CLIP, max_epsilon=6.0), folder=tmp_path)
    assert later.exhausted(done - 1), "the aborted round is forgotten"
    calibrated = privacy(ClientLevel(epsilon=2.0, clip=1.0), folder=tmp_path / "other")
    assert not calibrated.exhausted(9)
    assert calibrated.exhausted(10)


def test_what_is_claimed_names_what_is_not_covered() -> None:
    said = " ".join(privacy(ClientLevel(epsilon=2.0, clip=1.0)).statement(lambda: ZERO))
    for part in ("delta 1e-05", "10 rounds", "4 of 12", "Not covered", "seed", "dp-accounting"):
        assert part in said
    count = sum(x.numel() for x in ZERO.values())
    sigma = privacy().multiplier
    _, ratio, _ = privacy().statement(lambda: ZERO)
    assert f"norm {sigma * math.sqrt(count) / 4:.3g} clips" in ratio
    nothing = privacy(replace(FIXED_CLIP, sigma=0)).statement(lambda: ZERO)
    assert len(nothing) == 1
    assert "no guarantee" in nothing[0]
    fixed = " ".join(privacy(replace(FIXED_CLIP, sampling="fixed")).statement(lambda: ZERO))
    assert "replaced by another" in fixed and "Rényi" in fixed


def test_the_noise_of_fixed_cohorts_is_accounted_over_twice_the_clip() -> None:
    run = privacy(replace(FIXED_CLIP, sampling="fixed"))
    assert run.epsilon(5) > privacy().epsilon(5)
    assert len(run.cohort(run.roster, 7, 1)) == 4


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"epsilon": 1, "sigma": 1}, "set one of them to 0"),
        ({"delta": 0}, "privacy.delta"),
        ({"clip": 0}, "privacy.clip"),
        ({"clip": math.inf}, "bounds nothing"),
        ({"bands": 2}, "noise=banded"),
        ({"noise": "banded", "sampling": "fixed"}, "sampling=poisson"),
        ({"noise": "banded", "bands": 2}, "adaptive=null"),
        ({"sampling": "all"}, "privacy.sampling"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, object], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        build({"_target_": "fedlora.privacy.client.ClientLevel"} | settings, ClientLevel, "privacy")


def test_a_count_that_eats_the_budget_and_a_budget_below_one_round_are_refused() -> None:
    with pytest.raises(ValueError, match="count_sigma"):
        privacy(replace(FIXED_CLIP, adaptive=Adaptive(count_sigma=0.4)))
    with pytest.raises(ValueError, match=r"privacy\.max_epsilon=0\.1 is below"):
        privacy(replace(FIXED_CLIP, max_epsilon=0.1))
    with pytest.raises(ValueError, match=r"stands_for"):
        StandsFor(cohort=5)


def test_a_release_is_the_same_however_often_it_is_asked() -> None:
    run = privacy()
    one, two = run.release(3), run.release(3)
    assert isinstance(one, Release)
    a, b = (r.whole({"x": torch.zeros(4)}, 4.0, Moment(7, 3))["x"] for r in (one, two))
    assert torch.equal(a, b)
