"""Do the laws bite? Each fault was found in released code or lies one step from it.

Which law catches what: ``pytest tests/strategies/test_planted_faults.py --log-cli-level=INFO``.
"""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch

from fedlora.algebra.linalg import normalize
from fedlora.algebra.state import State
from fedlora.algebra.summand import Summands
from fedlora.core.payload import Payload
from fedlora.core.types import Adapter, Client, Factors, LocalPlan, Ranks, TrainJob, Update
from fedlora.techniques.rebased.payload import Rebased
from fedlora.techniques.sparse.payload import SparseDelta
from fedlora.techniques.spp.scale import place_in_blocks
from fedlora.techniques.switchlora.technique import SwitchTraining as Switching
from strategies.alternate import Alternate
from strategies.base import LoRAStrategy
from strategies.fedavg import FedAvg
from strategies.fedit import FedIT
from strategies.fedsa import FedSA
from strategies.flexlora import FlexLoRA
from strategies.heterolora import HeteroLoRA
from strategies.rebase import Rebase
from strategies.slora import SLoRA
from strategies.spp import SPP
from strategies.switchlora import ALTERNATE, DENSE, PRODUCT, SwitchLoRA
from tests.strategies.laws import LAWS, SINGLE, population_for, why_not

log = logging.getLogger(__name__)

Hook = Callable[..., Any]


def with_hook(strategy: LoRAStrategy, name: str, hook: Hook) -> LoRAStrategy:
    """The strategy with one hook replaced by ``hook(strategy, the right hook, *arguments)``."""
    cls = type(strategy)
    right = getattr(cls, name)

    def wrong(self: LoRAStrategy, *arguments: Any) -> Any:
        return hook(self, partial(right, self), *arguments)

    broken = type(cls.__name__, (cls,), {name: wrong, "__module__": cls.__module__})
    values = {f.name: getattr(strategy, f.name) for f in dataclasses.fields(cls)}
    return broken(**values)


def first_counted_twice(
    self: LoRAStrategy, right: Hook, state: State, updates: Sequence[Update]
) -> State:
    return right(state, [updates[0], *updates])


def unweighted_mean(
    self: LoRAStrategy, right: Hook, state: State, updates: Sequence[Update]
) -> State:
    return right(state, [dataclasses.replace(u, num_examples=1) for u in updates])


def never_loaded(self: LoRAStrategy, right: Hook, state: State, updates: Sequence[Update]) -> State:
    right(state, updates)
    return state


def _rescaled(payload: Payload, by: Callable[[Factors], float]) -> Payload:
    if isinstance(payload, SparseDelta):
        return payload
    return {p: Factors(f.a, by(f) * f.b, f.alpha) for p, f in payload.items()}


def scale_dropped_on_redistribution(
    self: LoRAStrategy, right: Hook, state: State, client: Client, *kept: Any
) -> Payload:
    return _rescaled(right(state, client, *kept), lambda f: f.scale)


def scale_dropped_on_arrival(
    self: LoRAStrategy, right: Hook, state: State, updates: Sequence[Update]
) -> State:
    return right(
        state,
        [
            dataclasses.replace(u, payload=_rescaled(u.payload, lambda f: 1 / f.scale))
            for u in updates
        ],
    )


def alpha_is_always_16(
    self: LoRAStrategy, right: Hook, state: State, client: Client, *kept: Any
) -> Payload:
    return _rescaled(right(state, client, *kept), lambda f: f.alpha / 16.0)


def ranks_not_applied(self: LoRAStrategy, right: Hook, state: State, client: Client) -> Client:
    return dataclasses.replace(client, ranks=Ranks(dict.fromkeys(client.ranks, 1)))


def start_ignores_ranks(
    self: LoRAStrategy, right: Hook, state: State, client: Client, *kept: Any
) -> Payload:
    return right(
        state, dataclasses.replace(client, ranks=Ranks(dict.fromkeys(client.ranks, 1))), *kept
    )


def start_depends_on_the_client(
    self: LoRAStrategy, right: Hook, state: State, client: Client, *kept: Any
) -> Payload:
    """Clients of equal variants share one start: another client's would be theirs."""
    return _rescaled(right(state, client, *kept), lambda f: f.alpha * (1 + client.id % 2))


