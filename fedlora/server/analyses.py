"""What a run's records say of its global update and its clients, beyond what it needs itself.

Definitions and sources: docs/analyses.md. Nothing here changes a result, and all numbers are of
weights, not of factors: they do not depend on the gauge ``(B G⁻¹, G A)``.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedlora.algebra.drift import as_product, difference, drift, factor_change, gram, spread
from fedlora.algebra.linalg import normalize, spectra
from fedlora.algebra.spectrum import (
    Spectra,
    dense_spectra,
    energy_by_index,
    index_ranges,
    mean_ranks,
    tail,
)
from fedlora.algebra.state import State
from fedlora.algebra.summand import Summand, Summands, dense, norm
from fedlora.core.checks import at_least, one_of
from fedlora.core.metric import TIER
from fedlora.core.payload import Payload, plain_factors
from fedlora.core.types import Client, Ranks, Setting, Update
from fedlora.server.method import Method

FACTORS, ALL, NONE = "factors", "all", "none"
Record = dict[str, float]


@dataclass(frozen=True)
class Analyses:
    """Which analyses a round's record holds."""

    spectrum: str = FACTORS
    """Singular values of the global update: of updates that have low-rank ``factors``; of ``all``,
    also of dense ones, each of whose matrices is then decomposed; or of ``none``."""
    lost: bool = False
    """How far what each tier receives is from the global update."""
    drift: bool = False
    """Norms of the clients' changes and their cosines to the mean, by tier."""
    every: int = 1
    """Rounds from one analysis to the next; the first is of round ``every``."""

    def __post_init__(self) -> None:
        one_of("analyses.spectrum", self.spectrum, (FACTORS, ALL, NONE))
        at_least("analyses.every", self.every, 1)

    def record(
        self,
        method: Method,
        state: State,
        setting: Setting,
        round: int,
        updates: Sequence[Update],
        starts: Mapping[int, Payload],
    ) -> Record:
        """The numbers of a round.

        Args:
            method: whose state it is.
            state: after the aggregation.
            setting: for the population's tiers.
            round: counted from 1.
            updates: the aggregated updates, at least one.
            starts: client id -> what it started the round from.
        """
        if round % self.every:
            return {}
        found: Record = {}
        if not method.private and (self.spectrum != NONE or self.lost):
            found |= self._of_model(method, state, setting)
        if self.drift:
            found |= drift_record(updates, starts, method.reference_weights(updates))
        return found

    def _of_model(self, method: Method, state: State, setting: Setting) -> Record:
        payload = method.technique.payload(method.global_update(state))
        found: Record = {}
        if (values := self._spectra(payload)) is not None:
            found |= spectrum_record(values, setting)
        if self.lost:
            found |= lost_record(method, state, setting, payload)
        return found

    def _spectra(self, payload: Payload) -> Spectra | None:
        """The singular values of what a payload adds, of factors by their factors."""
        factors = plain_factors(payload)
        if self.spectrum == NONE or (factors is None and self.spectrum != ALL):
            return None
        if factors is not None:
            return spectra(factors)
        whole = added(payload)
        return None if whole is None else dense_spectra({p: dense(x) for p, x in whole.items()})


def added(payload: Payload) -> Summands | None:
    """What a payload adds to the adapted weights: ``s B A`` as products, or ``shift + s B A`` of a
    moved base, dense; None: it is neither."""
    factors, base = payload.low_rank(), payload.base()
    if base is None:
        return None if factors is None else {p: as_product(f) for p, f in factors.items()}
    found: dict[str, Summand] = dict(base.shift)
    for path, f in (factors or {}).items():
        found[path] = base.shift[path] + f.delta()
    return found


def change(start: Payload, end: Payload) -> Summands | None:
    """The change of the adapted weights from what a client started from to what it sent.

    Factors over a base that has not moved since are compared as factors; None: one of the two is
    neither factors nor a moved base.
    """
    before, after = start.low_rank(), end.low_rank()
    if end.base() is None and before is not None and after is not None:
        return factor_change(before, after) if before.keys() >= after.keys() else None
    one, other = added(start), added(end)
    if one is None or other is None or start.base() is None:
        return None
    return difference({p: x for p, x in other.items() if p in one}, one)


