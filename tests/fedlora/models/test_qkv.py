"""A split projection: the same function and weights, and adapters that come together again."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.pytorch_utils import Conv1D

from fedlora.core.errors import ModelError
from fedlora.core.types import Factors, Module
from fedlora.models.qkv import Split, SplitLinear, join_adapter, split_adapter, split_qkv
from fedlora.techniques.lora.payload import LowRankPayload
from tests.fedlora.models.families import family
from tests.fedlora.models.networks import ALPHA, adapter, gpt2, logits, same, tokens, wrap

Q_AND_V = ("q_attn", "v_attn")
WIDTH = 6
LAYER = Split("h.c", tuple(Module(f"h.c.{n}", "attention", WIDTH, WIDTH) for n in "qkv"))


@st.composite
def adapters(draw, equal=False):
    """Of some parts of `LAYER` and of another module, any ranks and scales."""
    chosen = draw(st.lists(st.sampled_from(LAYER.parts), unique=True).map(set)) | {
        Module("h.other", "mlp", 4, 5)
    }
    rank, g = draw(st.integers(1, WIDTH)), torch.Generator().manual_seed(draw(st.integers(0, 99)))
    factors = {}
    for m in sorted(chosen, key=lambda m: [*LAYER.parts, m].index(m)):
        r = min(m.max_rank, rank if equal else draw(st.integers(1, WIDTH)))
        alpha = 7.0 if equal else draw(st.floats(0.5, 64))
        a = torch.randn(r, m.d_in, generator=g, dtype=torch.float64)
        factors[m.path] = Factors(a, torch.randn(m.d_out, r, generator=g).double(), alpha)
    return factors


def dense(adapter):
    """What an adapter adds to the fused layer, part by part."""
    rows = [adapter[p.path].delta() if p.path in adapter else None for p in LAYER.parts]
    return torch.cat([torch.zeros(WIDTH, WIDTH).double() if x is None else x for x in rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_network_alone_computes_the_same(dtype):
    """To the bit in most sizes; a product of other width may sum in another order."""
    whole, parts = gpt2().to(dtype).eval(), gpt2().to(dtype).eval()
    split_qkv(parts)
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(logits(parts), logits(whole), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("width", [128, 768])
@pytest.mark.parametrize("rows", [1, 5, 256])
def test_outputs_of_a_layer_as_wide_as_gpt2s(width, rows):
    torch.manual_seed(0)
    whole = Conv1D(3 * width, width)
    torch.nn.init.normal_(whole.bias)
    x = torch.randn(2, rows, width)
    torch.testing.assert_close(SplitLinear(whole, "qkv")(x), whole(x), rtol=1e-6, atol=1e-6)


def test_parts_hold_views_of_the_same_weights():
    network = gpt2()
    whole = network.transformer.h[1].attn.c_attn
    splits = split_qkv(network)
    assert [s.path for s in splits] == [f"transformer.h.{i}.attn.c_attn" for i in range(2)]
    assert splits[1].d_out == whole.weight.shape[1]
    for path, rows in splits[1].rows().items():
        part = network.get_submodule(path)
        assert part.weight.data_ptr() == whole.weight[:, rows].data_ptr()
        assert torch.equal(part.weight, whole.weight[:, rows])
        assert torch.equal(part.bias, whole.bias[rows])
    assert sum(p.numel() for p in network.parameters()) == sum(
        p.numel() for p in gpt2().parameters()
    )


@pytest.mark.parametrize("targets", ["all-linear", Q_AND_V, ("c_fc",)])
def test_the_bases_tensors_keep_their_names_and_bits(targets):
    state, files = wrap(gpt2(), targets, split=True).base_state(), gpt2().state_dict()
    assert state.keys() == files.keys()
    assert all(torch.equal(state[name], files[name]) for name in files)


def test_q_and_v_have_factors_of_their_own_and_k_has_none():
    """Only rows of q and v move, each by its own product (MergedLinear of the released code)."""
    model = wrap(gpt2().double(), Q_AND_V, split=True)
    factors = adapter(model.info.modules, 3)
    trained = model.mount(factors)
    assert sum(p.numel() for p in trained) == 2 * 4 * 3 * 16, "4 r d in each of two blocks"
    for split in model.info.splits:
        q, k, v = (p.path for p in split.parts)
        x = torch.randn(5, 16, dtype=torch.float64)
        c_attn = gpt2().double().get_submodule(split.path)
        moved = model.network.get_submodule(split.path)(x) - c_attn(x)
        wanted = {q: factors[q], v: factors[v]}
        for path, rows in split.rows().items():
            f = wanted.get(path)
            delta = torch.zeros(5, 16).double() if f is None else ALPHA / 3 * x @ f.a.T @ f.b.T
            torch.testing.assert_close(moved[:, rows], delta, rtol=1e-10, atol=1e-12)
        assert k not in model.layers


@pytest.mark.parametrize("rank", [3, lambda i: 1 + i % 4], ids=["equal", "unequal"])
def test_trains_like_the_joint_adapter_whose_other_entries_of_b_are_held_at_zero(rank):
    apart = wrap(gpt2().double(), Q_AND_V, split=True)
    factors = adapter(apart.info.modules, rank)
    whole = wrap(gpt2().double(), ("c_attn",))
    joint = join_adapter(factors, apart.info.splits)
    apart.mount(factors)
    whole.mount(LowRankPayload(joint))
    torch.testing.assert_close(logits(apart.network), logits(whole.network), rtol=0, atol=1e-12)
    for model in (apart, whole):
        model.network(input_ids=tokens(), labels=tokens()).loss.backward()
    for split in apart.info.splits:
        update, at = whole.layers[split.path].update, 0
        for path, rows in split.rows().items():
            if path not in factors:
                continue
            own, columns = apart.layers[path].update, slice(at, at + factors[path].rank)
            ratio = factors[path].scale / joint[split.path].scale  # of B, folded in
            at = columns.stop
            torch.testing.assert_close(own.a.grad, update.a.grad[columns], rtol=1e-8, atol=1e-14)
            grad = ratio * update.b.grad[rows, columns]
            torch.testing.assert_close(own.b.grad, grad, rtol=1e-8, atol=1e-14)


@given(adapters())
def test_a_joint_adapter_has_the_function_of_its_parts(factors):
    joint = join_adapter(factors, [LAYER])
    assert joint["h.other"] is factors["h.other"]
    parts = [factors[p.path] for p in LAYER.parts if p.path in factors]
    assert (LAYER.path in joint) == bool(parts)
    if parts:
        assert joint[LAYER.path].rank == sum(f.rank for f in parts)
        torch.testing.assert_close(joint[LAYER.path].delta(), dense(factors), rtol=1e-12, atol=1e-9)
    apart = split_adapter(joint, [LAYER])
    assert apart.keys() == factors.keys()
    assert {p: f.rank for p, f in apart.items()} == {p: f.rank for p, f in factors.items()}
    torch.testing.assert_close(dense(apart), dense(factors), rtol=1e-12, atol=1e-9)


@given(adapters(equal=True))
def test_parts_of_one_scale_are_not_rounded(factors):
    joint = join_adapter(factors, [LAYER])
    held = [factors[p.path] for p in LAYER.parts if p.path in factors]
    if held:
        assert joint[LAYER.path].alpha == len(held) * held[0].alpha
    assert same(split_adapter(joint, [LAYER]), factors)


@given(rank=st.integers(1, WIDTH), dead=st.integers(0, 2))
def test_an_adapter_of_the_whole_layer_comes_apart(rank, dead):
    """Every part gets every component, but those that add nothing to it."""
    g = torch.Generator().manual_seed(rank)
    a = torch.randn(rank, WIDTH, generator=g, dtype=torch.float64)
    b = torch.randn(3 * WIDTH, rank, generator=g, dtype=torch.float64)
    b[:WIDTH, :dead] = 0
    joint = Factors(a, b, 5.0)
    apart = split_adapter({LAYER.path: joint}, [LAYER])
    torch.testing.assert_close(dense(apart), joint.delta(), rtol=1e-12, atol=1e-12)
    ranks = [apart[p.path].rank if p.path in apart else 0 for p in LAYER.parts]
    assert ranks == [max(0, rank - dead), rank, rank]


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gpt_bigcode"])
def test_what_has_no_projection_to_split_is_refused_by_type(name):
    with pytest.raises(ModelError, match=rf"split_qkv=true: .*'{name}'.*types \['gpt2'\]"):
        split_qkv(family(name))
