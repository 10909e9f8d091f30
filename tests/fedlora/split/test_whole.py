"""The cost of a whole model against what PyTorch counts and saves."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, BertConfig, DistilBertConfig

from fedlora.core.types import Ranks
from fedlora.split.whole import WholeModel
from simulations.bench.saved_bytes import saved_bytes
from tests.fedlora.models.families import family
from tests.fedlora.split.test_cost import B, T, held, whole


def trained_loss(model: Any) -> torch.Tensor:
    """The loss of all tokens, with their logits."""
    tokens = torch.randint(0, 97, (B, T), generator=torch.Generator().manual_seed(3))
    logits = model.network(input_ids=tokens).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_whole_model_costs_what_pytorch_counts_and_saves(name: str):
    model = whole(name, "all-linear", "sdpa", 0.0)
    ranks = Ranks({m.path: 3 for m in model.info.modules})
    cost = WholeModel(model.network, 3, dropout=False)
    with saved_bytes(held(model)) as saved:
        kept = trained_loss(model)
    formula = cost.memory(ranks, B * T) - cost.memory(ranks, 0)
    assert formula / 1.1 <= saved.bytes <= 1.1 * formula
    kept.backward()
    model = whole(name, "all-linear", "eager", 0.0)
    with FlopCounterMode(display=False) as counted:
        trained_loss(model).backward()
    work = cost.work(ranks)
    assert counted.get_total_flops() == pytest.approx(B * T * (work.a + T * work.b), rel=0.01)


@pytest.mark.parametrize("config", [
    BertConfig(vocab_size=40, hidden_size=16, intermediate_size=20, num_hidden_layers=2,
               num_attention_heads=4),
    DistilBertConfig(vocab_size=40, dim=16, hidden_dim=20, n_layers=2, n_heads=4),
])  # fmt: skip
def test_encoders_compute_what_pytorch_counts(config: Any):
    network = AutoModel.from_config(config, attn_implementation="eager").eval()
    cost = WholeModel(network, 2, head=False, dropout=False)
    tokens = torch.randint(0, 40, (3, 9))
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        network(input_ids=tokens)
    pooler = 2 * 3 * 16 * 16 if config.model_type == "bert" else 0
    part, _ = cost._part(Ranks({}))
    forward = sum(b.flops(9, first=False).forward for b in part.blocks)
    assert counted.get_total_flops() - pooler == 27 * forward


def test_a_model_that_no_formula_covers_is_refused():
    with pytest.raises(ValueError, match="cost formulas know"):
        WholeModel(family("bloom"), 2, dropout=False)
