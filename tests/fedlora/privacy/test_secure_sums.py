"""Privacy of clients in secure sums: rounding stays within the clip, noise and denominator are as
in a private sum, and the protocol gives the state of its simulation."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fedlora.algebra.summand import dense, norm, total
from fedlora.core.errors import RunError
from fedlora.core.types import LocalPlan, Update
from fedlora.population.sampling import outside, poisson
from fedlora.privacy.adaptive import Adaptive, counted
from fedlora.privacy.client import ABORTED, ClientLevel, ClientPrivacy, Release, StandsFor
from fedlora.privacy.clip import clipped
from fedlora.privacy.noise import standard
from fedlora.run import checkpoint
from fedlora.run.tracking import read_jsonl
from fedlora.secagg.config import SecAgg
from fedlora.secagg.form import Form
from fedlora.secagg.limit import Limit
from fedlora.secagg.summed import Summed
from fedlora.server import secure_sum
from fedlora.server.secure_sum import SumPlan, simulate
from fedlora.server.training_round import begin, training_jobs
from strategies.alternate import Alternate
from strategies.base import LoRAStrategy
from tests.fedlora.privacy.rosters import roster
from tests.fedlora.privacy.test_sensitivity import LINEAR, NOW, a_round, distance, released
from tests.hostile.world import World, moved
from tests.planted import planted
from tests.strategies.laws import PLAN, added, population_for

COARSE = SecAgg(kind="simulated", bits=16, levels=8)
"""So few levels that rounding is a large part of a clip."""
FINE = SecAgg(kind="simulated")
FFA = Alternate(weights="uniform")
FIXED = ClientLevel(epsilon=0, sigma=1.0, clip=0.4, adaptive=None)
ADAPTIVE = replace(FIXED, adaptive=Adaptive())
SILENT = replace(FIXED, sigma=0)
LARGER = replace(FIXED, stands_for=StandsFor(cohort=5000, population=1_000_000))


# --- one client ---------------------------------------------------------------------------------


def form_of(x: np.ndarray, config: SecAgg, limit: Limit) -> Form:
    return Form.of(config, {"x": torch.from_numpy(x)}, {}, seed=3, round=2, limit=limit)


def sent(form: Form, x: np.ndarray, client: int) -> np.ndarray:
    """What one client adds to the decoded sum."""
    codes, _ = form.codes({"x": torch.from_numpy(x)}, 1.0, client, 0, {})
    layout = form.layout({"x": torch.from_numpy(x)}, 0, {})
    return form.decoded(codes, layout, 1)["x"].numpy()


@given(
    x=arrays.arrays(np.float64, st.integers(1, 60), elements=st.floats(-1e12, 1e12)),
    size=st.sampled_from([0.0, 1e-9, 0.5, 1.0, 1 + 1e-9, 1e6]),
    clip=st.floats(1e-6, 1e3),
    levels=st.integers(5, 15),
    client=st.integers(0, 50),
)
@settings(derandomize=True, max_examples=300, deadline=None)
def test_no_client_adds_more_than_the_clip(
    x: np.ndarray, size: float, clip: float, levels: int, client: int
) -> None:
    """After rounding, whatever its change, and whichever way every number is rounded."""
    limit = Limit(clip, counts=True)
    form = form_of(x, replace(COARSE, levels=levels), limit)
    most = form.fixed.range
    if length := float(np.linalg.norm(x)):
        x = x * (size * most / length)
    assert float(np.linalg.norm(sent(form, x, client))) <= clip
    for u in (0.0, 1 - 2.0**-53):
        codes, cut = form.fixed.encode(form._bounded(x)[:-1], np.full(x.size, u))
        assert float(np.linalg.norm(form.fixed.decode(codes, 1))) <= clip
        assert not cut


def test_the_worst_rounding_is_within_the_clip_and_near_it() -> None:
    """Numbers just above a value are rounded to the next one."""
    form = form_of(np.zeros(100), COARSE, Limit(1.0))
    step = 2 * form.fixed.range / (2**8 - 1)
    x = np.full(100, form.fixed.range / 10)
    x = (np.floor((x + form.fixed.range) / step) + 1e-9) * step - form.fixed.range
    codes, _ = form.fixed.encode(form._bounded(x), np.full(100, 1 - 1e-12))
    assert 0.95 < float(np.linalg.norm(form.fixed.decode(codes, 1))) <= 1.0


def test_too_few_levels_for_the_clip_are_refused() -> None:
    for numbers in (10, 1_000, 78_848):
        enough = math.ceil(math.log2(2 * math.sqrt(numbers) + 1))
        assert Limit(1.0).radius(enough, numbers) >= 0.499
        with pytest.raises(ValueError, match=f"use secagg.levels={enough} or more"):
            Limit(1.0).radius(enough - 1, numbers)


@given(st.lists(st.floats(0, 3), min_size=1, max_size=20))
@settings(derandomize=True, max_examples=50)
def test_the_count_in_the_sum_is_exact(norms: list[float]) -> None:
    form = form_of(np.zeros(7), COARSE, Limit(1.0, counts=True))
    sums = np.zeros(8, form.fixed.dtype)
    for k, n in enumerate(norms):
        x = np.zeros(7)
        x[k % 7] = n
        sums = sums + form.codes({"x": torch.from_numpy(x)}, 1.0, k, 0, {})[0]
    assert form.short(sums, len(norms)) == counted(form.fixed.range, norms)


# --- every method whose round is a sum ----------------------------------------------------------


def summed(
    method: LoRAStrategy, state: Mapping[str, torch.Tensor], updates: Sequence[Update], clip: float
) -> tuple[Summed, Form]:
    population = population_for(method)
    clients = [u.client for u in updates]
    jobs = training_jobs(method, state, clients, PLAN, seed=NOW.seed, round=NOW.round)
    starts = begin(method, state, jobs, NOW.round, "float32").account.starts
    plan = SumPlan.open(
        FINE, method, state, jobs, (), population.max_ranks, starts, "", limit=Limit(clip, True)
    )
    return simulate(plan, updates), plan.form


@pytest.mark.parametrize("name", LINEAR)
def test_a_secure_sum_is_the_private_sum_and_no_client_moves_it_further(name: str) -> None:
    method = LINEAR[name]
    state, updates = a_round(method, 1)
    clip = norm(added(method, state, updates)[2])
    found, form = summed(method, state, updates, clip)
    numbers = sum(dense(x).numel() for x in found.total.values())
    step = 2 * form.fixed.range / (2**22 - 1)
    plain, *_ = released(method, state, updates, clip)
    near = len(updates) * (clip - form.fixed.range + step * math.sqrt(numbers))
    assert near < 0.01 * clip * len(updates)
    assert distance(plain, found.total) <= near + 1e-5 * clip
    assert found.weights == {u.client.id: 1.0 for u in updates}
    for k in range(len(updates)):
        less, _ = summed(method, state, [u for i, u in enumerate(updates) if i != k], clip)
        assert distance(found.total, less.total) <= clip * (1 + 1e-6), f"client {k}"
        assert found.short is not None and less.short is not None
        assert abs(found.short - less.short) == 0.5


# --- whole runs ---------------------------------------------------------------------------------


def play(
    folder: Path, kind: str, spec: ClientLevel, rounds: int = 2, **given: object
) -> tuple[World, dict[str, torch.Tensor]]:
    """A run of all six clients, and its last state."""
    options = {"norm_bound": "off", "min_success": given.pop("min_success", 0.1)}
    secagg = SecAgg(kind=kind, **given)  # type: ignore[arg-type]
    world = World(FFA, folder, options=options, secagg=secagg, privacy=spec).play(rounds)
    saved = checkpoint.latest(folder / "checkpoints")
    assert saved is not None
    return world, dict(saved.state)


def clips(world: World) -> list[float]:
    return [float(r["privacy/clip"]) for r in read_jsonl(world.folder / "metrics.jsonl")]


@pytest.mark.parametrize("losses", [{}, {"vector": 0.1}, {"shares": 0.25}], ids=str)
def test_real_equals_simulated_with_noise_and_a_clip_that_adapts(
    tmp_path: Path, losses: dict[str, float]
) -> None:
    (real, _), (simulated, _) = (
        play(tmp_path / kind, kind, ADAPTIVE, losses=losses) for kind in ("real", "simulated")
    )
    assert real.hashes == simulated.hashes
    assert clips(real) == clips(simulated)
    assert len(set(clips(real))) == 2
    rows = read_jsonl(real.folder / "metrics.jsonl")
    assert [r["privacy/epsilon"] for r in rows] == sorted({r["privacy/epsilon"] for r in rows})
    assert bool(sum(r["secagg/lost"] for r in rows)) == bool(losses)


def apart(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> float:
    """The distance of two states, their counters left out."""
    named = [(t.double(), other[n].double()) for n, t in one.items() if t.dim()]
    return math.hypot(*(float((a - b).norm()) for a, b in named))


def check_noise(folder: Path) -> None:
    """One draw of ``z C`` over the six clients of the sum, added once, not by each client."""
    _, quiet = play(folder / "quiet", "simulated", SILENT, rounds=1)
    _, noisy = play(folder / "noisy", "simulated", FIXED, rounds=1)
    moved = sorted(n for n in noisy if not torch.equal(noisy[n], quiet[n]))
    drawn = standard(0, 1, tuple((n, tuple(noisy[n].shape)) for n in moved))
    for n, z in drawn:
        want = z * FIXED.sigma * FIXED.clip / 6
        assert torch.allclose((noisy[n] - quiet[n]).double(), want, rtol=0, atol=1e-6), n
    assert moved


def test_noise_is_added_once_at_the_server(tmp_path: Path) -> None:
    check_noise(tmp_path)


def check_denominator(folder: Path) -> None:
    """Two of six are lost: the sum of four is divided by six."""
    world, after = play(folder, "simulated", SILENT, rounds=1, losses={"vector": 0.1})
    (record,) = read_jsonl(world.folder / "metrics.jsonl")
    assert record["secagg/clients"] == 4
    lost = {i for i, r in world.rows(1).items() if "failure" in r}
    population = population_for(FFA)
    before = FFA.init_state(population)
    jobs = training_jobs(FFA, before, population.clients, LocalPlan(steps=3), seed=0, round=1)
    terms = []
    for job in (j for j in jobs if j.client.id not in lost):
        x = FFA.adds(before, job.start, moved(job))
        assert x is not None
        terms.append(clipped(x, SILENT.clip)[0])
    want = FFA.absorb(before, total(terms, [1.0] * 4), 6.0)
    assert apart(after, want) <= 1e-4 * SILENT.clip < 0.1 * apart(after, before)


def test_who_is_lost_does_not_change_the_denominator(tmp_path: Path) -> None:
    check_denominator(tmp_path)


def test_without_noise_the_state_is_that_of_the_private_sum(tmp_path: Path) -> None:
    _, plain = play(tmp_path / "plain", "none", SILENT, rounds=1)
    _, secure = play(tmp_path / "secure", "real", SILENT, rounds=1)
    numbers = sum(t.numel() for t in plain.values())
    radius = Limit(SILENT.clip).radius(22, numbers)
    assert apart(plain, secure) <= 2 * (SILENT.clip - radius) + 1e-6
    before = FFA.init_state(population_for(FFA))
    assert apart(plain, before) > 0.1 * SILENT.clip


def test_a_round_that_ends_without_its_sum_counts_as_a_release(tmp_path: Path) -> None:
    """Whether clients are lost before the sum, or too few are left for it to be told."""
    for kind in ("real", "simulated"):
        for n, more in enumerate(({}, {"min_success": 0.8})):
            folder, losses = tmp_path / f"{kind}{n}", {"vector": 0.8 if n == 0 else 0.1}
            with pytest.raises(RunError, match="clients"):
                play(folder, kind, FIXED, losses=losses, **more)
            assert (folder / ABORTED).read_text() == '{"rounds": 1}'


# --- sizes of cohorts ---------------------------------------------------------------------------


@given(n=st.integers(1, 12), rate=st.floats(0.05, 0.95), most=st.integers(1, 14))
@settings(derandomize=True, max_examples=100)
def test_the_bound_of_unfit_cohorts_is_one(n: int, rate: float, most: int) -> None:
    chance = [math.comb(n, j) * rate**j * (1 - rate) ** (n - j) for j in range(n + 1)]
    exact = sum(p for j, p in enumerate(chance) if j < 2 or j >= most)
    assert outside(n, rate, 2, most) >= min(1.0, exact) - 1e-12
    if most > n:
        assert outside(n, rate, 2, most) == pytest.approx(sum(chance[:2]))


def test_cohorts_that_may_be_too_small_or_too_large_are_refused() -> None:
    def checked(trainable: int, per_round: int, spec: ClientLevel = FIXED) -> None:
        run = ClientPrivacy(spec, roster(trainable, per_round), 7, 10, Path("unused"))
        run.check_sums(SecAgg(kind="simulated", bits=16, levels=8), lambda: {"x": torch.zeros(9)})

    checked(400, 80)
    checked(12, 12)
    for expected in (4, 250):
        said = f"fewer than 2 clients or more than 257.* the {expected} clients expected in a round"
        with pytest.raises(ValueError, match=said):
            checked(400, expected)
    checked(400, 4, replace(FIXED, sampling="fixed"))
    run = ClientPrivacy(FIXED, roster(400, 80), 7, 10, Path("unused"))
    with pytest.raises(ValueError, match=r"secagg\.levels=8: rounding 90,000 numbers"):
        run.check_sums(COARSE, lambda: {"x": torch.zeros(300, 300)})


@pytest.mark.parametrize("spec", [SILENT, LARGER], ids=["no noise", "a larger run's"])
@pytest.mark.parametrize("most", [257, 4])
def test_where_nothing_is_claimed_only_rounds_that_have_no_sum_are_refused(
    spec: ClientLevel, most: int
) -> None:
    """Law: a run is refused if and only if a round of it draws one client, or more than a sum
    holds; a round that draws none releases noise alone."""
    secagg = SecAgg(kind="simulated", bits=16, levels=8 if most == 257 else 14)
    assert secagg.capacity == most
    told, empty = set(), False
    for seed in range(12):
        run = ClientPrivacy(spec, roster(400, 3), seed, 3, Path("unused"))
        sizes = [len(poisson(run.roster, seed, t, 3 / 400)) for t in (1, 2, 3)]
        wrong = [t for t, n in enumerate(sizes, 1) if n == 1 or n > most]
        if wrong:
            said = f"round {wrong[0]} has a cohort of {sizes[wrong[0] - 1]}, .* 2 to {most} clients"
            with pytest.raises(ValueError, match=said):
                run.check_sums(secagg, lambda: {"x": torch.zeros(9)})
        else:
            run.check_sums(secagg, lambda: {"x": torch.zeros(9)})
            empty |= 0 in sizes
        told.add(bool(wrong))
    assert told == {True, False} and empty


# --- do these tests bite? -----------------------------------------------------------------------


def one(_: Path) -> None:
    test_a_secure_sum_is_the_private_sum_and_no_client_moves_it_further("fedit")


FAULTS: dict[str, tuple[Callable[..., Any], str, str, Callable[[Path], None]]] = {
    "the sensitivity of rounding left out": (
        Limit.radius,
        "MARGIN * self.clip / (1 + share)",
        "MARGIN * self.clip",
        lambda _: test_the_worst_rounding_is_within_the_clip_and_near_it(),
    ),
    "no clip at the client": (Form._bounded, "if short else x *", "if True else x *", one),
    "the count turned round": (
        Form._bounded,
        "most if short else -most",
        "-most if short else most",
        lambda _: test_the_count_in_the_sum_is_exact(),
    ),
    "weights by examples": (
        SumPlan.open.__func__,  # type: ignore[attr-defined]
        "[1.0] * len(jobs) if limit else",
        "[1.0 / (1 + j.client.id) for j in jobs] if limit else",
        one,
    ),
    "noise twice": (secure_sum.usable_sum, "else [release])]", "else [release] * 2)]", check_noise),
    "the survivors' denominator": (
        Release.weight,
        "return self.cohort",
        "return weight",
        check_denominator,
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_noticed(name: str, tmp_path: Path) -> None:
    function, right, wrong, law = FAULTS[name]
    with planted(function, right, wrong), pytest.raises(AssertionError):
        law(tmp_path)
