"""What each method sends and keeps, by formula: scalars of one adapted layer of one client.

``m x n`` is the layer's weight, ``r`` the rank that the client trains, ``R`` the largest rank of
the population; ``rho_t`` are the ranks of all clients of round ``t`` together and ``K_t`` how many
they were. A client misses the rounds since the one before it last took part, as
`fedlora.server.missed` counts them; sums are over these.

Sources: McMahan et al., arXiv:1602.05629 (FedIT and all that send both factors); Sun et al.,
arXiv:2403.12313 (FFA-LoRA); Chen et al., arXiv:2502.01755 (RoLoRA); Lee et al., arXiv:2505.12805
(FedSVD); Wang et al., arXiv:2409.05976 (FLoRA), whose stack a server that has merged it need not
send beyond ``m n``; Singhal et al., arXiv:2410.09432 (FedEx-LoRA: a residual of rank ``(K - 1)
r``); arXiv:2506.09199 (FLoRIST); Guo et al., arXiv:2410.01463 (FedSA-LoRA); Singhal et al.,
arXiv:2502.15436 (Fed-SB); Raje et al., arXiv:2506.05568 (RAVAN); Koo et al., arXiv:2410.22815
(LoRA-A²); Karimireddy et al., arXiv:1910.06378 (SCAFFOLD: the control variate goes down and, by
option II, not up); Acar et al., arXiv:2111.04263 (FedDyn); Babakniya et al., arXiv:2308.06522
(SLoRA); Lu et al., arXiv:2405.16057 (SPP); Zhou et al., arXiv:2406.06564 (SwitchLoRA); Lin et al.,
arXiv:2407.00952 (SplitLoRA). What follows from the run's seed is not sent. Nothing here calls the
methods' own accounts: that is the point.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from fedlora.core.seeding import mask_noise

WIDTH = 4
"""Bytes of a float32."""


@dataclass(frozen=True)
class Past:
    """One round whose result a client does not know, as far as one layer is concerned."""

    round: int
    """Counted from 0."""
    ranks: tuple[int, ...]
    """Ranks of the clients that took part."""
    changed: int = 0
    """The rank that the server says its base has changed by."""


@dataclass(frozen=True)
class Visit:
    """One layer of one client in one round: what a formula may depend on."""

    path: str
    m: int
    n: int
    r: int
    """The rank that the client holds."""
    lowest: int
    """The smallest rank of the population."""
    highest: int
    """The largest."""
    round: int = 0
    """Counted from 0."""
    missed: tuple[Past, ...] = ()
    """Rounds whose results the client does not know, in order."""
    budget: float = 0.0
    """Scalars of the client's adapter as a fraction of the base's parameters."""
    block: int = 0
    blocks: int = 1
    """The layer's transformer block, and how many there are."""
    seed: int = 0
    """Seed of the run."""


@dataclass(frozen=True)
class Tokens:
    """What a client's part of a split model has seen in a round."""

    tokens: int
    width: int
    """Scalars of a token's hidden state."""
    rows: int
    """Sequences."""


Scalars = Callable[[Visit], int]


@dataclass(frozen=True)
class Formula:
    """What a method sends up and down and what its clients keep, in symbols and as functions."""

    up: str
    count_up: Scalars
    down: str
    count_down: Scalars
    kept: str = ""
    """What a client keeps between rounds; empty: nothing."""
    count_kept: Scalars | None = None
    chooses: bool = False
    """Whether a client of less than the largest rank chooses what it sends up, by what it has
    learnt: no formula says how much that is."""
    smallest: bool = False
    """Whether all clients train the smallest rank."""
    beside_up: Callable[[Tokens], int] | None = None
    beside_down: Callable[[Tokens], int] | None = None
    """Scalars beside the adapter: activations, gradients, labels."""

    def trained(self, visit: Visit) -> Visit:
        """The visit at the rank that the client trains."""
        return replace(visit, r=visit.lowest) if self.smallest else visit


# --- pieces ---------------------------------------------------------------------------------------


def _a(v: Visit) -> int:
    return v.r * v.n


def _b(v: Visit) -> int:
    return v.r * v.m


def _both(v: Visit) -> int:
    return v.r * (v.m + v.n)


def _core(v: Visit) -> int:
    return v.r * v.r


def _nothing(v: Visit) -> int:
    return 0


