"""Laws of the cost model, and of measuring once."""

import logging
import math
import multiprocessing
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.engine.fused.cost import (
    CANDIDATES,
    CostModel,
    Sample,
    best_budget,
    fit,
    load_or_measure,
    measure,
    nonnegative,
    slots_for,
    tuning_key,
)
from fedlora.engine.fused.schedule import POLICIES, Forward, Schedule, Work

LAWS = settings(derandomize=True, deadline=None, max_examples=100)
COSTS = st.one_of(st.just(0.0), st.floats(1e-3, 1.0))
WORKS = [Work((Forward(2, 40, 60),) * n) for n in (1, 3, 9, 4, 4)]


def sample(tokens: int, seconds: float, *, memory: float = 0.0, clients: int = 4) -> Sample:
    return Sample(tokens, clients, tokens // 2, seconds, memory)


def planted(step=1e-2, token=3e-5, client=2e-4, base=1e6, per_token=1e3, supervised=4e3):
    """Five samples of a machine with these costs; tokens per client and supervision differ."""
    shapes = [(256, 3, 40), (512, 20, 300), (1024, 9, 1000), (2048, 64, 100), (4096, 32, 4000)]
    return [
        Sample(t, k, s, step + token * t + client * k, base + per_token * t + supervised * s)
        for t, k, s in shapes
    ]


MODEL = fit(planted(), row_bytes=5e5)


# --- fitting -------------------------------------------------------------------------------------


@LAWS
@given(step=COSTS, token=COSTS, client=COSTS, base=COSTS, per_token=COSTS, supervised=COSTS)
def test_planted_costs_are_recovered(step, token, client, base, per_token, supervised):
    costs = {
        "step": step, "token": token / 300, "client": client / 10,
        "base": base * 1e8, "per_token": per_token * 1e5, "supervised": supervised * 1e5,
    }  # fmt: skip
    if step + token + client == 0:
        return
    model = fit(planted(**costs), row_bytes=16.0)
    found = (
        model.step_seconds, model.token_seconds, model.client_seconds,
        model.base_bytes, model.token_bytes, model.supervised_bytes,
    )  # fmt: skip
    for value, true in zip(found, costs.values(), strict=True):
        assert value == pytest.approx(true, rel=1e-5, abs=1e-12)


@LAWS
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 6), columns=st.integers(1, 4))
def test_no_nonnegative_point_fits_better(seed, rows, columns):
    rng = np.random.default_rng(seed)
    matrix, target = rng.uniform(0, 1, (rows, columns)), rng.uniform(0.1, 1, rows)
    if seed % 3 == 0:
        matrix[:, -1] = matrix[:, 0]  # terms that cannot be told apart

    def gradient(x):
        scaled = matrix / target[:, None]
        return scaled.T @ (scaled @ x - 1)

    found = np.array(nonnegative(matrix, target))
    slope = gradient(found)
    # Karush-Kuhn-Tucker: the conditions of the optimum of a convex problem.
    assert (found >= 0).all()
    assert (slope >= -1e-5).all()
    assert np.abs(slope * found).max() <= 1e-5


def test_costs_that_cannot_be_told_apart_are_given_to_tokens():
    one = fit([sample(512, 0.5)], row_bytes=0)
    assert (one.step_seconds, one.client_seconds) == (0, 0)
    assert one.seconds(1024, 9) == pytest.approx(1.0)
    alike = fit([sample(256 * k, 0.1 + 0.02 * k, clients=k) for k in (1, 2, 4)], row_bytes=0)
    assert alike.client_seconds == 0
    assert alike.seconds(256 * 3, 3) == pytest.approx(0.16)


def test_memory_that_cannot_be_told_is_the_rows():
    model = fit([sample(256, 0.1), sample(512, 0.2)], row_bytes=100)
    assert model.memory(10**6, 10**6, 7) == 700


@pytest.mark.parametrize("field", ["step_seconds", "row_bytes"])
@pytest.mark.parametrize("value", [-1.0, math.nan])
def test_impossible_costs_are_refused(field, value):
    with pytest.raises(ValueError, match=field):
        replace(MODEL, **{field: value})


def test_a_model_without_samples_is_refused():
    with pytest.raises(ValueError, match="at least one sample"):
        fit([], row_bytes=0)


@pytest.mark.parametrize(
    "change", [{"tokens": 0}, {"clients": 0}, {"supervised": -1}, {"seconds": 0.0}, {"bytes": -1.0}]
)
def test_impossible_samples_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        replace(sample(256, 0.1), **change)


