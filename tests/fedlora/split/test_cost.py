"""Formulas against the specification's numbers by hand, and against what PyTorch really does."""

import functools
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from fedlora.models.language_model import LanguageModel
from fedlora.models.modules import find_modules
from fedlora.split.cost import ClientPart, client_part
from fedlora.split.protocol import Cut
from fedlora.wire.rows import Wire
from simulations.bench.saved_bytes import saved_bytes
from tests.fedlora.models.families import family
from tests.fedlora.models.networks import adapter, wrap

B, T = 4, 24
FP32 = Wire("fp32")
BLOCKS = {"S": 12, "M": 24}


@functools.cache
def gpt2(size: str, cut: Cut, rank: int = 4) -> ClientPart:
    """A client's part of GPT-2 as published, adapters on c_attn; without weights."""
    d, heads = {"S": (768, 12), "M": (1024, 16)}[size]
    with torch.device("meta"):
        network = GPT2LMHeadModel(GPT2Config(n_layer=BLOCKS[size], n_embd=d, n_head=heads))
    return client_part(network, {m.path: rank for m in find_modules(network, "c_attn")}, cut)


def everything(size: str, rank: int = 4) -> ClientPart:
    """A client that holds the whole model."""
    return gpt2(size, Cut(BLOCKS[size], 0), rank)


# ---------------------------------------------------------------------- the specification's numbers


@pytest.mark.parametrize(("size", "whole", "per_rank"), [("S", 124.4, 36864), ("M", 354.8, 98304)])
def test_parameters_of_gpt2(size: str, whole: float, per_rank: int):
    base = everything(size).memory(0, dropout=False).base
    assert base / 4e6 == pytest.approx(whole, abs=0.05)
    assert everything(size).adapter == 4 * per_rank and everything(size, 1).adapter == per_rank
    client = gpt2(size, Cut(3))
    assert client.adapter * BLOCKS[size] == 3 * everything(size).adapter
    base = client.memory(0, dropout=False).base / 1e6
    assert base == pytest.approx({"S": 243, "M": 361}[size], abs=0.6)


@pytest.mark.parametrize(("size", "padded", "short"), [("S", 419.4, 55.2), ("M", 559.2, 73.6)])
def test_the_table_of_bytes(size: str, padded: float, short: float):
    """B=4, r=4, c=3, a hundred steps in three periods; MB up and down; T=512 and T=67.4."""
    client = gpt2(size, Cut(3))

    def crossing(steps: int, tokens: int, kind: str) -> float:
        return steps * sum(client.traffic(tokens, Wire(kind), Wire(kind))) / 3 / 1e6

    assert crossing(100, 2048, "fp32") == pytest.approx(padded, abs=0.06)
    assert crossing(20, 1348, "fp32") == pytest.approx(short, abs=0.06)
    assert crossing(20, 1348, "fp16") == pytest.approx(short / 2, rel=2e-3)
    assert crossing(20, 1348, "int8") == pytest.approx(short / 4 * (1 + 4 / 64), rel=1e-3)
    assert client.adapter * 4 * 2 / 1e6 == pytest.approx({"S": 0.295, "M": 0.393}[size], abs=0.001)


@pytest.mark.parametrize(
    ("size", "percent"), [("S", (5.8, 11.5, 17.3, 34.6)), ("M", (3.6, 7.1, 10.7, 21.4))]
)
def test_the_clients_fraction_of_the_forward(size: str, percent: tuple[float, ...]):
    whole = everything(size).flops(67).forward
    for first, expected in zip((1, 2, 3, 6), percent, strict=True):
        client = gpt2(size, Cut(first)).flops(67).forward
        assert 100 * client / whole == pytest.approx(expected, abs=0.06)
    head = gpt2(size, Cut(0, 0)).flops(0).forward
    blocks = head / gpt2(size, Cut(1)).blocks[0].flops(0, first=False).forward
    assert blocks == pytest.approx({"S": 5.4, "M": 4.0}[size], abs=0.09)


