"""SPP's laws P1 to P9: against the materialised product, in value and gradient."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from fedlora.core.errors import ModelError
from fedlora.core.types import Factors
from fedlora.models.export import merge
from fedlora.models.layers import dense_weight, dropout, dropout_bits
from fedlora.models.masks import check_zeros
from fedlora.techniques.lora.layer import LowRank
from fedlora.techniques.spp import scale as scale_module
from fedlora.techniques.spp.layer import BlockScaled, scaled_branch
from fedlora.techniques.spp.payload import merged_gain, merged_weight
from fedlora.techniques.spp.scale import factor, place_in_blocks, repeat_rows
from tests import doctests
from tests.fedlora.models.networks import NETWORKS, adapter, logits, step, tokens
from tests.fedlora.prune.models import (
    LORA_ALPHA,
    pruned,
    scale,
    zeros,
)
from tests.generators import gain

LAWS = settings(derandomize=True, deadline=None, max_examples=40)
shapes = st.tuples(st.integers(1, 13), st.integers(1, 9)).flatmap(
    lambda s: st.tuples(st.just(s[0]), st.just(s[1]), st.integers(1, s[0]))
)


def layer(m: int, n: int, r: int, seed: int = 0, bias: bool = True):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    base = nn.Linear(n, m, bias=bias, dtype=torch.float64).requires_grad_(False)
    base.weight.copy_(normal(m, n) * (torch.rand(m, n, generator=g) < 0.5))
    return base, normal(r, n), normal(m), normal(2, 5, n)


def materialised(x, base, alpha, beta, s, kept=None, before=None):
    """The definition, in float64 (of kept inputs: what each is multiplied by)."""
    w = dense_weight(base).double() * (1 if before is None else before.double())
    bias = None if base.bias is None else base.bias.double()
    x, dropped = x.double(), x.double() if kept is None else x.double() * kept
    branch = functional.linear(dropped, s * w * factor(alpha.double(), beta.double()))
    return functional.linear(x, w, bias) + branch


@LAWS
@given(
    shapes,
    st.integers(0, 99),
    st.sampled_from(["alpha", "beta", "both"]),
    st.booleans(),
    st.sampled_from([0.0, 1e-6, 0.4, 1.0]),
)
def test_it_is_the_materialised_product(shape, seed, trains, bias, p):
    """P4, P7: any m, n and r up to m, ragged blocks included, whole and as a branch."""
    m, n, r = shape
    base, alpha, beta, x = layer(m, n, r, seed, bias)
    bits = dropout_bits(10, [n], seed, x.device)[0]
    kept = dropout(torch.ones_like(x), p, bits)
    results = []
    for kind in ("layer", "branch", "definition"):
        here = x.clone().requires_grad_()
        if kind == "layer":
            update = BlockScaled(alpha, beta, 0.7, p, base, dtype=torch.float64, trains=trains)
            update.bits = bits
            (a, b), y = update.parameters(), update(here, base)
        else:
            a, b = alpha.clone(), beta.clone()
            a.requires_grad_(trains != "beta")
            b.requires_grad_(trains != "alpha")
            if kind == "branch":
                y = base(here) + scaled_branch(here * kept, base.weight, a, b, 0.7)
            else:
                y = materialised(here, base, a, b, 0.7, kept)
        (y.sin().sum()).backward()
        results.append((y.detach(), here.grad, a.grad, b.grad))
    for result in results[:-1]:
        for i, (got, want) in enumerate(zip(result, results[-1], strict=True)):
            if (i, trains) in ((2, "beta"), (3, "alpha")):
                assert got is None
            else:
                torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


FORMATS = {
    "float32": (torch.float32, False, 1e-5),
    "bfloat16": (torch.bfloat16, False, 2e-2),
    "float16": (torch.float16, False, 3e-3),
    "autocast": (torch.float32, True, 2e-2),
}


def in_format(name, m=48, n=64, r=6, kind=nn.Linear):
    """A layer, its factors in float32, and inputs as they arrive there."""
    dtype, _, _ = FORMATS[name]
    base, alpha, beta, x = layer(m, n, r)
    if kind is Conv1D:
        turned = Conv1D(m, n).requires_grad_(False)
        turned.weight.data, turned.bias.data = base.weight.T.contiguous(), base.bias
        base = turned
    return base.to(dtype), alpha.float(), beta.float(), x.to(dtype)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_every_number_format_is_the_materialised_product(name, p, merged, kind):
    """P4: values, and gradients of the input, alpha and beta, as exact as the format is."""
    _, autocast, tolerance = FORMATS[name]
    base, alpha, beta, x = in_format(name, kind=kind)
    before = (
        1 + 0.5 * torch.rand(48, 64, generator=torch.Generator().manual_seed(5)) if merged else None
    )
    update = BlockScaled(alpha, beta, 0.7, p, base, dtype=torch.float32, gain=before)
    update.bits = dropout_bits(10, [64], 1, x.device)[0]
    kept = dropout(torch.ones(x.shape, dtype=torch.float64), p, update.bits)
    outcomes = []
    for ours in (True, False):
        here = x.clone().requires_grad_()
        if ours:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y = update(here, base)
            assert y.dtype == (torch.bfloat16 if autocast else x.dtype)
            a, b = update.parameters()
        else:
            a, b = alpha.clone().requires_grad_(), beta.clone().requires_grad_()
            y = materialised(here, base, a, b, 0.7, kept, before)
        (0.1 * y.double()).tanh().sum().backward()
        outcomes.append((y.detach(), here.grad, a.grad, b.grad))
    for got, want in zip(*outcomes, strict=True):
        error = (got.double() - want.double()).norm() / want.double().norm()
        assert error < tolerance


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_the_branch_is_computed_in_the_factors_type(name):
    """Whatever the base's: a small update is not rounded away."""
    base, alpha, beta, x = in_format(name)
    y = scaled_branch(x, base.weight, alpha, 1e-3 * beta, 0.7)
    want = materialised(x, base, alpha, 1e-3 * beta, 0.7) - base.double()(x.double())
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-6 * float(want.abs().max()))


