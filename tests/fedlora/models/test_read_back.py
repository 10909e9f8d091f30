"""What is exported is read back by the program that it is for; what cannot be is said."""

import shutil

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma3Config,
    MambaConfig,
    MixtralConfig,
    Qwen2MoeConfig,
)

from fedlora.core.types import Factors
from fedlora.models import read_back as module
from fedlora.models.export import merge, save
from fedlora.models.folder import find_assets
from fedlora.models.read_back import read_back
from fedlora.models.spec import HuggingFace, Tiny, TinyGPT2
from fedlora.techniques.lora.payload import LowRankPayload
from fedlora.techniques.rebased.payload import Rebased

IDS = {"vocab_size": 2048, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CONFIGS = {
    "deepseek_v3": lambda: DeepseekV3Config(
        **SMALL | {"num_key_value_heads": 4}, **IDS, max_position_embeddings=64,
        n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, n_shared_experts=1,
        first_k_dense_replace=1, n_group=2, topk_group=1, q_lora_rank=16, kv_lora_rank=16,
        qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16,
    ),
    "mamba": lambda: MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=8, **IDS),
    "mixtral": lambda: MixtralConfig(**SMALL, **IDS, num_local_experts=4),
    "qwen2_moe": lambda: Qwen2MoeConfig(
        **SMALL, **IDS, num_experts=4, moe_intermediate_size=24, shared_expert_intermediate_size=24
    ),
    "gemma3": lambda: Gemma3Config(
        text_config={**SMALL, **IDS, "head_dim": 8},
        vision_config={
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "image_size": 28, "patch_size": 14,
        },
        image_token_index=2047, boi_token_index=2046, eoi_token_index=2045, mm_tokens_per_image=4,
    ),
}  # fmt: skip
MISREAD = {"deepseek_v3": "adapts layers that the folder has no factors for"}


SPECS = [Tiny(), TinyGPT2(["q_attn"], split_qkv=True)]


def base(kind, tmp_path):
    folder = tmp_path / kind
    AutoModelForCausalLM.from_config(CONFIGS[kind]()).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(find_assets("tiny") / name, folder)
    return HuggingFace(path=str(folder))


def random_factors(info, scale=0.2):
    g = torch.Generator().manual_seed(0)

    def factor(rows, columns):
        return torch.randn(rows, columns, generator=g) * scale

    return LowRankPayload(
        {
            m.path: Factors(factor(r, m.d_in), factor(m.d_out, r), 16.0)
            for m in info.modules
            for r in (min(2, m.max_rank),)
        }
    )


@pytest.mark.parametrize("kind", CONFIGS)
def test_peft_computes_the_same_or_the_export_says_that_it_does_not(kind, tmp_path):
    spec = base(kind, tmp_path)
    model = spec.load(torch.device("cpu"))
    payload = random_factors(model.info)
    save(payload, model.info, tmp_path / "adapter", str(spec.folder()))
    found = read_back(payload, tmp_path / "adapter", spec)
    assert found.checked
    assert found.agrees == (kind not in MISREAD)
    assert MISREAD.get(kind, "computes the same from this folder") in found.sentence()
    assert ("fedlora merge" in found.sentence()) == (kind in MISREAD)
    # whatever PEFT does, a merged model is what was mounted
    merge(model, payload, tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        model.mount(payload)
        torch.testing.assert_close(
            plain(input_ids=ids).logits, model.network(input_ids=ids).logits, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_adapted_layer_acts(kind, tmp_path):
    """Mamba's scan reads the weight of some of its layers and never calls them."""
    spec = base(kind, tmp_path)
    model = spec.load(torch.device("cpu"))
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        bare = model.network(input_ids=ids).logits
        for path, factors in random_factors(model.info).items():
            model.mount(LowRankPayload({path: factors}))
            assert not torch.equal(model.network(input_ids=ids).logits, bare), path


def test_only_the_language_model_of_a_multimodal_one_is_adapted(tmp_path):
    for targets in ("all-linear", ["q_proj"]):
        spec = HuggingFace(path=base("gemma3", tmp_path).path, targets=targets)
        paths = [m.path for m in spec.describe().modules]
        assert paths and all(".language_model." in f".{p}" for p in paths)


@pytest.mark.parametrize("spec", SPECS, ids=["llama", "split gpt2"])
@pytest.mark.parametrize("scale", [0.0, 1e-3, 0.2])
def test_factors_of_any_size_are_checked(spec, scale, tmp_path):
    info = spec.describe()
    payload = random_factors(info, scale)
    save(payload, info, tmp_path / "adapter")
    assert read_back(payload, tmp_path / "adapter", spec).agrees


@pytest.mark.parametrize("fault", ["alpha", "one factor"])
def test_a_folder_that_holds_something_else_is_noticed(fault, tmp_path):
    info = Tiny().describe()
    payload = random_factors(info, 0.05)
    first, *_ = payload
    f = payload[first]
    changed = {"alpha": Factors(f.a, f.b, 32.0), "one factor": Factors(f.a, f.b * 0, f.alpha)}
    save(LowRankPayload({**payload, first: changed[fault]}), info, tmp_path / "adapter")
    found = read_back(payload, tmp_path / "adapter", Tiny())
    assert found.checked and not found.agrees
    assert "logits of a small text differ by" in found.note


def test_what_cannot_be_checked_is_said(tmp_path, monkeypatch):
    info = Tiny().describe()
    payload = random_factors(info)
    save(payload, info, tmp_path / "adapter")
    int4 = HuggingFace(path=Tiny().folder().as_posix(), quantization="int4")
    found = read_back(payload, tmp_path / "adapter", int4)
    assert "quantised (model.quantization=int4)" in found.note
    monkeypatch.setattr(module, "_ROOM", 1e9)
    found = read_back(payload, tmp_path / "adapter", Tiny())
    assert not found.checked and not found.agrees
    assert "was not checked on it: the base needs about" in found.sentence()
    assert found.record().keys() == {"reader", "checked", "agrees", "note"}


def test_a_folder_for_us_alone_is_not_checked(tmp_path):
    assert read_back(Rebased({}), tmp_path, Tiny()) is None


def test_reading_back_draws_nothing_from_the_global_generator(tmp_path):
    info = Tiny().describe()
    payload = random_factors(info)
    save(payload, info, tmp_path / "adapter")
    before = torch.get_rng_state()
    read_back(payload, tmp_path / "adapter", Tiny())
    assert torch.equal(torch.get_rng_state(), before)
