"""What is saved is what was mounted, for PEFT, for us and for plain transformers."""

import json
from dataclasses import replace

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedlora.core.errors import ModelError
from fedlora.core.types import Factors
from fedlora.models.export import merge, save
from fedlora.models.folder import MASKS, mask_identity
from fedlora.models.masks import (
    check_network,
    load_masks,
)
from fedlora.techniques.lora.payload import LowRankPayload
from fedlora.techniques.lora.peft import CONFIG, WEIGHTS, load_peft
from fedlora.techniques.sparse.payload import SparseDelta
from tests.fedlora.models.networks import ALPHA, NETWORKS, adapter, llama, logits, same, wrap
from tests.fedlora.prune.models import (
    pruned,
    reopened,
    scale,
)

LAWS = settings(derandomize=True, deadline=None, max_examples=15)
RANKS = {"equal": 5, "unequal": lambda i: 1 + i % 7}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("rank", RANKS.values(), ids=RANKS)
@pytest.mark.parametrize("alphas", ["one", "many"])
def test_peft_computes_what_we_mounted(name, rank, alphas, tmp_path):
    model = wrap(NETWORKS[name]().double())
    factors = adapter(model.info.modules, rank)
    if alphas == "many":
        factors = LowRankPayload(
            {p: Factors(f.a, f.b, ALPHA + i % 3 / 2) for i, (p, f) in enumerate(factors.items())}
        )
    model.mount(factors)
    save(factors, model.info, tmp_path, base_name="base", dropout=0.1)
    theirs = peft.PeftModel.from_pretrained(NETWORKS[name]().double(), tmp_path).double().eval()
    # PEFT reads adapters in float32
    torch.testing.assert_close(logits(model.network), logits(theirs), rtol=1e-5, atol=1e-6)
    assert theirs.peft_config["default"].base_model_name_or_path == "base"
    assert theirs.peft_config["default"].lora_dropout == 0.1


@LAWS
@given(ranks=st.lists(st.integers(1, 16), min_size=14, max_size=14), alpha=st.floats(0.5, 64))
def test_round_trip_is_exact(ranks, alpha, tmp_path_factory):
    info = wrap(llama()).info
    factors = adapter(info.modules, lambda i: ranks[i], alpha=alpha)
    folder = tmp_path_factory.mktemp("adapter")
    save(factors, info, folder)
    assert same(load_peft(folder), factors)


@pytest.mark.parametrize("targets", [("q_attn", "v_attn"), ("q_attn", "k_attn", "v_attn")])
@pytest.mark.parametrize("rank", [4, lambda i: 1 + i % 4], ids=["equal", "unequal"])
def test_parts_of_a_split_layer_are_one_layer_to_peft(targets, rank, tmp_path):
    model = wrap(NETWORKS["gpt2"]().double(), targets, split=True)
    factors = adapter(model.info.modules, rank)
    model.mount(factors)
    save(factors, model.info, tmp_path)
    theirs = peft.PeftModel.from_pretrained(NETWORKS["gpt2"]().double(), tmp_path).double().eval()
    torch.testing.assert_close(logits(model.network), logits(theirs), rtol=1e-5, atol=1e-6)
    names = {n for n, m in theirs.base_model.model.named_modules() if hasattr(m, "lora_A")}
    assert names == {f"transformer.h.{i}.attn.c_attn" for i in range(2)}
    config = theirs.peft_config["default"]
    if rank == 4:
        assert (config.r, config.lora_alpha) == (4 * len(targets), ALPHA * len(targets))
        assert same(load_peft(tmp_path, model.info), factors)
    model.mount(load_peft(tmp_path, model.info))
    torch.testing.assert_close(logits(model.network), logits(theirs), rtol=1e-5, atol=1e-6)


def test_reads_what_peft_wrote(tmp_path):
    theirs = peft.get_peft_model(
        llama().double(),
        peft.LoraConfig(
            r=6,
            lora_alpha=10,
            target_modules="all-linear",
            rank_pattern={"q_proj": 3, "layers.1.mlp.up_proj": 2},
            alpha_pattern={"v_proj": 7},
            init_lora_weights="gaussian",
        ),
    ).eval()
    _randomise(theirs)
    theirs.save_pretrained(tmp_path)
    model = wrap(llama().double())
    model.mount(load_peft(tmp_path))
    torch.testing.assert_close(logits(model.network), logits(theirs), rtol=1e-12, atol=1e-12)


def test_rank_stabilised_scale_is_kept(tmp_path):
    config = peft.LoraConfig(r=9, lora_alpha=10, target_modules=["q_proj"], use_rslora=True)
    theirs = peft.get_peft_model(llama().double(), config).eval()
    _randomise(theirs)
    theirs.save_pretrained(tmp_path)
    ours = load_peft(tmp_path)
    assert all(f.scale == pytest.approx(10 / 3) for f in ours.values())
    model = wrap(llama().double())
    model.mount(ours)
    torch.testing.assert_close(logits(model.network), logits(theirs), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"invented_in_the_future": 1}, "invented_in_the_future"),
    ],
)
def test_more_than_two_factors_is_refused_by_name(option, named, tmp_path):
    info = wrap(llama()).info
    save(adapter(info.modules, 2), info, tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text()) | option
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ModelError, match=named):
        load_peft(tmp_path)


