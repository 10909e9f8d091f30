r"""Any method that averages LoRA factors, with the head of a classifier beside the factors.

    averaged    h ← Σ_k w_k h_k / Σ_k w_k          w_k: the method's own weights
    local       h_k stays with client k            a client that never took part uses the first head

The method's hooks see neither: its part of the state, of updates and of what clients keep is cut
out before each call. ``averaged`` is what PEFT's ``modules_to_save`` is to a single user; ``local``
is FedPer's split into shared and personal layers (Arivazhagan et al., arXiv:1912.00818).
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedlora.algebra.linalg import normalize, weighted_sum
from fedlora.algebra.state import Kept, State, prefixed, under
from fedlora.algebra.summand import Summands, dense
from fedlora.core.payload import Payload
from fedlora.core.technique import Technique
from fedlora.core.types import (
    Adapter,
    Client,
    LocalPlan,
    Module,
    Ranks,
    Setting,
    TrainJob,
    Update,
)
from fedlora.models.head import AVERAGED, LOCAL
from fedlora.models.headed import HEAD, WithHead
from fedlora.server.method import Method, Setup, StateAudit
from fedlora.wire.codec import WIRE_BYTES


class Headed(Method):
    """A method over updates with heads.

    Args:
        inner: over updates alone.
        head: before round 1, by the names of the network's parameters.
        mode: ``averaged`` or ``local``.
    """

    def __init__(self, inner: Method, head: Mapping[str, Tensor], mode: str) -> None:
        self.inner, self.mode = inner, mode
        self._initial = {name: t.detach().clone() for name, t in head.items()}

    @property
    def technique(self) -> type[Technique]:  # type: ignore[override]
        """That of the inner method."""
        return self.inner.technique

    @property
    def private(self) -> str:  # type: ignore[override]
        """Those of the inner method."""
        return self.inner.private

    @property
    def label(self) -> str:
        """Name of the inner method."""
        return self.inner.label

    def check(self, setup: Setup) -> None:
        """As the inner method."""
        self.inner.check(setup)

    def rank_range(self, module: Module) -> tuple[int, int]:
        """As the inner method."""
        return self.inner.rank_range(module)

    def init_state(self, setting: Setting) -> State:
        """The inner state, and the first head as ``head/<name>``."""
        return {**self.inner.init_state(setting), **prefixed(self._initial, HEAD)}

    # --- a round ------------------------------------------------------------------------------

    def enlist(self, state: State, client: Client) -> Client:
        """As the inner method."""
        return self.inner.enlist(_without(state), client)

    def variant(self, state: State, client: Client) -> Hashable:
        """As the inner method: a client with a head of its own keeps something, and is told apart
        by that."""
        return self.inner.variant(_without(state), client)

    def client_start(self, state: State, client: Client, kept: Kept | None = None) -> WithHead:
        """The inner start with the client's head."""
        start = self.inner.client_start(_without(state), client, _own(kept))
        return self._with(start, self._head_of(state, kept))

    def plan(self, state: State, client: Client, base: LocalPlan) -> LocalPlan:
        """As the inner method."""
        return self.inner.plan(_without(state), client, base)

    def bytes_down(self, state: State, job: TrainJob, wire: str) -> int:
        """Those of the inner method, and the head if it is averaged."""
        bare = replace(job, start=_stripped(job.start))
        return self.inner.bytes_down(_without(state), bare, wire) + self._bytes(wire)

    def bytes_up(self, state: State, update: Update, plan: LocalPlan, wire: str) -> int:
        """The same of what a client sends."""
        inner = self.inner.bytes_up(_without(state), _bare(update), plan, wire)
        return inner + self._bytes(wire)

    def _bytes(self, wire: str) -> int:
        scalars = sum(t.numel() for t in self._initial.values())
        return WIRE_BYTES[wire] * scalars if self.mode == AVERAGED else 0

    def aggregate(self, state: State, updates: Sequence[Update]) -> State:
        """The inner state, and the weighted mean of the heads if they are averaged."""
        bare = [_bare(u) for u in updates]
        new = dict(self.inner.aggregate(_without(state), bare))
        head = under(state, HEAD)
        if self.mode == AVERAGED:
            p = normalize(self.inner.reference_weights(bare))
            sent = [_head(u.payload) for u in updates]
            head = {name: _mean([h[name] for h in sent], p, t.dtype) for name, t in head.items()}
        return new | prefixed(head, HEAD)

    @property
    def needs_updates(self) -> str:
        """As the inner method."""
        return self.inner.needs_updates

    def adds(self, state: State, start: Payload, update: Update) -> Summands | None:
        """What the inner method adds, and the change of an averaged head."""
        found = self.inner.adds(_without(state), _stripped(start), _bare(update))
        if found is None or self.mode != AVERAGED:
            return found
        before, after = _head(start), _head(update.payload)
        return {**found, **{f"{HEAD}{name}": t - before[name] for name, t in after.items()}}

    def adds_state(self, state: State) -> State:
        """As the inner method: a client knows the head that it started from."""
        return self.inner.adds_state(_without(state))

    def absorb(self, state: State, total: Summands, weight: float) -> State:
        """The inner state, and the head moved by the mean of its changes."""
        own = {name: x for name, x in total.items() if not name.startswith(HEAD)}
        new = dict(self.inner.absorb(_without(state), own, weight))
        for name, t in prefixed(under(state, HEAD), HEAD).items():
            change = dense(total[name]) / weight if name in total else torch.zeros_like(t)
            new[name] = (t + change).to(t.dtype)
        return new

    def kept(
        self, state: State, client: Client, before: Kept | None, start: Payload, update: Update
    ) -> Kept | None:
        """What the inner method lets the client keep, and its head if that is local."""
        mine = _own(before)
        found = self.inner.kept(_without(state), client, mine, _stripped(start), _bare(update))
        if self.mode != LOCAL:
            return found
        return {**(found or mine or {}), **prefixed(_head(update.payload), HEAD)}

    # --- the global model ---------------------------------------------------------------------

    def global_update(self, state: State, ranks: Ranks | None = None) -> WithHead:
        """The inner global update with the averaged head, or the first one if heads are local."""
        return self._with(self.inner.global_update(_without(state), ranks), under(state, HEAD))

    def evaluated_ranks(self, state: State, client: Client) -> Ranks:
        """As the inner method."""
        return self.inner.evaluated_ranks(_without(state), client)

    def personal_update(self, state: State, client: Client, kept: Kept | None = None) -> WithHead:
        """The inner personal update with the head that the client uses."""
        update = self.inner.personal_update(_without(state), client, _own(kept))
        return self._with(update, self._head_of(state, kept))

    def reference_weights(self, updates: Sequence[Update]) -> list[float]:
        """As the inner method."""
        return self.inner.reference_weights([_bare(u) for u in updates])

    def report(self, state: State) -> Mapping[str, float | int | str]:
        """As the inner method."""
        return self.inner.report(_without(state))

    def state_audit(self) -> StateAudit | None:
        """As the inner method."""
        audit = self.inner.state_audit()
        return None if audit is None else lambda state: audit(_without(state))

    def _with(self, update: Payload | Adapter, head: Mapping[str, Tensor]) -> WithHead:
        return WithHead(self.technique.payload(update), dict(head), self.mode == AVERAGED)

    def _head_of(self, state: State, kept: Kept | None) -> Mapping[str, Tensor]:
        """The head that a client uses: its own if it has one."""
        return under(kept or {}, HEAD) or under(state, HEAD)


def _without(state: State) -> State:
    """The inner method's part of a state."""
    return {name: t for name, t in state.items() if not name.startswith(HEAD)}


def _own(kept: Kept | None) -> Kept | None:
    """The inner method's part of what a client keeps; None: nothing."""
    return (_without(kept) or None) if kept is not None else None


def _stripped(payload: Payload) -> Payload:
    assert isinstance(payload, WithHead)
    return payload.update


def _bare(update: Update) -> Update:
    return replace(update, payload=_stripped(update.payload))


def _head(payload: Payload) -> Mapping[str, Tensor]:
    head = payload.head()
    assert head is not None
    return head


def _mean(heads: Sequence[Tensor], p: Sequence[float], dtype: torch.dtype) -> Tensor:
    """``Σ_k p_k h_k``, summed in float64."""
    return weighted_sum([h.double() for h in heads], p).to(dtype)