# --- predicting ----------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", sorted(POLICIES))
def test_a_round_costs_the_sum_of_its_steps(name, padded):
    def schedule() -> Schedule:
        return Schedule(WORKS, POLICIES[name], 200, 3, padded)

    forwards = sum(len(w.forwards) for w in WORKS)
    tokens = (80 if padded else 60) * forwards  # all forwards are alike: no padding between them
    steps = len(list(schedule()))
    expected = (
        MODEL.step_seconds * steps + MODEL.token_seconds * tokens + MODEL.client_seconds * forwards
    )
    assert MODEL.predict(schedule()) == pytest.approx(expected)


# --- choosing ------------------------------------------------------------------------------------


def model_of(*microseconds: float, row_bytes: float = 0.0) -> CostModel:
    """Candidates with so many microseconds per token, and 1000 bytes of memory each."""
    samples = [
        sample(t, 1e-6 * us * t, memory=1000.0 * t)
        for t, us in zip(CANDIDATES, microseconds, strict=False)
    ]
    return fit(samples, row_bytes)


def test_the_smallest_budget_within_five_percent_of_the_best_is_taken():
    assert best_budget(model_of(100, 60, 41, 40, 44)) == 1024
    assert best_budget(model_of(100, 60, 43, 40, 44)) == 2048
    assert best_budget(model_of(100, 100, 100, 100, 100)) == 256
    assert best_budget(model_of(100, 80)) == 512


@LAWS
@given(times=st.lists(st.floats(1, 1000), min_size=1, max_size=5), limit=st.floats(0, 5e6))
def test_a_budget_fits_the_memory_and_is_nearly_the_best_of_those(times, limit):
    model = model_of(*times, row_bytes=1e4)
    allowed = [s for s in model.samples if s.bytes + 3e4 <= limit]
    budget = best_budget(model, memory=limit, slots=3)
    if not allowed:
        assert budget == CANDIDATES[0]
        return
    per_token = {s.tokens: s.seconds / s.tokens for s in allowed}
    assert per_token[budget] <= 1.05 * min(per_token.values())
    assert all(per_token[t] > 1.05 * min(per_token.values()) for t in per_token if t < budget)


def test_a_limit_below_the_smallest_step_is_reported(caplog):
    with caplog.at_level(logging.WARNING):
        assert best_budget(model_of(100, 60), memory=1.0) == 256
    assert "limit" in caplog.text


def test_slots_by_hand():
    works = [Work((Forward(2, 50, 80), Forward(2, 50, 80)))] * 40
    assert slots_for(800, works) == 15
    assert slots_for(800, works, padded=True) == 12
    assert slots_for(10, works) == 1
    assert slots_for(10**6, works) == 40
    assert slots_for(800, []) == 1


@LAWS
@given(budget=st.integers(1, 5000), memory=st.floats(0, 1e8))
def test_slots_fit_the_memory_or_are_one(budget, memory):
    slots = slots_for(budget, WORKS, MODEL, memory)
    assert 1 <= slots <= len(WORKS)
    supervised = math.ceil(budget * 4000 / 4096)  # the probes' largest share
    assert slots == 1 or MODEL.memory(budget, supervised, slots) <= memory
    assert slots <= slots_for(budget, WORKS)


# --- measuring -----------------------------------------------------------------------------------


def test_probing_stops_growing_after_one_that_took_too_long(monkeypatch):
    clock = {"now": 0.0}
    monkeypatch.setattr("time.perf_counter", lambda: clock["now"])

    def probe(tokens: int) -> Sample:
        clock["now"] += tokens / 500
        return sample(tokens, tokens / 1000)

    assert [s.tokens for s in measure(probe, limit_s=2.0)] == [256, 512, 1024]
    assert [s.tokens for s in measure(probe, limit_s=0.0)] == [256]
    assert [s.tokens for s in measure(probe, limit_s=1e9)] == list(CANDIDATES)


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
def test_probing_stops_where_memory_ends(error):
    def probe(tokens: int) -> Sample:
        if tokens > 512:
            raise error("no more")
        return sample(tokens, 0.1)

    assert [s.tokens for s in measure(probe, limit_s=1e9)] == [256, 512]
    with pytest.raises(error):
        measure(probe, candidates=[1024])


# --- measuring once ------------------------------------------------------------------------------


