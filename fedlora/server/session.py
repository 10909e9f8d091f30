"""One federated run as the server sees it, free of Flower: who works, what comes of it, what is
written down.

`Session` turns a method's hooks into batches of jobs and turns results into the next state. It is
driven by `fedlora.server.flower.FederatedRun`, which carries jobs and results over the wire.
"""

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from fedlora.algebra.state import State
from fedlora.core.checks import (
    at_least,
    one_of,
    share,
)
from fedlora.core.errors import RejectedUpdate, RunError
from fedlora.core.types import (
    Client,
    EvaluateJob,
    EvaluatePlan,
    Evaluation,
    Failure,
    LocalPlan,
    Payload,
    Setting,
    TrainJob,
    Update,
)
from fedlora.evaluation.summary import summarise
from fedlora.population.sampling import (
    Roster,
    cohort,
    deal,
    panel,
)
from fedlora.population.workload import evaluation_tokens, training_tokens
from fedlora.run import checkpoint
from fedlora.run.progress import RoundProgress, round_summary
from fedlora.run.tracking import (
    Tracker,
    read_jsonl,
)
from fedlora.server.combine import combine
from fedlora.server.method import Method
from fedlora.server.postprocess import Moment, Postprocessor
from fedlora.server.round_metrics import (
    diagnosis,
    engine_record,
    training_record,
)
from fedlora.server.validation import check_update
from fedlora.wire.codec import (
    WIRE_BYTES,
    Glance,
    update_bytes,
)

log = logging.getLogger(__name__)

MOST_PER_MESSAGE = 256
"""Clients in one message, unless asked otherwise. A worker and the server hold a reply in memory
whole (half a MiB per client of the default run, tens for larger models), progress is seen by
replies alone, and whoever dies loses a whole message: with everybody of a large population in one
round, a share of the round per worker would be too much of all three."""


@dataclass(frozen=True)
class EvaluationSchedule:
    """Which clients are evaluated, when, and with which adapter."""

    every: int = 1
    """Rounds between evaluations; the last round is always evaluated; 0: never."""
    first: bool = True
    """Also before round 1."""
    groups: tuple[str, ...] = ("unseen_random",)
    """Of ``seen``, ``unseen_random``, ``unseen_task`` (fixed panels) and ``participants`` (those
    who will train next, as the FlexLoRA code evaluates)."""
    clients: int = 20
    """Panel size per group; 0: everybody."""
    adapters: tuple[str, ...] = ("full",)
    """``full``: the global update as exactly as it is known (for FlexLoRA the whole W: large for
    large models); ``largest``: at the population's largest ranks; ``own``: at the client's."""
    plan: EvaluatePlan = field(default_factory=EvaluatePlan)

    def __post_init__(self) -> None:
        at_least("evaluate.every", self.every, 0)
        at_least("evaluate.clients", self.clients, 0)
        if self.every and not (self.groups and self.adapters):
            raise ValueError(
                f"evaluate.groups={list(self.groups)} and evaluate.adapters={list(self.adapters)} "
                "must not be empty; evaluate.every=0 turns evaluation off"
            )
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
    """How long a run lasts, and when it must stop instead."""

    rounds: int = 3
    lr_decay: float = 1.0
    """The local learning rate is multiplied by this once ``lr_decay_round`` is complete."""
    lr_decay_round: int = 0
    """0: never. The FlexLoRA code halves it after round 15."""
    min_success: float = 0.5
    """Share of a round's clients that must succeed, or the run stops."""
    min_clients: int = 1
    max_update_norm: float = 0.0
    """Updates that move further than this (Frobenius) are rejected; 0: no bound."""
    clients_per_message: int = 0
    """Most clients in one Flower message; 0: as many as the engine likes (sequential: a fourth of
    a worker's share of the round), and no more than `MOST_PER_MESSAGE`."""
    wire: str = "float32"
    """Number format of payloads on the wire: ``float32``, ``bfloat16`` or ``float64``."""
    timeout_s: float = 3600.0
    """Seconds that a round waits for its slowest client."""
    keep: int = 3
    """Checkpoints kept."""
    threads: int = 1
    """Intra-op threads of the server's linear algebra. More are faster on large layers; another
    number gives other last bits, which is why it does not follow the machine."""

    def __post_init__(self) -> None:
        at_least("rounds", self.rounds, 1)
        at_least("lr_decay", self.lr_decay, 0, strict=True)
        at_least("lr_decay_round", self.lr_decay_round, 0)
        share("min_success", self.min_success)
        at_least("min_clients", self.min_clients, 1)
        at_least("max_update_norm", self.max_update_norm, 0)
        at_least("clients_per_message", self.clients_per_message, 0)
        at_least("timeout_s", self.timeout_s, 0, strict=True)
        at_least("keep", self.keep, 1)
        at_least("threads", self.threads, 1)
        one_of("wire", self.wire, WIRE_BYTES)

    def plan(self, base: LocalPlan, round: int) -> LocalPlan:
        """The configured plan with the learning rate of this round."""
        if self.lr_decay_round and round > self.lr_decay_round:
            return replace(base, lr=base.lr * self.lr_decay)
        return base


