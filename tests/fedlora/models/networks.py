"""Small random language models and adapters for them, in float64."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer, Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPT2TokenizerFast,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from fedlora.core.types import Factors, Module
from fedlora.models.blocks import adapted_blocks
from fedlora.models.language_model import LanguageModel
from fedlora.models.modules import ModelInfo, find_modules
from fedlora.models.qkv import split_qkv
from fedlora.techniques.lora.payload import LowRankPayload

ALPHA = 12.0
VOCABULARY = 40


def llama(layers: int = 2) -> PreTrainedModel:
    """Grouped-query attention: d_out of k and v is smaller than d_in."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=20,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
            tie_word_embeddings=True,
        )
    )


def gpt2(layers: int = 2) -> PreTrainedModel:
    """Layers of Conv1D, with dropout in the base, which must stay off."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=32,
        n_embd=16,
        n_layer=layers,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
    )
    network = GPT2LMHeadModel(config)
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):  # zero by default, which would hide a forgotten bias
            torch.nn.init.normal_(parameter)
    return network


NETWORKS: Mapping[str, Callable[[], PreTrainedModel]] = {"llama": llama, "gpt2": gpt2}


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0", unk_token="w0")


def save_gpt2_tokenizer(folder: Path, texts: Sequence[str]) -> None:
    """As GPT-2's own: one special token, no padding, and files that name neither."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=300, special_tokens=["<|endoftext|>"])
    bpe.save_model(str(folder))
    files = [str(folder / name) for name in ("vocab.json", "merges.txt")]
    GPT2TokenizerFast(*files).save_pretrained(folder)
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 1024}')


def wrap(
    network: PreTrainedModel,
    targets: str | tuple[str, ...] = "all-linear",
    split: bool = False,
    layers: Any = "all",
) -> LanguageModel:
    """As a spec loads it; ``split``: with GPT-2's fused projection in parts."""
    splits = split_qkv(network) if split else ()
    modules = find_modules(network, targets, layers)
    parameters = sum(p.numel() for p in network.parameters())
    blocks, adapted = adapted_blocks(network, [m.path for m in modules])
    info = ModelInfo(
        "random", modules, parameters, 32, "none", splits, blocks=blocks, adapted=adapted
    )
    return LanguageModel(network, tokenizer(), info)


def adapter(
    modules: tuple[Module, ...],
    rank: int | Callable[[int], int],
    seed: int = 1,
    alpha: float = ALPHA,
    dtype: torch.dtype = torch.float64,
) -> LowRankPayload:
    """Both factors random; ``rank`` may be a function of the module's position."""
    g = torch.Generator().manual_seed(seed)
    factors = {}
    for i, m in enumerate(modules):
        r = min(m.max_rank, rank if isinstance(rank, int) else rank(i))
        a = torch.randn(r, m.d_in, generator=g, dtype=torch.float64)
        b = torch.randn(m.d_out, r, generator=g, dtype=torch.float64)
        factors[m.path] = Factors((0.2 * a).to(dtype), (0.2 * b).to(dtype), alpha)
    return LowRankPayload(factors)


def tokens(seed: int = 2) -> torch.Tensor:
    """Two rows of nine tokens."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (2, 9), generator=g)


def logits(network: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return network(input_ids=tokens(), use_cache=False).logits


def step(model: LanguageModel, parameters: list[torch.nn.Parameter], lr: float = 0.05) -> None:
    """One plain gradient step on `tokens`."""
    model.seed_dropout(0, tokens().numel())
    model.network(input_ids=tokens(), labels=tokens()).loss.backward()
    with torch.no_grad():
        for p in parameters:
            assert p.grad is not None
            p -= lr * p.grad
            p.grad = None


def same(a: Mapping[str, Factors], b: Mapping[str, Factors]) -> bool:
    """Bitwise, scale included."""
    return a.keys() == b.keys() and all(
        torch.equal(a[p].a, b[p].a) and torch.equal(a[p].b, b[p].b) and a[p].alpha == b[p].alpha
        for p in a
    )
