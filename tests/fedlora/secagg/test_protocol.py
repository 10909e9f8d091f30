"""The protocol: masks cancel exactly, whoever is lost; nobody learns a summand."""

import dataclasses
import itertools
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.secagg import masks, protocol
from fedlora.secagg.config import STAGES
from fedlora.secagg.masks import CHUNK, add_mask, derived
from fedlora.secagg.protocol import Member
from fedlora.secagg.shares import combined, split
from tests.fedlora.secagg.instance import Instance, Stopped
from tests.planted import planted

D = 24


def codes(clients: int, size: int = D, dtype: str = "<u4", seed: int = 0) -> np.ndarray:
    """Codes of 8 levels: sums of few never wrap around."""
    return np.random.default_rng(seed).integers(0, 256, (clients, size)).astype(dtype)


def is_the_survivors_sum_or_nothing(lost, clients: int = 6, needed: int = 4, degree: int = 0):
    """Whoever is lost: the exact sum of the others, or none at all."""
    e = codes(clients)
    instance = Instance(e, needed, degree, lost=lost)
    try:
        total, inside = instance.run()
    except Stopped:
        gone = set().union(*(set(ids) for ids in lost.values())) if lost else set()
        assert len(gone) > clients - needed, f"{lost}: stopped though enough were left"
        return
    assert len(inside) >= needed
    assert total.tolist() == e[sorted(inside)].sum(axis=0).tolist(), lost
    assert all(len(kinds) == 1 for kinds in instance.kinds.values()), "both secrets were told"


def test_masks_cancel_when_all_are_there():
    is_the_survivors_sum_or_nothing({})


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("gone", [(0,), (2, 5), (0, 1, 2), (1, 2, 3, 4, 5)])
def test_clients_lost_in_one_stage(stage, gone):
    is_the_survivors_sum_or_nothing({stage: gone})


@pytest.mark.parametrize("stage", STAGES)
def test_every_subset_lost_in_a_stage(stage):
    """K = 6: all 64 subsets."""
    for n in range(7):
        for gone in itertools.combinations(range(6), n):
            is_the_survivors_sum_or_nothing({stage: gone})


@settings(max_examples=12, deadline=None)
@given(st.lists(st.sampled_from(["", *STAGES]), min_size=6, max_size=6))
def test_clients_lost_in_several_stages(where):
    lost = {stage: [i for i, s in enumerate(where) if s == stage] for stage in STAGES}
    is_the_survivors_sum_or_nothing(lost)


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_sums_wrap_around_as_their_type_does(dtype):
    e = codes(5, dtype=dtype)
    e += np.array(-1).astype(dtype)  # near the top, so that every sum wraps
    total, _ = Instance(e, 3).run()
    assert total.dtype == np.dtype(dtype)
    assert total.tolist() == e.sum(axis=0, dtype=dtype).tolist()


def test_a_sparse_graph():
    e = codes(9)
    total, inside = Instance(e, 3, degree=4, lost={"vector": [3]}).run()
    assert len(inside) == 8
    assert total.tolist() == e[sorted(inside)].sum(axis=0).tolist()


def test_a_mask_in_chunks_is_one_key_stream():
    whole, start = np.zeros(CHUNK + 7, "<u4"), np.zeros(CHUNK, "<u4")
    key = derived(b"x" * 16, "test")
    add_mask(whole, key, 1)
    add_mask(start, key, 1)
    assert whole[:CHUNK].tolist() == start.tolist()
    add_mask(whole, key, -1)
    assert not whole.any()


# --- what the server sees -----------------------------------------------------------------------

CRITICAL = 347.65
"""The value that chi-squared with 255 degrees of freedom exceeds with probability 1e-4."""


def chi_squared(data: bytes) -> float:
    """Of bytes over 256 bins."""
    counts = np.bincount(np.frombuffer(data, np.uint8), minlength=256)
    due = len(data) / 256
    return float(((counts - due) ** 2 / due).sum())


@pytest.mark.parametrize("what", ["zero", "constant", "trained"])
def test_vectors_look_random_and_unlike_their_codes(what, monkeypatch):
    """Fixed secrets; bytes pass chi-squared at 1e-4, codes and vectors are uncorrelated."""
    stream = np.random.default_rng(7)
    monkeypatch.setattr(protocol, "new_secret", lambda: stream.bytes(16))
    size = 20_000
    e = {
        "zero": np.full((3, size), 2**21, "<u4"),
        "constant": np.full((3, size), 3, "<u4"),
        "trained": (2**21 + 4000 * np.random.default_rng(1).standard_normal((3, size))),
    }[what].astype("<u4")
    instance = Instance(e, 2)
    instance.run()
    for i, vector in instance.vectors.items():
        assert chi_squared(vector.tobytes()) < CRITICAL
        if what == "trained":
            r = np.corrcoef(e[i].astype(float), vector.astype(float))[0, 1]
            assert abs(r) < 4.5 / np.sqrt(size)


def test_vectors_of_one_update_under_two_secrets_have_nothing_in_common():
    e = codes(3, 5000)
    one, two = Instance(e, 2), Instance(e, 2)
    one.run()
    two.run()
    for i in range(3):
        assert (one.vectors[i] == two.vectors[i]).mean() < 0.01


