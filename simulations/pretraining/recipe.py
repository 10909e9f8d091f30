"""The settings that determine the weights of a tiny base model: sizes, architecture, schedule,
optimiser."""

import math
from dataclasses import dataclass

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

PAD, BOS, EOS = 0, 1, 2
ARCHITECTURES = ("llama", "gpt2")

Network = LlamaForCausalLM | GPT2LMHeadModel


@dataclass(frozen=True)
class Recipe:
    """All settings that determine the weights, except the versions of the libraries."""

    tokens: int = 14_000_000
    seed: int = 0
    vocabulary: int = 2048
    hidden: int = 128
    intermediate: int = 352
    layers: int = 4
    heads: int = 4
    positions: int = 1024
    batch: int = 32  # sequences
    length: int = 256  # tokens of a sequence
    long_every: int = 8  # every n-th step has the same tokens in sequences of `positions`
    lr: float = 3e-3
    warmup: int = 100  # steps
    decay: float = 0.1
    clip: float = 1.0
    instruction_share: float = 0.33  # of the characters made from WordNet
    sotu_repeats: int = 3  # per epoch
    held_out: float = 0.025  # share of the addresses, and of the runs of senses
    wordnet: str = "/usr/share/wordnet"
    arch: str = "llama"
    beta2: float = 0.95

    @property
    def block(self) -> int:
        """Tokens of one optimiser step."""
        return self.batch * self.length

    @property
    def steps(self) -> int:
        """Optimiser steps, the last one whole."""
        return max(1, math.ceil(self.tokens / self.block))

    def rate(self, step: int) -> float:
        """Learning rate: linear warm-up, then a cosine down to a tenth."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (0.55 + 0.45 * math.cos(math.pi * done))


def build_model(recipe: Recipe) -> Network:
    """A new network with tied embeddings and without dropout, initialised from the recipe's seed.

    Raises:
        ValueError: if the architecture is not known.
    """
    torch.manual_seed(recipe.seed)
    if recipe.arch == "llama":
        return LlamaForCausalLM(_llama(recipe))
    if recipe.arch == "gpt2":
        return GPT2LMHeadModel(_gpt2(recipe))
    raise ValueError(f"arch={recipe.arch!r} is not one of {ARCHITECTURES}")


def _llama(recipe: Recipe) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=recipe.vocabulary,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=recipe.positions,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        use_cache=True,
    )


def _gpt2(recipe: Recipe) -> GPT2Config:
    """``gelu_pytorch_tanh`` is GPT-2's own ``gelu_new`` as one operation."""
    return GPT2Config(
        vocab_size=recipe.vocabulary,
        n_positions=recipe.positions,
        n_embd=recipe.hidden,
        n_inner=recipe.intermediate,
        n_layer=recipe.layers,
        n_head=recipe.heads,
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        use_cache=True,
    )


def build_optimizer(model: Network, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices and none on the gains of the norms and biases."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    gains = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": recipe.decay},
        {"params": gains, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, recipe.beta2), fused=True)
