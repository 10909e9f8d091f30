"""Resource tiers and the rank distributions of the FlexLoRA paper (arXiv:2402.11505, section 4).

A tier says what rank a client can hold in attention and MLP modules; a distribution says which
fraction of the clients is in which tier. Four tiers, ordered by size:

    tier   q,k,v,o   gate,up,down   fraction of trainable parameters (1.3 B model, recomputed)
    T1        8           8          0.554 %
    T2       30          30          2.046 %
    T3       30         200          8.223 %
    T4      200         200         12.225 %
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedlora.core import renamed
from fedlora.core.checks import at_least, fraction, one_of
from fedlora.core.errors import ConfigError
from fedlora.core.types import Module, Ranks


@dataclass(frozen=True)
class Tier:
    """One resource class."""

    name: str
    fraction: float
    """Fraction of the clients."""
    attention: int
    """Rank in attention modules."""
    mlp: int
    """Rank in all other modules."""

    def __post_init__(self) -> None:
        fraction(f"tier {self.name}: fraction", self.fraction)
        at_least(f"tier {self.name}: attention rank", self.attention, 1)
        at_least(f"tier {self.name}: mlp rank", self.mlp, 1)


NAMES = ("T1", "T2", "T3", "T4")
PAPER_RANKS = ((8, 8), (30, 30), (30, 200), (200, 200))
"""(attention, mlp) by tier."""
PAPER_BUDGETS = (0.00554, 0.02046, 0.08223, 0.12225)
"""LoRA / (base + LoRA) parameters by tier, recomputed for the paper's 1.3 B model."""


def _normal() -> tuple[float, ...]:
    """N(1.5, 0.7) at 0..3, normalised: what the released code computes."""
    pdf = [math.exp(-((i - 1.5) ** 2) / (2 * 0.7**2)) for i in range(4)]
    return tuple(p / sum(pdf) for p in pdf)


_N = _normal()
_UNIFORM = (0.25, 0.25, 0.25, 0.25)
_LIGHT, _STRONG = (0.80, 0.05, 0.05, 0.10), (0.05, 0.05, 0.10, 0.80)
FRACTIONS: Mapping[str, Mapping[str, tuple[float, ...]]] = {
    "homogeneous": dict.fromkeys(("paper", "code", "readme"), (1.0, 0.0, 0.0, 0.0)),
    "uniform": dict.fromkeys(("paper", "code", "readme"), _UNIFORM),
    "heavy_tail_light": {"paper": _LIGHT, "code": _LIGHT, "readme": (0.85, 0.05, 0.05, 0.05)},
    "heavy_tail_strong": {"paper": _STRONG, "code": _STRONG, "readme": (0.05, 0.05, 0.05, 0.85)},
    "normal": {
        "paper": _N,  # T2 and T3 dominate, as in the paper's figure 3
        "code": (_N[0], _N[3], _N[2], _N[1]),  # labels used as positions: T3 and T4 dominate
        "readme": _N,
    },
}
"""distribution -> variant -> fraction of T1..T4. Where sources are silent, the paper's."""


@dataclass(frozen=True)
class RankDistribution:
    """Which ranks the clients of a population hold, and the LoRA scale ``alpha / r``."""

    distribution: str = "uniform"
    """``homogeneous``, ``uniform``, ``heavy_tail_light``, ``heavy_tail_strong``, ``normal`` or
    ``custom`` (the fractions in ``tiers``)."""
    variant: str = "paper"
    """Source of the fractions: ``paper``, released ``code`` or its ``readme``."""
    preset: str = "scaled"
    """Source of the ranks: ``paper`` (8, 30, 30/200, 200) or ``scaled`` to the same fraction of
    this model's parameters; ignored where ``tiers`` are given."""
    rank: int = 0
    """``homogeneous`` only: this rank in every module; 0: the smallest tier's."""
    tiers: tuple[Mapping[str, object], ...] = ()
    """A user's own tiers: mappings with name, attention, mlp and, for ``custom``, fraction."""
    alpha: float = 16.0
    quotas: str = "exact"
    """``exact``: fractions met by largest remainder; ``iid``: each client draws its tier."""
    clamp: bool = True
    """Ranks above ``min(d_out, d_in)`` of a module become that; false: they are refused."""

    def __post_init__(self) -> None:
        one_of("ranks.distribution", self.distribution, (*FRACTIONS, "custom"))
        one_of("ranks.variant", self.variant, ("paper", "code", "readme"))
        one_of("ranks.preset", self.preset, ("paper", "scaled"))
        one_of("ranks.quotas", self.quotas, ("exact", "iid"))
        at_least("ranks.alpha", self.alpha, 0, strict=True)
        at_least("ranks.rank", self.rank, 0)
        if self.rank and self.distribution != "homogeneous":
            raise ValueError(
                f"ranks.rank={self.rank} needs ranks.distribution=homogeneous, "
                f"not {self.distribution}; other distributions take their ranks from tiers"
            )
        if self.distribution == "custom" and not self.tiers:
            raise ValueError("ranks.distribution=custom needs ranks.tiers")
        if self.tiers:
            _custom_tiers(self.tiers, self.distribution)

    def resolve(self, modules: Sequence[Module], model_parameters: int) -> tuple[Tier, ...]:
        """The tiers that clients are in, for one model, with the fractions of this distribution.

        A tier of fraction zero is left out: no client holds its ranks.

        Raises:
            ConfigError: for a rank that some module cannot hold while ``clamp`` is off.
        """
        if self.tiers:
            tiers = _custom_tiers(self.tiers, self.distribution)
        else:
            if self.rank:
                ranks: Sequence[tuple[int, int]] = ((self.rank, self.rank), *PAPER_RANKS[1:])
            elif self.preset == "paper":
                ranks = PAPER_RANKS
            else:
                ranks = scaled_ranks(modules, model_parameters)
            tiers = tuple(Tier(n, 0.0, a, m) for n, (a, m) in zip(NAMES, ranks, strict=True))
        if self.distribution != "custom":
            fractions = FRACTIONS[self.distribution][self.variant]
            if len(tiers) != len(fractions):
                raise ValueError(
                    f"ranks.distribution={self.distribution} has {len(fractions)} tiers, "
                    f"ranks.tiers lists {len(tiers)}"
                )
            tiers = tuple(
                Tier(t.name, s, t.attention, t.mlp) for t, s in zip(tiers, fractions, strict=True)
            )
        held = tuple(t for t in tiers if t.fraction > 0)
        for tier in held:
            module_ranks(tier, modules, clamp=self.clamp)
        return held


