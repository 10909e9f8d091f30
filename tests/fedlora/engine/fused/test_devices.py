"""The engines agree on every device: on a GPU as on the CPU."""

import dataclasses

import pytest
import torch

from fedlora.engine.fused import Fused
from fedlora.engine.sequential import SequentialEngine
from tests.fedlora.engine.fused.harness import ADAMW, assert_equal, by_client
from tests.fedlora.engine.world import FakeStore, examples, job, model, start

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["ragged", "padded"])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_both_engines_train_the_same_in_float64(device, layout, dropout):
    on = model("llama")
    on.network.to(device)
    store = FakeStore({k: examples(5, k) for k in range(3)})
    plan = dataclasses.replace(ADAMW, steps=3, batch_size=2, dropout=dropout)
    jobs = [job(start(on, 1 + k), plan, k) for k in range(3)]
    wanted = by_client(SequentialEngine(on, store).train(jobs))
    fused = Fused(layout=layout, tokens=60, slots=2, reuse_memory=False).open(on, store)
    for client, update in by_client(fused.train(jobs)).items():
        assert_equal(update, wanted[client], tolerance=1e-9)


@pytest.mark.parametrize("device", DEVICES)
def test_the_budget_needs_no_measurement(device, monkeypatch):
    monkeypatch.setattr("time.perf_counter", None)
    on = model("llama")
    on.network.to(device)
    spec = Fused(reuse_memory=False).open(on, FakeStore({})).spec
    assert spec == Fused(reuse_memory=False).settled(on.info, on.network.dtype, on.device)
