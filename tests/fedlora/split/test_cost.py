"""Formulas against the specification's numbers by hand, and against what PyTorch really does."""

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from fedlora.models.language_model import LanguageModel
from fedlora.models.modules import find_modules
from fedlora.split.compression import Wire
from fedlora.split.cost import (
    Device,
    Step,
    Traffic,
    adapter_traffic,
    block_work,
    break_even,
    client_memory,
    client_work,
    full_traffic,
    head_work,
    saved_floats,
    server_work,
    split_traffic,
    step_times,
)
from fedlora.split.measure import counted_flops, saved_bytes
from fedlora.split.shapes import Split, shapes_of
from tests.fedlora.models.families import family
from tests.fedlora.models.networks import adapter, wrap

B, T = 4, 24
FP32 = {"activations": Wire("fp32"), "gradients": Wire("fp32")}


@functools.cache
def gpt2(size: str, rank: int = 4) -> Any:
    """GPT-2 as published, adapters on c_attn; without weights."""
    layers, d, heads = {"S": (12, 768, 12), "M": (24, 1024, 16)}[size]
    with torch.device("meta"):
        network = GPT2LMHeadModel(GPT2Config(n_layer=layers, n_embd=d, n_head=heads))
    return shapes_of(network, {m.path: rank for m in find_modules(network, "c_attn")})


# ---------------------------------------------------------------------- the specification's numbers


@pytest.mark.parametrize(("size", "whole", "per_rank"), [("S", 124.4, 36864), ("M", 354.8, 98304)])
def test_parameters_of_gpt2(size: str, whole: float, per_rank: int):
    shapes = gpt2(size)
    assert shapes.parameters / 1e6 == pytest.approx(whole, abs=0.05)
    assert shapes.adapter == 4 * per_rank and gpt2(size, rank=1).adapter == per_rank
    client = Split(3).client(shapes)
    assert sum(b.adapter for b in client) * len(shapes.blocks) == 3 * shapes.adapter
    base = client_memory(shapes, Split(3), 0).base / 1e6
    assert base == pytest.approx({"S": 243, "M": 361}[size], abs=0.6)


@pytest.mark.parametrize(
    ("size", "full", "lora", "padded", "short"),
    [("S", 995.5, 1.18, 419.4, 55.2), ("M", 2838.6, 3.15, 559.2, 73.6)],
)
def test_the_table_of_bytes(size: str, full: float, lora: float, padded: float, short: float):
    """B=4, r=4, c=3, a hundred steps in three periods; MB up and down; T=512 and T=67.4."""
    shapes = gpt2(size)
    assert full_traffic(shapes).total / 1e6 == pytest.approx(full, abs=0.06)
    assert adapter_traffic(shapes).total / 1e6 == pytest.approx(lora, abs=0.006)

    def crossing(steps: int, tokens: int, kind: str) -> float:
        wires = {"activations": Wire(kind), "gradients": Wire(kind)}
        found = split_traffic(
            shapes, Split(3), steps=steps, tokens=tokens, weight_bytes=0, label_bytes=0, **wires
        )
        return found.total / 3 / 1e6

    assert crossing(100, 2048, "fp32") == pytest.approx(padded, abs=0.06)
    assert crossing(20, 1348, "fp32") == pytest.approx(short, abs=0.06)
    assert crossing(20, 1348, "fp16") == pytest.approx(short / 2, rel=2e-3)
    assert crossing(20, 1348, "int8") == pytest.approx(short / 4 * (1 + 4 / 64), rel=1e-3)
    inside = split_traffic(shapes, Split(3), steps=0, tokens=0, **FP32).total / 1e6
    assert inside == pytest.approx({"S": 0.295, "M": 0.393}[size], abs=0.001)


def test_break_even_tokens():
    """``4 r (L - c)`` against federated LoRA, about ``W / d`` against full models."""
    for size, tokens, full in (("S", 144, 162_000), ("M", 336, 346_500)):
        shapes = gpt2(size)
        kind = {**FP32, "label_bytes": 0}
        assert break_even(shapes, Split(3), adapter_traffic(shapes), **kind) == tokens
        found = break_even(shapes, Split(3), full_traffic(shapes), **kind)
        assert found == pytest.approx(full, rel=2e-3)
    shapes = gpt2("S")
    assert break_even(shapes, Split(3), adapter_traffic(shapes), **FP32) < 144
    half = {"activations": Wire("bf16"), "gradients": Wire("bf16"), "label_bytes": 0}
    assert break_even(shapes, Split(3), adapter_traffic(shapes), **half) == 288
    assert break_even(shapes, Split(3, 0), adapter_traffic(shapes), **FP32) == 72


