"""Faults of code of Fed-SB and RAVAN, or one step from it, and the laws that catch them."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fedlora.algebra.init import orthonormal_rows
from fedlora.algebra.state import State
from fedlora.core.types import Adapter, Client, LocalPlan, Ranks, TrainJob, Update
from fedlora.techniques.cores.payload import Core, CorePayload
from fedlora.wire.codec import payload_bytes
from strategies.fedsb import FedSB
from tests.planted import planted
from tests.strategies.laws import LAWS, SINGLE, why_not
from tests.strategies.test_fedsb import (
    test_directions_of_an_update_are_sent_to_each_client_once as directions_are_sent_once,
)
from tests.strategies.test_fedsb import (
    test_it_goes_on_from_the_leading_directions_of_an_update as leading_directions,
)
from tests.strategies.test_planted_faults import (
    first_counted_twice,
    never_loaded,
    ranks_not_applied,
    start_ignores_ranks,
    unweighted_mean,
    weight_twice,
    with_hook,
)

FEDSB = FedSB()
HEADS = FedSB(heads=3, gains=True)

Right = Callable[..., Any]


def _each(payload: CorePayload, do: Callable[[Core, Tensor], Tensor]) -> CorePayload:
    """Every block of a payload replaced."""
    cores = {
        path: dataclasses.replace(core, blocks=tuple(do(core, b) for b in core.blocks))
        for path, core in payload.cores.items()
    }
    return dataclasses.replace(payload, cores=cores)


def _sent(updates: Sequence[Update], do: Callable[[Core, Tensor], Tensor]) -> list[Update]:
    return [dataclasses.replace(u, payload=_each(u.payload, do)) for u in updates]


def transposed_on_arrival(
    self: FedSB, right: Right, state: State, updates: Sequence[Update]
) -> State:
    """Square, so that no shape tells."""
    return right(state, _sent(updates, lambda core, b: b.T.contiguous()))


def scales_left_out(self: FedSB, right: Right, state: State, updates: Sequence[Update]) -> State:
    """Cores of unequal ranks are summed as if their scales were one."""
    return right(state, _sent(updates, lambda core, b: core.rank * b))


def entries_fade(self: FedSB, right: Right, state: State, updates: Sequence[Update]) -> State:
    """Padded results are averaged, not changes: what few clients hold fades."""
    after = dict(right(state, updates))
    total = sum(u.num_examples for u in updates)
    for name, block in after.items():
        if name.endswith("/core0"):
            path = name.removeprefix("global/").removesuffix("/core0")
            owned = torch.zeros_like(block)
            for u in updates:
                n = len(u.payload.cores[path].blocks[0])
                owned[:n, :n] += u.num_examples / total
            after[name] = owned * block
    return after


def all_rounds_are_averaged(
    self: FedSB, right: Right, state: State, updates: Sequence[Update]
) -> State:
    """putssander/fed-sb: the list of results is never cleared (FSB-4)."""
    after = dict(right(state, updates))
    for name, block in after.items():
        if "/core" in name:
            after[name] = (block + state[name]) / 2
    return after


def diagonal_alone(self: FedSB, right: Right, state: State, updates: Sequence[Update]) -> State:
    return right(state, _sent(updates, lambda core, b: torch.diag(torch.diagonal(b))))


def scale_of_blocks_forgotten(
    self: FedSB, right: Right, state: State, client: Client, *kept: Any
) -> CorePayload:
    start = right(state, client, *kept)
    widest = {p: state[f"global/{p}/core0"].shape[0] for p in start.cores}
    if self.heads > 1:
        return start
    cores = {
        p: dataclasses.replace(c, blocks=tuple(widest[p] / c.rank * b for b in c.blocks))
        for p, c in start.cores.items()
    }
    return dataclasses.replace(start, cores=cores)


def fixed_factors_of_its_own(
    self: FedSB, right: Right, state: State, client: Client, *kept: Any
) -> CorePayload:
    """Each client draws them anew."""
    start = right(state, client, *kept)
    return dataclasses.replace(start, seed=start.seed + client.id)


def fixed_factors_of_each_rank(
    self: FedSB, right: Right, state: State, client: Client, *kept: Any
) -> CorePayload:
    """A draw per rank is not a prefix of a larger one."""
    start = right(state, client, *kept)
    return dataclasses.replace(start, seed=start.seed + sum(client.ranks.values()))


def start_depends_on_the_client(
    self: FedSB, right: Right, state: State, client: Client, *kept: Any
) -> CorePayload:
    return _each(right(state, client, *kept), lambda core, b: b + client.id % 2)


def trailing_block(
    self: FedSB, right: Right, state: State, client: Client, *kept: Any
) -> CorePayload:
    """The last rank indices in place of the first."""
    start = right(state, client, *kept)
    return _each(start, lambda core, b: b.flip(0, 1))


def sum_without_padding(
    self: FedSB, right: Right, state: State, start: CorePayload, update: Update
) -> Any:
    """Padded at the wrong end."""
    return {name: x.flip(0, 1) for name, x in right(state, start, update).items()}


def model_of_the_widest(
    self: FedSB, right: Right, state: State, ranks: Ranks | None = None
) -> Adapter:
    """Ranks are not looked at."""
    return right(state, None)


def fixed_factors_are_counted(
    self: FedSB, right: Right, state: State, job: TrainJob, wire: str
) -> int:
    more = sum(f.a.numel() for f in job.start.low_rank().values())
    return right(state, job, wire) + 4 * more


def first_core_is_counted(self: FedSB, right: Right, state: State, job: TrainJob, wire: str) -> int:
    return payload_bytes(job.start, wire)


def nothing_goes_up(
    self: FedSB, right: Right, state: State, update: Update, plan: LocalPlan, wire: str
) -> int:
    return 0


FAULTS = [
    *[
        (s, "aggregate", fault)
        for s in (FEDSB, HEADS)
        for fault in (
            first_counted_twice,
            unweighted_mean,
            never_loaded,
            transposed_on_arrival,
            scales_left_out,
            entries_fade,
            all_rounds_are_averaged,
            diagonal_alone,
        )
    ],
    *[
        (s, "client_start", fault)
        for s in (FEDSB, HEADS)
        for fault in (
            fixed_factors_of_its_own,
            fixed_factors_of_each_rank,
            start_depends_on_the_client,
            start_ignores_ranks,
            trailing_block,
        )
    ],
    (FEDSB, "client_start", scale_of_blocks_forgotten),
    *[
        (s, hook, fault)
        for s in (FEDSB, HEADS)
        for hook, fault in (
            ("enlist", ranks_not_applied),
            ("absorb", weight_twice),
            ("adds", sum_without_padding),
            ("global_update", model_of_the_widest),
            ("bytes_down", fixed_factors_are_counted),
            ("bytes_down", first_core_is_counted),
            ("bytes_up", nothing_goes_up),
        )
    ],
]


@pytest.mark.parametrize(
    ("strategy", "hook", "fault"), FAULTS, ids=[f"{f.__name__}-{s.heads}" for s, _, f in FAULTS]
)
def test_a_planted_fault_is_caught(strategy: FedSB, hook: str, fault: Right) -> None:
    broken = with_hook(strategy, hook, fault)
    for law in (law for law in LAWS if not why_not(law, broken)):
        try:
            law(broken, 1, SINGLE)
        except AssertionError:
            return
    raise AssertionError(f"no law noticed {fault.__name__}")


@pytest.mark.parametrize("strategy", [FEDSB, HEADS, FedSB(weighting="covered")])
def test_a_wrapped_strategy_without_fault_obeys_every_law(strategy: FedSB) -> None:
    """What is caught above is the fault, not the wrapping."""
    same = with_hook(strategy, "aggregate", lambda self, right, *arguments: right(*arguments))
    for law in (law for law in LAWS if not why_not(law, same)):
        law(same, 1, SINGLE)


def test_rows_that_are_not_orthonormal_bend_the_norm_of_a_change(monkeypatch) -> None:
    """Released re-implementations draw fixed factors from N(0, 1), unscaled."""

    def unscaled(*of: Any) -> Tensor:
        return 5 * orthonormal_rows(*of)

    monkeypatch.setattr("fedlora.techniques.cores.payload.orthonormal_rows", unscaled)
    core = Core(6, 5, (torch.eye(2),))
    one, two = (
        CorePayload({"w": dataclasses.replace(core, blocks=(x * core.blocks[0],))}, 4.0, 1)
        for x in (1.0, 2.0)
    )
    whole = float((two.low_rank()["w"].delta() - one.low_rank()["w"].delta()).norm())
    assert abs(two.change_norm(one) - whole) > 0.1 * whole


STARTS = {
    "fixed factors go to those who have them": (FedSB.bytes_down, "== NOTHING", "!= NOTHING"),
    "who took part is forgotten": (FedSB._moved, "next_seen(state, updates)", "{}"),
    "V is cut where U is": (FedSB.adopt, "right[: core.rank]", "right[-core.rank :]"),
    "the scale of the first R is forgotten": (FedSB.adopt, "* (core.rank / alpha)", "* 1.0"),
}


@pytest.mark.parametrize("fault", STARTS)
def test_a_planted_fault_of_the_other_start_is_caught(fault: str) -> None:
    def laws() -> None:
        directions_are_sent_once("float32")
        leading_directions(1)

    laws()
    with planted(*STARTS[fault]), pytest.raises(AssertionError):
        laws()