def base_not_moved(
    self: LoRAStrategy, right: Hook, state: State, client: Client, *kept: Any
) -> Payload:
    start = right(state, client, *kept)
    shift = {p: torch.zeros_like(t) for p, t in start.shift.items()}
    return dataclasses.replace(start, shift=shift)


def restarts_from_nothing(
    self: LoRAStrategy, right: Hook, state: State, client: Client, *kept: Any
) -> Payload:
    """New factors that are zero, both of them, learn nothing."""
    start = right(state, client, *kept)
    zero = {p: Factors(0 * f.a, f.b, f.alpha) for p, f in start.factors.items()}
    return dataclasses.replace(start, factors=zero)


def base_of_another_rank(
    self: LoRAStrategy, right: Hook, state: State, client: Client, *kept: Any
) -> Payload:
    """One base for all ranks, under factors that differ."""
    other = right(state, _of_other_ranks(self, state, client), *kept)
    return dataclasses.replace(right(state, client, *kept), shift=other.shift)


def residual_forgotten(
    self: LoRAStrategy, right: Hook, state: State, updates: Sequence[Update]
) -> State:
    """Both factors averaged, each by itself, and nothing else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedlora.techniques.switchlora.replica.residual", lambda result: None)
        return right(state, updates)


def last_client_leaks(
    self: LoRAStrategy, right: Hook, state: State, updates: Sequence[Update]
) -> State:
    """One model serves all clients: who comes next starts from the B of who came last."""
    after = dict(right(state, updates))
    for path, f in updates[-1].adapter.items():
        b = after[f"global/{path}/b"].clone()
        b[:, : f.rank] = f.b
        after[f"global/{path}/b"] = b
    return after


def own_b_is_not_loaded(
    self: LoRAStrategy, right: Hook, state: State, client: Client, *kept: Any
) -> Adapter:
    return right(state, client)


def common_b_is_kept(
    self: LoRAStrategy, right: Hook, state: State, client: Client, *round: Any
) -> dict[str, torch.Tensor]:
    """A client stores what it was sent, not what it has trained."""
    start = round[1]
    return {f"{path}/b": f.b for path, f in start.items()}


def rows_fade(self: LoRAStrategy, right: Hook, state: State, updates: Sequence[Update]) -> State:
    """Zero-padded results in place of changes: a row keeps the share of its owners."""
    after, weights = dict(right(state, updates)), self.reference_weights(updates)
    for path in updates[0].adapter:
        total = torch.zeros_like(after[f"global/{path}/a"])
        for u, w in zip(updates, weights, strict=True):
            a = u.adapter[path].a
            total[: len(a)] += w / sum(weights) * a
        after[f"global/{path}/a"] = total
    return after


def a_of_its_own(
    self: LoRAStrategy, right: Hook, state: State, client: Client, *kept: Any
) -> Adapter:
    """Every client draws its A."""
    found = {}
    for path, f in right(state, client, *kept).items():
        g = torch.Generator().manual_seed(client.id)
        found[path] = dataclasses.replace(f, a=torch.rand(f.a.shape, generator=g).to(f.a.dtype))
    return found


def both_are_trained(
    self: LoRAStrategy, right: Hook, state: State, client: Client, base: LocalPlan
) -> LocalPlan:
    """Names are frozen before the adapters exist: every client trains its A, and only B is
    averaged."""
    return base


def begins_with_a(
    self: LoRAStrategy, right: Hook, state: State, client: Client, base: LocalPlan
) -> LocalPlan:
    plan = right(state, client, base)
    return dataclasses.replace(plan, train_a=plan.train_b, train_b=plan.train_a)


def frozen_is_averaged(
    self: LoRAStrategy, right: Hook, state: State, updates: Sequence[Update]
) -> State:
    """What arrives in the place of a factor that was not sent is taken for it."""
    after = dict(right(state, updates))
    for path, f in updates[-1].adapter.items():
        a = after[f"global/{path}/a"].clone()
        a[: f.rank] = f.a
        after[f"global/{path}/a"] = a
    return after


def indices_fade(self: LoRAStrategy, right: Hook, state: State, updates: Sequence[Update]) -> State:
    """Zero-padded results in place of changes: an index keeps the share of its owners."""
    after, p = dict(right(state, updates)), normalize(self.reference_weights(updates))
    for path in updates[0].adapter:
        b = after[f"global/{path}/b"].clone()
        for i in range(b.shape[1]):
            owners = [w for u, w in zip(updates, p, strict=True) if u.adapter[path].rank > i]
            b[:, i] -= (1 - sum(owners)) * state[f"global/{path}/b"][:, i]
        after[f"global/{path}/b"] = b
    return after


def scale_of_prefixes_forgotten(
    self: LoRAStrategy, right: Hook, state: State, client: Client, *kept: Any
) -> Adapter:
    """``B[:, :r]`` at the scale ``alpha / r``: too large by ``R / r``."""
    return {
        p: dataclasses.replace(f, b=f.b * (state[f"global/{p}/b"].shape[1] / f.rank))
        for p, f in right(state, client, *kept).items()
    }


def nobody_is_remembered(
    self: LoRAStrategy, right: Hook, state: State, updates: Sequence[Update]
) -> State:
    """Who took part is sent as much as who did not."""
    return dict(right(state, updates)) | {"seen": state["seen"]}


def everybody_is_up_to_date(
    self: LoRAStrategy, right: Hook, state: State, updates: Sequence[Update]
) -> State:
    """Who did not take part is sent no more than who did."""
    after = dict(right(state, updates))
    return after | {"seen": torch.full_like(after["seen"], int(state["round"]))}


def last_round_alone(
    self: LoRAStrategy, right: Hook, state: State, job: TrainJob, wire: str
) -> int:
    """The factor that was averaged last, for everybody."""
    done = int(state["round"])
    side = self.schedule[(done - 1) % len(self.schedule)]
    scalars = sum(getattr(f, side).numel() for f in job.start.values()) if done else 0
    return 4 * scalars


def a_root_is_forgotten(
    self: LoRAStrategy, right: Hook, state: State, updates: Sequence[Update]
) -> State:
    """``B = U √S`` over ``A = Vᵀ``."""
    after = right(state, updates)
    return {k: t.sqrt() if k.endswith("/s") else t for k, t in after.items()}


def right_vectors_are_transposed(
    self: LoRAStrategy, right: Hook, state: State, updates: Sequence[Update]
) -> State:
    """``V`` where ``Vᵀ`` is meant, which fits as far as the layer is square."""
    after = dict(right(state, updates))
    for key in (k for k in after if k.endswith("/v")):
        v, n = after[key].clone(), min(after[key].shape)
        v[:n, :n] = v[:n, :n].T.clone()
        after[key] = v
    return after


def nothing_is_counted(
    self: LoRAStrategy, right: Hook, state: State, job: TrainJob, wire: str
) -> int:
    return 0


def zero_padded(
    self: LoRAStrategy, right: Hook, state: State, client: Client, *kept: Any
) -> Adapter:
    return {
        p: Factors(f.a * (f.b != 0).any(dim=0)[:, None], f.b, f.alpha)
        for p, f in right(state, client, *kept).items()
    }


def merge_forgotten(
    self: LoRAStrategy, right: Hook, state: State, updates: Sequence[Update]
) -> State:
    """Factors begin anew, and what they were is in no base."""
    return {k: t for k, t in right(state, updates).items() if not k.startswith("merged/")}


def shares_left_out(
    self: LoRAStrategy, right: Hook, state: State, updates: Sequence[Update]
) -> State:
    """Clients' factors are summed, not averaged."""
    after = right(state, updates)
    new = [k for k in after if k.startswith("merged/") and k.endswith("/beta") and k not in state]
    return dict(after) | {k: len(updates) * after[k] for k in new}


