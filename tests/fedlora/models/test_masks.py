"""Masks are what they say, wherever they are kept."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fedlora.core.errors import ModelError
from fedlora.models.folder import fingerprint, mask_identity
from fedlora.models.layers import dense_weight
from fedlora.models.masks import (
    as_stored,
    check_zeros,
    density,
    identity,
    load_masks,
    load_sparse,
    pack,
    save_masks,
    save_sparse,
    unpack,
)
from tests.fedlora.models.networks import NETWORKS
from tests.fedlora.prune.models import pruned


def masks(seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {p: torch.rand(5, 7, generator=g) < 0.5 for p in ("h.0.up", "h.1.up")}


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
def test_packing_is_exact(m: int, n: int, seed: int) -> None:
    mask = torch.rand(m, n, generator=torch.Generator().manual_seed(seed)) < 0.5
    assert torch.equal(unpack(pack(mask), (m, n)), mask)
    assert len(pack(mask)) == -(-m * n // 8)


def test_identity_is_of_positions_names_and_shapes() -> None:
    one = masks()
    assert identity(one) == identity(dict(reversed(one.items())))
    flipped = {p: m.clone() for p, m in one.items()}
    flipped["h.1.up"][4, 6] ^= True
    renamed = {p.replace("up", "down"): m for p, m in one.items()}
    turned = {p: m.reshape(7, 5) for p, m in one.items()}
    assert len({identity(x) for x in (one, flipped, renamed, turned)}) == 4


def test_zeros_elsewhere_are_found_and_counted(tmp_path: Path) -> None:
    one = masks()
    weights = {p: m.double() for p, m in one.items()}
    check_zeros(one, weights.__getitem__, "here")
    filled = ~one["h.1.up"]
    weights["h.1.up"][filled] = 1.0
    weights["h.1.up"][0, int(one["h.1.up"][0].nonzero()[0])] = 0.0
    with pytest.raises(
        ModelError, match=rf"here: the zeros of h.1.up .*: {int(filled.sum())} weights of 35 .* 1 "
    ):
        check_zeros(one, weights.__getitem__, "here")
    with pytest.raises(ModelError, match=r"is \[7, 5\], its mask \[5, 7\]"):
        check_zeros(one, lambda p: weights[p].T, "here")


def test_a_folder_of_masks(tmp_path: Path) -> None:
    assert mask_identity(tmp_path) == ""
    with pytest.raises(ModelError, match="no pruned model"):
        load_masks(tmp_path)
    one = masks()
    name = save_masks(one, tmp_path)
    assert name == identity(one) == mask_identity(tmp_path)
    back = load_masks(tmp_path)
    assert all(torch.equal(back[p], one[p]) for p in one)
    assert density(one) == density(back)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sparse_file_loses_nothing_and_weighs_what_it_says(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    """Conv1D's transposed weights and whatever has no mask included."""
    one = masks()
    g = torch.Generator().manual_seed(1)
    weights = {p: torch.rand(5, 7, generator=g) + 1 for p in one}
    state = {f"{p}.weight": (w * one[p]).to(dtype) for p, w in weights.items()}
    state["h.1.up.weight"] = state["h.1.up.weight"].T.contiguous()
    state["norm.weight"] = torch.rand(7, generator=g).to(dtype)
    file = tmp_path / "sparse.safetensors"
    written = save_sparse(state, one, file)
    nonzero = sum(int(m.sum()) for m in one.values())
    assert written == (nonzero + 7) * dtype.itemsize + 2 * -(-35 // 8)
    back = load_sparse(file)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[k], t) and back[k].dtype == dtype for k, t in state.items())
    lacking = {k: t for k, t in state.items() if k != "h.0.up.weight"}
    with pytest.raises(ModelError, match=r"no weight of h.0.up, which has a mask \(1 of 2\)"):
        save_sparse(lacking, one, file)
    state["h.0.up.weight"] = torch.ones(5, 7, dtype=dtype)
    with pytest.raises(ModelError, match=r"the zeros of h.0.up are not where"):
        save_sparse(state, one, file)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_sparse_file_of_a_whole_model(name: str, tmp_path: Path) -> None:
    """Square layers included, whose shape does not say whether they are stored turned (Conv1D)."""
    model = pruned(name, dtype=torch.float32)
    zero = {p: (dense_weight(x.base) != 0) for p, x in model.layers.items()}
    assert any(m.shape[0] == m.shape[1] for m in zero.values())
    state = model.base_state()
    save_sparse(state, zero, tmp_path / "s")
    back = load_sparse(tmp_path / "s")
    assert back.keys() == state.keys()
    assert all(torch.equal(back[k], t) for k, t in state.items())


def test_a_sparse_file_whose_bits_moved_is_refused(tmp_path: Path) -> None:
    one, file = masks(), tmp_path / "s"
    save_sparse({f"{p}.weight": m.float() for p, m in one.items()}, one, file)
    with safe_open(file, framework="pt") as opened:
        about, bits = opened.metadata(), opened.get_tensor("h.0.up.weight/bits")
    tensors = load_file(file)
    tensors["h.0.up.weight/bits"] = bits.flip(0)
    save_file(tensors, file, metadata=about)
    with pytest.raises(ModelError, match="its masks are not those of its identity"):
        load_sparse(file)
    save_file(tensors, file)
    with pytest.raises(ModelError, match="is no file of weights without their zeros"):
        load_sparse(file)


@given(st.integers(1, 5), st.integers(1, 5), st.booleans(), st.integers(0, 99))
def test_zeros_tell_how_a_weight_is_stored(m: int, n: int, turned: bool, seed: int) -> None:
    mask = torch.rand(m, n, generator=torch.Generator().manual_seed(seed)) < 0.5
    weight = (mask.T if turned else mask).float()
    assert torch.equal(as_stored(mask, weight, "w", "here"), weight != 0)
    weight[0, 0] = torch.nan if weight[0, 0] else 1.0
    with pytest.raises(ModelError, match=r"here: .* w"):
        as_stored(mask, weight, "w", "here")


def test_what_is_not_finite_is_refused() -> None:
    mask = torch.tensor([[True, False, True]])
    for value in (torch.inf, -torch.inf, torch.nan):
        weight = torch.tensor([[1.0, 0.0, value]])
        with pytest.raises(ModelError, match="here: 1 weights of 3 of w are not finite"):
            check_zeros({"w": mask}, lambda _, w=weight: w, "here")


def test_a_models_identity_holds_that_of_its_masks_and_not_the_bytes_of_their_file(tmp_path):
    """The header of a safetensors file may list its metadata in any order."""
    (tmp_path / "config.json").write_text("{}")
    save_file({"w": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    dense = fingerprint(tmp_path)
    mask = {"w": torch.tensor([[True, False], [False, True]])}
    found = set()
    for _ in range(8):
        save_masks(mask, tmp_path)
        found.add(fingerprint(tmp_path))
    save_masks({"w": ~mask["w"]}, tmp_path)
    assert len(found | {dense, fingerprint(tmp_path)}) == 3