class Probe:
    """Leaves a line in a file per call: other processes are counted as well."""

    def __init__(self, folder):
        self.calls = folder / "calls"

    def __call__(self, tokens: int) -> Sample:
        with self.calls.open("a") as file:
            file.write(f"{tokens}\n")
        time.sleep(0.005)  # long enough for the others to come
        return sample(tokens, 1e-3 + 1e-5 * tokens)

    def probed(self) -> list[int]:
        return [int(line) for line in self.calls.read_text().split()]


def test_what_was_measured_is_read_back(tmp_path):
    probe = Probe(tmp_path)
    first = load_or_measure("key", probe, 16.0, tmp_path)
    assert load_or_measure("key", probe, 16.0, tmp_path) == first
    assert probe.probed() == list(CANDIDATES)
    assert CostModel.load((tmp_path / "key.json").read_text()) == first
    assert {p.name for p in tmp_path.iterdir()} == {"calls", "key.json", "key.lock"}


def test_another_row_length_changes_only_the_row(tmp_path):
    probe = Probe(tmp_path)
    first = load_or_measure("key", probe, 16.0, tmp_path)
    assert load_or_measure("key", probe, 32.0, tmp_path) == replace(first, row_bytes=32.0)
    assert probe.probed() == list(CANDIDATES)


def test_other_keys_are_measured_for_themselves(tmp_path):
    probe = Probe(tmp_path)
    load_or_measure("one", probe, 16.0, tmp_path, candidates=[64])
    load_or_measure("two", probe, 16.0, tmp_path, candidates=[32])
    assert probe.probed() == [64, 32]


def test_files_are_in_the_cache_by_default(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / "cache"))
    load_or_measure("key", Probe(tmp_path), 16.0)
    assert (tmp_path / "cache" / "tuning" / "key.json").is_file()


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"format": 0}', '{"format": 1, "samples": []}', MODEL.dump()[:-40],
     MODEL.dump().replace('"format": 1', '"format": 0'),
     MODEL.dump().replace('"tokens": 256', '"tokens": "x"'),
     MODEL.dump().replace('"tokens": 256', '"tokens": 0'),
     MODEL.dump().replace("step_seconds", "step")],
)  # fmt: skip
def test_a_file_of_no_use_is_measured_again(tmp_path, text, caplog):
    (tmp_path / "key.json").write_text(text)
    with pytest.raises(ValueError, match="no cost model"):
        CostModel.load(text)
    found = load_or_measure("key", Probe(tmp_path), 16.0, tmp_path)
    assert "measuring again" in caplog.text
    assert CostModel.load((tmp_path / "key.json").read_text()) == found


def test_bytes_that_are_no_text_are_measured_again(tmp_path):
    (tmp_path / "key.json").write_bytes(b"\xff\xfe\x00")
    load_or_measure("key", Probe(tmp_path), 16.0, tmp_path)


def test_a_probe_that_fails_leaves_no_file_and_no_lock_held(tmp_path):
    def broken(tokens: int) -> Sample:
        raise RuntimeError("no model")

    with pytest.raises(RuntimeError, match="no model"):
        load_or_measure("key", broken, 16.0, tmp_path)
    assert not (tmp_path / "key.json").exists()
    load_or_measure("key", Probe(tmp_path), 16.0, tmp_path)


def test_threads_that_start_together_measure_once(tmp_path):
    probe = Probe(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: load_or_measure("key", probe, 16.0, tmp_path), range(8)))
    assert probe.probed() == list(CANDIDATES)
    assert all(model == found[0] for model in found)


def test_processes_that_start_together_measure_once(tmp_path):
    probe = Probe(tmp_path)
    fork = multiprocessing.get_context("fork")
    workers = [
        fork.Process(target=load_or_measure, args=("key", probe, 16.0, tmp_path)) for _ in range(3)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert probe.probed() == list(CANDIDATES)


def test_the_key_depends_on_everything_that_a_measurement_depends_on():
    cpu = torch.device("cpu")
    keys = {
        tuning_key("model", torch.float32, cpu, 1),
        tuning_key("other", torch.float32, cpu, 1),
        tuning_key("model", torch.bfloat16, cpu, 1),
        tuning_key("model", torch.float32, torch.device("meta"), 1),
        tuning_key("model", torch.float32, cpu, 2),
        tuning_key("model", torch.float32, cpu, 1, "padded"),
        tuning_key("model", torch.float32, cpu, 1, "ragged"),
    }
    assert len(keys) == 7
    assert tuning_key("model", torch.float32, cpu, 1) in keys
    assert all(len(key) == 16 and int(key, 16) >= 0 for key in keys)
