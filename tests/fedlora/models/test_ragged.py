"""Sequences end to end: each computes as if alone, forward and backward, whatever the others do."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fedlora.models import ragged as ragged_module
from fedlora.models.ragged import (
    STACKS,
    Geometry,
    RaggedAttention,
    RaggedUnsupported,
    _Stack,
    _Unstack,
    ragged,
)
from tests import doctests
from tests.fedlora.models.families import CONTEXT, WINDOW, family
from tests.fedlora.models.networks import VOCABULARY

LENGTHS = st.lists(st.integers(1, 21), min_size=1, max_size=7)
UNEQUAL = LENGTHS.filter(lambda lengths: len(set(lengths)) > 1)
MODELS = ("llama", "mistral", "gemma3_text", "olmo3", "gpt2", "opt", "gpt_bigcode", "cohere2")


def rows(lengths, d=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(sum(lengths), d, generator=g, dtype=torch.float64)


def owners(lengths):
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))


# --- geometry ------------------------------------------------------------------------------------


@given(UNEQUAL)
def test_every_row_has_one_place_and_every_other_place_is_a_pad(lengths):
    geometry = Geometry.of(lengths)
    places = sum(s * t for s, t in geometry.shapes)
    assert geometry.gather.shape == (places,)
    torch.testing.assert_close(geometry.gather[geometry.scatter], torch.arange(sum(lengths)))
    pads = set() if geometry.pads is None else set(geometry.pads.tolist())
    assert pads | set(geometry.scatter.tolist()) == set(range(places))
    assert len(pads) == places - sum(lengths)


@given(UNEQUAL)
def test_a_place_holds_its_own_sequence_in_order(lengths):
    geometry, owner = Geometry.of(lengths), owners(lengths)
    seen, at = [], 0
    for sequences, width in geometry.shapes:
        for _ in range(sequences):
            held = geometry.gather[at : at + width]
            (who,) = owner[held].unique().tolist()
            start = sum(lengths[:who])
            wanted = [start + min(i, lengths[who] - 1) for i in range(width)]
            assert held.tolist() == wanted
            seen.append(who)
            at += width
    assert sorted(seen) == list(range(len(lengths)))


@given(UNEQUAL)
def test_stacks_are_few_and_hold_similar_lengths(lengths):
    geometry = Geometry.of(lengths)
    assert len(geometry.shapes) <= STACKS
    pads = 0 if geometry.pads is None else len(geometry.pads)
    assert pads <= len(lengths) * max(lengths) / STACKS


@given(st.integers(1, 9), st.integers(1, 5))
def test_equal_lengths_need_no_stacking(length, sequences):
    geometry = Geometry.of([length] * sequences)
    assert geometry.shapes == ((sequences, length),)
    assert geometry.gather is geometry.scatter is geometry.pads is None


@given(UNEQUAL)
def test_unstacking_is_the_inverse_of_stacking(lengths):
    geometry, x = Geometry.of(lengths), rows(lengths)
    places = _Stack.apply(x, geometry.gather, geometry.scatter)
    assert torch.equal(_Unstack.apply(places, geometry), x)


@pytest.mark.parametrize("lengths", [[3, 1, 2], [1, 4, 4], [2, 7, 1, 5]])
def test_gradients_of_stacking_are_exact(lengths):
    """Of whatever reaches the rows: what a pad computes is thrown away."""
    geometry = Geometry.of(lengths)
    x = rows(lengths, 2).requires_grad_()

    def there_and_back(x):
        return _Unstack.apply(_Stack.apply(x, geometry.gather, geometry.scatter).sin(), geometry)

    assert torch.autograd.gradcheck(there_and_back, x)
    y = rows([sum(s * t for s, t in geometry.shapes)], 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda y: _Unstack.apply(y, geometry), y)


# --- attention -----------------------------------------------------------------------------------


def heads(lengths, query_heads=4, key_heads=2, d=3, seed=0):
    """Query, key and value ``[1, heads, N, d]``."""
    g = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    return [
        torch.randn(1, h, n, d, generator=g, dtype=torch.float64)
        for h in (query_heads, key_heads, key_heads)
    ]


def attend(lengths, q, k, v, **kwargs):
    attention = RaggedAttention()
    attention.geometry = Geometry.of(lengths)
    out, weights = attention(nn.Identity(), q, k, v, None, **kwargs)
    assert weights is None
    return out


def by_definition(lengths, q, k, v, scaling=None, sliding_window=None, is_causal=True):
    """Softmax over what each token may see, one sequence and one token at a time."""
    group, scale = q.shape[1] // k.shape[1], scaling or 1 / math.sqrt(q.shape[-1])
    out, start = [], 0
    for n in lengths:
        for i in range(n):
            first = 0 if sliding_window is None else max(0, i - sliding_window + 1)
            last = i if is_causal else min(n - 1, i + (sliding_window or n) - 1)
            near = slice(start + first, start + last + 1)
            keys, values = (x[0, :, near].repeat_interleave(group, 0) for x in (k, v))
            weights = (scale * (q[0, :, start + i, None] * keys).sum(-1)).softmax(-1)
            out.append((weights[..., None] * values).sum(1))
        start += n
    return torch.stack(out)[None]


@given(
    LENGTHS,
    st.sampled_from([(4, 4), (4, 2), (6, 1)]),
    st.sampled_from([None, 0.7]),
    st.sampled_from([None, 1, 4, 100]),
    st.booleans(),
)
def test_attention_is_that_of_each_sequence(lengths, counts, scaling, window, causal):
    q, k, v = heads(lengths, *counts)
    asked = {"scaling": scaling, "sliding_window": window, "is_causal": causal}
    found = attend(lengths, q, k, v, **asked)
    wanted = by_definition(lengths, q, k, v, **asked)
    assert found.shape == (1, sum(lengths), counts[0], 3)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("causal", [True, False])
def test_gradients_of_attention_are_exact(window, causal):
    lengths = [3, 1, 4]
    inputs = [x.requires_grad_() for x in heads(lengths, 2, 1, 2)]
    asked = {"sliding_window": window, "is_causal": causal}
    assert torch.autograd.gradcheck(lambda q, k, v: attend(lengths, q, k, v, **asked), inputs)


def test_a_module_that_says_nothing_else_attends_as_it_is_made():
    lengths, module = [2, 4, 3], nn.Identity()
    module.is_causal = False
    inputs = heads(lengths)
    attention = RaggedAttention()
    attention.geometry = Geometry.of(lengths)
    found, _ = attention(module, *inputs, None)
    assert torch.equal(found, attend(lengths, *inputs, is_causal=False))
    assert not torch.equal(found, attend(lengths, *inputs))


@given(UNEQUAL, st.booleans(), st.sampled_from([None, 1, 4]), st.data())
def test_nothing_of_a_sequence_reaches_another_not_even_a_nan(lengths, causal, window, data):
    who = data.draw(st.integers(0, len(lengths) - 1))
    mine = owners(lengths) == who
    poison = data.draw(st.sampled_from([7.0, math.inf, math.nan]))
    results = []
    for value in (None, poison):
        inputs = heads(lengths)
        if value is not None:
            for x in inputs:
                x[:, :, mine] = value
        inputs = [x.requires_grad_() for x in inputs]
        out = attend(lengths, *inputs, is_causal=causal, sliding_window=window)
        grads = torch.autograd.grad(out.pow(2).sum(), inputs)
        results.append([out[:, ~mine], *(g[:, :, ~mine] for g in grads)])
    for before, after in zip(*results, strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"softcap": 30.0}, "softcap"),
        ({"s_aux": torch.ones(4)}, "s_aux"),
        ({"invented_in_the_future": 1}, "invented_in_the_future"),
        ({"dropout": 0.1}, "dropout"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(asked, named):
    with pytest.raises(RaggedUnsupported, match=f"Identity attends with {named}"):
        attend([2, 3], *heads([2, 3]), **asked)
    attention = RaggedAttention()
    with pytest.raises(RaggedUnsupported, match="attends with a mask"):
        attention(nn.Identity(), *heads([2]), torch.ones(1))


def test_what_changes_nothing_is_accepted():
    lengths = [2, 3]
    q, k, v = heads(lengths)
    more = {"softcap": None, "position_ids": torch.arange(5), "use_cache": False, "dropout": 0.0}
    found = attend(lengths, q, k, v, is_causal=True, **more)
    assert torch.equal(found, attend(lengths, q, k, v))


# --- whole models --------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=MODELS)
def network(request):
    return family(request.param).double().requires_grad_(False)


def end_to_end(network, lengths, embedded):
    """Logits ``[N, vocabulary]`` of inputs ``[N, d]``."""
    attention = RaggedAttention()
    places = torch.cat([torch.arange(n) for n in lengths])
    with ragged(network, attention):
        attention.geometry = Geometry.of(lengths)
        out = network(inputs_embeds=embedded[None], position_ids=places[None], use_cache=False)
    assert attention.calls == 2, "once per layer"
    return out.logits[0]


def embedded(network, lengths, seed=0):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (sum(lengths),), generator=g)
    return network.get_input_embeddings()(ids)


@pytest.mark.parametrize("lengths", [[5], [2, 2, 2], [1, 3 * WINDOW, 4, 1, 11], [CONTEXT, 2]])
def test_logits_and_gradients_are_those_of_each_sequence_alone(network, lengths):
    together = embedded(network, lengths).requires_grad_()
    apart = together.detach().clone().requires_grad_()
    found = end_to_end(network, lengths, together)
    wanted = [
        network(inputs_embeds=part[None], use_cache=False).logits[0]
        for part in apart.split(lengths)
    ]
    torch.testing.assert_close(found, torch.cat(wanted), rtol=1e-6, atol=1e-6)
    for logits in (found, torch.cat(wanted)):
        logits.log_softmax(-1)[:, 3].sum().backward()
    torch.testing.assert_close(together.grad, apart.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("who", [0, 1, 3])
@pytest.mark.parametrize("poison", [1.0, math.nan])
def test_sequences_of_a_model_do_not_notice_one_another(network, who, poison):
    lengths = [4, 2 * WINDOW, 1, 7]
    mine = owners(lengths) == who
    results = []
    for added in (0.0, poison):
        x = embedded(network, lengths)
        x[mine] += added
        x.requires_grad_()
        logits = end_to_end(network, lengths, x)
        (grad,) = torch.autograd.grad(logits.sum(), x)
        results.append((logits[~mine], grad[~mine]))
        assert bool(logits[mine].isnan().any()) == math.isnan(added)
    for before, after in zip(*results, strict=True):
        torch.testing.assert_close(before, after, rtol=1e-12, atol=1e-12)


# --- the context ---------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_network_gets_its_attention_back_whatever_happens(implementation):
    network, attention = family("llama"), RaggedAttention()
    network.set_attn_implementation(implementation)
    known = sorted(ALL_ATTENTION_FUNCTIONS.valid_keys())

    def fail():
        with ragged(network, attention):
            assert network.config._attn_implementation == attention.name
            attention.geometry = Geometry.of([1])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert network.config._attn_implementation == implementation
    assert sorted(ALL_ATTENTION_FUNCTIONS.valid_keys()) == known
    assert attention.geometry is None


def test_a_network_that_refuses_leaves_nothing_registered(monkeypatch):
    network, known = family("llama"), sorted(ALL_ATTENTION_FUNCTIONS.valid_keys())
    plain = network.set_attn_implementation

    def refuse(name):
        if name.startswith("fedlora"):
            raise ValueError("not here")
        plain(name)

    monkeypatch.setattr(network, "set_attn_implementation", refuse)
    with pytest.raises(ValueError, match="not here"), ragged(network, RaggedAttention()):
        pass
    assert sorted(ALL_ATTENTION_FUNCTIONS.valid_keys()) == known


def test_two_networks_attend_at_once():
    one, two = family("llama"), family("mistral")
    mine, other = RaggedAttention(), RaggedAttention()
    assert mine.name != other.name
    with ragged(one, mine), ragged(two, other):
        assert one.config._attn_implementation == mine.name
        assert two.config._attn_implementation == other.name


def test_the_examples_in_the_module_are_right():
    assert doctests.run(ragged_module) > 5