def test_no_mask_is_used_twice(monkeypatch):
    """A mask that came again in a later round would show the change of the update."""
    seen: list[bytes] = []
    inner = masks.add_mask

    def noted(total, key, sign):
        seen.append(key)
        inner(total, key, sign)

    stream = np.random.default_rng(3)
    secrets = [stream.bytes(16) for _ in range(12)]
    monkeypatch.setattr(protocol, "add_mask", noted)
    for name in ("run|1|0", "run|1|1", "run|2|0"):
        again = iter(secrets)  # a client that draws the same secrets again
        monkeypatch.setattr(protocol, "new_secret", partial(next, again))
        instance = Instance(codes(4), 3, name=name)
        instance.run()
    ways = {key: seen.count(key) for key in seen}
    # an own mask is added and taken out, a pair's is added at both ends
    assert set(ways.values()) == {2}


def test_both_ends_seal_for_each_other_alone():
    everyone = {i: Member.begin(i, "run|1|0", 2) for i in range(3)}
    keys = {i: m.public for i, m in everyone.items()}
    others = lambda i: {j: k for j, k in keys.items() if j != i}
    sealed = {i: m.shared(others(i)) for i, m in everyone.items()}
    holder = sealed[1][0]
    swapped = dataclasses.replace(
        holder, boxes={0: sealed[2][1][0], 2: sealed[2][1][1]}, stage="vector"
    )
    with pytest.raises(ValueError, match="sealed for another message"):
        swapped.revealed([0, 1, 2], [])


# --- a server that asks for more ----------------------------------------------------------------


def at_the_last_stage() -> Member:
    instance = Instance(codes(5), 3, lost={"unmask": [0]})
    instance.run()
    return instance.members[0]


def test_a_client_never_tells_both_secrets():
    with pytest.raises(ValueError, match="both secrets of client 2"):
        at_the_last_stage().revealed([0, 1, 2, 3], [2])


def test_a_client_answers_the_last_stage_once():
    member, _ = at_the_last_stage().revealed([0, 1, 2, 3, 4], [])
    assert not member.secret + member.seed + member.channel + member.own
    with pytest.raises(ValueError, match="a stage is answered once"):
        member.revealed([0, 1, 2], [3, 4])


def test_a_client_refuses_a_sum_of_few():
    with pytest.raises(ValueError, match="of 2 clients, 3 are needed"):
        at_the_last_stage().revealed([0, 1], [2, 3, 4])


def test_a_client_refuses_a_second_vector():
    member = at_the_last_stage()
    with pytest.raises(ValueError, match="a stage is answered once"):
        member.masked(codes(1)[0], {})


def test_a_client_refuses_shares_of_which_two_groups_have_enough():
    """One group would tell its key and the other its seed."""
    member = Member.begin(0, "run", 3)
    with pytest.raises(ValueError, match="more than half"):
        member.shared({i: Member.begin(i, "run", 3).public for i in range(1, 6)})


def test_a_client_refuses_one_key_for_two():
    member = Member.begin(0, "run|1|0", 2)
    other = Member.begin(1, "run|1|0", 2).public
    with pytest.raises(ValueError, match="one key for several"):
        member.shared({1: other, 2: other})


def test_shares_of_another_secret_are_noticed():
    """Of a lost client, whose public key the server knows."""
    wrong = Member.revealed, "[:SHARE] for j in lost", "[SHARE:] for j in lost"
    with planted(*wrong), pytest.raises(ValueError, match="do not make its key"):
        Instance(codes(5), 3, lost={"vector": [1]}).run()


def test_fewer_shares_than_needed_are_refused():
    parts = dict(enumerate(split(b"0123456789abcdef", 3, 5), start=1))
    for chosen in itertools.combinations(parts, 3):
        assert combined({i: parts[i] for i in chosen}, 3) == b"0123456789abcdef"
    with pytest.raises(ValueError, match="2 shares are there, 3 are needed"):
        combined({1: parts[1], 4: parts[4]}, 3)


# --- planted faults -----------------------------------------------------------------------------

FAULTS = {
    "masks of equal sign on both ends": (
        protocol.sign,
        "1 if other > client else -1",
        "1",
        partial(is_the_survivors_sum_or_nothing, {}),
    ),
    "key without round": (
        protocol.own_mask,
        '"own mask", instance',
        '"own mask"',
        None,
    ),
    "lost client's private mask subtracted": (
        protocol.unmasked,
        "for k in survivors:",
        "for k in [*survivors, *lost]:",
        partial(is_the_survivors_sum_or_nothing, {"vector": (1,)}),
    ),
    "masks with the lost left in": (
        protocol.unmasked,
        "for j in lost:",
        "for j in ():",
        partial(is_the_survivors_sum_or_nothing, {"vector": (1,)}),
    ),
    "masks with the lost taken out with the wrong sign": (
        protocol.unmasked,
        "-sign(k, j)",
        "sign(k, j)",
        partial(is_the_survivors_sum_or_nothing, {"vector": (1,)}),
    ),
    "both shares revealed": (
        Member.revealed,
        "j: self._pair(j)[SHARE:] for j in survivors",
        "j: self._pair(j) for j in survivors",
        partial(is_the_survivors_sum_or_nothing, {}),
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_noticed(name, monkeypatch):
    function, right, wrong, law = FAULTS[name]
    law = law or partial(test_no_mask_is_used_twice, monkeypatch)
    with planted(function, right, wrong), pytest.raises((AssertionError, ValueError)):
        law()