@pytest.mark.parametrize("rows", [3, 7, 25])
def test_an_input_of_another_size_has_the_bits_over_and_over(rows):
    """As DeBERTa's relative positions, which pass through adapted layers; values and gradients."""
    base, alpha, beta, x = layer(5, 4, 2)  # x: [10, 4]
    update = BlockScaled(alpha, beta, 0.7, 0.4, base, dtype=torch.float64)
    update.bits = dropout_bits(rows, [4], 1, x.device)[0]
    kept = dropout(torch.ones_like(x), 0.4, update.bits.flatten().repeat(4)[: x.numel()])
    outcomes = []
    for ours in (True, False):
        here, a, b = (t.clone().requires_grad_() for t in (x, alpha, beta))
        y = update(here, base) if ours else materialised(here, base, a, b, 0.7, kept)
        y.tanh().sum().backward()
        (a, b) = update.parameters() if ours else (a, b)
        outcomes.append((y.detach(), here.grad, a.grad, b.grad))
    for got, want in zip(*outcomes, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_dropout_of_everything_leaves_the_base():
    """The one mask that a rate of one does not drop has no say either."""
    base, alpha, beta, x = layer(5, 4, 2)
    update = BlockScaled(alpha, beta, 0.7, 1.0, base, dtype=torch.float64)
    update.bits = torch.full((10, 4), 2**15 - 1, dtype=torch.int16)
    assert torch.equal(update(x, base), base(x))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("merged", [False, True])
def test_nothing_of_the_size_of_the_weight_is_kept(name, p, merged):
    """What autograd saves beyond the input, the dropout's bits, the weight and the factors."""
    _, autocast, _ = FORMATS[name]
    base, alpha, beta, x = in_format(name, m=256, n=256)
    before = torch.ones(256, 256) if merged else None
    update = BlockScaled(alpha, beta, 0.7, p, base, dtype=torch.float32, gain=before)
    update.bits = dropout_bits(10, [256], 1, x.device)[0]
    x.requires_grad_()
    own = [x, update.bits, base.weight, base.bias, *update.parameters()]
    if merged:
        own.append(update._weight(base))
    ours = {t.untyped_storage().data_ptr() for t in own}
    saved = {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        y = update(x, base)
    # What the base itself does under autocast is not ours: torch keeps its weight in bfloat16.
    allowed = 256 * 256 * 2 if autocast and not merged else 0
    assert sum(size for at, size in saved.items() if at not in ours) <= allowed + 256 * 16
    y.sum().backward()


def test_a_small_merged_gain_acts_on_a_base_in_bfloat16():
    """Rounded to the base's type, a gain of a thousandth would be gone."""
    base, alpha, beta, _ = in_format("bfloat16")
    x = torch.randn(400, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    before = torch.full((48, 64), 1.001)
    update = BlockScaled(alpha, 0 * beta, 0.7, 0.0, base, dtype=torch.float32, gain=before)
    bias = base.bias.double()
    with torch.no_grad():
        y, plain = update(x, base).double() - bias, materialised(x, base, alpha, 0 * beta, 1) - bias
    assert float((y * plain).sum() / plain.square().sum()) == pytest.approx(1.001, abs=2e-4)


@LAWS
@given(shapes)
def test_the_factor_is_of_rank_r_and_a_product(shape):
    """P8, and the blocks are those of the paper: ``F_ij = beta_i alpha_{floor(ir/m), j}``."""
    m, n, r = shape
    _, alpha, beta, _ = layer(m, n, r)
    f = factor(alpha, beta)
    torch.testing.assert_close(f, place_in_blocks(beta, r) @ alpha, rtol=1e-14, atol=0)
    assert torch.linalg.matrix_rank(f) <= r
    for i in range(m):
        assert torch.equal(f[i], beta[i] * alpha[i * r // m])


def test_a_smaller_rank_that_divides_is_nested():
    """S-F4's ground: the same factor at four times the rank, ragged blocks included."""
    _, alpha, beta, _ = layer(13, 5, 3)
    assert torch.equal(factor(alpha, beta), factor(repeat_rows(alpha, 12), beta))
    with pytest.raises(ValueError, match="rank 3 does not divide 10"):
        repeat_rows(alpha, 10)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_nothing_changes_at_the_start(name, dtype):
    """P1, bit by bit, with dropout too."""
    model = pruned(name, dtype=dtype)
    before = logits(model.network)
    for p in (0.0, 0.3):
        model.mount(scale(model, zero=True), dropout=p)
        model.seed_dropout(0, tokens().numel())
        assert torch.equal(logits(model.network), before)


@pytest.mark.parametrize("name", NETWORKS)
def test_nothing_changes_at_the_start_and_only_beta_learns_first(name):
    """P1, P2 and P6; in training, without dropout, and in evaluation."""
    model = pruned(name)
    before = logits(model.network)
    parameters = model.mount(scale(model, zero=True))
    assert torch.equal(logits(model.network), before)
    assert sum(p.numel() for p in parameters) == sum(
        4 * m.d_in + m.d_out for m in model.info.modules
    )
    model.network(input_ids=tokens(), labels=tokens()).loss.backward()
    trained = {id(p) for p in parameters}
    for p in model.network.parameters():
        assert id(p) in trained or p.grad is None
    for alpha, beta in model.parameters():
        assert not alpha.grad.any()
        assert beta.grad.any()


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_training_leaves_the_base_and_dropout_its_seed(name, dropout):
    model = pruned(name)
    base = {k: t.clone() for k, t in model.base_state().items()}
    ends = []
    for _ in range(2):
        parameters = model.mount(scale(model, zero=True), dropout=dropout)
        for _ in range(3):
            step(model, parameters)
        ends.append(model.payload())
    one, other = ends
    assert all(torch.equal(one.beta[p], other.beta[p]) for p in one.beta)
    assert any(bool(b.any()) for b in one.beta.values())
    assert all(torch.equal(base[k], t) for k, t in model.base_state().items())


@pytest.mark.parametrize("name", NETWORKS)
def test_dropout_is_the_same_mask_as_loras(name):
    """A branch on ``x ∘ mask`` in either."""
    model = pruned(name, targets=("up_proj",) if name == "llama" else ("c_fc",))
    path, wrapped = next(iter(model.layers.items()))
    payload = scale(model)
    model.mount(payload, dropout=0.4)
    model.seed_dropout(5, 3)
    x = torch.randn(3, model.info.modules[0].d_in, dtype=torch.float64)
    y = wrapped.update(x, wrapped.base)
    full = (
        wrapped.update.scale
        * dense_weight(wrapped.base)
        * factor(payload.alpha[path], payload.beta[path])
    )
    a = torch.eye(x.shape[1], dtype=torch.float64)
    lora = LowRank(Factors(a, full, float(len(a))), 0.4, x.device, torch.float64)
    lora.bits = model.dropout_bits(5, 3)[path]
    torch.testing.assert_close(y, lora(x, wrapped.base), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pattern", ["0.5", "0.75", "2:4", "1:4", "4:8", "2:8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_training_and_merging_keep_every_zero(pattern, dtype, tmp_path):
    """P3, P5: the merged file has the zeros of the base, and computes what was mounted."""
    keep, _, group = pattern.partition(":")
    widths = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj")  # divisible by eight
    model = pruned(pattern=pattern, dtype=dtype, targets=widths if group == "8" else "all-linear")
    before = zeros(model)
    parameters = model.mount(scale(model))
    for _ in range(3):
        step(model, parameters)
    payload, mounted = model.payload(), logits(model.network)
    merge(model, payload, tmp_path)
    model.mount(None)
    state = model.base_state(payload)
    for path, zero in before.items():
        found = state[f"{path}.weight"]
        assert torch.equal(found == 0, zero), path
        if group:
            assert (found.view(len(found), -1, int(group)).count_nonzero(-1) == int(keep)).all()
        assert not torch.equal(state[f"{path}.weight"], model.layers[path].base.weight)
        assert state[f"{path}.weight"].dtype == dtype
    if dtype == torch.float32:
        reread = type(model.network).from_pretrained(tmp_path)
        torch.testing.assert_close(logits(reread), mounted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("merges", [0, 1, 2])
def test_a_merge_is_rounded_once(name, dtype, merges):
    """Whatever was merged before; what is written is what the audit merges, bit by bit."""
    model = pruned(name, dtype=dtype)
    payload = scale(model)
    past = {p: (0.3 * a[None], 0.2 * payload.beta[p][None]) for p, a in payload.alpha.items()}
    payload = replace(payload, merges=(past,) * merges)
    exact = torch.promote_types(dtype, torch.float32)
    state = model.base_state(payload)
    model.mount(payload)
    for path, x in model.layers.items():
        weight = dense_weight(x.base)
        found = state[f"{path}.weight"]
        found = found.T if name == "gpt2" else found
        assert torch.equal(found, merged_weight(weight, payload, path))
        wide = weight.double() * gain(payload, path).double()
        torch.testing.assert_close(model.effective_weight(path), wide.to(exact))
        if dtype not in (torch.float64, torch.float32):
            assert torch.equal(found, wide.to(dtype))


def test_lora_fills_the_zeros():
    """P9: the law above can fail."""
    model = pruned()
    masks = {p: ~z for p, z in zeros(model).items()}
    state = model.base_state(adapter(model.info.modules, 2))
    with pytest.raises(ModelError, match=r"the zeros of .*q_proj are not where its mask says"):
        check_zeros(masks, lambda p: state[f"{p}.weight"], "merged")


@pytest.mark.parametrize(("value", "said"), [(torch.inf, "128 weights"), (-1.0, "0 weights")])
def test_a_merge_that_would_move_zeros_is_refused(value, said):
    """0 * inf fills a zero, 1 + s F = 0 makes one."""
    model = pruned(targets=("q_proj",))
    payload = scale(model)
    path = next(iter(payload.beta))
    ones = torch.ones_like(payload.alpha[path])
    beta = torch.full_like(payload.beta[path], value)
    payload = replace(
        payload,
        lora_alpha=4.0,
        alpha={**payload.alpha, path: ones},
        beta={**payload.beta, path: beta},
    )
    with pytest.raises(ModelError, match=f"merging: the zeros of .* says: {said} of 256"):
        model.base_state(payload)


def test_a_merge_that_overflows_is_refused():
    """Finite factors, infinite weights, and every zero in its place."""
    model = pruned(targets=("q_proj",), dtype=torch.float16)
    payload = scale(model)
    path = next(iter(payload.beta))
    ones = {**payload.alpha, path: torch.ones_like(payload.alpha[path])}
    large = {**payload.beta, path: torch.full_like(payload.beta[path], 1e9)}
    with pytest.raises(ModelError, match=r"merging: 128 weights of 256 of .* are not finite"):
        model.base_state(replace(payload, alpha=ones, beta=large))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_tied_change_is_alpha_with_repeated_rows(name):
    """10.2: what is trained is the change, and the effect is that of alpha + repeated change."""
    model = pruned(name)
    payload = scale(model)
    g = torch.Generator().manual_seed(3)
    change = {
        m.path: torch.randn(2, m.d_in, generator=g, dtype=torch.float64) for m in model.info.modules
    }
    tied = replace(payload, tied=dict.fromkeys(change, 2), change=change, trains="alpha")
    parameters = model.mount(tied)
    assert [tuple(p.shape) for p in parameters] == [(2, m.d_in) for m in model.info.modules]
    got = logits(model.network)
    model.mount(
        replace(payload, alpha={p: a + repeat_rows(change[p], 4) for p, a in payload.alpha.items()})
    )
    torch.testing.assert_close(got, logits(model.network), rtol=1e-12, atol=1e-12)
    model.mount(replace(tied, change={}))
    back = model.payload()
    assert all(not c.any() for c in back.change.values())
    assert all(torch.equal(back.alpha[p], a) for p, a in payload.alpha.items())


def test_merges_act_before_the_factors():
    """``W ∘ (1 + s ΣF) ∘ (1 + s F')``, in value and gradient as on a base that was merged."""
    model = pruned()
    first, second, last = (scale(model, seed=i) for i in (1, 2, 3))
    merged = {
        p: (
            torch.stack([first.alpha[p], second.alpha[p]]),
            torch.stack([0.3 * first.beta[p], 0.7 * second.beta[p]]),
        )
        for p in last.beta
    }
    s = LORA_ALPHA / 4
    for path in last.beta:
        want = 1 + s * sum(
            w * factor(x.alpha[path], x.beta[path]) for w, x in ((0.3, first), (0.7, second))
        )
        found = merged_gain(replace(last, merges=(merged,)), path)
        torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(
            merged_gain(replace(last, merges=(merged, merged)), path), want * want
        )
    together = replace(last, merges=(merged,))
    for p in (0.0, 0.2):
        outcomes = []
        for payload in (together, last):
            if payload is last:
                state = model.base_state(
                    replace(together, beta={p: 0 * b for p, b in last.beta.items()})
                )
                for path, x in model.layers.items():
                    x.base.weight.data = state[f"{path}.weight"]
            parameters = model.mount(payload, dropout=p)
            step(model, parameters)
            outcomes.append(model.payload())
        for path in last.beta:
            torch.testing.assert_close(outcomes[0].alpha[path], outcomes[1].alpha[path])
        model = pruned()


def test_another_base_is_refused_and_nothing_changes():
    model = pruned()
    payload = scale(model)
    model.mount(payload)
    before = logits(model.network)
    for other, said in (
        (replace(payload, mask="abc"), r"pruned with the mask abc, and random has the mask"),
        (replace(payload, beta={"x": torch.zeros(3)}), r"'x', which is not an adapted module"),
        (replace(payload, alpha={}), r"q_proj: alpha None does not fit"),
        (replace(payload, alpha={p: a[:3] for p, a in payload.alpha.items()}), "does not divide 4"),
        (replace(payload, beta={p: b[:-1] for p, b in payload.beta.items()}), "beta .* expected"),
    ):
        with pytest.raises(ValueError, match=said):
            model.mount(other)
    assert torch.equal(logits(model.network), before)
    model.info = replace(model.info, mask="")
    with pytest.raises(ValueError, match="and random is dense"):
        model.mount(payload)


def test_examples_in_docstrings():
    assert doctests.run(scale_module) == 5
