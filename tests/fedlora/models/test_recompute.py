"""Recomputed activations: the same numbers, fewer of them kept, nothing left behind."""

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

from fedlora.models.recompute import check_recomputable, recomputing
from tests.fedlora.models.networks import NETWORKS, VOCABULARY, tokens


def opt():
    """Its blocks drop numbers themselves, with the probability below, if they think they train."""
    torch.manual_seed(0)
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            ffn_dim=20,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=32,
            word_embed_proj_dim=16,
            dropout=0.5,
        )
    )


NETWORKS = {**NETWORKS, "opt": opt}


def gradients(network) -> list[torch.Tensor]:
    loss = network(input_ids=tokens(), labels=tokens(), use_cache=False).loss
    return list(torch.autograd.grad(loss, [p for p in network.parameters() if p.requires_grad]))


def saved(network) -> int:
    """Numbers that autograd keeps for the backward pass."""
    kept: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        kept[t.data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        network(input_ids=tokens(), labels=tokens(), use_cache=False).loss.backward()
    for p in network.parameters():
        kept.pop(p.data_ptr(), None)
        p.grad = None
    return sum(kept.values())


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_are_the_same_from_fewer_saved_numbers(name):
    network = NETWORKS[name]().eval()
    wanted, before = gradients(network), saved(network)
    with recomputing(network):
        again, after = gradients(network), saved(network)
    for a, b in zip(again, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
    assert after < 0.6 * before


@pytest.mark.parametrize("name", NETWORKS)
def test_nothing_is_left_behind_and_nothing_pretends_to_train(name):
    network = NETWORKS[name]().eval()
    network.requires_grad_(False)

    def state():
        return [
            (path, type(m), m.training, set(m.__dict__), len(m._forward_hooks))
            for path, m in network.named_modules()
        ]

    before = state()
    with recomputing(network):
        assert not any(m.training for m in network.modules())
        assert not network(input_ids=tokens()).logits.requires_grad
    assert state() == before


def test_a_network_that_cannot_is_refused_by_name():
    network = NETWORKS["llama"]()
    check_recomputable(network)
    network.supports_gradient_checkpointing = False
    with pytest.raises(ValueError, match=r"engine\.checkpoint=true: LlamaForCausalLM"):
        check_recomputable(network)