def test_the_arithmetic_of_one_block_in_d():
    """Forward ``24 d² + 8 r d + 4 T d``, backward less ``6 d²`` in the first block."""
    (d, r), block = (768, 4), gpt2("S", Cut(1)).blocks[0]
    work = block.flops(T, first=False)
    assert work.forward == 24 * d**2 + 8 * r * d + 4 * T * d
    assert work.backward == 24 * d**2 + 16 * r * d + 8 * T * d
    first = block.flops(T, first=True)
    assert first.backward == work.backward - 6 * d**2 - 2 * r * d
    ratios = [gpt2("S", Cut(c)).flops(0) for c in (1, 2, 3, 4)]
    assert [w.backward / w.forward for w in ratios] == pytest.approx(
        [0.76, 0.88, 0.92, 0.94], abs=0.015
    )


def test_saved_activations_in_d():
    """22 ``B T d`` in the first block, 24.06 in the others, 23.06 without dropout (spec 5.3)."""
    d, block = 768, gpt2("S", Cut(1)).blocks[0]
    assert block.saved(first=True, dropout=True) / d == pytest.approx(22, abs=0.05)
    assert block.saved(first=False, dropout=True) / d == pytest.approx(24.06, abs=0.05)
    assert block.saved(first=False, dropout=False) / d == pytest.approx(23.06, abs=0.05)
    two, three = (gpt2("S", Cut(c)).memory(4 * 67, dropout=True).saved for c in (2, 3))
    assert (three - two) / 1e6 == pytest.approx(19.8, abs=0.1)
    logits = everything("S").memory(4 * 67, dropout=False).saved
    logits -= gpt2("S", Cut(12)).memory(4 * 67, dropout=False).saved
    assert logits / 1e6 == pytest.approx(54, abs=1)


# ------------------------------------------------------------------------------- the formulas' laws


@pytest.mark.parametrize("tail", [0, 2])
@pytest.mark.parametrize("first", [1, 5, 10])
def test_all_parts_make_the_model(first: int, tail: int):
    """The first blocks and a U-shape without them: together what the whole model costs."""
    front, back = gpt2("S", Cut(first)), gpt2("S", Cut(0, 12 - first))
    parts, whole = (front.flops(T), back.flops(T)), everything("S").flops(T)
    assert sum(f.forward for f in parts) == whole.forward
    assert sum(f.backward for f in parts) == whole.backward
    both = gpt2("S", Cut(first, tail))
    assert both.blocks == front.blocks + back.blocks[len(back.blocks) - tail :]


def test_u_shaped_traffic_is_twice_the_numbers_and_no_label():
    plain = gpt2("S", Cut(3)).traffic(50, FP32, FP32)
    labelled = gpt2("S", Cut(3)).traffic(50, FP32, FP32, labels=50)
    u = gpt2("S", Cut(3, 0)).traffic(50, FP32, FP32, labels=50)
    assert labelled == (plain[0] + 50 * 4, plain[1])
    assert u == (sum(plain), sum(plain))
    assert gpt2("S", Cut(3, 2)).adapter * 3 == gpt2("S", Cut(3)).adapter * 5


@pytest.mark.parametrize("cut", [Cut(13), Cut(12, 1), Cut(0, 13)], ids=str)
def test_a_cut_outside_the_model_is_refused(cut: Cut):
    with pytest.raises(ValueError, match="of 12 blocks"):
        gpt2("S", cut)


def test_unknown_blocks_are_refused():
    with pytest.raises(ValueError, match="cost formulas know"):
        client_part(family("bloom"), {}, Cut(1))


# ----------------------------------------------------------------------------- against measurements


def whole(name: str, targets: Any, attention: str, dropout: float) -> LanguageModel:
    """A random model of three blocks with mounted adapters."""
    torch.manual_seed(0)
    common = {"vocab_size": 97, "attn_implementation": attention, "bos_token_id": 0}
    network: Any
    if name == "gpt2":
        config = GPT2Config(n_embd=64, n_head=4, n_layer=3, n_positions=T, eos_token_id=0, **common)
        network = GPT2LMHeadModel(config)
    else:
        config = LlamaConfig(
            hidden_size=64,
            intermediate_size=112,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4 if name == "llama" else 2,
            max_position_embeddings=T,
            **common,
        )
        network = LlamaForCausalLM(config)
    model = wrap(network, targets)
    factors = adapter(model.info.modules, 3, dtype=torch.float32)
    model.mount(factors, dropout)
    return model