def _custom_tiers(rows: Sequence[Mapping[str, object]], distribution: str) -> tuple[Tier, ...]:
    tiers = []
    for i, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise ValueError(f"ranks.tiers[{i}]={row!r} must be a mapping")
        unknown = set(row) - {"name", "fraction", "attention", "mlp", "rank"}
        if unknown:
            raise ValueError(
                f"ranks.tiers[{i}]: unknown keys {sorted(map(str, unknown))}; "
                "known: name, fraction, attention, mlp, rank (both)"
                f"{renamed.answer(f'ranks.tiers.{key}' for key in sorted(map(str, unknown)))}"
            )
        both = row.get("rank")
        values = {k: row.get(k, both) for k in ("attention", "mlp")}
        for key, value in values.items():
            if not isinstance(value, int) or isinstance(value, bool):
                raise ValueError(f"ranks.tiers[{i}].{key}={value!r} must be a whole number >= 1")
        fraction_ = row.get("fraction", 0.0)
        if not isinstance(fraction_, int | float):
            raise ValueError(f"ranks.tiers[{i}].fraction={fraction_!r} must be a number in [0, 1]")
        name = str(row.get("name", f"T{i + 1}"))
        tiers.append(Tier(name, float(fraction_), values["attention"], values["mlp"]))  # type: ignore[arg-type]
    total = sum(t.fraction for t in tiers)
    if distribution == "custom" and abs(total - 1) > 1e-6:
        raise ValueError(
            f"ranks.tiers: fractions {[t.fraction for t in tiers]} sum to {total:g}, not 1"
        )
    if len({t.name for t in tiers}) < len(tiers):
        raise ValueError(f"ranks.tiers: names {[t.name for t in tiers]} are not distinct")
    return tuple(tiers)


def scaled_ranks(modules: Sequence[Module], model_parameters: int) -> list[tuple[int, int]]:
    """(attention, mlp) ranks whose parameter fractions of this model are the paper's (>= 1).

    T3 keeps T2's attention rank and takes its MLP rank from what is left of its budget.
    """
    unit = {"attention": 0, "mlp": 0}
    for m in modules:
        unit[m.kind] += m.d_out + m.d_in
    both = unit["attention"] + unit["mlp"]

    def rank(budget: float, spent: int, per_rank: int) -> int:
        parameters = budget * model_parameters / (1 - budget) - spent
        return max(1, round(parameters / per_rank)) if per_rank else 1

    small, middle, _, large = (rank(b, 0, both) for b in PAPER_BUDGETS)
    wide = rank(PAPER_BUDGETS[2], middle * unit["attention"], unit["mlp"])
    return [(small, small), (middle, middle), (middle, max(middle, wide)), (large, large)]


def module_ranks(tier: Tier, modules: Sequence[Module], *, clamp: bool) -> Ranks:
    """The rank of every module for a client of this tier.

    Raises:
        ConfigError: naming tier, rank, module and the largest rank that it can hold.
    """
    ranks = {}
    for m in modules:
        r = tier.attention if m.kind == "attention" else tier.mlp
        if r > m.max_rank and not clamp:
            raise ConfigError(
                f"ranks, tier {tier.name}: rank {r} is above {m.max_rank} = min(d_out, d_in) of "
                f"{m.path} [{m.d_out} x {m.d_in}]; lower it or set ranks.clamp=true"
            )
        ranks[m.path] = min(r, m.max_rank)
    return Ranks(ranks)


def rank_text(ranks: Ranks, modules: Sequence[Module]) -> str:
    """Ranks in words, by kind of module where they differ: ``15``, or ``2 in attention modules and
    15 in mlp modules``; ``12 to 15`` where modules of one kind cannot all hold the tier's rank."""

    def spread(found: Collection[int]) -> str:
        low, high = min(found), max(found)
        return f"{low}" if low == high else f"{low} to {high}"

    if len(set(ranks.values())) == 1:
        return spread(ranks.values())
    by_kind: dict[str, list[int]] = {}
    for m in modules:
        if m.path in ranks:
            by_kind.setdefault(m.kind, []).append(ranks[m.path])
    return " and ".join(f"{spread(found)} in {kind} modules" for kind, found in by_kind.items())


def quotas(fractions: Sequence[float], total: int) -> list[int]:
    """Whole numbers that sum to ``total`` and are closest to the fractions (largest remainder)."""
    ideal = np.asarray(fractions) / sum(fractions) * total
    counts = np.floor(ideal + 1e-9).astype(int)
    order = np.argsort(counts - ideal, kind="stable")
    counts[order[: total - int(counts.sum())]] += 1
    return [int(c) for c in counts]