def mask_not_shared(
    self: LoRAStrategy, right: Hook, state: State, client: Client, *kept: Any
) -> Payload:
    """Every client prunes for itself."""
    start = right(state, client, *kept)
    return dataclasses.replace(start, mask=f"{start.mask[:-2]}{client.id:02d}")


def merge_fills_zeros(
    self: LoRAStrategy, right: Hook, state: State, *ranks: Ranks | None
) -> Payload:
    """What is exported is added to the weights, as LoRA is, instead of scaling them."""
    scale = right(state, *ranks)
    if not ranks:  # what clients start from
        return scale
    return {
        p: Factors(a, place_in_blocks(scale.beta[p], len(a)), scale.lora_alpha)
        for p, a in scale.alpha.items()
    }


def merge_overflows(
    self: LoRAStrategy, right: Hook, state: State, updates: Sequence[Update]
) -> State:
    """``0 * inf`` is no zero."""
    after = dict(right(state, updates))
    for key in (k for k in after if k.endswith("/beta")):
        after[key] = after[key] * torch.finfo(after[key].dtype).max * 8
    return after


def scale_dropped_from_summands(
    self: LoRAStrategy, right: Hook, state: State, start: Payload, update: Update
) -> Summands:
    """``B A`` is added where ``s B A`` is meant."""
    plain = dataclasses.replace(update, payload=_rescaled(update.payload, lambda f: 1 / f.scale))
    if isinstance(start, Rebased):  # from B = 0
        return right(state, start, plain)
    return right(state, _rescaled(start, lambda f: 1 / f.scale), plain)


