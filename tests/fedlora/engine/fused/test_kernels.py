"""The fused layer's gradients: finite differences, autograd of the formula, and torch.func."""

import dataclasses

import pytest
import torch
from torch.func import functional_call, grad, vmap

from fedlora.core.types import Factors, Module
from fedlora.engine.fused import kernels
from fedlora.engine.fused import kernels as kernels_module
from fedlora.engine.fused.bank import AdapterBank, Layout, Layouts
from fedlora.engine.fused.batch import ragged_batch
from fedlora.engine.fused.kernels import FusedDelta, FusedLinear, LayerPlan, Segment
from fedlora.engine.fused.lanes import Lane, Spread
from fedlora.engine.fused.model import FusedModel
from fedlora.models.layers import dropped_share, survivors, threshold
from tests import doctests
from tests.fedlora.engine.world import exact, examples, model, start
from tests.fedlora.models.networks import llama

D_IN, D_OUT = 5, 4
MODULES = (Module("w", "mlp", D_OUT, D_IN),)
DOUBLE, CPU = torch.float64, torch.device("cpu")


@dataclasses.dataclass(frozen=True)
class Part:
    """A segment: whose adapters of which rank, how many rows each."""

    rank: int
    """0: no adapter."""
    rows: tuple[int, ...]
    """Of each client, before they are spread."""
    train_a: bool = True
    train_b: bool = True


PARTS = {
    "one": (Part(2, (3,)),),
    "mixed": (Part(2, (3,)), Part(0, (2,)), Part(1, (1,)), Part(3, (2,))),
    "stacked": (Part(2, (2, 2, 2)), Part(0, (2, 2)), Part(1, (1, 1))),
    "spread": (Part(2, (1, 3, 2)), Part(0, (2, 1)), Part(3, (2,))),
    "frozen a": (Part(2, (2, 2), train_a=False), Part(1, (3,))),
    "frozen b": (Part(2, (2,), train_b=False), Part(3, (1,))),
    "all a frozen": (Part(2, (2, 2), train_a=False), Part(1, (3,), train_a=False)),
}
P = 0.3