def spectrum_record(values: Spectra, setting: Setting) -> Record:
    """Energy by rank index, effective and stable rank, and what a tier of so many ranks loses at
    least.

    Args:
        values: singular values of some of the setting's modules.
        setting: for the ranks of its tiers.
    """
    ranks = {r for pattern in setting.rank_patterns for r in pattern.values()}
    shares = energy_by_index(values, index_ranges(sorted(ranks)))
    found = {f"spectrum/energy_{label}": share for label, share in shares.items()}
    found |= {f"spectrum/{name}": value for name, value in mean_ranks(values).items()}
    by_pattern = {pattern: tail(values, pattern) for pattern in setting.rank_patterns}
    return found | {
        f"{TIER}{tier}/truncation_error": _mean(by_pattern, members)
        for tier, members in _tiers(setting.clients).items()
    }


def lost_record(method: Method, state: State, setting: Setting, payload: Payload) -> Record:
    """``tier/<tier>/lost``: ``||ΔW - ΔW_r||_F / ||ΔW||_F`` of all modules together, for the global
    update at the ranks of a tier.

    Args:
        method: makes ``ΔW_r`` (`Method.global_update`).
        state: after the aggregation.
        setting: for the ranks of its tiers.
        payload: the global update.
    """
    whole = added(payload)
    if whole is None:
        return {}
    size = norm(whole)
    lost: dict[Ranks, float] = {}
    for pattern in setting.rank_patterns:
        received = added(method.technique.payload(method.global_update(state, pattern)))
        if received is None or not received.keys() >= whole.keys():
            return {}
        lost[pattern] = norm(difference(whole, received)) / size if size > 0 else 0.0
    return {
        f"{TIER}{tier}/lost": _mean(lost, members)
        for tier, members in _tiers(setting.clients).items()
    }


def drift_record(
    updates: Sequence[Update], starts: Mapping[int, Payload], weights: Sequence[float]
) -> Record:
    """Norms and cosines of the clients' changes: over all, and by tier if there are several.

    Args:
        updates: at least one.
        starts: client id -> what it started from.
        weights: of the updates, not normalized.
    """
    changes = []
    for update in updates:
        x = change(starts[update.client.id], update.payload)
        if x is None:
            return {}
        changes.append(x)
    measured = drift(gram(changes), normalize(weights))
    found = _spreads("drift/", measured.norms, measured.cosines)
    for name, value in (("pairs", measured.pairs), ("diversity", measured.diversity)):
        if math.isfinite(value):
            found[f"drift/{name}"] = value
    tiers = _tiers([u.client for u in updates])
    place = {u.client.id: i for i, u in enumerate(updates)}
    for tier, members in tiers.items():
        own = [place[c.id] for c in members]
        norms, cosines = ([x[i] for i in own] for x in (measured.norms, measured.cosines))
        found |= _spreads(f"{TIER}{tier}/drift_", norms, cosines)
    return found


def _spreads(prefix: str, norms: Sequence[float], cosines: Sequence[float]) -> Record:
    """Mean and standard deviation of both; without clients that moved there is no cosine."""
    found: Record = {}
    for name, values in (("norm", norms), ("cosine", cosines)):
        if (of := spread(values)) is not None:
            found |= {f"{prefix}{name}": of[0], f"{prefix}{name}_std": of[1]}
    return found


def _tiers(clients: Sequence[Client]) -> dict[str, list[Client]]:
    """Tier -> its clients; nothing if there is only one."""
    tiers: dict[str, list[Client]] = defaultdict(list)
    for client in clients:
        tiers[client.tier].append(client)
    return {tier: tiers[tier] for tier in sorted(tiers)} if len(tiers) > 1 else {}


def _mean(by_pattern: Mapping[Ranks, float], clients: Sequence[Client]) -> float:
    return math.fsum(by_pattern[c.ranks] for c in clients) / len(clients)
