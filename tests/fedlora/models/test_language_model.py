"""Mounting: equal to PEFT, exact, without a trace, and never at the cost of the base."""

import copy

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.core.seeding import mask_noise
from fedlora.core.types import Factors
from fedlora.models.language_model import LanguageModel
from fedlora.techniques.lora.payload import LowRankPayload
from fedlora.techniques.rebased.payload import Rebased
from fedlora.techniques.sparse.payload import MASKS_KEPT, SparseDelta
from tests.fedlora.models.networks import (
    ALPHA,
    NETWORKS,
    adapter,
    gpt2,
    llama,
    logits,
    same,
    step,
    tokens,
    wrap,
)

LAWS = settings(derandomize=True, deadline=None, max_examples=15)


@pytest.fixture(params=NETWORKS)
def model(request) -> LanguageModel:
    return wrap(NETWORKS[request.param]().double())


def peft_twin(network, factors) -> tuple[peft.PeftModel, dict]:
    """PEFT's own model with the same factors; its layers by module path."""
    twin = peft.get_peft_model(
        network.double(),
        peft.LoraConfig(
            r=1,
            lora_alpha=ALPHA,
            target_modules=list(factors),
            rank_pattern={p: f.rank for p, f in factors.items()},
            fan_in_fan_out=network.config.model_type == "gpt2",
        ),
    ).eval()
    layers = {p: twin.base_model.model.get_submodule(p) for p in factors}
    for p, f in factors.items():
        layers[p].lora_A["default"].weight.data = f.a.clone()
        layers[p].lora_B["default"].weight.data = f.b.clone()
    return twin, layers


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("rank", [1, 5, lambda i: 1 + i % 7], ids=["one", "five", "unequal"])
def test_equals_peft_in_value_and_gradient(name, rank):
    model = wrap(NETWORKS[name]().double())
    factors = adapter(model.info.modules, rank)
    parameters = model.mount(factors)
    twin, layers = peft_twin(NETWORKS[name](), factors)
    torch.testing.assert_close(logits(model.network), logits(twin), rtol=1e-12, atol=1e-12)
    model.network(input_ids=tokens(), labels=tokens()).loss.backward()
    twin(input_ids=tokens(), labels=tokens()).loss.backward()
    expected = [
        half["default"].weight.grad for m in layers.values() for half in (m.lora_A, m.lora_B)
    ]
    assert len(parameters) == len(expected)
    for p, grad in zip(parameters, expected, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("name", NETWORKS)
def test_adapts_the_layers_that_peft_adapts(name):
    twin = peft.get_peft_model(
        NETWORKS[name](),
        peft.LoraConfig(target_modules="all-linear", fan_in_fan_out=name == "gpt2"),
    )
    adapted = [n for n, m in twin.base_model.model.named_modules() if hasattr(m, "lora_A")]
    assert adapted == [m.path for m in wrap(NETWORKS[name]()).info.modules]


def test_nothing_mounted_is_the_base_to_the_bit(model):
    untouched = logits(NETWORKS[model.network.config.model_type]().double().eval())
    assert torch.equal(logits(model.network), untouched)
    assert model.mount(None) == []
    assert model.payload() is None
    assert torch.equal(logits(model.network), untouched)


def test_a_zero_b_is_the_base_to_the_bit(model):
    base = logits(model.network)
    zero = LowRankPayload(
        {
            p: Factors(f.a, torch.zeros_like(f.b), f.alpha)
            for p, f in adapter(model.info.modules, 4).items()
        }
    )
    model.mount(zero)
    assert torch.equal(logits(model.network), base)


@LAWS
@given(ranks=st.lists(st.integers(1, 16), min_size=2, max_size=4), seed=st.integers(0, 99))
def test_remounting_leaves_no_trace(ranks, seed):
    model = wrap(llama().double())
    first = adapter(model.info.modules, ranks[0], seed)
    model.mount(first)
    before = logits(model.network)
    for r in ranks[1:]:
        step(model, model.mount(adapter(model.info.modules, r, seed + r), dropout=0.3))
    model.mount(first)
    assert torch.equal(logits(model.network), before)
    assert same(model.payload(), first)


def test_training_changes_the_payload_alone(model):
    bits = copy.deepcopy(model.base_state())
    start = adapter(model.info.modules, lambda i: 1 + i % 5)
    kept = copy.deepcopy(start)
    parameters = model.mount(start, dropout=0.1)
    for _ in range(3):
        step(model, parameters)
    assert same(start, kept), "the caller's tensors are not the mounted ones"
    assert not same(model.payload(), start)
    delta = SparseDelta(3, 0.2, _values(model, 3, 0.2))
    step(model, model.mount(delta))
    model.unmount()
    after = model.base_state()
    assert bits.keys() == after.keys()
    assert all(torch.equal(bits[n], after[n]) for n in bits)
    assert not any(p.requires_grad for p in model.network.parameters())


def test_a_payload_is_a_copy(model):
    parameters = model.mount(adapter(model.info.modules, 3))
    taken = model.payload()
    kept = copy.deepcopy(taken)
    step(model, parameters)
    assert same(taken, kept)


@pytest.mark.parametrize(("train_a", "train_b"), [(True, False), (False, True), (False, False)])
def test_frozen_factors_get_no_gradient_and_are_not_returned(model, train_a, train_b):
    parameters = model.mount(adapter(model.info.modules, 3), train_a=train_a, train_b=train_b)
    wanted = [f for a, b in model.parameters() for f, on in ((a, train_a), (b, train_b)) if on]
    assert [id(p) for p in parameters] == [id(p) for p in wanted]
    assert all(
        a.requires_grad == train_a and b.requires_grad == train_b for a, b in model.parameters()
    )


def test_factors_are_live_and_in_module_order(model):
    factors = adapter(model.info.modules, 3)
    shuffled = LowRankPayload(dict(sorted(factors.items(), reverse=True)))
    parameters = model.mount(shuffled)
    assert [id(p) for pair in model.parameters() for p in pair] == [id(p) for p in parameters]
    assert list(model.payload()) == [m.path for m in model.info.modules]
    assert all(p.dtype == torch.float64 for p in parameters)


def test_a_module_without_factors_stays_as_in_the_base(model):
    first, *rest = model.info.modules
    factors = adapter(model.info.modules, 3)
    model.mount(LowRankPayload({first.path: factors[first.path]}))
    assert len(model.parameters()) == 1
    for m in rest:
        assert torch.equal(model.effective_weight(m.path), _base_weight(model, m.path))


def test_the_effective_weight_is_what_is_multiplied_by(model):
    factors = adapter(model.info.modules, 4)
    model.mount(factors)
    for m in model.info.modules:
        layer = model.layers[m.path]
        x = torch.randn(3, m.d_in, dtype=torch.float64)
        bias = 0 if layer.bias is None else layer.bias
        weight = model.effective_weight(m.path)
        torch.testing.assert_close(layer(x), x @ weight.T + bias, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(weight, _base_weight(model, m.path) + factors[m.path].delta())


def test_a_base_in_bfloat16_keeps_its_adapters_in_float32():
    model = wrap(llama().to(torch.bfloat16))
    parameters = model.mount(adapter(model.info.modules, 3, dtype=torch.float32))
    assert {p.dtype for p in parameters} == {torch.float32}
    assert logits(model.network).dtype == torch.bfloat16
    step(model, parameters)


def test_the_base_never_drops_out():
    model = wrap(gpt2().double())
    model.mount(adapter(model.info.modules, 3))
    assert torch.equal(logits(model.network), logits(model.network))


def test_dropout_follows_its_seeds_and_is_off_without_a_rate(model):
    factors = adapter(model.info.modules, 3)

    def draw(seed: int, p: float) -> torch.Tensor:
        model.mount(factors, dropout=p)
        model.seed_dropout(seed, tokens().numel())
        return logits(model.network)

    assert torch.equal(draw(1, 0.2), draw(1, 0.2))
    assert not torch.equal(draw(1, 0.2), draw(2, 0.2))
    assert torch.equal(draw(1, 0.0), draw(2, 0.0))


def test_masks_of_tokens_do_not_depend_on_padding(model):
    """The same two texts of three and two tokens, padded to three and to five."""
    model.mount(adapter(model.info.modules, 3), dropout=0.2)
    seen = []
    for width in (3, 5):
        real = torch.tensor([0, 1, 2, width, width + 1])
        model.seed_dropout(7, 2 * width, real)
        seen.append({p: update.bits[real] for p, update in model.mounted().items()})
    one, other = seen
    assert all(torch.equal(one[path], other[path]) for path in one)


def test_dropout_without_a_seed_is_refused(model):
    model.mount(adapter(model.info.modules, 3), dropout=0.2)
    with pytest.raises(RuntimeError, match=r"dropout=0\.2 without a seed"):
        logits(model.network)


def test_a_rank_that_no_module_can_have_is_refused_by_name(model):
    m = model.info.modules[0]
    r = m.max_rank + 1
    factors = adapter(model.info.modules, 3)
    model.mount(factors)
    before = logits(model.network)
    wrong = Factors(torch.ones(r, m.d_in), torch.ones(m.d_out, r), ALPHA)
    bad = LowRankPayload({**factors, m.path: wrong})
    with pytest.raises(ValueError, match=rf"{m.path}: rank {r} is not in 1\.\.{m.max_rank}"):
        model.mount(bad)
    assert torch.equal(logits(model.network), before), "a refused payload changes nothing"


def test_shapes_and_names_that_do_not_fit_are_refused_by_name(model):
    m = model.info.modules[0]
    wrong = Factors(torch.ones(2, m.d_in + 1), torch.ones(m.d_out, 2), ALPHA)
    with pytest.raises(ValueError, match=f"{m.path}: .* d_in={m.d_in}"):
        model.mount(LowRankPayload({m.path: wrong}))
    with pytest.raises(ValueError, match=r"'lm_head'.*model\.targets"):
        model.mount(
            LowRankPayload({"lm_head": Factors(torch.ones(2, 16), torch.ones(40, 2), ALPHA)})
        )
    short = {p: v[:-1] for p, v in _values(model, 5, 0.3).items()}
    with pytest.raises(ValueError, match=r"seed 5 and density 0\.3"):
        model.mount(SparseDelta(5, 0.3, short))


@LAWS
@given(seed=st.integers(0, 2**40), density=st.floats(0.01, 1), name=st.sampled_from(list(NETWORKS)))
def test_a_sparse_delta_moves_its_mask_and_nothing_else(seed, density, name):
    model = wrap(NETWORKS[name]().double())
    values = _values(model, seed, density)
    model.mount(SparseDelta(seed, density, values))
    for m in model.info.modules:
        mask = mask_noise(seed, m.path, m.d_out, m.d_in) < density
        base, now = _base_weight(model, m.path), model.effective_weight(m.path)
        assert torch.equal(now[~mask], base[~mask])
        assert torch.equal(now[mask], base[mask] + values[m.path])


def test_a_sparse_delta_has_the_gradient_of_its_coordinates(model):
    delta = SparseDelta(7, 0.25, _values(model, 7, 0.25))
    parameters = model.mount(delta)
    assert [p.shape for p in parameters] == [v.shape for v in delta.values.values()]
    model.network(input_ids=tokens(), labels=tokens()).loss.backward()
    full = NETWORKS[model.network.config.model_type]().double().eval()
    with torch.no_grad():
        for m in model.info.modules:
            _stored(full, m.path).copy_(model.effective_weight(m.path))
    full(input_ids=tokens(), labels=tokens()).loss.backward()
    for m, p in zip(model.info.modules, parameters, strict=True):
        mask = mask_noise(7, m.path, m.d_out, m.d_in) < 0.25
        weight = full.get_submodule(m.path).weight.grad
        dense = weight if isinstance(full.get_submodule(m.path), torch.nn.Linear) else weight.T
        torch.testing.assert_close(p.grad, dense[mask], rtol=1e-9, atol=1e-14)


def test_a_sparse_delta_comes_back_as_one(model):
    delta = SparseDelta(7, 0.25, _values(model, 7, 0.25))
    model.mount(delta)
    back = model.payload()
    assert isinstance(back, SparseDelta)
    assert (back.seed, back.density) == (7, 0.25)
    assert all(torch.equal(back.values[p], v) for p, v in delta.values.items())


def test_masks_are_drawn_once_and_forgotten_in_the_end(model, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "fedlora.techniques.sparse.payload.mask_noise",
        lambda seed, *rest: drawn.append(seed) or mask_noise(seed, *rest),
    )
    for seed in (1, 1, *range(2, 2 + MASKS_KEPT), 1):
        model.mount(SparseDelta(seed, 0.1, {}))
    layers = len(model.info.modules)
    assert drawn.count(1) == 2 * layers, "once at first, once again after it was forgotten"
    assert drawn.count(2) == layers


def test_wrapping_a_wrapped_network_again_changes_nothing():
    network = llama().double()
    once = wrap(network)
    again = LanguageModel(network, once.tokenizer, once.info)
    assert all(again.layers[p] is layer for p, layer in once.layers.items())


def _values(model: LanguageModel, seed: int, density: float) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return {
        m.path: torch.randn(
            int((mask_noise(seed, m.path, m.d_out, m.d_in) < density).sum()),
            generator=g,
            dtype=torch.float64,
        )
        for m in model.info.modules
    }


def _base_weight(model: LanguageModel, path: str) -> torch.Tensor:
    base = model.layers[path].base
    return base.weight if isinstance(base, torch.nn.Linear) else base.weight.T


def _stored(network, path: str) -> torch.Tensor:
    """The layer's weight seen as ``[d_out, d_in]``."""
    layer = network.get_submodule(path)
    return layer.weight if isinstance(layer, torch.nn.Linear) else layer.weight.T


def moved_twin(name, shift):
    """The same network with weights that have moved."""
    network = NETWORKS[name]().double()
    for path, d in shift.items():
        weight = network.get_submodule(path).weight.data
        weight += d if isinstance(network.get_submodule(path), torch.nn.Linear) else d.t()
    return wrap(network)


@pytest.mark.parametrize("name", NETWORKS)
def test_factors_over_a_moved_base_are_factors_on_such_a_base(name):
    model = wrap(NETWORKS[name]().double())
    factors = adapter(model.info.modules, 3)
    g = torch.Generator().manual_seed(0)
    shift = {
        m.path: 0.1 * torch.randn(m.d_out, m.d_in, generator=g, dtype=torch.float64)
        for m in model.info.modules
    }
    twin, before = moved_twin(name, shift), logits(model.network)
    parameters = model.mount(Rebased(shift, factors), dropout=0.3)
    theirs = twin.mount(factors, dropout=0.3)
    step(model, parameters)
    step(twin, theirs)
    assert len(parameters) == len(theirs) == 2 * len(factors)
    for p, q in zip(parameters, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)
    assert model.payload().keys() == factors.keys()
    for path in factors:
        torch.testing.assert_close(model.effective_weight(path), twin.effective_weight(path))
    model.mount(Rebased(shift, factors))
    twin.mount(factors)
    torch.testing.assert_close(logits(model.network), logits(twin.network), rtol=0, atol=1e-12)
    assert model.mount(Rebased(shift)) == [] and not model.payload()
    twin.unmount()
    torch.testing.assert_close(logits(model.network), logits(twin.network), rtol=0, atol=1e-12)
    for key, t in model.base_state(Rebased(shift)).items():
        torch.testing.assert_close(t, twin.base_state()[key], rtol=0, atol=1e-12)
    model.unmount()
    assert torch.equal(logits(model.network), before)


def test_a_base_in_half_precision_moves_in_single():
    """The shift is kept in float32: what is added to a bfloat16 weight is not rounded to it."""
    model = wrap(llama().to(torch.bfloat16))
    path = model.info.modules[0].path
    shift = {path: torch.full((16, 16), 1e-5)}
    model.mount(Rebased(shift))
    base = model.layers[path].base.weight.float()
    assert torch.equal(model.effective_weight(path), base + 1e-5)
    assert logits(model.network).isfinite().all()


@pytest.mark.parametrize(
    ("shift", "why"),
    [({"nowhere": (16, 16)}, "not an adapted module"), ({None: (15, 16)}, "does not fit a layer")],
)
def test_a_shift_that_does_not_fit_is_refused(shift, why):
    model = wrap(llama())
    path = model.info.modules[0].path
    with pytest.raises(ValueError, match=why):
        model.mount(Rebased({p or path: torch.zeros(s) for p, s in shift.items()}))
    with pytest.raises(ValueError, match=r"factors of a layer \(16, 16\) over the shift"):
        Rebased({}, {path: adapter(model.info.modules, 2)[path]})
