"""Configuration of a run's length, of its rounds, and of when it is evaluated."""

import math
from dataclasses import dataclass, field, replace

from fedlora.core.checks import MOST_THREADS, at_least, distinct, fraction, one_of, within
from fedlora.core.metric import HIGHEST, LOWEST
from fedlora.core.types import EvaluatePlan, LocalPlan
from fedlora.server.norm_bound import COHORT, OFF
from fedlora.wire.codec import ROUNDING, WIRE_BYTES

AUTO = "auto"
SYNC, BUFFERED = "sync", "buffered"


@dataclass(frozen=True)
class EvaluationSchedule:
    """Which clients are evaluated, when, and with which adapter."""

    every: int = 1
    """Rounds between evaluations; the last round is always evaluated; 0: never."""
    first: bool = True
    """Whether to evaluate before round 1 too."""
    groups: tuple[str, ...] = ("unseen_random",)
    """Any of ``seen``, ``unseen_random``, ``unseen_task`` (fixed panels) and ``participants`` (the
    clients of the next round, as the FlexLoRA code evaluates)."""
    clients: int = 20
    """Panel size per group; 0: all clients."""
    adapters: tuple[str, ...] = ("full",)
    """``full``: the global update as exactly as it is known (for FlexLoRA the whole W: large for
    large models); ``largest``: at the population's largest ranks; ``own``: at the client's."""
    seed: int | None = None
    """Seed of the panels and of the examples that ``plan.max_examples`` leaves of each client;
    None: the population's (`fedlora.population.sampling.Roster.seed`)."""
    plan: EvaluatePlan = field(default_factory=EvaluatePlan)

    def __post_init__(self) -> None:
        at_least("evaluate.every", self.every, 0)
        at_least("evaluate.clients", self.clients, 0)
        at_least("evaluate.seed", self.seed or 0, 0)
        if self.every and not (self.groups and self.adapters):
            raise ValueError(
                f"evaluate.groups={list(self.groups)} and evaluate.adapters={list(self.adapters)} "
                "must not be empty; evaluate.every=0 turns evaluation off"
            )
        distinct("evaluate.groups", self.groups)
        distinct("evaluate.adapters", self.adapters)
        for group in self.groups:
            one_of(
                "evaluate.groups", group, ("seen", "unseen_random", "unseen_task", "participants")
            )
        for adapter in self.adapters:
            one_of("evaluate.adapters", adapter, ("full", "largest", "own"))

    def due(self, round: int, last: int) -> bool:
        """Whether this round is followed by an evaluation."""
        if not self.every:
            return False
        return self.first if round == 0 else round % self.every == 0 or round == last