@dataclass
class _Phase:
    """What is under way: training or one evaluation of one round."""

    round: int
    jobs: dict[int, TrainJob]
    started: float
    down: dict[int, int]
    """Bytes that each client is sent before it trains."""


@dataclass
class Session:
    """The state of a run and everything that happens to it between messages."""

    method: Method
    setting: Setting
    roster: Roster
    plan: LocalPlan
    schedule: EvaluationSchedule
    rounds: Rounds
    workers: int
    """Processes that train at once, as far as the server knows: how finely cohorts are split."""
    folder: Path
    """The run folder; checkpoints go to its ``checkpoints/``."""
    tracker: Tracker
    messages_per_worker: int = 4
    """Into how many messages a worker's share of a round is cut: as the engine likes it."""
    config_hash: str = ""
    audit: Callable[[Payload], Mapping[str, float | int | str]] | None = None
    """Looks at the global model after every round, for its record."""
    postprocess: Sequence[Postprocessor] = ()
    """What happens to clients' changes between accepted and averaged; none: nothing does."""
    emit: Callable[[str], None] = log.info
    state: State = field(init=False)
    done: int = field(init=False, default=0)
    """Rounds complete."""

    def __post_init__(self) -> None:
        self.state = self.method.init_state(self.setting)
        self._phase: _Phase | None = None
        self._said: set[str] = set()  # engines' notes that whoever watches has read
        self._notes: set[str] = set()  # of the phase under way

    # --- resuming -----------------------------------------------------------------------------

    def resume(self) -> int:
        """Go on after the newest intact checkpoint of the run folder; the number of rounds done.

        Raises:
            RunError: if that checkpoint was written under another configuration.
        """
        found = checkpoint.latest(self.folder / "checkpoints")
        if found is None:
            return 0
        if found.config_hash != self.config_hash:
            raise RunError(
                f"{self.folder}: the checkpoint of round {found.round} was written under another "
                f"configuration ({found.config_hash[:12]}, now {self.config_hash[:12]}); rounds "
                "and runtime may change, anything else needs a new run folder"
            )
        self.state, self.done = found.state, found.round
        return self.done

    def evaluation_missing(self) -> bool:
        """Whether the round that the run stands at still wants its evaluation: at the start, or
        when a run was killed after a checkpoint and before what it had to say about it."""
        due = self.schedule.due(self.done, self.rounds.rounds)
        panels = {(g, a) for g in self.schedule.groups for a in self.schedule.adapters}
        return due and bool(panels - self._evaluated(self.done))

    def _evaluated(self, round: int) -> set[tuple[str, str]]:
        """What metrics.jsonl already says about a round: (group, adapter)."""
        records = read_jsonl(self.folder / "metrics.jsonl")
        mine = (r for r in records if r.get("kind") == "evaluate" and r.get("round") == round)
        return {(str(r.get("group")), str(r.get("adapter"))) for r in mine}

    def safe(self) -> str:
        """What a run that stops here has kept, for messages."""
        if not self.done:
            return "No round was complete yet"
        return f"The first {self.done} rounds are safe in {self.folder}"

    # --- training -----------------------------------------------------------------------------

    def train_cohorts(self, round: int) -> list[list[TrainJob]]:
        """The round's jobs, split over messages by the tokens that each will probably need."""
        clients = [
            self.method.enlist(self.state, c) for c in cohort(self.roster, self.setting.seed, round)
        ]
        plan, starts, plans = self.rounds.plan(self.plan, round), {}, {}
        for c in clients:
            if c.ranks not in starts:
                starts[c.ranks] = self.method.client_start(self.state, c)
                plans[c.ranks] = self.method.plan(self.state, c, plan)
        jobs = [
            TrainJob(self.setting.seed, round, c, starts[c.ranks], plans[c.ranks]) for c in clients
        ]
        weights = [training_tokens(self.roster.shards[j.client.id], j.plan) for j in jobs]
        self._begin(round, "train", len(jobs))
        wire = self.rounds.wire
        down = {
            j.client.id: self.method.bytes_down(self.state, j.client, j.start, wire) for j in jobs
        }
        self._phase = _Phase(round, {j.client.id: j for j in jobs}, time.monotonic(), down)
        hands = deal(weights, self._messages(len(jobs)), self._most)
        return [[jobs[i] for i in hand] for hand in hands]

    @property
    def _most(self) -> int:
        """Clients that one message may hold."""
        return self.rounds.clients_per_message or MOST_PER_MESSAGE

    def _messages(self, jobs: int) -> int:
        needed = -(-jobs // self._most)
        if self.rounds.clients_per_message:
            return needed
        return max(needed, min(jobs, self.messages_per_worker * self.workers))

    def _begin(self, round: int, phase: str, clients: int) -> None:
        self._notes = set()
        label = f"round {round}/{self.rounds.rounds}  {phase}"
        self._progress = RoundProgress(clients, label, emit=self.emit)

    def on_reply(self, reply: Glance) -> None:
        """Show progress when a reply arrives, and what an engine says of itself if it is new."""
        for note in reply.notes:
            if note not in self._said:
                self.emit(f"engine: {note}")
        self._said.update(reply.notes)
        self._notes.update(reply.notes)
        self._progress.done(reply.clients, reply.losses, reply.failed)

    def on_step(self, step: int, steps: int, loss: float) -> None:
        """Show progress in a round whose clients take their steps together."""
        self._progress.on_step(step, steps, loss)

    def finish_training(
        self, results: Iterable[Update | Failure], state: State
    ) -> dict[str, float | int | str]:
        """Validate and aggregate a round's results, write the checkpoint and the records.

        Clients of whom nothing came count as failed.

        Args:
            results: of the round's clients.
            state: into which they are aggregated: that of the round's start, or what exchanges
                have made of it (`fedlora.server.method.RoundOutcome`).

        Raises:
            RunError: if too few clients succeeded. Completed rounds stay on disk.
        """
        assert self._phase is not None
        phase, arrived = self._phase, time.monotonic()
        by_client = {r.client.id: r for r in results}
        updates, failures = self._sort_out(phase, by_client)
        self._report_clients(phase, updates, failures, by_client)
        self._require_enough(phase, updates, failures)
        self.state = combine(
            self.method,
            state,
            updates,
            Moment(self.setting.seed, phase.round),
            starts={i: job.start for i, job in phase.jobs.items()},
            postprocessors=self.postprocess,
        )
        seconds = time.monotonic() - arrived
        seconds_training = arrived - phase.started
        record = training_record(phase.round, updates, failures, seconds_training)
        record |= engine_record(updates, self._notes)
        record["wire/up_bytes"] = sum(self._bytes_up(phase, r) for r in by_client.values())
        record["wire/down_bytes"] = sum(
            self._bytes_down(phase, j.client, by_client.get(i)) for i, j in phase.jobs.items()
        )
        record["round/aggregate_seconds"] = seconds
        record |= diagnosis(self.method, self.state, self.setting, updates)
        record |= self.method.report(self.state)
        if self.audit is not None:
            record |= self.audit(self.method.global_update(self.state))
        record["state/hash"] = checkpoint.state_hash(self.state)[:12]
        record["round/seconds"] = time.monotonic() - phase.started
        # Records before the checkpoint: if a kill comes between, resuming drops them and repeats
        # the round; the other way round they would be lost.
        self.tracker.round(record)
        checkpoint.save(
            self.folder / "checkpoints",
            phase.round,
            self.state,
            self.rounds.keep,
            config_hash=self.config_hash,
        )
        self.done = phase.round
        self.emit(round_summary(record | {"rounds": self.rounds.rounds}))
        self._phase = None
        return record

    def _sort_out(
        self, phase: _Phase, by_client: Mapping[int, Update | Failure]
    ) -> tuple[list[Update], list[Failure]]:
        """Accepted updates and failures, each by client id."""
        updates, failures = [], []
        for cid, job in sorted(phase.jobs.items()):
            result = by_client.get(cid)
            if result is None:
                failures.append(Failure(job.client, "NoReply", "no reply came"))
            elif isinstance(result, Failure):
                failures.append(result)
            else:
                try:
                    check_update(
                        result,
                        job.client,
                        job.start,
                        max_norm=self.rounds.max_update_norm,
                        allow_shrink=job.plan.self_prune is not None,
                        dense=job.plan.switch is not None,
                        density=self.setting.density,
                    )
                    updates.append(result)
                except RejectedUpdate as error:
                    failures.append(Failure(job.client, "RejectedUpdate", error.reason))
        return updates, failures

    def _require_enough(
        self, phase: _Phase, updates: Sequence[Update], failures: Sequence[Failure]
    ) -> None:
        for f in failures[:5]:
            tier = f"{f.client.tier}, " if f.client.tier else ""
            self.emit(
                f"round {phase.round}: client {f.client.id} ({tier}rank {f.client.ranks.label}) "
                f"failed: {f.kind}: {f.message}"
            )
            if f.traceback:
                log.debug("client %d: %s", f.client.id, f.traceback)
        if len(failures) > 5:
            self.emit(f"round {phase.round}: and {len(failures) - 5} more, see clients.jsonl")
        needed = max(self.rounds.min_clients, self.rounds.min_success * len(phase.jobs))
        if len(updates) < needed or not updates:
            first = (
                f"; first failure: {failures[0].kind}: {failures[0].message}" if failures else ""
            )
            raise RunError(
                f"round {phase.round}: only {len(updates)} of {len(phase.jobs)} clients succeeded "
                f"(min_success={self.rounds.min_success}, min_clients={self.rounds.min_clients})"
                f"{first}. {self.safe()}"
            )

    def _bytes_up(self, phase: _Phase, result: Update | Failure | None) -> int:
        """What a client sent, accepted or not."""
        if not isinstance(result, Update):
            return 0
        plan = phase.jobs[result.client.id].plan
        exchanged = int(result.metrics.get("exchanged_up", 0))
        return update_bytes(result.payload, plan, self.rounds.wire) + exchanged

    def _bytes_down(self, phase: _Phase, client: Client, result: Update | Failure | None) -> int:
        """What a client was sent: its start and, in a round of several exchanges, the rest."""
        start = phase.down[client.id]
        if not isinstance(result, Update):
            return start
        return start + int(result.metrics.get("exchanged_down", 0))

    def _report_clients(
        self,
        phase: _Phase,
        updates: Sequence[Update],
        failures: Sequence[Failure],
        by_client: Mapping[int, Update | Failure],
    ) -> None:
        def row(client: Client) -> dict[str, object]:
            return {
                "round": phase.round,
                "client": client.id,
                "tier": client.tier,
                "rank": client.ranks.label,
                "examples": client.num_examples,
                "bytes_down": self._bytes_down(phase, client, by_client.get(client.id)),
                "bytes_up": self._bytes_up(phase, by_client.get(client.id)),
            }

        rows = [row(u.client) | dict(u.metrics) for u in updates]
        rows += [row(f.client) | {"failure": f.kind, "message": f.message} for f in failures]
        self.tracker.clients(rows)

    # --- evaluation ---------------------------------------------------------------------------

    def evaluate_cohorts(self, round: int) -> list[tuple[str, list[EvaluateJob]]]:
        """Tagged batches of evaluation jobs after this round; empty where none is due."""
        if not self.schedule.due(round, self.rounds.rounds):
            return []
        batches: list[tuple[str, list[EvaluateJob]]] = []
        evaluated = self._evaluated(round)
        for group in self.schedule.groups:
            for kind in self.schedule.adapters:
                if (group, kind) in evaluated:
                    continue  # a run that was killed between two panels goes on here
                jobs = self._evaluation_jobs(round, group, kind)
                # Fewer messages than in training: the full adapter can be as large as the model,
                # and what comes back are a few numbers per client.
                weights = [evaluation_tokens(self.roster.shards[j.client.id], j.plan) for j in jobs]
                hands = deal(weights, min(2 * self.workers, self._messages(len(jobs))))
                batches += [(f"{group}:{kind}", [jobs[i] for i in hand]) for hand in hands]
        self._begin(round, "evaluate", sum(len(jobs) for _, jobs in batches))
        self._evaluation_started = time.monotonic()
        return batches

    def _evaluation_jobs(self, round: int, group: str, kind: str) -> list[EvaluateJob]:
        seed = self.setting.seed
        if group == "participants":
            clients = cohort(self.roster, seed, round + 1)
        else:
            clients = panel(self.roster, group, self.schedule.clients, seed)
        fixed = {"full": None, "largest": self.setting.max_ranks}
        wanted = [
            self.method.evaluated_ranks(self.state, c) if kind == "own" else fixed[kind]
            for c in clients
        ]
        clients = [self.method.enlist(self.state, c) for c in clients]
        adapters = {r: self.method.global_update(self.state, r) for r in dict.fromkeys(wanted)}
        return [
            EvaluateJob(seed, round, c, adapters[r], self.schedule.plan)
            for c, r in zip(clients, wanted, strict=True)
        ]

    def finish_evaluation(
        self, round: int, results: Mapping[str, Sequence[Evaluation | Failure]]
    ) -> dict[str, float]:
        """Summarise tagged results, write one record per tag; the first tag's numbers."""
        numbers: dict[str, float] = {}
        for tag, found in results.items():
            group, _, adapter = tag.partition(":")
            good = sorted(
                (r for r in found if isinstance(r, Evaluation)), key=lambda r: r.client.id
            )
            failed = [r for r in found if isinstance(r, Failure)]
            for f in failed[:3]:
                self.emit(
                    f"round {round}: evaluating client {f.client.id} failed: {f.kind}: {f.message}"
                )
            if not good:
                self.emit(f"round {round}: evaluation of {group} gave nothing: all clients failed")
            summary = summarise(good) if good else {"clients": 0.0}
            record: dict[str, float | int | str] = {
                "kind": "evaluate",
                "round": round,
                "group": group,
                "adapter": adapter,
                "failed": len(failed),
                "round/evaluate_seconds": time.monotonic() - self._evaluation_started,
                **summary,
            }
            self.tracker.round(record)
            self.emit(round_summary(record | {"rounds": self.rounds.rounds}))
            numbers |= {f"{tag}/{k}": v for k, v in summary.items()} if numbers else dict(summary)
        return numbers