@pytest.mark.parametrize(
    ("size", "percent"), [("S", (5.8, 11.5, 17.3, 34.6)), ("M", (3.6, 7.1, 10.7, 21.4))]
)
def test_the_clients_share_of_the_forward(size: str, percent: tuple[float, ...]):
    shapes = gpt2(size)
    for cut, expected in zip((1, 2, 3, 6), percent, strict=True):
        client = client_work(shapes, Split(cut), 67).forward
        whole = client + server_work(shapes, Split(cut), 67).forward
        assert 100 * client / whole == pytest.approx(expected, abs=0.06)
    blocks = head_work(shapes).forward / block_work(shapes.blocks[1], 0).forward
    assert blocks == pytest.approx({"S": 5.4, "M": 4.0}[size], abs=0.09)


def test_the_arithmetic_of_one_block_in_d():
    """Forward ``24 d² + 8 r d + 4 T d``, backward less ``6 d²`` in the first block."""
    (d, r), block = (768, 4), gpt2("S").blocks[0]
    work = block_work(block, T)
    assert work.forward == 24 * d**2 + 8 * r * d + 4 * T * d
    assert work.backward == 24 * d**2 + 16 * r * d + 8 * T * d
    first = block_work(block, T, first=True)
    assert first.backward == work.backward - 6 * d**2 - 2 * r * d
    assert block_work(block, T, causal=True).forward == work.forward - 2 * T * d
    ratios = [client_work(gpt2("S"), Split(c), 0) for c in (1, 2, 3, 4)]
    assert [w.backward / w.forward for w in ratios] == pytest.approx(
        [0.76, 0.88, 0.92, 0.94], abs=0.015
    )


def test_saved_activations_in_d():
    """22 ``B T d`` in the first block, 24.06 in the others, 23.06 without dropout (spec 5.3)."""
    d, block = 768, gpt2("S").blocks[1]
    assert saved_floats(block, first=True, dropout=True) / d == pytest.approx(22, abs=0.05)
    assert saved_floats(block, dropout=True) / d == pytest.approx(24.06, abs=0.05)
    assert saved_floats(block) / d == pytest.approx(23.06, abs=0.05)
    shapes = gpt2("S")
    per_block = [
        client_memory(shapes, Split(c), 4 * 67, dropout=True, checkpointing=False).saved
        for c in (2, 3)
    ]
    assert (per_block[1] - per_block[0]) / 1e6 == pytest.approx(19.8, abs=0.1)
    logits = client_memory(shapes, Split(12, 0), 4 * 67).saved
    logits -= client_memory(shapes, Split(12), 4 * 67).saved
    assert logits / 1e6 == pytest.approx(54, abs=1)


# ------------------------------------------------------------------------------- the formulas' laws


@pytest.mark.parametrize("tail", [None, 0, 2])
@pytest.mark.parametrize("cut", [0, 1, 5, 10])
def test_client_and_server_share_one_model(cut: int, tail: int | None):
    shapes = gpt2("S")
    split, whole = Split(cut, tail), server_work(shapes, Split(0), T)
    both = client_work(shapes, split, T) + server_work(shapes, split, T)
    assert both.forward == whole.forward and both.backward == whole.backward
    assert (*split.client(shapes)[:cut], *split.server(shapes)) == shapes.blocks[: 12 - (tail or 0)]
    again = client_work(shapes, split, T, checkpointing=True)
    blocks = client_work(shapes, replace(split, tail=tail), T).forward
    blocks -= head_work(shapes).forward if tail is not None else 0
    assert again.backward - client_work(shapes, split, T).backward == blocks


def test_u_shaped_traffic_is_twice_the_numbers_and_no_label():
    shapes = gpt2("S")
    plain = split_traffic(shapes, Split(3), steps=7, tokens=50, label_bytes=0, **FP32)
    labelled = split_traffic(shapes, Split(3), steps=7, tokens=50, **FP32)
    u = split_traffic(shapes, Split(3, 0), steps=7, tokens=50, **FP32)
    assert labelled.up - plain.up == 7 * 50 * 5 and labelled.down == plain.down
    adapters = sum(b.adapter for b in shapes.blocks[:3]) * 4
    assert u.up == u.down == 2 * (plain.up - adapters) + adapters
    tailed = split_traffic(shapes, Split(3, 2), steps=7, tokens=50, **FP32)
    assert tailed.up - u.up == 2 * shapes.blocks[0].adapter * 4