def test_incomplete_adapters_are_refused_by_name(tmp_path):
    with pytest.raises(ModelError, match="adapter_config"):
        load_peft(tmp_path / "nowhere")
    info = wrap(llama()).info
    save(adapter(info.modules, 2), info, tmp_path)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({key: torch.ones(2, 16)}, tmp_path / WEIGHTS)
    with pytest.raises(ModelError, match="q_proj has lora_A alone"):
        load_peft(tmp_path)
    save_file({"base_model.model.embed.lora_embedding_A": torch.ones(2)}, tmp_path / WEIGHTS)
    with pytest.raises(ModelError, match="lora_embedding_A"):
        load_peft(tmp_path)


def test_an_adapter_that_fits_no_model_is_not_saved(tmp_path):
    info = wrap(llama()).info
    with pytest.raises(ValueError, match="without modules"):
        save(LowRankPayload({}), info, tmp_path)
    with pytest.raises(ValueError, match="elsewhere"):
        save(
            LowRankPayload({"elsewhere": Factors(torch.ones(1, 2), torch.ones(2, 1), ALPHA)}),
            info,
            tmp_path,
        )


@pytest.mark.parametrize(("name", "split"), [*((n, False) for n in NETWORKS), ("gpt2", True)])
@pytest.mark.parametrize("kind", ["adapter", "sparse", "nothing"])
def test_the_merged_model_computes_the_same(name, split, kind, tmp_path):
    model = wrap(NETWORKS[name]().double(), split=split)
    payload = {
        "adapter": adapter(model.info.modules, lambda i: 1 + i % 7),
        "sparse": SparseDelta(
            3, 1.0, {m.path: torch.full((m.d_out * m.d_in,), 0.01) for m in model.info.modules}
        ),
        "nothing": LowRankPayload({}),
    }[kind]
    mounted = adapter(model.info.modules, 2, seed=9)
    model.mount(mounted)
    merge(model, payload, tmp_path)
    assert same(model.payload(), mounted), "what was mounted stays"
    model.mount(payload)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(logits(plain), logits(model.network), rtol=1e-5, atol=1e-5)
    assert plain.config.use_cache
    assert not model.network.config.use_cache
    assert plain.state_dict().keys() == NETWORKS[name]().state_dict().keys()
    assert AutoTokenizer.from_pretrained(tmp_path).vocab_size == model.tokenizer.vocab_size


@pytest.mark.parametrize(("name", "split"), [("llama", False), ("gpt2", False), ("gpt2", True)])
def test_a_merged_pruned_model_has_the_masks_of_its_base(name, split, tmp_path):
    """All of them, whatever carried the update, in the layers that the files have."""
    base, folder = tmp_path / "base", tmp_path / "merged"
    merge(pruned(name, dtype=torch.float32), None, base)
    targets = {"llama": ("q_proj",), "gpt2": ("q_attn",) if split else ("c_proj",)}[name]
    model = reopened(base, name, targets, split)
    assert len(model.layers) < len(load_masks(base))
    payload = scale(model)
    merge(model, payload, folder)
    assert mask_identity(folder) == mask_identity(base)
    again = reopened(folder, name)
    check_network(load_masks(folder), again.network, "merged")
    model.mount(payload)
    torch.testing.assert_close(logits(again.network), logits(model.network), rtol=1e-5, atol=1e-5)


def test_masks_go_with_the_zeros_that_they_describe(tmp_path):
    """LoRA fills zeros: no mask is left, of an earlier merge into the folder neither. A base
    pruned further since has masks of its own, which nobody has written yet."""
    base, folder = tmp_path / "base", tmp_path / "merged"
    merge(pruned(dtype=torch.float32), None, base)
    model = reopened(base)
    merge(model, scale(model), folder)
    merge(model, adapter(model.info.modules, 2), folder)
    assert not (folder / MASKS).exists()
    merge(model, None, folder)
    assert mask_identity(folder) == model.info.mask
    next(iter(model.layers.values())).base.weight[0] = 0
    merge(model, None, folder)
    assert not (folder / MASKS).exists()
    with pytest.raises(ModelError, match=r"the zeros of .* are not where its mask says"):
        merge(model, scale(model), folder)


def test_masks_that_nobody_knows_are_not_invented(tmp_path):
    """From no folder, and with fewer layers adapted than were pruned."""
    whole = pruned(dtype=torch.float32)
    model = pruned(dtype=torch.float32, targets=("q_proj",))
    model.info = replace(model.info, mask=whole.info.mask)
    with pytest.raises(ModelError, match="its masks are nowhere"):
        merge(model, scale(model), tmp_path)


def test_lora_replaces_spp_in_a_folder(tmp_path):
    model = pruned()
    save(scale(model), model.info, tmp_path)
    factors = adapter(model.info.modules, 2)
    save(factors, model.info, tmp_path)
    assert same(load_peft(tmp_path), factors)


def _randomise(network) -> None:
    g = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for n, p in network.named_parameters():
            if "lora_" in n:
                p.copy_(0.2 * torch.randn(p.shape, generator=g, dtype=torch.float64))