def scales_left_out_of_changes(
    self: LoRAStrategy, right: Hook, state: State, start: Payload, update: Update
) -> Summands:
    """Factors of unequal ranks are summed as if their scales were one."""
    found = right(state, start, update)
    return {k: x / update.adapter[k[:-2]].scale ** 0.5 for k, x in found.items()}


def padded_at_the_wrong_end(
    self: LoRAStrategy, right: Hook, state: State, start: Payload, update: Update
) -> Summands:
    found = dict(right(state, start, update))
    for name, x in found.items():
        dim = x.dim() - 1 if name.endswith("/b") else 0
        used = x.norm(dim=1 - dim) > 0 if x.dim() == 2 else x != 0
        found[name] = x.roll(len(used) - int(used.nonzero().max()) - 1 if used.any() else 0, dim)
    return found


def start_of_another_rank(
    self: LoRAStrategy, right: Hook, state: State, start: Payload, update: Update
) -> Summands:
    """What a client of other ranks starts from, cut to its own."""
    other = self.client_start(state, _of_other_ranks(self, state, update.client))
    if isinstance(other, SparseDelta):
        values = {p: torch.zeros_like(v) for p, v in start.values.items()}
        for p, v in other.values.items():
            n = min(len(v), len(values[p]))
            values[p][:n] = v[:n]
        return right(state, dataclasses.replace(start, values=values), update)
    if isinstance(other, Rebased):
        ranks = {p: f.rank for p, f in start.factors.items()}
        cut = {p: _cut(f, ranks[p]) for p, f in other.factors.items()}
        return right(state, Rebased(start.shift, cut), update)
    return right(state, {p: _cut(f, start[p].rank) for p, f in other.items()}, update)


def _of_other_ranks(strategy: LoRAStrategy, state: State, client: Client) -> Client:
    tier = "T3" if client.tier == "T4" else "T4"
    other = next(c for c in population_for(strategy).clients if c.tier == tier)
    return strategy.enlist(state, other)


def _cut(f: Factors, rank: int) -> Factors:
    """The first directions of factors; missing ones are zero."""
    a, b = f.a.new_zeros(rank, f.a.shape[1]), f.b.new_zeros(f.b.shape[0], rank)
    n = min(rank, f.rank)
    a[:n], b[:, :n] = f.a[:n], f.b[:, :n]
    return Factors(a, b, f.alpha)


def weight_twice(
    self: LoRAStrategy, right: Hook, state: State, total: Summands, weight: float
) -> State:
    """An average of an average."""
    return right(state, total, 2 * weight)


PERSONAL = FedSA()
FFA, ROLORA = Alternate(), Alternate(schedule="ba")
SVD_OF_B = FlexLoRA(train="b")
COVERED, TURNED = FedIT(heterogeneous="covered"), FedIT(align="rotate")
FLEX, HETERO = FlexLoRA(), HeteroLoRA(weights="examples")
AVERAGE, FEDIT = FedAvg(), FedIT()
SPARSE = SLoRA(aggregator=FlexLoRA(), stage1_rounds=5)
SECOND = SLoRA(aggregator=FlexLoRA(), stage1_rounds=0)
CARRY = FlexLoRA(residual="carry")
CHANGE = HeteroLoRA(weights="examples", average="change", prune=False)
SCALED, STACKED = SPP(), SPP(mode="stack")
FLORA, FEDEX, LEADING = Rebase(), Rebase(hold="mean"), Rebase(hold="svd")
SWITCH = [
    SwitchLoRA(mode=mode, switching=Switching(interval=10.0, ratio=10.0), steps=3, horizon=40)
    for mode in (ALTERNATE, PRODUCT, DENSE)
]


