"""Rows without padding, and the order in which a client sees its examples."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.core.seeding import dropout_seeds
from fedlora.core.types import LocalPlan
from fedlora.data.batches import step_indices
from fedlora.models.stages import Span, Stages
from fedlora.split import batches
from fedlora.split.batches import ROUND, Labels, Order, Seeds, Shape, pack, pad, step_of
from tests import doctests
from tests.fedlora.engine.world import conversation, examples
from tests.fedlora.models.networks import VOCABULARY
from tests.fedlora.split.world import MODELS

LENGTHS = st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple)


@given(LENGTHS, st.integers(0, 3))
def test_packing_undoes_padding(lengths: tuple[int, ...], more: int) -> None:
    shape, width = Shape(lengths), max(lengths) + more
    packed = torch.randn(shape.tokens, 2, dtype=torch.float64, requires_grad=True)
    padded = pad(packed, shape, width)
    assert padded.shape == (len(lengths), width, 2)
    assert torch.equal(pack(padded, shape), packed)
    for row, n in enumerate(lengths):
        assert not padded[row, n:].any()
    assert torch.autograd.gradcheck(lambda x: pad(x, shape, width), packed)


@given(LENGTHS, st.data())
def test_labels_lie_where_the_rows_say(lengths: tuple[int, ...], data: st.DataObject) -> None:
    first = tuple(data.draw(st.integers(0, n)) for n in lengths)
    n = sum(lengths) - sum(first)
    shape, labels = Shape(lengths), Labels(first, torch.arange(n))
    labels.check(shape, max(1, n))
    at = labels.positions(shape, max(lengths) + 1)
    rows = [divmod(int(i), max(lengths) + 1) for i in at]
    ends = zip(first, lengths, strict=True)
    assert rows == [(r, c) for r, (start, n) in enumerate(ends) for c in range(start, n)]


@pytest.mark.parametrize(
    ("first", "targets", "message"),
    [
        ((0, 1), [1, 2], "do not fit rows"),
        ((0, 4), [1, 2], "do not fit rows"),
        ((0, -1), [1] * 6, "do not fit rows"),
        ((0,), [1], "zip"),
        ((0, 2), [1, 2, 40], r"not in 0\.\.39"),
        ((0, 2), [1, 2, -1], r"not in 0\.\.39"),
    ],
)
def test_labels_that_do_not_fit_are_refused(
    first: tuple[int, ...], targets: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Labels(first, torch.tensor(targets)).check(Shape((2, 3)), 40)


@given(st.integers(1, 5), st.integers(0, 99), st.sampled_from(["full", "response"]))
def test_labels_of_conversations_lie_where_their_batch_has_a_loss(
    n: int, seed: int, loss: str
) -> None:
    held = [conversation(e, seed + i) if i % 2 else e for i, e in enumerate(examples(n, seed))]
    step = step_of(held, range(n), LocalPlan(loss=loss))
    step.labels.check(step.shape, VOCABULARY)
    assert torch.equal(step.labels.positions(step.shape), step.batch.positions)
    assert torch.equal(step.labels.targets, step.batch.targets)
    if loss == "full" or n == 1:
        assert not step.labels.gaps


@pytest.mark.parametrize("gaps", [(5,), (-1,), (1, 1), (2, 1), (0, 1)])
def test_gaps_that_do_not_fit_are_refused(gaps: tuple[int, ...]) -> None:
    Labels((0, 0), torch.tensor([1, 2, 3, 4]), (1,)).check(Shape((2, 3)), 40)
    with pytest.raises(ValueError, match="do not fit rows"):
        Labels((0, 0), torch.tensor([1, 2, 3, 4]), gaps).check(Shape((2, 3)), 40)


@pytest.mark.parametrize("lengths", [(), (0, 2), (3, -1), (33,)])
def test_rows_that_no_model_takes_are_refused(lengths: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"the model takes 1\.\.32 in a row"):
        Shape(lengths).check(32, 3)


@given(
    st.lists(st.integers(2, 30), min_size=1, max_size=20),
    st.integers(1, 4),
    st.booleans(),
    st.lists(st.integers(0, 12), min_size=1, max_size=6),
)
def test_any_step_is_that_of_an_unsplit_client(
    lengths: list[int], size: int, group: bool, steps: list[int]
) -> None:
    """In whatever order they are asked for."""
    n, plan = len(lengths), LocalPlan(batch_size=size, steps=13, group_by_length=group)
    order, seeds = Order(n, plan, seed=5, client=3, lengths=lengths), Seeds(seed=5, client=3)
    want = list(step_indices(n, plan, seed=5, round=ROUND, client=3, lengths=lengths))
    stream = dropout_seeds(5, ROUND, 3)
    drawn = [next(stream) for _ in range(13)]
    for step in steps:
        assert np.array_equal(order[step], want[step])
        assert seeds[step] == drawn[step]


@pytest.mark.parametrize("name", MODELS)
def test_padding_changes_nothing_but_rounding(name: str) -> None:
    """Hidden states at the cut, and what comes out of the server, at any width."""
    stages = Stages(MODELS[name]())
    step = step_of(examples(3), [0, 1, 2], LocalPlan())
    head, rest = stages[Span(0, 2, embeds=True)], stages[Span(2, 4, heads=True)]
    found = []
    for more in (0, 1, 7):
        width = step.shape.width + more
        inputs = torch.nn.functional.pad(step.batch.inputs, (0, more), value=more)
        with torch.no_grad():
            packed = pack(head.hidden(inputs), step.shape)
            logits = rest.logits(
                pad(packed, step.shape, width), step.labels.positions(step.shape, width)
            )
        found.append((packed, logits))
    for packed, logits in found[1:]:
        torch.testing.assert_close(packed, found[0][0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(logits, found[0][1], rtol=1e-12, atol=1e-12)


def test_the_examples_in_the_module_are_right():
    assert doctests.run(batches) > 5
