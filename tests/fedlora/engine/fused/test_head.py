"""Cross-entropy in chunks equals cross-entropy of all logits, in value and in gradient."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from fedlora.engine.fused import head
from fedlora.engine.fused.head import head_nll, is_plain
from tests.fedlora.engine.world import model

VOCABULARY, WIDTH = 11, 5


def embedding(bias: bool) -> nn.Linear:
    g = torch.Generator().manual_seed(1)
    layer = nn.Linear(WIDTH, VOCABULARY, bias=bias).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64))
    return layer.requires_grad_(False)


@given(n=st.integers(1, 9), chunk=st.integers(1, 60), bias=st.booleans(), seed=st.integers(0, 9))
def test_chunks_change_nothing(n, chunk, bias, seed):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, WIDTH, generator=g, dtype=torch.float64).requires_grad_()
    targets = torch.randint(0, VOCABULARY, (n,), generator=g)
    weights = torch.rand(n, generator=g, dtype=torch.float64)
    layer = embedding(bias)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head, "CHUNK_NUMBERS", chunk)
        got = head_nll(hidden, layer, targets)
    wanted = functional.cross_entropy(layer(hidden), targets, reduction="none")
    torch.testing.assert_close(got, wanted, rtol=1e-13, atol=1e-13)
    (ours,) = torch.autograd.grad((got * weights).sum(), hidden)
    (theirs,) = torch.autograd.grad((wanted * weights).sum(), hidden)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


def test_gradients_are_those_of_finite_differences():
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, WIDTH, generator=g, dtype=torch.float64).requires_grad_()
    targets = torch.randint(0, VOCABULARY, (4,), generator=g)
    assert torch.autograd.gradcheck(lambda h: head_nll(h, embedding(True), targets), (hidden,))


def test_a_row_that_is_not_finite_spoils_no_other():
    hidden = torch.ones(3, WIDTH, dtype=torch.float64)
    hidden[1, 0] = torch.nan
    hidden.requires_grad_()
    nll = head_nll(hidden, embedding(False), torch.tensor([1, 2, 3]))
    nll.sum().backward()
    assert nll.isfinite().tolist() == [True, False, True]
    assert hidden.grad.isfinite().all(dim=1).tolist() == [True, False, True]


def test_half_precision_is_summed_in_single_precision():
    layer = embedding(False).bfloat16()
    hidden = torch.ones(3, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    nll = head_nll(hidden, layer, torch.tensor([1, 2, 3]))
    assert nll.dtype == torch.float32
    nll.sum().backward()
    assert hidden.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("on", ["llama", "gpt2"])
def test_a_network_that_does_something_to_its_logits_is_not_plain(on):
    resident = model(on)
    network = resident.network
    assert is_plain(resident)
    assert not network.get_output_embeddings()._forward_pre_hooks
    honest = network.forward

    def capped(*args, **kwargs):
        out = honest(*args, **kwargs)
        out.logits = 30 * torch.tanh(out.logits / 30)
        return out

    network.forward = capped
    assert not is_plain(resident)
    network.forward = honest
    network.get_output_embeddings = lambda: None
    assert not is_plain(resident)