def _option(strategy: LoRAStrategy) -> Any:
    """What tells two strategies of one class apart."""
    found = (getattr(strategy, name, None) for name in ("stage1_rounds", "mode", "hold"))
    return next((x for x in found if x is not None), "")


FAULTS = [
    *[
        (s, "aggregate", first_counted_twice)
        for s in (AVERAGE, FEDIT, FLEX, HETERO, SPARSE, SCALED, STACKED)
    ],
    *[
        (s, "aggregate", unweighted_mean)
        for s in (AVERAGE, FEDIT, FLEX, HETERO, SPARSE, SCALED, STACKED)
    ],
    *[
        (s, "aggregate", never_loaded)
        for s in (AVERAGE, FEDIT, FLEX, HETERO, SPARSE, SECOND, SCALED)
    ],
    *[(s, "aggregate", first_counted_twice) for s in (COVERED, TURNED)],
    *[(s, "aggregate", unweighted_mean) for s in (COVERED, TURNED)],
    *[(s, "aggregate", scale_dropped_on_arrival) for s in (COVERED, TURNED)],
    *[(s, "client_start", scale_dropped_on_redistribution) for s in (COVERED,)],
    *[(s, "client_start", start_depends_on_the_client) for s in (COVERED, TURNED)],
    *[(s, "enlist", ranks_not_applied) for s in (COVERED,)],
    (TURNED, "absorb", weight_twice),
    *[
        (s, "aggregate", fault)
        for s in (FFA, ROLORA)
        for fault in (
            first_counted_twice,
            unweighted_mean,
            never_loaded,
            last_client_leaks,
            frozen_is_averaged,
            indices_fade,
        )
    ],
    *[
        (s, "client_start", fault)
        for s in (FFA, ROLORA)
        for fault in (a_of_its_own, scale_of_prefixes_forgotten, start_depends_on_the_client)
    ],
    *[(s, "plan", fault) for s in (FFA, ROLORA) for fault in (both_are_trained, begins_with_a)],
    *[(s, "enlist", ranks_not_applied) for s in (FFA, ROLORA)],
    *[(s, "absorb", weight_twice) for s in (FFA, ROLORA)],
    (FFA, "adds", padded_at_the_wrong_end),
    (ROLORA, "aggregate", nobody_is_remembered),
    (ROLORA, "aggregate", everybody_is_up_to_date),
    (ROLORA, "bytes_down", last_round_alone),
    *[(s, "bytes_down", nothing_is_counted) for s in (FFA, ROLORA, FEDIT, SVD_OF_B, PERSONAL)],
    *[(s, "aggregate", first_counted_twice) for s in (SVD_OF_B,)],
    *[(s, "client_start", a_of_its_own) for s in (SVD_OF_B,)],
    *[(s, "client_start", scale_dropped_on_redistribution) for s in (SVD_OF_B,)],
    (SVD_OF_B, "plan", both_are_trained),
    *[
        (s, "aggregate", fault)
        for s in (SVD_OF_B, FLEX)
        for fault in (a_root_is_forgotten, right_vectors_are_transposed)
    ],
    (PERSONAL, "aggregate", first_counted_twice),
    (PERSONAL, "aggregate", unweighted_mean),
    (PERSONAL, "aggregate", never_loaded),
    (PERSONAL, "aggregate", last_client_leaks),
    (PERSONAL, "aggregate", rows_fade),
    (PERSONAL, "client_start", own_b_is_not_loaded),
    (PERSONAL, "client_start", start_depends_on_the_client),
    (PERSONAL, "kept", common_b_is_kept),
    (PERSONAL, "enlist", ranks_not_applied),
    *[(s, "aggregate", merge_forgotten) for s in (STACKED,)],
    *[(s, "aggregate", shares_left_out) for s in (STACKED,)],
    *[(s, "client_start", mask_not_shared) for s in (SCALED, STACKED)],
    *[(s, "global_update", merge_fills_zeros) for s in (SCALED, STACKED)],
    *[(s, "aggregate", merge_overflows) for s in (SCALED, STACKED)],
    *[(s, "client_start", scale_dropped_on_redistribution) for s in (FLEX, HETERO, SECOND)],
    *[(s, "aggregate", scale_dropped_on_arrival) for s in (AVERAGE, FLEX, HETERO, SECOND)],
    *[(s, "client_start", alpha_is_always_16) for s in (AVERAGE, FLEX, HETERO, SECOND)],
    *[(s, "enlist", ranks_not_applied) for s in (FLEX, HETERO, SPARSE, SECOND)],
    *[(s, "client_start", start_ignores_ranks) for s in (FLEX, HETERO, SPARSE, SECOND)],
    *[(s, "client_start", start_depends_on_the_client) for s in (AVERAGE, FLEX, HETERO)],
    *[(s, "client_start", zero_padded) for s in (AVERAGE, FLEX, HETERO, SECOND)],
    *[
        (s, "aggregate", fault)
        for s in (FLORA, FEDEX, LEADING)
        for fault in (
            first_counted_twice,
            unweighted_mean,
            never_loaded,
            scale_dropped_on_arrival,
        )
    ],
    *[(s, "client_start", base_not_moved) for s in (FLORA, FEDEX, LEADING)],
    *[(s, "client_start", base_of_another_rank) for s in (FEDEX, LEADING)],
    *[(s, "client_start", start_ignores_ranks) for s in (FLORA, FEDEX)],
    (FLORA, "client_start", restarts_from_nothing),
    (FLORA, "adds", scale_dropped_from_summands),
    (FLORA, "absorb", weight_twice),
    *[(s, "aggregate", first_counted_twice) for s in SWITCH],
    *[(s, "aggregate", unweighted_mean) for s in SWITCH],
    *[(s, "aggregate", never_loaded) for s in SWITCH],
    *[(s, "client_start", base_not_moved) for s in SWITCH],
    (SWITCH[1], "aggregate", residual_forgotten),
    (CARRY, "adds", scale_dropped_from_summands),
    (CHANGE, "adds", scales_left_out_of_changes),
    *[(s, "adds", padded_at_the_wrong_end) for s in (CHANGE, SPARSE, SWITCH[0])],
    *[(s, "adds", start_of_another_rank) for s in (CARRY, CHANGE, SPARSE)],
    *[
        (s, "absorb", weight_twice)
        for s in (AVERAGE, FEDIT, CARRY, CHANGE, SPARSE, SCALED, SWITCH[0], SWITCH[2])
    ],
]


