"""The longest sequence that a configuration promises is one that the network can compute."""

import pytest
import torch
from transformers import (
    BioGptConfig,
    BioGptForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
    XGLMConfig,
    XGLMForCausalLM,
)

from fedlora.models.context import IF_UNSTATED, limits
from tests.fedlora.models.families import FAMILIES, family

SIZES = {"vocab_size": 20, "num_attention_heads": 2}
GPT2 = {"vocab_size": 20, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 24}
LEARNED = {
    "gpt2": (GPT2LMHeadModel, GPT2Config(**GPT2)),
    "opt": (
        OPTForCausalLM,
        OPTConfig(
            **SIZES, hidden_size=8, ffn_dim=8, num_hidden_layers=1, word_embed_proj_dim=8,
            max_position_embeddings=24,
        ),
    ),
    "roberta": (
        RobertaForCausalLM,
        RobertaConfig(
            **SIZES, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
            max_position_embeddings=24, is_decoder=True,
        ),
    ),
    "biogpt": (
        BioGptForCausalLM,
        BioGptConfig(
            **SIZES, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
            max_position_embeddings=24,
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LEARNED)
def test_a_table_of_positions_limits_exactly(name):
    """A sequence of the stated length is computed, and one token more fails."""
    kind, config = LEARNED[name]
    network, found = kind(config).eval(), limits(config, kind(config))
    assert found.stated and found.context <= 24 and found.vocabulary == 20
    ids = torch.full((1, found.context + 1), 5)
    assert network(input_ids=ids[:, :-1]).logits.shape[1] == found.context
    with pytest.raises((IndexError, RuntimeError)):
        network(input_ids=ids)


def test_relative_positions_state_no_limit():
    config = BloomConfig(vocab_size=20, hidden_size=8, n_layer=1, n_head=2)
    network = BloomForCausalLM(config)
    assert limits(config, network)[:2] == (IF_UNSTATED, False)
    assert network(input_ids=torch.ones(1, IF_UNSTATED + 2, dtype=torch.long)).logits is not None


def test_computed_positions_are_limited_by_what_is_stated():
    config = XGLMConfig(
        vocab_size=20, d_model=8, ffn_dim=8, num_layers=1, attention_heads=2,
        max_position_embeddings=24,
    )  # fmt: skip
    assert limits(config, XGLMForCausalLM(config))[:2] == (24, True)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_family_is_read(name):
    network = family(name)
    found = limits(network.config, network)
    assert found.vocabulary == network.get_input_embeddings().num_embeddings
    stated = getattr(network.config.get_text_config(), "max_position_embeddings", None)
    assert not stated or (found.stated and found.context == stated)
