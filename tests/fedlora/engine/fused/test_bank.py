"""Rows: nothing padded, nothing shared, everything back as it came."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.core.types import Factors
from fedlora.engine.fused import bank as bank_module
from fedlora.engine.fused.bank import AdapterBank, Layout, Layouts
from tests import doctests
from tests.fedlora.models.networks import same
from tests.generators import ALPHA, MODULES, factors

DOUBLE, CPU = torch.float64, torch.device("cpu")


def adapter(ranks, seed=0, alpha=ALPHA):
    """Of the modules whose rank is not 0."""
    return {
        m.path: factors(m.d_out, m.d_in, min(r, m.max_rank), seed, alpha)
        for m, r in zip(MODULES, ranks, strict=True)
        if r
    }


RANKS = st.tuples(*[st.integers(0, m.max_rank) for m in MODULES])


@given(ranks=RANKS, seed=st.integers(0, 99), slot=st.integers(0, 2))
def test_an_adapter_comes_back_bit_for_bit(ranks, seed, slot):
    sent = adapter(ranks, seed)
    layout = Layout.of(sent, MODULES)
    assert layout.size == sum(f.a.numel() + f.b.numel() for f in sent.values())
    assert layout.a_size == sum(f.a.numel() for f in sent.values())
    bank = AdapterBank(3, layout.size + 5, DOUBLE, CPU)
    row, grad = bank.load(slot, layout.pack(sent, DOUBLE, CPU))
    got = layout.read(row)
    assert same(got, sent) and list(got) == [m.path for m in MODULES if m.path in sent]
    row.zero_()
    assert same(got, sent)  # a copy: it outlives the slot
    assert row.shape == grad.shape == (layout.size,)


@given(first=RANKS, second=RANKS)
def test_layouts_are_shared_by_ranks_and_scales_alone(first, second):
    layouts = Layouts(MODULES)
    a, b = layouts(adapter(first, 1)), layouts(adapter(second, 2))
    assert (a is b) == (first == second)
    assert layouts(adapter(first, 3)) is a
    if any(first):
        assert layouts(adapter(first, 1, alpha=3.0)) is not a


@given(ranks=RANKS, rows=st.integers(1, 3), slot=st.integers(0, 2))
def test_views_are_the_factors_of_consecutive_slots(ranks, rows, slot):
    sent = [adapter(ranks, seed) for seed in range(rows)]
    layout = Layout.of(sent[0], MODULES)
    bank = AdapterBank(5, layout.size + 3, DOUBLE, CPU)
    for k, one in enumerate(sent):
        bank.load(slot + k, layout.pack(one, DOUBLE, CPU))
    views = bank.views(slot, rows, layout)
    assert [v is None for v in views] == [r == 0 for r in ranks]
    for module, view in zip(MODULES, views, strict=True):
        if view is None:
            continue
        a, bt = (t if rows > 1 else t[None] for t in (view.a, view.bt))
        for k, one in enumerate(sent):
            f = one[module.path]
            assert torch.equal(a[k], f.a) and torch.equal(bt[k], f.b.t())
        view.grad_a.fill_(1.0), view.grad_bt.fill_(2.0)
    written = torch.zeros(5, layout.size + 3, dtype=DOUBLE)
    written[slot : slot + rows, : layout.a_size] = 1.0
    written[slot : slot + rows, layout.a_size : layout.size] = 2.0
    assert torch.equal(bank.grads, written)  # every number of the rows, and no other


def test_loading_clears_what_the_last_client_left():
    small, large = adapter((1, 1, 1)), adapter((3, 3, 3))
    layouts = Layouts(MODULES)
    bank = AdapterBank(2, layouts(large).size, DOUBLE, CPU)
    bank.grads.fill_(7.0)
    _, grad = bank.load(0, layouts(small).pack(small, DOUBLE, CPU))
    assert not grad.any()
    _, grad = bank.load(0, layouts(large).pack(large, DOUBLE, CPU))
    assert not grad.any() and (bank.grads[1] == 7.0).all()


def test_what_does_not_fit_is_refused_by_name():
    layouts = Layouts(MODULES)
    large = adapter((4, 4, 4))
    bank = AdapterBank(2, layouts(adapter((1, 1, 1))).size, DOUBLE, CPU)
    with pytest.raises(ValueError, match="its ranks are larger than those the bank was made for"):
        bank.load(0, layouts(large).pack(large, DOUBLE, CPU))
    row = torch.zeros(3, dtype=DOUBLE)
    for slot in (-1, 2):
        with pytest.raises(ValueError, match=rf"slot {slot} is not in 0\.\.1"):
            bank.load(slot, row)


def test_a_forward_in_another_type_sees_the_parameters_of_the_last_refresh():
    sent = adapter((2, 2, 2))
    layout = Layout.of(sent, MODULES)
    bank = AdapterBank(1, layout.size, torch.float32, CPU, torch.bfloat16)
    row, _ = bank.load(0, layout.pack(sent, torch.float32, CPU))
    view = bank.views(0, 1, layout)[0]
    assert view.a.dtype == torch.bfloat16 and view.grad_a.dtype == torch.float32
    assert not view.a.any()
    bank.refresh()
    wanted = row[: view.a.numel()].view_as(view.a).to(torch.bfloat16)
    assert torch.equal(view.a, wanted)
    row.add_(1.0)
    assert torch.equal(view.a, wanted)
    bank.refresh()
    assert not torch.equal(view.a, wanted)


def test_the_memory_of_views_does_not_change_them(monkeypatch):
    monkeypatch.setattr(AdapterBank, "_KEPT", 2)
    sent = adapter((2, 1, 2))
    layout = Layout.of(sent, MODULES)
    bank = AdapterBank(4, layout.size, DOUBLE, CPU)
    first = bank.views(0, 1, layout)
    assert bank.views(0, 1, layout) is first
    for slot in range(4):
        bank.views(slot, 1, layout)
    again = bank.views(0, 1, layout)
    assert again is not first
    assert again[0].a.data_ptr() == first[0].a.data_ptr()


def test_factors_keep_their_own_scale():
    mixed = {
        m.path: Factors(torch.ones(k + 1, m.d_in), torch.ones(m.d_out, k + 1), float(k + 2))
        for k, m in enumerate(MODULES)
    }
    layout = Layout.of(mixed, MODULES)
    assert [p.scale for p in layout.parts] == [f.scale for f in mixed.values()]


def test_the_examples_in_the_module_are_right():
    assert doctests.run(bank_module) > 5