@pytest.mark.parametrize(("cut", "tail"), [(13, None), (12, 1), (0, 13)])
def test_a_split_outside_the_model_is_refused(cut: int, tail: int | None):
    with pytest.raises(ValueError, match="of 12 blocks"):
        Split(cut, tail).server(gpt2("S"))
    with pytest.raises(ValueError, match=r"split\.cut"):
        Split(-1)


def test_unknown_blocks_are_refused():
    with pytest.raises(ValueError, match="cost formulas know"):
        shapes_of(family("bloom"), {})


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
    shapes = shapes_of(model.network, {m.path: 3 for m in model.info.modules})
    assert len(shapes.blocks) == cut
    with counted_flops() as there:
        hidden = forward(model)
    with counted_flops() as back:
        hidden.sum().backward()
    work = client_work(shapes, Split(cut), T)
    assert there.get_total_flops() == B * T * work.forward
    assert back.get_total_flops() == B * T * work.backward


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("cut", [1, 3])
@pytest.mark.parametrize(("name", "targets"), TARGETS)
def test_saved_bytes_are_those_of_autograd(name: str, targets: Any, cut: int, dropout: float):
    model = tiny(name, targets, "sdpa", cut, dropout)
    shapes = shapes_of(model.network, {m.path: 3 for m in model.info.modules})
    with saved_bytes(held(model)) as saved:
        hidden = forward(model)
    formula = client_memory(shapes, Split(cut), B * T, dropout=dropout > 0).saved
    assert saved.bytes == pytest.approx(formula, rel=0.03)
    hidden.sum().backward()


@pytest.mark.parametrize("targets", ["c_attn", "all-linear"])
def test_eager_attention_keeps_its_weights(targets: str):
    model = tiny("gpt2", targets, "eager", 1, 0.0)
    block = shapes_of(model.network, {m.path: 3 for m in model.info.modules}).blocks[0]
    with saved_bytes(held(model)) as saved:
        hidden = forward(model)
    formula = B * T * 4 * saved_floats(block, first=True, eager_length=T)
    assert saved.bytes == pytest.approx(formula, rel=0.03)
    assert hidden.requires_grad


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_u_shaped_client_has_the_head_and_the_logits(name: str):
    def loss(model: LanguageModel) -> torch.Tensor:
        tokens = torch.randint(0, 97, (B, T), generator=torch.Generator().manual_seed(3))
        logits = model.network(input_ids=tokens).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())

    model = whole(name, "all-linear", "sdpa", 0.0)
    shapes = shapes_of(model.network, {m.path: 3 for m in model.info.modules})
    with saved_bytes(held(model)) as saved:
        kept = loss(model)
    formula = client_memory(shapes, Split(2, 1), B * T).saved
    assert saved.bytes == pytest.approx(formula, rel=0.03)
    assert kept.requires_grad
    model = whole(name, "all-linear", "eager", 0.0)
    with counted_flops() as there:
        kept = loss(model)
    with counted_flops() as back:
        kept.backward()
    work = client_work(shapes, Split(2, 1), T)
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


# --------------------------------------------------------------------------------------------- time


def step(up: int = 0, server: float = 0.0) -> Step:
    return Step(forward=10.0, backward=20.0, server=server, traffic=Traffic(up, 40))


FAST = Device(flops=10.0, up=10.0, down=20.0, latency=0.5)
SLOW = replace(FAST, flops=1.0)


def test_a_client_alone_waits_for_itself():
    """1 forward + 0.5 + 3 up + 4 server + 0.5 + 2 down + 2 backward, whatever the rule."""
    for rule in ("concat", "sequential", "per_client"):
        assert step_times([(step(30, 8.0), FAST)], 2.0, rule) == pytest.approx([13.0])


def test_who_waits_for_whom():
    """Arrivals 10.5 and 1.5, work 4 each; 4.5 and 22.5 seconds of the clients' own afterwards."""
    pair = [(step(0, 8.0), SLOW), (step(0, 8.0), FAST)]
    assert step_times(pair, 2.0, "concat") == pytest.approx([18.5 + 22.5, 18.5 + 4.5])
    assert step_times(pair, 2.0, "sequential") == pytest.approx([14.5 + 22.5, 18.5 + 4.5])
    assert step_times(pair, 2.0, "per_client") == pytest.approx([14.5 + 22.5, 5.5 + 4.5])
    assert step_times([], 2.0) == []


def test_impossible_devices_and_rules_are_refused():
    with pytest.raises(ValueError, match=r"device\.up"):
        Device(up=0)
    with pytest.raises(ValueError, match="rule"):
        step_times([], 1.0, "both")
    with pytest.raises(ValueError, match="server_flops"):
        step_times([], 0.0)
