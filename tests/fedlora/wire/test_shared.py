"""What several starts of a message hold travels once: a moved base under factors of their own."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedlora.core.payload import Payload
from fedlora.core.types import Factors, LocalPlan, TrainJob
from fedlora.server.training_round import training_jobs
from fedlora.techniques.lora.payload import LowRankPayload
from fedlora.techniques.rebased.payload import Rebased
from fedlora.wire import codec
from fedlora.wire.codec import decode_payload, decode_shared, encode_together
from fedlora.wire.messages import decode_jobs, encode_jobs
from strategies.rebase import Rebase
from tests.generators import MODULES, setting
from tests.planted import planted

PLAN = LocalPlan(lr=0.1)
DENSE = 4 * sum(m.d_out * m.d_in for m in MODULES)
"""Bytes of a base that has moved."""


def jobs_of(method: Rebase) -> list[TrainJob]:
    population = setting()
    state = method.init_state(population)
    shift = {k: torch.randn(t.shape) for k, t in state.items() if k.endswith("/d")}
    return training_jobs(method, state | shift, population.clients, PLAN, seed=1, round=1)


def through(jobs: Sequence[TrainJob]) -> tuple[list[TrainJob], int]:
    """The jobs as a worker has them, and the bytes of their message."""
    content = encode_jobs(jobs, worker="", source="", wire="float32")
    sent = sum(a.numpy().nbytes for a in content.array_records["starts"].values())
    return [j for j in decode_jobs(content).jobs if isinstance(j, TrainJob)], sent


def factor_bytes(jobs: Sequence[TrainJob]) -> int:
    starts = {id(j.start): j.start for j in jobs}.values()
    return 4 * sum(t.numel() for s in starts for n, t in s.tensors() if not n.endswith("/shift"))


def same(one: Payload, other: Payload) -> bool:
    left, right = dict(one.tensors()), dict(other.tensors())
    return list(left) == list(right) and all(torch.equal(t, right[n]) for n, t in left.items())


def memory(payload: Payload) -> list[int]:
    base = payload.base()
    assert base is not None
    return [t.data_ptr() for t in base.shift.values()]


@pytest.mark.parametrize("method", [Rebase(own_a=True), Rebase()], ids=["own_a", "by rank"])
def test_clients_with_factors_of_their_own_share_one_base(method: Rebase):
    jobs = jobs_of(method)
    back, sent = through(jobs)
    assert sent == DENSE + factor_bytes(jobs)
    assert all(same(one.start, other.start) for one, other in zip(jobs, back, strict=True))
    assert len({tuple(memory(j.start)) for j in back}) == 1
    assert len({p for j in back for p in memory(j.start)}) == len(MODULES)


def test_what_one_client_trains_is_no_other_clients():
    back, _ = through(jobs_of(Rebase(own_a=True)))
    trained = [t.data_ptr() for j in back for n, t in j.start.tensors() if not n.endswith("/shift")]
    assert len(trained) == len(set(trained)) > 0


def test_every_base_of_its_own_travels_whole():
    """FedEx-LoRA at unequal ranks: a base for each of four ranks."""
    method = Rebase(hold="mean")
    jobs = jobs_of(method)
    patterns = len({j.client.ranks for j in jobs})
    assert through(jobs)[1] == patterns * DENSE + factor_bytes(jobs)


def drawn(pool: Sequence[Tensor], picks: Sequence[tuple[int, int]]) -> list[LowRankPayload]:
    """Payloads whose factors are tensors of one pool, whole or their first rank index."""
    return [
        LowRankPayload({"w": Factors(pool[i][:rank], pool[i].T[:, :rank], 1.0)})
        for i, rank in picks
    ]


pairs = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 3)), min_size=1, max_size=6)


def comes_back(picks: Sequence[tuple[int, int]]) -> None:
    pool = [torch.arange(12.0).reshape(3, 4) + 100 * i for i in range(3)]
    payloads = drawn(pool, picks)
    encoded, common = encode_together(payloads)
    shared = decode_shared(*common)
    for payload, (array, header) in zip(payloads, encoded, strict=True):
        assert same(decode_payload(array, header, shared=shared), payload)
    held = {codec._memory(t): t for p in payloads for _, t in p.tensors()}
    assert sum(a.size for a, _ in encoded) + common[0].size == sum(t.numel() for t in held.values())


@given(pairs)
def test_whatever_is_shared_comes_back_and_nothing_travels_twice(picks: list[tuple[int, int]]):
    comes_back(picks)


@dataclass(frozen=True)
class Fault:
    function: Callable[..., Any]
    right: str
    wrong: str


FAULTS = {
    "shape": Fault(codec._memory, "tuple(t.shape), t.stride()", "t.stride()"),
    "place": Fault(codec._memory, "t.untyped_storage().data_ptr()", "0"),
    "number": Fault(codec._own_and_shared, "shared[numbers[n]]", "shared[0]"),
    "order": Fault(codec.encode_together, "holders[key] > 1", "holders[key] > 9"),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_fault_is_seen(fault: Fault):
    picks = [(0, 1), (0, 2), (0, 2), (1, 3), (1, 3), (2, 1), (2, 1)]
    comes_back(picks)
    seen = pytest.raises((AssertionError, ValueError))
    with planted(fault.function, fault.right, fault.wrong), seen:
        comes_back(picks)


@pytest.mark.parametrize("number", [-1, 1, True, "0", None])
def test_a_number_that_is_not_there_is_refused(number: object):
    base = Rebased({"w": torch.ones(3, 2)})
    (first, _), common = encode_together([base, Rebased(base.shift)])
    header = json.loads(first[1]) | {"shared": {"w/shift": number}}
    with pytest.raises(ValueError, match="w/shift is shared tensor"):
        decode_payload(first[0], json.dumps(header), shared=decode_shared(*common))


def test_a_reply_has_nothing_to_share():
    base = Rebased({"w": torch.ones(3, 2)})
    (first, _), _ = encode_together([base, Rebased(base.shift)])
    with pytest.raises(ValueError, match="of 0"):
        decode_payload(*first, trusted=False)