@pytest.mark.parametrize(
    ("strategy", "hook", "fault"),
    FAULTS,
    ids=[f"{f.__name__}-{type(s).__name__}{_option(s)}" for s, _, f in FAULTS],
)
def test_a_planted_fault_is_caught(strategy: LoRAStrategy, hook: str, fault: Hook) -> None:
    broken, name = with_hook(strategy, hook, fault), type(strategy).__name__
    caught: list[str] = []
    for law in (law for law in LAWS if not why_not(law, broken)):
        try:
            law(broken, 1, SINGLE)
        except AssertionError as error:
            caught.append(f"{law.__name__}: {str(error).splitlines()[0]}")
            if not log.isEnabledFor(logging.INFO):  # one is enough
                break
        except (KeyError, ValueError) as error:  # stopped by the fault: no law has said anything
            log.info("%s of %s stopped %s: %r", fault.__name__, name, law.__name__, error)
    assert caught, f"no law noticed {fault.__name__}"
    log.info("%s of %s: %s", fault.__name__, name, caught)


@pytest.mark.parametrize(
    "strategy",
    [
        AVERAGE,
        FEDIT,
        PERSONAL,
        FFA,
        ROLORA,
        SVD_OF_B,
        FLEX,
        CARRY,
        HETERO,
        CHANGE,
        SPARSE,
        SECOND,
        SCALED,
        STACKED,
        *SWITCH,
    ],
)
def test_a_wrapped_strategy_without_fault_obeys_every_law(strategy: LoRAStrategy) -> None:
    """What is caught above is the fault, not the wrapping."""
    same = with_hook(strategy, "aggregate", lambda self, right, *arguments: right(*arguments))
    for law in (law for law in LAWS if not why_not(law, same)):
        law(same, 1, SINGLE)