def tiny(name: str, targets: Any, attention: str, cut: int, dropout: float) -> LanguageModel:
    """Its first blocks, as a client holds them."""
    model = whole(name, targets, attention, dropout)
    network: Any = model.network
    body = network.transformer if name == "gpt2" else network.model
    blocks = body.h if name == "gpt2" else body.layers
    del blocks[cut:]
    network.config.num_hidden_layers = cut
    setattr(body, "ln_f" if name == "gpt2" else "norm", torch.nn.Identity())
    return model


def forward(model: LanguageModel) -> torch.Tensor:
    model.seed_dropout(0, B * T)
    tokens = torch.randint(0, 97, (B, T), generator=torch.Generator().manual_seed(3))
    body: Any = model.network.base_model
    hidden: torch.Tensor = body(input_ids=tokens, use_cache=False).last_hidden_state
    return hidden


def held(model: LanguageModel) -> list[torch.Tensor]:
    """What a client holds whether or not it trains."""
    factors = [x for pair in model.parameters() for x in pair]
    return [*model.network.parameters(), *model.network.buffers(), *factors]


TARGETS = [
    ("gpt2", "c_attn"),
    ("gpt2", "all-linear"),
    ("llama", ("q_proj", "k_proj", "v_proj")),
    ("llama", "all-linear"),
    ("grouped", "all-linear"),
]


@pytest.mark.parametrize("cut", [1, 3])
@pytest.mark.parametrize(("name", "targets"), TARGETS)
def test_operations_are_those_that_pytorch_counts(name: str, targets: Any, cut: int):
    model = tiny(name, targets, "eager", cut, dropout=0.0)
    part = client_part(model.network, {m.path: 3 for m in model.info.modules}, Cut(cut))
    assert len(part.blocks) == cut
    with FlopCounterMode(display=False) as there:
        hidden = forward(model)
    with FlopCounterMode(display=False) as back:
        hidden.sum().backward()
    work = part.flops(T)
    assert there.get_total_flops() == B * T * work.forward
    assert back.get_total_flops() == B * T * work.backward


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("cut", [1, 3])
@pytest.mark.parametrize(("name", "targets"), TARGETS)
def test_saved_bytes_are_those_of_autograd(name: str, targets: Any, cut: int, dropout: float):
    model = tiny(name, targets, "sdpa", cut, dropout)
    part = client_part(model.network, {m.path: 3 for m in model.info.modules}, Cut(cut))
    with saved_bytes(held(model)) as saved:
        hidden = forward(model)
    formula = part.memory(B * T, dropout=dropout > 0).saved
    assert saved.bytes == pytest.approx(formula, rel=0.03)
    hidden.sum().backward()


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_u_shaped_client_has_the_head_and_the_logits(name: str):
    def loss(model: LanguageModel) -> torch.Tensor:
        tokens = torch.randint(0, 97, (B, T), generator=torch.Generator().manual_seed(3))
        logits = model.network(input_ids=tokens).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())

    model = whole(name, "all-linear", "sdpa", 0.0)
    part = client_part(model.network, {m.path: 3 for m in model.info.modules}, Cut(2, 1))
    with saved_bytes(held(model)) as saved:
        kept = loss(model)
    formula = part.memory(B * T, dropout=False).saved
    assert saved.bytes == pytest.approx(formula, rel=0.03)
    assert kept.requires_grad
    model = whole(name, "all-linear", "eager", 0.0)
    with FlopCounterMode(display=False) as there:
        kept = loss(model)
    with FlopCounterMode(display=False) as back:
        kept.backward()
    work = part.flops(T)
    assert there.get_total_flops() == B * T * work.forward
    assert back.get_total_flops() == B * T * work.backward


def test_saved_bytes_counts_each_storage_once_and_no_parameter():
    layer = torch.nn.Linear(5, 5, bias=False)
    x = torch.randn(7, 5, requires_grad=True)
    with saved_bytes(layer.parameters()) as saved:
        y = layer(x)
        z = layer(x).sum()
    assert saved.bytes == 7 * 5 * 4
    with saved_bytes() as saved:
        y, z = layer(x), layer(x)
    assert saved.bytes == 7 * 5 * 4 + 5 * 5 * 4
    assert y.requires_grad and z.requires_grad


def test_a_mixture_of_experts_is_covered_by_no_formula_and_trains_all_the_same():
    """Its MLPs are no linear layers: a ValueError, never a StopIteration."""
    network = family("mixtral")
    with pytest.raises(ValueError, match="no linear layer of a block reads the inner"):
        client_part(network, {}, Cut(1))
