"""The audit counts what a merge would move, merges what is written, and stops a run."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedlora.core.errors import ModelError, RunError
from fedlora.models.export import merge
from fedlora.models.folder import weight_files
from fedlora.models.masks import load_masks
from fedlora.techniques.spp.audit import ZeroAudit
from fedlora.techniques.spp.payload import MaskedScale
from tests.fedlora.models.networks import NETWORKS, adapter
from tests.fedlora.prune.models import pruned, scale


def saved(folder: Path, name: str = "llama", dtype: torch.dtype = torch.float32):
    """A pruned model, in a folder too."""
    model = pruned(name, dtype=dtype)
    merge(model, None, folder)
    return model


def first(payload: MaskedScale, value: float) -> MaskedScale:
    """With all of one module's factors at a value, and s = 1."""
    path = next(iter(payload.beta))
    ones = {**payload.alpha, path: torch.ones_like(payload.alpha[path])}
    beta = {**payload.beta, path: torch.full_like(payload.beta[path], value)}
    return replace(payload, lora_alpha=4.0, alpha=ones, beta=beta)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("merges", [0, 2])
def test_zeros_stay_and_are_counted(name, dtype, merges, tmp_path):
    """Square and turned layers (Conv1D) included."""
    model = saved(tmp_path, name, dtype)
    payload = scale(model)
    past = {p: (0.3 * a[None], payload.beta[p][None]) for p, a in payload.alpha.items()}
    payload = replace(payload, merges=(past,) * merges)
    audit = ZeroAudit(tmp_path)
    found = audit(payload)
    assert (found["spp/zero_pattern"], found["spp/zeros_moved"]) == (model.info.mask, 0)
    kept = sum(int(m.sum()) for m in load_masks(tmp_path).values())
    total = sum(m.d_out * m.d_in for m in model.info.modules)
    assert found["spp/density"] == kept / total
    assert audit(adapter(model.info.modules, 2)) == {}


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (torch.inf, "would move 128 zeros and make 256 weights"),  # 0 * inf
        (-1.0, "would move 128 zeros and make 0 weights"),  # 1 + s F = 0
        (1e9, "would move 0 zeros and make 128 weights"),  # more than float16 holds
    ],
)
def test_an_update_that_would_break_the_model_stops_the_run(value, said, tmp_path):
    model = saved(tmp_path, dtype=torch.float16)
    with pytest.raises(RunError, match=said):
        ZeroAudit(tmp_path)(first(scale(model), value))


def test_the_model_is_audited_in_the_type_in_which_it_is_held(tmp_path):
    """What overflows float16 does not overflow the file's float32."""
    payload = first(scale(saved(tmp_path)), 1e9)
    assert ZeroAudit(tmp_path)(payload)["spp/zeros_moved"] == 0
    with pytest.raises(RunError, match="make 128 weights"):
        ZeroAudit(tmp_path, torch.float16)(payload)


def test_a_base_that_is_not_what_its_masks_say_is_refused(tmp_path):
    model = saved(tmp_path)
    payload = scale(model)
    state = load_file(tmp_path / "model.safetensors")
    path = model.info.modules[1].path
    weight = state[f"{path}.weight"]
    weight[0] = weight[0].roll(1)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"the zeros of {path} are not where its mask says"):
        ZeroAudit(tmp_path)(payload)


def test_a_module_without_a_mask_is_named(tmp_path):
    payload = scale(saved(tmp_path))
    one = next(iter(payload.beta))
    more = {"elsewhere.c_attn.q_attn": payload.beta[one]}
    with pytest.raises(ModelError, match=r"elsewhere.c_attn.q_attn is scaled, and has no mask"):
        ZeroAudit(tmp_path)(replace(payload, beta=more))


def test_masks_are_no_weights(tmp_path):
    """A folder of masks alone is no model, and pickled weights beside them are found."""
    saved(tmp_path)
    assert [p.name for p in weight_files(tmp_path)] == ["model.safetensors"]
    (tmp_path / "model.safetensors").unlink()
    assert weight_files(tmp_path) == []
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    assert [p.name for p in weight_files(tmp_path)] == ["pytorch_model.bin"]
    with pytest.raises(ModelError, match="is no safetensors file: convert the model first"):
        ZeroAudit(tmp_path)