def _heads(v: Visit) -> int:
    """Cores of four heads, which share ``R`` evenly; a client has the first ones up to ``r``."""
    sizes = [(v.highest + i) // 4 for i in (3, 2, 1, 0)]
    left, count = v.r, 0
    for size in sizes:
        own = min(size, left)
        left, count = left - own, count + own * own
    return count


def _later(then: Scalars) -> Scalars:
    """Nothing in the first round, when all follows from the seed."""
    return lambda v: then(v) if v.round else 0


def _turns(sides: str) -> Scalars:
    """The factor that a round trains, by turns."""
    return lambda v: _a(v) if sides[v.round % len(sides)] == "a" else _b(v)


def _missed_turns(sides: str) -> Scalars:
    """The factors that the missed rounds have trained, each once."""

    def count(v: Visit) -> int:
        missed = {sides[p.round % len(sides)] for p in v.missed}
        return _a(v) * ("a" in missed) + _b(v) * ("b" in missed)

    return count


def _stack(v: Visit, rank: int) -> int:
    return min(rank * (v.m + v.n), v.m * v.n)


def _flora(v: Visit) -> int:
    return _stack(v, sum(sum(p.ranks) for p in v.missed))


def _fedex(v: Visit) -> int:
    return _both(v) + _stack(v, sum((len(p.ranks) - 1) * v.r for p in v.missed))


def _florist(v: Visit) -> int:
    return _stack(v, sum(p.changed for p in v.missed))


def _twice_later(v: Visit) -> int:
    return _both(v) * (2 if v.round else 1)


def _masked(v: Visit) -> int:
    """Coordinates of a mask that all can draw: ``u < density`` of uniform noise ``u``."""
    noise = mask_noise(v.seed, v.path, v.m, v.n)
    return int((noise < v.budget).sum())


def _two_stages(first: int, sparse: Scalars, then: Scalars) -> Scalars:
    return lambda v: sparse(v) if v.round < first else then(v)


def _divisor(v: Visit) -> int:
    """The largest rank up to ``r`` that divides ``R``."""
    return max(d for d in range(1, v.r + 1) if v.highest % d == 0)


def _spp_up(v: Visit) -> int:
    return _divisor(v) * v.n if v.round % 2 else v.m


def _spp_down(v: Visit) -> int:
    return v.highest * v.n + v.m


def _switched(v: Visit) -> int:
    """The averages of the missed rounds, at the rank ``R`` of the shared state."""
    return sum(v.highest * (v.m if p.round % 2 else v.n) for p in v.missed)


def _lower_quarter(v: Visit) -> int:
    return _both(v) if v.block < -(-v.blocks // 4) else 0


# --- methods --------------------------------------------------------------------------------------

_BOTH = Formula("r (m + n)", _both, "r (m + n)", _both)
_FEDIT = replace(_BOTH, smallest=True)
_SLORA_ROUNDS = 2
SLORA_WORDS = (f"strategy.stage1_rounds={_SLORA_ROUNDS}",)
"""The sparse rounds of SLoRA that its formula is for."""

FORMULAS: Mapping[str, Formula] = {
    **dict.fromkeys(("fedavg", "fedit", "fedrot"), _FEDIT),
    **dict.fromkeys(("rbla", "flexlora", "heterolora"), _BOTH),
    "feddyn": replace(_FEDIT, kept="r (m + n)", count_kept=_both),
    "scaffold": replace(
        _FEDIT,
        down="2 r (m + n); round 1: r (m + n)",
        count_down=_twice_later,
        kept="r (m + n)",
        count_kept=_both,
    ),
    "ffa": Formula("r m", _b, "r m; round 1: 0", _later(_b)),
    "rolora": Formula(
        "r m or r n, by turns",
        _turns("ba"),
        "what missed rounds trained: r m, r n or both",
        _missed_turns("ba"),
    ),
    "fedsvd": Formula(
        "r m", _b, "r (m + n); round 1: r m", lambda v: _both(v) if v.round else _b(v)
    ),
    "flora": Formula("r (m + n)", _both, "min(Σ rho (m + n), m n)", _flora),
    "florist": Formula(
        "r (m + n)", _both, "min(Σ k (m + n), m n), k: rank that was kept", _florist
    ),
    "fedex": Formula(
        "r (m + n)",
        _both,
        "r (m + n) + min(Σ (K - 1) r (m + n), m n); round 1: 0",
        _later(_fedex),
        smallest=True,
    ),
    "fedsa": Formula("r n", _a, "r n; round 1: 0", _later(_a), kept="r m", count_kept=_b),
    "local": Formula("0", _nothing, "0", _nothing, kept="r (m + n)", count_kept=_both),
    "fedsb": Formula("r²", _core, "r²; round 1: 0", _later(_core)),
    "ravan": Formula(
        "Σ r_h² of its heads, r in all", _heads, "the same; round 1: 0", _later(_heads)
    ),
    "lora_a2": Formula(
        "r m or r n, by turns, and 2 bytes of each chosen index",
        _turns("ba"),
        "what missed rounds trained: R m, R n or both",
        lambda v: _missed_turns("ba")(replace(v, r=v.highest)),
        chooses=True,
    ),
    "slora": Formula(
        "coordinates of the mask, then r (m + n)",
        _two_stages(_SLORA_ROUNDS, _masked, _both),
        "the same",
        _two_stages(_SLORA_ROUNDS, _masked, _both),
    ),
    "spp": Formula("m or d n, by turns; d: divisor of R up to r", _spp_up, "R n + m", _spp_down),
    "switchlora": Formula(
        "r n or r m, by turns",
        _turns("ab"),
        "what missed rounds trained, each R n or R m",
        _switched,
    ),
    "splitlora": Formula(
        "r (m + n) of the client's blocks; T d activations, T + 2 S of labels",
        _lower_quarter,
        "r (m + n) of its blocks; T d gradients",
        _lower_quarter,
        smallest=True,
        beside_up=lambda t: t.tokens * t.width + t.tokens + 2 * t.rows,
        beside_down=lambda t: t.tokens * t.width,
    ),
}
"""By preset of conf/strategy, with its defaults. A preset that is not here is measured all the
same, and shown without a formula."""
