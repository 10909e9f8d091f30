"""Every token of every lane once, in its lane's rows, with its own client's weight and mask."""

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.core.types import Factors, Module
from fedlora.data.batches import PAD, collate
from fedlora.engine.fused import batch as batches
from fedlora.engine.fused.bank import Layouts
from fedlora.engine.fused.batch import padded_batch, ragged_batch
from fedlora.engine.fused.lanes import Lane
from tests import doctests
from tests.fedlora.engine.world import conversation, example

MODULES = (Module("w", "attention", 5, 6),)
LAYOUTS = Layouts(MODULES)
KINDS = {"ragged": ragged_batch, "padded": padded_batch}
BUILD = st.sampled_from(list(KINDS.values()))


def layout(rank=2):
    return LAYOUTS({"w": Factors(torch.ones(rank, 6), torch.ones(5, rank), 1.0)})


@st.composite
def lane_lists(draw):
    """Lanes in ascending slots, some neighbours, some alike; every token number is used once."""
    slot, token, lanes = -1, 10, []
    for _ in range(draw(st.integers(1, 6))):
        slot += draw(st.integers(1, 2))
        held = []
        for _ in range(draw(st.integers(1, 3))):
            length = draw(st.integers(2, 9))
            prompt = draw(st.integers(0, length - 1))
            plain = example(list(range(token, token + length)), prompt)
            held.append(conversation(plain, token) if draw(st.booleans()) else plain)
            token += length
        lanes.append(
            Lane(
                slot,
                layout(draw(st.sampled_from([1, 2]))),
                held,
                draw(st.sampled_from(["full", "response"])),
                draw(st.integers(1, 50)),
                train_a=draw(st.sampled_from([True, True, False])),
                dropped=draw(st.sampled_from([0, 2**14, 2**16])),
                seed=slot,
            )
        )
    return lanes


@given(lanes=lane_lists(), build=BUILD, lanes_spread=st.sampled_from([1, 3, 10**9]))
def test_a_batch_holds_every_lane_and_nothing_else(lanes, build, lanes_spread):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "SPREAD_LANES", lanes_spread)
        made = build(lanes, 6)
    inputs = made.batch.inputs.flatten()
    wanted = [t for lane in lanes for e in lane.examples for t in e.input_ids[:-1].tolist()]
    assert inputs[inputs != PAD].tolist() == wanted
    assert made.tokens == len(wanted) and made.rows == inputs.numel()
    assert made.lanes == tuple(lanes)
    assert [x for g in made.all.groups for x in g.lanes] == lanes
    if build is ragged_batch:
        assert made.rows == made.tokens  # not one pad

    # supervised: each client's own targets, in order, weighed with its own step
    at = 0
    for k, lane in enumerate(lanes):
        alone = collate(lane.examples, lane.loss)
        mine = made.owners == k
        assert made.batch.targets[mine].tolist() == alone.targets.tolist()
        sources = inputs[made.batch.positions[mine]]
        assert torch.equal(sources, alone.inputs.flatten()[alone.positions])
        assert set(made.weights[mine].tolist()) == {1 / lane.tokens}
        at += int(mine.sum())
    assert at == len(made.batch.targets) == len(made.weights)


@given(lanes=lane_lists(), build=BUILD)
def test_groups_can_be_batched(lanes, build):
    for spread in (1, 10**9):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(batches, "SPREAD_LANES", spread)
            made = build(lanes, 6)
        for group in made.all.groups:
            first = group.lanes[0]
            assert group.rows % len(group.lanes) == 0
            for i, lane in enumerate(group.lanes):
                assert lane.slot == first.slot + i and lane.layout is first.layout
                assert (lane.train_a, lane.train_b) == (first.train_a, first.train_b)
                assert lane.dropped == first.dropped
        rows = made.rows if made.all.spread is None else len(made.all.spread.out)
        assert sum(g.rows for g in made.all.groups) == rows


@given(lanes=lane_lists(), build=BUILD)
def test_spread_rows_are_a_copy_in_which_nobody_borrows_from_another(lanes, build):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "SPREAD_LANES", 1)
        made = build(lanes, 6)
    spread, rows = made.all.spread, made.rows
    assert spread is not None
    assert torch.equal(spread.out[spread.back], torch.arange(rows))  # there and back
    pads = set() if spread.pads is None else set(spread.pads.tolist())
    assert pads == set(range(len(spread.out))) - set(spread.back.tolist())
    owner = np.repeat(
        np.arange(len(lanes)),
        [
            sum(len(e.input_ids) - 1 for e in lane.examples)
            if build is ragged_batch
            else len(lane.examples) * made.batch.inputs.shape[1]
            for lane in lanes
        ],
    )
    at = 0
    for group in made.all.groups:
        size = group.rows // len(group.lanes)
        for lane in group.lanes:
            mine = owner[spread.out[at : at + size].numpy()]
            assert (mine == lanes.index(lane)).all()
            at += size


@given(lanes=lane_lists(), build=BUILD, spread=st.booleans())
def test_masks_are_drawn_for_the_clients_own_tokens(lanes, build, spread):
    """Token ``source[i]`` of the lanes' tokens, one after another, is what row ``i`` holds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "SPREAD_LANES", 1 if spread else 10**9)
        made = build(lanes, 6)
    own = [torch.cat([torch.as_tensor(e.input_ids[:-1]) for e in x.examples]) for x in lanes]
    assert made.drawn == tuple(ids.numel() for ids in own)
    inputs = made.batch.inputs.flatten()
    rows = inputs if made.all.spread is None else inputs[made.all.spread.out]
    if any(0 < lane.dropped < 2**16 for lane in lanes):
        drawn = torch.cat([ids.flatten() for ids in own])
        seen = drawn if made.all.source is None else drawn[made.all.source]
        real = rows != PAD
        assert torch.equal(seen[real], rows[real])
        found = torch.zeros_like(rows)
        places = made.all.places(made.drawn)
        for ids, (where, source) in zip(own, places, strict=True):
            found[where] = ids.flatten() if source is None else ids.flatten()[source]
        assert torch.equal(found[real], rows[real])
        shares = made.all.thresholds.flatten().int() + 2**15
        sizes = [(g.lanes[0].dropped % 2**16, g.rows) for g in made.all.groups]
        assert shares.tolist() == [share for share, n in sizes for _ in range(n)]
    else:
        assert made.all.thresholds is None


ALONE = Lane(0, layout(), [example([11, 12, 13, 14])], "full", 3)


@given(lanes=lane_lists(), build=BUILD)
@hypothesis.example(lanes=[ALONE], build=padded_batch)
def test_places_are_those_within_each_sequence(lanes, build):
    made = build(lanes, 6)
    lengths = [len(e.input_ids) - 1 for lane in lanes for e in lane.examples]
    if build is ragged_batch:
        assert made.batch.position_ids.tolist() == [[i for n in lengths for i in range(n)]]
        assert made.geometry is not None
    else:  # models that count positions themselves do not take them
        assert made.batch.position_ids is None and made.geometry is None
        assert made.batch.inputs.shape == (len(lengths), max(lengths))


def test_few_lanes_and_wide_ones_are_not_copied():
    short = [Lane(k, layout(), [example([1, 2, 3])], "full", 2) for k in range(8)]
    assert ragged_batch(short, 6).all.spread is not None
    assert ragged_batch(short[: batches.SPREAD_LANES - 1], 6).all.spread is None
    assert ragged_batch(short, batches.SPREAD_SCALARS // 2 + 1).all.spread is None


def test_the_examples_in_the_module_are_right():
    assert doctests.run(batches) > 5