@dataclass(frozen=True)
class Rounds:
    """The length of a run, its wire format, and when it stops early."""

    rounds: int = 3
    lr_decay: float = 1.0
    """The local learning rate is multiplied by this once ``lr_decay_round`` is complete."""
    lr_decay_round: int = 0
    """0: never. The FlexLoRA code halves it after round 15."""
    min_success: float = 0.5
    """Fraction of a round's clients that must succeed; otherwise the run stops."""
    min_clients: int = 1
    max_update_norm: float = 0.0
    """Updates with a larger change (Frobenius norm) are rejected; 0: no absolute bound but
    `fedlora.server.validation.LARGEST`."""
    max_factor_norm: float = 0.0
    """The same for the tensors that are sent (of LoRA the factors): ``(c B, A / c)`` are the same
    weights, and ruin an average of factors; 0: no absolute bound."""
    rebalance: bool = False
    """Whether factors are turned back towards the start before they are compared and averaged
    (`fedlora.server.gauge`): then no client chooses which factors of its product are averaged."""
    norm_bound: str = COHORT
    """``cohort``: updates that move much further than those of most clients of their round are
    rejected (`fedlora.server.norm_bound`); ``off``: they are averaged."""
    norm_factor: float = 50.0
    """How many medians of the round's changes are still averaged."""
    clients_per_message: int = 0
    """Most clients in one Flower message; 0: as many as the engine likes (sequential: a fourth of
    a worker's share of the round), and no more than `fedlora.server.packing.MOST_PER_MESSAGE`."""
    over: float = 1.0
    """How many times the clients that a round needs are asked; the first results count. Needs
    ``devices``."""
    deadline: float = math.inf
    """Seconds of virtual time after which a round no longer waits for results. Needs
    ``devices``."""
    mode: str = SYNC
    """``sync``: a round waits for its clients; ``buffered``: the model is changed whenever some
    results have arrived (`fedlora.server.buffered`). Needs ``devices``."""
    buffer: int = 10
    """Buffered: results of which a version of the model is made; a round is the making of one."""
    concurrency: int = 80
    """Buffered: clients at work at once."""
    staleness: float = 0.5
    """Buffered: a change that is ``τ`` versions old counts ``(1 + τ)^-staleness``."""
    max_staleness: int = 100
    """Buffered: older changes are dropped."""
    normalise: str = "weights"
    """Buffered: what the sum of changes is divided by, ``weights`` or ``staleness``: weights times
    the factor above."""
    wire: str = "float32"
    """Number format of payloads on the wire: ``float32``, ``bfloat16`` or ``float64``. Clients'
    replies in bfloat16 are changes of what they started from (`fedlora.wire.change`)."""
    error_feedback: bool = False
    """Whether the rounding error of a client's bfloat16 reply is stored and added to its next
    reply."""
    timeout_s: float = 3600.0
    """Seconds that a worker has for one message, before its clients are dropped from the round."""
    keep: int = 3
    """Checkpoints kept."""
    patience: int = 0
    """The run stops after so many evaluations in a row that have not improved; 0: it does not."""
    min_delta: float = 0.0
    """An evaluation improves if it is better by more than this than the last one that did."""
    watch: str = AUTO
    """Which metric of ``metrics.jsonl`` decides; ``auto``: the loss of all responses (of a
    classifier: of all labels) together."""
    watch_group: str = AUTO
    """The group that is watched, one of `EvaluationSchedule.groups`; ``auto``: the first."""
    watch_adapter: str = AUTO
    """With which of `EvaluationSchedule.adapters`; ``auto``: the first."""
    better: str = AUTO
    """Whether ``lowest`` or ``highest`` values are better; ``auto``: as the metric says."""
    threads: int = 1
    """Intra-op threads of the server's linear algebra. More are faster on large layers; the
    last bits of results depend on it, so it does not follow the machine."""

    def __post_init__(self) -> None:
        at_least("rounds", self.rounds, 1)
        at_least("lr_decay", self.lr_decay, 0, strict=True)
        at_least("lr_decay_round", self.lr_decay_round, 0)
        fraction("min_success", self.min_success)
        at_least("min_clients", self.min_clients, 1)
        at_least("max_update_norm", self.max_update_norm, 0)
        at_least("max_factor_norm", self.max_factor_norm, 0)
        one_of("norm_bound", self.norm_bound, (COHORT, OFF))
        at_least("norm_factor", self.norm_factor, 1)
        at_least("clients_per_message", self.clients_per_message, 0)
        one_of("mode", self.mode, (SYNC, BUFFERED))
        at_least("over", self.over, 1)
        if not self.deadline > 0:
            raise ValueError(f"deadline={self.deadline!r} must be > 0; .inf: none")
        at_least("timeout_s", self.timeout_s, 0, strict=True)
        at_least("keep", self.keep, 1)
        at_least("patience", self.patience, 0)
        at_least("min_delta", self.min_delta, 0)
        one_of("better", self.better, (AUTO, LOWEST, HIGHEST))
        within("threads", self.threads, 1, MOST_THREADS)
        one_of("wire", self.wire, WIRE_BYTES)
        if self.error_feedback and self.wire not in ROUNDING:
            raise ValueError(
                f"error_feedback=true with wire={self.wire}: nothing is rounded off that could be "
                "kept; use wire=bfloat16, or error_feedback=false"
            )

    def plan(self, base: LocalPlan, round: int) -> LocalPlan:
        """The configured plan with the learning rate of this round."""
        if self.lr_decay_round and round > self.lr_decay_round:
            return replace(base, lr=base.lr * self.lr_decay)
        return base
