"""Tiny random models of the architectures that people fine-tune, by their Hugging Face type."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from fedlora.models.qkv import split_qkv
from tests.fedlora.models.networks import VOCABULARY

CONTEXT = 64
WINDOW = 6
"""Of every family that has a sliding window: most test sequences are longer."""

_NAMED: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": 1,
        "eos_token_id": 0,
        "pad_token_id": None,
    }
)
_GPT2: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": VOCABULARY,
        "n_positions": CONTEXT,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 4,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
)
_EXPERTS: Mapping[str, Any] = MappingProxyType(
    {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
)
SLIDING = ["sliding_attention", "full_attention"]

FAMILIES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "llama": _NAMED,
        "qwen2": _NAMED,
        "qwen3": {**_NAMED, "head_dim": 8},
        "mistral": {**_NAMED, "sliding_window": WINDOW},
        "phi3": _NAMED,
        "gemma": {**_NAMED, "head_dim": 8},
        "gemma2": {
            **_NAMED,
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": WINDOW,
            "layer_types": SLIDING,
            "final_logit_softcapping": 0.05,
            "attn_logit_softcapping": 0.05,
        },
        "gemma3_text": {
            **_NAMED,
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": WINDOW,
            "layer_types": SLIDING,
        },
        "olmo2": _NAMED,
        "olmo3": {**_NAMED, "sliding_window": WINDOW, "layer_types": SLIDING},
        "smollm3": {**_NAMED, "no_rope_layers": [1, 0]},
        "granite": {**_NAMED, "logits_scaling": 3.0, "embedding_multiplier": 2.0},
        "stablelm": _NAMED,
        "cohere": {**_NAMED, "logit_scale": 0.25},
        "cohere2": {
            **_NAMED,
            "logit_scale": 0.25,
            "sliding_window": WINDOW,
            "layer_types": SLIDING,
        },
        "starcoder2": {**_NAMED, "sliding_window": WINDOW},
        "glm4": {**_NAMED, "head_dim": 8},
        "ernie4_5": {**_NAMED, "head_dim": 8},
        "exaone4": {**_NAMED, "sliding_window": WINDOW, "layer_types": SLIDING},
        "nemotron": _NAMED,
        "seed_oss": {**_NAMED, "head_dim": 8},
        "apertus": _NAMED,
        "hunyuan_v1_dense": {**_NAMED, "head_dim": 8},
        "gpt_oss": {
            **_NAMED,
            **_EXPERTS,
            "head_dim": 8,
            "sliding_window": WINDOW,
            "layer_types": SLIDING,
        },
        "mixtral": {**_NAMED, **_EXPERTS},
        "qwen3_moe": {**_NAMED, **_EXPERTS, "head_dim": 8, "moe_intermediate_size": 16},
        "olmoe": {**_NAMED, **_EXPERTS},
        "qwen2_moe": {
            **_NAMED,
            **_EXPERTS,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
        "phimoe": {**_NAMED, **_EXPERTS, "sliding_window": WINDOW},
        "llama4_text": {
            **_NAMED,
            **_EXPERTS,
            "head_dim": 8,
            "intermediate_size_mlp": 24,
            "attention_chunk_size": WINDOW,
            "no_rope_layers": [1, 0],
        },
        "gpt2": _GPT2,
        "gpt2_split": _GPT2,
        "gpt_bigcode": _GPT2,
        "gptj": {**_GPT2, "rotary_dim": 4},
        "gpt_neo": {
            "vocab_size": VOCABULARY,
            "max_position_embeddings": CONTEXT,
            "hidden_size": 16,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": WINDOW,
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
        "gpt_neox": _NAMED,
        "phi": _NAMED,
        "opt": {**_NAMED, "ffn_dim": 20, "word_embed_proj_dim": 16, "pad_token_id": 1},
        "bloom": {
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "n_layer": 2,
            "n_head": 4,
            "bos_token_id": 1,
            "eos_token_id": 0,
            "pad_token_id": 3,
        },
        "falcon": {**_NAMED, "new_decoder_architecture": True, "num_kv_heads": 2},
        "mpt": {"vocab_size": VOCABULARY, "d_model": 16, "n_heads": 4, "n_layers": 2},
        "persimmon": _NAMED,
        "qwen3_next": {
            **_NAMED,
            **_EXPERTS,
            "head_dim": 8,
            "linear_key_head_dim": 4,
            "linear_value_head_dim": 4,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "layer_types": ["linear_attention", "full_attention"],
        },
        "lfm2": {**_NAMED, "layer_types": ["conv", "full_attention"]},
    }
)
"""Model type -> what makes a configuration of it tiny; ``gpt2_split``: with q, k and v apart."""


def family(name: str) -> PreTrainedModel:
    """A random model, all of whose biases and norms matter."""
    torch.manual_seed(0)
    kind = name.removesuffix("_split")
    network = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **FAMILIES[name]))
    with torch.no_grad():
        for path, parameter in network.named_parameters():
            if parameter.dim() == 1 and "norm" not in path.lower() and "ln" not in path:
                parameter.normal_(std=0.2)
            elif parameter.dim() >= 2:
                parameter.mul_(5.0)  # standard deviation 0.1: attention has something to weigh
    if name != kind:
        split_qkv(network)
    return network.eval()
