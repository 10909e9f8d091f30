"""What a probe measures is what a step takes."""

import dataclasses
import functools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from fedlora.core.types import LocalPlan, TrainJob
from fedlora.engine.fused import Fused, cost, probe
from fedlora.engine.fused.cost import slots_for
from fedlora.engine.fused.engine import FusedEngine
from fedlora.engine.fused.model import FusedModel
from fedlora.engine.fused.probe import Prober
from fedlora.engine.fused.schedule import Schedule, policy
from fedlora.engine.fused.trainer import Chain, FusedTrainer, Limits, Planner
from fedlora.models.layers import dropped_share
from tests.fedlora.engine.world import FakeStore, example, examples, job, model, start
from tests.fedlora.models.networks import adapter, wrap

PLAN = LocalPlan(batch_size=2, steps=2, dropout=0.25)


def prober(plan=PLAN, is_ragged=True) -> Prober:
    on = model("llama")
    on.network.float()
    fused = FusedModel(on, is_ragged)
    planner = Planner(fused, FakeStore({0: examples(4)}))
    (chain,) = planner.chains([job(start(fused.model), plan)])
    assert isinstance(chain, Chain)
    return Prober(fused, chain)


@given(length=st.integers(1, 40), clients=st.integers(1, 9), more=st.integers(0, 20))
def test_lengths_differ_but_not_in_their_sum(length, clients, more):
    found = probe._unequal(length, clients, length + more)
    assert len(found) == clients and sum(found) == length * clients
    assert all(1 <= n <= length + more for n in found)
    assert clients < 2 or length < 2 or more == 0 or len(set(found)) > 1


@pytest.mark.parametrize("is_ragged", [True, False])
@pytest.mark.parametrize("tokens", [1, 7, 100])
def test_a_sample_is_a_training_step_of_that_size_with_the_clients_dropout(
    tokens, is_ragged, monkeypatch
):
    mine, seen = prober(is_ragged=is_ragged), []
    honest = FusedModel.backward

    def backward(self, batch):
        seen.append(batch)
        return honest(self, batch)

    monkeypatch.setattr(FusedModel, "backward", backward)
    sample = mine.sample(tokens)
    assert 0.6 * tokens <= sample.tokens <= tokens
    assert {b.tokens for b in seen} == {sample.tokens}
    assert sample.seconds > 0
    assert {lane.dropped for lane in seen[0].lanes} == {dropped_share(0.25)}
    assert len(seen[0].lanes) == sample.clients
    fused = mine._fused
    assert not any(layer.update for layer in fused.model.layers.values())


@pytest.mark.parametrize(
    "change", [{"dropout": 0.0}, {"autocast": "bf16"}, {"lr": 0.5, "dropout": 0.1}]
)
def test_measurements_are_kept_for_plans_that_cost_the_same(change, monkeypatch, tmp_path):
    monkeypatch.setattr("fedlora.engine.fused.cost.cache_root", lambda: tmp_path)
    monkeypatch.setattr(
        probe, "load_or_measure", functools.partial(cost.load_or_measure, candidates=(8,))
    )
    for plan in (PLAN, PLAN, dataclasses.replace(PLAN, **change)):
        prober(plan).cost_model(threads=1)
    assert len(list(tmp_path.rglob("*.json"))) == (1 if "lr" in change else 2)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells")
def test_the_peak_is_that_since_the_last_look():
    before = probe._used(torch.device("cpu"))
    block = torch.ones(8 << 20)
    del block
    assert probe._peak(torch.device("cpu")) - before > 30e6
    again = probe._used(torch.device("cpu"))
    assert probe._peak(torch.device("cpu")) - again < 30e6


# --- memory: real processes, for what was freed may or may not be in a process's size ------------


def engine_of(tokens: int) -> tuple[FusedEngine, list[TrainJob]]:
    """An engine whose steps take a hundred MiB, and clients of unequal lengths."""
    torch.manual_seed(0)
    on = wrap(
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=2048,
                hidden_size=128,
                intermediate_size=352,
                num_hidden_layers=4,
                num_attention_heads=4,
                max_position_embeddings=256,
            )
        )
    )
    on.info = dataclasses.replace(on.info, context=256, fingerprint="memory")
    rng = np.random.default_rng(0)
    held = {
        k: [example(rng.integers(1, 2048, int(rng.integers(32, 65))).tolist()) for _ in range(4)]
        for k in range(40)
    }
    plan = LocalPlan(batch_size=2, dropout=0.05, steps=3)
    factors = adapter(on.info.modules, 8, dtype=torch.float32)
    opened = Fused(tokens=tokens).open(on, FakeStore(held))
    return opened, [job(factors, plan, k) for k in held]


def measure(warm: bool) -> None:
    """Fit a cost model into the cache; ``warm``: in a process that holds freed memory."""
    opened, jobs = engine_of(2048)
    chains = list(opened._planner.chains(jobs))
    if warm:
        for _ in opened.train(jobs):
            pass
    opened.cost_model(chains[0])


def train(tokens: int) -> None:
    """Write the peak of training beyond what was there before, and what was predicted."""
    opened, jobs = engine_of(tokens)
    chains = list(opened._planner.chains(jobs))
    works = [c.work for c in chains]
    predicted = opened.cost_model(chains[0])
    slots = slots_for(tokens, works, predicted)
    most = max(
        sum(works[k].forwards[i].tokens for k, _, i in step.active)
        for step in Schedule(works, policy("refill"), tokens, slots)
    )
    before = probe._used(torch.device("cpu"))
    for _ in FusedTrainer(opened.fused, opened.store).train(
        chains, Limits(policy("refill"), tokens, slots)
    ):
        pass
    took = probe._peak(torch.device("cpu")) - before
    sys.stdout.write(f"{took} {predicted.memory(most, most, slots)}")


def in_a_process(call: str, cache: Path) -> str:
    code = f"from tests.fedlora.engine.fused import test_probe; test_probe.{call}"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "FEDLORA_CACHE": str(cache), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells")
@pytest.mark.parametrize("warm", [False, True])
def test_a_step_takes_no_more_memory_than_predicted(warm, tmp_path):
    in_a_process(f"measure({warm})", tmp_path)
    for tokens in (512, 1024, 2048):
        took, predicted = map(float, in_a_process(f"train({tokens})", tmp_path).split())
        assert took <= 1.1 * predicted, f"{tokens} tokens: {took / predicted:.2f} of the prediction"
        assert took >= 0.5 * predicted  # nor is the prediction a guess on the safe side
