"""What SPP is compared with: masked baselines keep zeros, and are what their names say."""

import pytest
import torch

from fedlora.models.layers import dense_weight
from simulations.bench.sparse import (
    TECHNIQUES,
    MaskedLowRank,
    Window,
    loss_of,
    mount_masked_full,
    mount_masked_lora,
)
from tests.fedlora.models.networks import adapter, step, tokens
from tests.fedlora.models.pruned import pruned, zeros


@pytest.mark.parametrize("name", TECHNIQUES)
def test_every_technique_starts_at_the_pruned_model_and_learns(name):
    model = pruned(dtype=torch.float32)
    texts = [Window(row.numpy()) for row in tokens()]
    before, kept = loss_of(model, texts), zeros(model)
    parameters = TECHNIQUES[name].mount(model, 2)
    assert loss_of(model, texts) == pytest.approx(before, rel=1e-5)
    for _ in range(4):
        step(model, parameters)
    assert loss_of(model, texts) < before
    same = [torch.equal(model.effective_weight(p) == 0, z) for p, z in kept.items()]
    assert all(same) == (name != "LoRA")


def test_masked_lora_is_the_masked_product():
    model = pruned()
    factors = adapter(model.info.modules, 3)
    for path, f in factors.items():
        layer = model.layers[path]
        update = MaskedLowRank(f, 0.0, model.device, model.dtype)
        w = dense_weight(layer.base)
        torch.testing.assert_close(update.weight(layer.base), w + (w != 0) * f.delta())
        x = torch.randn(3, w.shape[1], dtype=torch.float64)
        torch.testing.assert_close(update(x, layer.base), x @ update.weight(layer.base).T)


def test_masked_full_trains_every_weight_that_is_not_zero():
    model = pruned()
    count = sum(int((~z).sum()) for z in zeros(model).values())
    assert sum(p.numel() for p in mount_masked_full(model, 1)) == count
    assert len(mount_masked_lora(model, 2)) == 2 * len(model.layers)
