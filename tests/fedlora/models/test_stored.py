"""What a server reads of a pruned model's files."""

import pytest
import torch
from safetensors.torch import save_file

from fedlora.core.errors import ModelError
from fedlora.models.masks import save_masks, save_sparse
from fedlora.models.stored import inspect, require_masked

SHAPES = {"a": (5, 7), "square": (6, 6), "turned": (4, 9)}


def stored():
    g = torch.Generator().manual_seed(1)
    masks = {p: torch.rand(shape, generator=g) < 0.4 for p, shape in SHAPES.items()}
    state = {f"{p}.weight": torch.randn(m.shape, generator=g) * m for p, m in masks.items()}
    for p in ("square", "turned"):
        state[f"{p}.weight"] = state[f"{p}.weight"].T.contiguous()
    state |= {"a.bias": torch.zeros(5), "embedding.weight": torch.randn(3, 4, generator=g)}
    return state, masks


def write(state, masks, folder):
    save_file(state, folder / "model.safetensors")
    save_masks(masks, folder)
    return folder


def test_bytes_and_density_are_those_of_the_model_without_zeros(tmp_path):
    state, masks = stored()
    found = inspect(write(state, masks, tmp_path))
    kept = sum(int(m.sum()) for m in masks.values())
    total = sum(m.numel() for m in masks.values())
    assert found.density == pytest.approx(kept / total)
    bits = sum(-(-m.numel() // 8) for m in masks.values())
    assert found.bytes == 4 * (kept + 5 + 12) + bits
    assert found.bytes == save_sparse(state, masks, tmp_path / "sparse")


def test_a_weight_that_moved_or_is_not_there_is_named(tmp_path):
    state, masks = stored()
    moved = state | {"square.weight": state["square.weight"].roll(1, 0)}
    with pytest.raises(ModelError, match="zeros of square are not where its mask says"):
        inspect(write(moved, masks, tmp_path))
    state.pop("turned.weight")
    with pytest.raises(ModelError, match=r"a mask for turned, and stores no such weight \(1 of 3"):
        inspect(write(state, masks, tmp_path))


def test_a_layer_that_was_not_pruned_is_named():
    _, masks = stored()
    require_masked(["a", "square"], masks, "it")
    with pytest.raises(ModelError, match=r"adapts b, which it has no mask for \(1 of 2 .*\[a, squ"):
        require_masked(["a", "b"], masks, "it")