class Layer:
    """A fused layer on a bank of its own, as a function of input and factors."""

    def __init__(self, parts, dropout: float, seed=0, scale=1.7) -> None:
        g = torch.Generator().manual_seed(seed)
        self.parts, self.layouts = parts, Layouts(MODULES)
        self.counts = [n for p in parts for n in p.rows]
        room = [max(p.rows) for p in parts for _ in p.rows]
        n, m = sum(self.counts), sum(room)
        self.x = torch.randn(n, D_IN, generator=g, dtype=DOUBLE)
        self.weight = torch.randn(D_IN, D_OUT, generator=g, dtype=DOUBLE)
        self.bias = torch.randn(D_OUT, generator=g, dtype=DOUBLE)
        self.spread = self._spread(room) if m > n else None
        factors = [
            (
                torch.randn(p.rank, D_IN, generator=g, dtype=DOUBLE),
                torch.randn(p.rank, D_OUT, generator=g, dtype=DOUBLE),
            )
            for p in parts
            for _ in p.rows
            if p.rank
        ]
        self.factors = [t for pair in factors for t in pair]
        width = max(f.numel() for f in self.factors) * 3
        self.bank = AdapterBank(sum(len(p.rows) for p in parts), width, DOUBLE, CPU)
        self.scale = scale / (1 - P if dropout else 1)
        self.mask = torch.ones(m, D_IN, dtype=DOUBLE)
        bits = thresholds = None
        if dropout:
            bits = torch.randint(-(2**15), 2**15, (m, D_IN), generator=g, dtype=torch.int16)
            thresholds = torch.full((m, 1), threshold(dropped_share(dropout)), dtype=torch.int16)
            self.mask = survivors(bits, thresholds, DOUBLE)
            assert 0 < self.mask.mean() < 1
        self.plan = LayerPlan(
            [max(p.rows) * len(p.rows) for p in parts], [], bits, thresholds, self.spread
        )

    def _spread(self, room) -> Spread:
        out, pads, back, at = [], [], [], 0
        for n, space in zip(self.counts, room, strict=True):
            for i in range(space):
                (pads if i >= n else back).append(len(out))
                out.append(at + min(i, n - 1))
            at += n
        return Spread(torch.tensor(out), torch.tensor(back), torch.tensor(pads))

    def load(self, factors) -> LayerPlan:
        """Put the factors into the bank; a plan that reads them there."""
        self.bank.params.zero_()
        self.bank.grads.zero_()
        segments, slot, pairs = [], 0, iter(zip(factors[::2], factors[1::2], strict=True))
        for p in self.parts:
            views = None
            for k in range(len(p.rows) if p.rank else 0):
                a, bt = next(pairs)
                layout = self.layout(p.rank)
                start = {"w": Factors(a.detach(), bt.detach().t(), 1.0)}
                self.bank.load(slot + k, layout.pack(start, DOUBLE, CPU))
                views = self.bank.views(slot, len(p.rows), layout)[0]
            segments.append(Segment(len(p.rows), views, self.scale, p.train_a, p.train_b))
            slot += len(p.rows)
        return dataclasses.replace(self.plan, segments=segments)

    def layout(self, rank: int) -> Layout:
        return self.layouts({"w": Factors(torch.ones(rank, D_IN), torch.ones(D_OUT, rank), 1.0)})

    def bank_gradients(self) -> list[torch.Tensor]:
        found, slot = [], 0
        for p in self.parts:
            for k in range(len(p.rows)):
                if p.rank:
                    views = self.bank.views(slot + k, 1, self.layout(p.rank))[0]
                    found += [views.grad_a.clone(), views.grad_bt.clone()]
            slot += len(p.rows)
        return found

    def rows(self, x, plan):
        return None if plan.spread is None else x.detach()[plan.spread.out]

    def formula(self, x, *factors):
        """``x W + b + s (m x) A^T B^T`` client by client, for autograd."""
        y, at, pairs = [], 0, iter(zip(factors[::2], factors[1::2], strict=True))
        mask = self.mask if self.spread is None else self.mask[self.spread.back]
        for p in self.parts:
            for n in p.rows:
                rows, mine = x[at : at + n], mask[at : at + n]
                out = rows @ self.weight + self.bias
                if p.rank:
                    a, bt = next(pairs)
                    a, bt = (t if on else t.detach() for t, on in ((a, p.train_a), (bt, p.train_b)))
                    out = out + self.scale * (mine * rows) @ a.t() @ bt
                y.append(out)
                at += n
        return torch.cat(y)


class ThroughBank(torch.autograd.Function):
    """The layer under test with the factors as autograd sees them."""

    @staticmethod
    def forward(ctx, layer, kind, x, *factors):
        plan = layer.load(factors)
        anchor = torch.zeros((), dtype=DOUBLE, requires_grad=True)
        inner = x.detach().requires_grad_(ctx.needs_input_grad[2])
        with torch.enable_grad():
            if kind == "linear":
                out = FusedLinear.apply(
                    inner, anchor, layer.weight, layer.bias, layer.rows(x, plan), plan
                )
            else:
                out = FusedDelta.apply(inner, anchor, D_OUT, None, layer.rows(x, plan), plan)
        ctx.layer, ctx.inner, ctx.out, ctx.factors = layer, inner, out, factors
        result = out.detach().clone()
        return result if kind == "linear" else result + x @ layer.weight + layer.bias

    @staticmethod
    def backward(ctx, g):
        ctx.layer.load(ctx.factors)
        ctx.out.backward(g, retain_graph=True)
        dx, ctx.inner.grad = ctx.inner.grad, None
        if dx is not None and "Delta" in type(ctx.out.grad_fn).__name__:
            dx = dx + g @ ctx.layer.weight.t()
        return None, None, dx, *ctx.layer.bank_gradients()


def free(layer, needs_x=True):
    """Input and factors that require gradients as the plan says."""
    flags = [f for p in layer.parts for _ in p.rows if p.rank for f in (p.train_a, p.train_b)]
    factors = [f.clone().requires_grad_(on) for f, on in zip(layer.factors, flags, strict=True)]
    return layer.x.clone().requires_grad_(needs_x), factors


@pytest.mark.parametrize("kind", ["linear", "delta"])
@pytest.mark.parametrize("dropout", [0.0, P])
@pytest.mark.parametrize("parts", PARTS)
def test_gradients_are_those_of_finite_differences(parts, dropout, kind):
    layer = Layer(PARTS[parts], dropout)
    x, factors = free(layer)
    assert torch.autograd.gradcheck(
        lambda x, *f: ThroughBank.apply(layer, kind, x, *f), (x, *factors), atol=1e-7
    )


@pytest.mark.parametrize("needs_x", [True, False])
@pytest.mark.parametrize("dropout", [0.0, P])
@pytest.mark.parametrize("parts", PARTS)
def test_values_and_gradients_are_those_of_the_formula(parts, dropout, needs_x):
    """``needs_x=False`` is the first layer, whose input needs no gradient."""
    layer = Layer(PARTS[parts], dropout)
    x, factors = free(layer, needs_x)
    leaves = [t for t in (x, *factors) if t.requires_grad]
    g = torch.randn(len(x), D_OUT, dtype=DOUBLE, generator=torch.Generator().manual_seed(3))
    wanted = layer.formula(x, *factors)
    expected = torch.autograd.grad(wanted, leaves, g)
    for kind in ("linear", "delta"):
        got = ThroughBank.apply(layer, kind, x, *factors)
        torch.testing.assert_close(got, wanted, rtol=1e-13, atol=1e-13)
        for a, b in zip(torch.autograd.grad(got, leaves, g), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    frozen = [f for f in factors if not f.requires_grad]
    assert len(frozen) == sum(
        len(p.rows) * ((not p.train_a) + (not p.train_b)) for p in layer.parts
    )
    grads = layer.bank_gradients()
    for f, written in zip(factors, grads, strict=True):
        assert f.requires_grad or not written.any()  # not a number for a frozen factor


def test_what_is_nobodys_stays_untouched():
    """Gradients accumulate in the rows of the plan's clients; no other bit of the bank changes."""
    layer = Layer(PARTS["one"], 0.0)
    layer.bank = AdapterBank(3, 40, DOUBLE, CPU)
    layer.bank.grads.fill_(7.0)
    start = {"w": Factors(layer.factors[0], layer.factors[1].t(), 1.0)}
    layout = layer.layout(2)
    layer.bank.load(1, layout.pack(start, DOUBLE, CPU))
    views = layer.bank.views(1, 1, layout)[0]
    plan = dataclasses.replace(layer.plan, segments=[Segment(1, views, 1.0, True, True)])
    anchor = torch.zeros((), dtype=DOUBLE, requires_grad=True)
    once = []
    for _ in range(2):
        x = layer.x.clone().requires_grad_()
        FusedLinear.apply(x, anchor, layer.weight, None, None, plan).sum().backward()
        once.append(layer.bank.grads[1, : layout.size].clone())
        assert torch.equal(x.detach(), layer.x)
    torch.testing.assert_close(once[1], 2 * once[0], rtol=1e-13, atol=0)
    others = layer.bank.grads.clone()
    others[1, : layout.size] = 7.0
    assert (others == 7.0).all()


def test_without_dropout_the_input_is_used_as_it_is(monkeypatch):
    layer = Layer(PARTS["one"], 0.0)
    seen = []
    honest = kernels.up
    monkeypatch.setattr(
        kernels, "up", lambda y, x, *a, **k: seen.append(x) or honest(y, x, *a, **k)
    )
    plan = layer.load(layer.factors)
    x = layer.x.clone().requires_grad_()
    FusedLinear.apply(x, torch.zeros((), requires_grad=True), layer.weight, None, None, plan)
    assert seen[0].data_ptr() == x.data_ptr() and torch.equal(x.detach(), layer.x)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_both_layouts_of_the_frozen_weight(transposed, bias):
    """``Conv1D`` stores ``[d_in, d_out]``, ``Linear`` its transpose."""
    layer = Layer(PARTS["mixed"], 0.0)
    if transposed:
        layer.weight = layer.weight.t().contiguous().t()
    plan, x = layer.load(layer.factors), layer.x.view(1, -1, D_IN).requires_grad_()
    offset = layer.bias if bias else None
    anchor = torch.zeros((), dtype=DOUBLE, requires_grad=True)
    got = FusedLinear.apply(x, anchor, layer.weight, offset, None, plan)
    wanted = layer.formula(layer.x, *layer.factors) - (0 if bias else layer.bias)
    assert got.shape == (1, len(layer.x), D_OUT)
    torch.testing.assert_close(got[0], wanted, rtol=1e-13, atol=1e-13)


# --- mLoRA's fault, planted ----------------------------------------------------------------------


def test_a_mask_forgotten_in_the_backward_pass_is_noticed(monkeypatch):
    """mLoRA's public BatchLoRA leaves it out of the gradients of A and of the input: a quarter of
    them at a dropout rate of 0.05."""
    layer = Layer((Part(2, (60,)),), 0.05, seed=1)
    x, factors = free(layer)
    leaves = [x, *factors]
    g = torch.randn(len(x), D_OUT, dtype=DOUBLE, generator=torch.Generator().manual_seed(3))
    dx, da, db = torch.autograd.grad(layer.formula(x, *factors), leaves, g)
    out = ThroughBank.apply(layer, "linear", x, *factors)
    monkeypatch.setattr(LayerPlan, "mask", lambda self, dtype: None)
    bad_dx, bad_da, bad_db = torch.autograd.grad(out, leaves, g)
    base = g @ layer.weight.t()
    torch.testing.assert_close(bad_db, db, rtol=1e-12, atol=1e-12)
    assert float((bad_da - da).norm() / da.norm()) > 0.05
    assert float((bad_dx - dx).norm() / (dx - base).norm()) > 0.05


# --- a second oracle: torch.func -----------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # attention in a loop
@pytest.mark.parametrize("loss", ["full", "response"])
def test_gradients_of_a_whole_llama_are_those_of_vmap_over_stacked_adapters(loss):
    """Per-client gradients by ``functional_call`` over effective weights: no code of ours."""
    clients, width = 4, 9
    resident, plain = model("llama"), exact(llama())
    starts = [start(resident, 3, seed=k) for k in range(clients)]
    held = [
        [e for e in examples(40, seed=k) if len(e.input_ids) == width][:2] for k in range(clients)
    ]
    ids = torch.tensor([[e.input_ids.tolist() for e in two] for two in held])
    prompts = [[e.prompt_tokens if loss == "response" else 1 for e in two] for two in held]
    counted = torch.arange(1, width) >= torch.tensor(prompts)[..., None]
    weights = {p: t.detach() for p, t in plain.named_parameters()}

    def mean_loss(factors, ids, counted):
        adapted = {
            f"{p}.weight": weights[f"{p}.weight"] + scale[p] * b @ a
            for p, (a, b) in factors.items()
        }
        logits = functional_call(plain, weights | adapted, (ids[:, :-1],), {"use_cache": False})
        logs = logits.logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        return -(logs * counted).sum() / counted.sum()

    scale = {p: f.scale for p, f in starts[0].items()}
    stacked = {
        p: (torch.stack([s[p].a for s in starts]), torch.stack([s[p].b for s in starts]))
        for p in starts[0]
    }
    wanted = vmap(grad(mean_loss))(stacked, ids, counted)

    layout = Layout.of(starts[0], resident.info.modules)
    bank = AdapterBank(clients, layout.size, DOUBLE, CPU)
    for k, s in enumerate(starts):
        bank.load(k, layout.pack(s, DOUBLE, CPU))
    lanes = [Lane(k, layout, held[k], loss, int(counted[k].sum())) for k in range(clients)]
    fused = FusedModel(resident, is_ragged=True)
    with fused.mounted(bank):
        losses = fused.backward(ragged_batch(lanes, 16))
    for k in range(clients):
        alone = mean_loss({p: (f.a, f.b) for p, f in starts[k].items()}, ids[k], counted[k])
        torch.testing.assert_close(losses[k], alone.detach(), rtol=1e-12, atol=0)
        for p, (da, dbt) in layout.factors(bank.grads[k]).items():
            torch.testing.assert_close(da, wanted[p][0][k], rtol=1e-10, atol=1e-13)
            torch.testing.assert_close(dbt.t(), wanted[p][1][k], rtol=1e-10, atol=1e-13)


def test_the_examples_in_the_module_are_right():
    assert doctests.run(kernels_module) > 5
