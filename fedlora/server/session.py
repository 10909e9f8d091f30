"""One federated run as the server sees it, free of Flower: its state, checkpoints and records.

`Session` turns a method's hooks into batches of jobs and turns results into the next state. It is
driven by `fedlora.server.flower.FederatedRun`, which carries jobs and results over the wire.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor

from fedlora.algebra.state import State
from fedlora.algebra.summand import Summands
from fedlora.core.errors import CheckpointError, RunError
from fedlora.core.payload import Payload
from fedlora.core.types import (
    Client,
    EvaluateJob,
    Evaluation,
    Failure,
    Ranks,
    TrainJob,
    Update,
)
from fedlora.population.sampling import panel
from fedlora.population.workload import evaluation_tokens, training_tokens
from fedlora.run import checkpoint
from fedlora.run.progress import RoundProgress, round_summary
from fedlora.run.tracking import read_jsonl
from fedlora.secagg.config import REAL
from fedlora.secagg.summed import Summed
from fedlora.server.average import usable_average
from fedlora.server.client_state import ClientStore
from fedlora.server.combine import Combined, combine, zero_summand
from fedlora.server.compressed import with_compressed_starts
from fedlora.server.early_stop import Standing, Watch, standing, stopped, watched_values
from fedlora.server.evaluation_round import (
    evaluated_pairs,
    evaluation_jobs,
    recorded,
)
from fedlora.server.packing import Packing
from fedlora.server.postprocess import Moment, Postprocessor
from fedlora.server.round_metrics import (
    diagnosis,
    engine_record,
    influence_record,
    training_record,
)
from fedlora.server.secure_sum import SumPlan, usable_sum
from fedlora.server.session_parts import SessionParts
from fedlora.server.training_round import (
    Replies,
    TrainingRound,
    begin,
    client_rows,
    collect,
    enough,
    fewest,
    require_enough,
    stage_kept,
    training_jobs,
    validate,
    with_collusion,
    with_recalls,
    with_residuals,
    withheld,
)
from fedlora.server.validation import absurd
from fedlora.wire.messages import Glance

VIRTUAL = "virtual"
"""The key of the virtual clock in a checkpoint."""
CLIENT_STATE = "client_state"
"""The key of the client states' index in a checkpoint, and the name of their folder."""
Record = dict[str, float | int | str]


@dataclass
class Session(SessionParts):
    """The state of a run, and all steps of a run except the transport of messages."""

    state: State = field(init=False)
    client_store: ClientStore = field(init=False)
    """What clients keep, in the run folder's ``client_state/``."""
    done: int = field(init=False, default=0)
    """Rounds complete."""

    def __post_init__(self) -> None:
        self.robust.check(self.roster.per_round)
        if self.secagg.on:
            self.secagg.check_cohort(self.roster.per_round)
        self.state = self.method.init_state(self.setting)
        if self.secagg.on:
            self.privacy.check_sums(self.secagg, self._nothing)
        self.client_store = ClientStore(self.folder / CLIENT_STATE)
        self._packing = Packing(
            self.workers, self.messages_per_worker, self.rounds.clients_per_message
        )
        self._state_audit = self.method.state_audit()
        self._current: TrainingRound | None = None
        self._said: set[str] = set()  # engines' notes that have been shown
        self._notes: set[str] = set()  # notes of the current phase

    # --- resuming -----------------------------------------------------------------------------

    def resume(self) -> int:
        """Continue after the newest intact checkpoint of the run folder; returns the completed
        rounds.

        Raises:
            RunError: if that checkpoint was written under another configuration.
        """
        found = checkpoint.latest(self.folder / "checkpoints")
        if found is None:
            self.client_store.restore(0, {})
            return 0
        if found.config_hash != self.config_hash:
            raise RunError(
                f"{self.folder}: the checkpoint of round {found.round} was written under another "
                f"configuration ({found.config_hash[:12]}, now {self.config_hash[:12]}); rounds "
                "and runtime may change, anything else needs a new run folder"
            )
        self.state, self.done = found.state, found.round
        self.client_store.restore(found.round, found.extra.get(CLIENT_STATE, {}))
        self.privacy.restore(found.extra)
        if self.virtual is not None:
            self.virtual.restore(found.extra[VIRTUAL], found.beside)
        self.client_store.prune(checkpoint.saved_rounds(self.folder / "checkpoints")[0])
        return self.done

    def evaluation_missing(self) -> bool:
        """Whether the last completed round still needs its evaluation: at the start, or when a run
        was killed between a checkpoint and its evaluation."""
        due = self.schedule.due(self.done, self.rounds.rounds)
        panels = {(g, a) for g in self.schedule.groups for a in self.schedule.adapters}
        return due and bool(panels - evaluated_pairs(self.folder, self.done))

    # --- early stopping -----------------------------------------------------------------------

    def stopped(self) -> str:
        """The sentence with which the run ends before its last round; empty: it goes on.

        Raises:
            RunError: if evaluations do not report what is watched.
        """
        if self.done >= self.rounds.rounds:
            return ""
        if why := self.privacy.exhausted(self.done):
            return why
        if self.watch is None:
            return ""
        return stopped(self.standing(self.watch), self.watch)

    def standing(self, watch: Watch) -> Standing:
        """How the run stands by the evaluations on record.

        One that the present schedule does not ask for does not count: it followed what was once the
        last round.

        Raises:
            RunError: if evaluations do not report what is watched.
        """
        records = [
            r
            for r in read_jsonl(self.folder / "metrics.jsonl")
            if r["round"] <= self.done and self.schedule.due(r["round"], self.rounds.rounds)
        ]
        try:
            return standing(watched_values(records, watch), watch)
        except ValueError as error:
            raise RunError(f"{error}. {self.safe()}") from error

    def best(self, ranks: Ranks | None = None) -> tuple[int, Payload] | None:
        """The round with the best evaluation, and the global update after it; None: nothing is
        watched or was measured, or that round's checkpoint is gone or cannot be read (which is
        said)."""
        found = self.standing(self.watch) if self.watch else Standing()
        if found.best is None:
            return None
        round = found.best_round
        if round in (0, self.done):
            state = self.state if round else self.method.init_state(self.setting)
            return round, self.global_payload(ranks, state)
        try:
            saved = checkpoint.of_round(self.folder / "checkpoints", round)
        except CheckpointError as error:
            self.emit(f"best/ is not written: {error}")
            return None
        if saved is None:
            self.emit(f"best/ is not written: the checkpoint of round {round} is no longer kept")
            return None
        return round, self.global_payload(ranks, dict(saved.state))

    def safe(self) -> str:
        """A sentence about the completed rounds, for messages."""
        if not self.done:
            return "No round was complete yet"
        return f"The first {self.done} rounds are safe in {self.folder}"

    # --- progress -----------------------------------------------------------------------------

    def _begin_phase(self, round: int, phase: str, clients: int) -> None:
        self._notes = set()
        label = f"round {round}/{self.rounds.rounds}  {phase}"
        self._progress = RoundProgress(clients, label, emit=self.emit)

    def on_reply(self, reply: Glance) -> None:
        """Show progress when a reply arrives, and the engine's notes that are new."""
        for note in reply.notes:
            if note not in self._said:
                self.emit(f"engine: {note}")
        self._said.update(reply.notes)
        self._notes.update(reply.notes)
        self._progress.done(reply.clients, reply.losses, reply.failed)

    def on_step(self, step: int, steps: int, loss: float) -> None:
        """Show progress in a round whose clients step together."""
        self._progress.on_step(step, steps, loss)

    # --- training -----------------------------------------------------------------------------

    def claims(self) -> list[str]:
        """What is claimed of the run's privacy, line by line; nothing without any."""
        return self.privacy.statement(self._nothing)

    def _nothing(self) -> Summands:
        """What a client adds that did not move."""
        return zero_summand(self.method, self.state, self.roster.clients[0])

    def drawn(self, round: int) -> list[Client]:
        """The clients that a round asks."""
        if self.virtual is not None:
            return self.virtual.drawn(self.roster, self.setting.seed, round)[1]
        return self.privacy.cohort(self.roster, self.setting.seed, round)

    def train_cohorts(self, round: int) -> list[list[TrainJob]]:
        """The round's jobs, split over messages by the tokens that each will probably need."""
        if self.virtual is None:
            current = self._made(round, self.drawn(round))
        else:
            made = partial(self._made, round)
            current = self.virtual.open(self.roster, self.setting.seed, round, made)
        self._current, jobs = current, list(current.jobs.values())
        self._begin_phase(round, "train", len(jobs))
        weights = [training_tokens(self.roster.shards[j.client.id], j.plan) for j in jobs]
        return self._packing.training(jobs, weights)

    def _made(self, round: int, clients: Sequence[Client]) -> TrainingRound:
        """The round of these clients, which begins now."""
        seed = self.setting.seed
        plan = self.privacy.plan(self.rounds.plan(self.plan, round))
        kept = self.client_store.get
        jobs = training_jobs(
            self.method, self.state, clients, plan, seed=seed, round=round, kept=kept
        )
        feedback = self.rounds.error_feedback or self.compression.error_feedback
        if self.at_home and (feedback or self.compression.down.acts):
            jobs = with_recalls(jobs, self.client_store, feedback)
        elif feedback:
            jobs = with_residuals(jobs, self.client_store)
        jobs, down = with_compressed_starts(jobs, self.compression.down, self.client_store)
        return begin(self.method, self.state, jobs, round, self.rounds.wire, down)

    def sum_plan(self, jobs: Sequence[TrainJob]) -> SumPlan:
        """The secure sum of the current round.

        Args:
            jobs: of the clients that are asked, by id, at least one.
        """
        assert self._current is not None
        account, ranks, privacy = self._current.account, self.setting.max_ranks, self.privacy
        run = self.secagg, self.method, self.state, jobs, self.postprocess
        least = fewest(self.rounds, len(self._current.jobs))
        more = least, privacy.limit(), privacy.aborted
        return SumPlan.open(*run, ranks, account.starts, self.safe(), *more)

    def finish_training(
        self, results: Iterable[Update | Failure], state: State, summed: Summed | None = None
    ) -> Record:
        """Validate and aggregate a round's results, write the records and the checkpoint. Clients
        without a reply count as failed.

        Args:
            results: the results of the round's clients.
            state: the state into which they are aggregated: that of the round's start, or the one
                that a split round returned (`fedlora.server.method.RoundOutcome`).
            summed: the secure sum that the updates went into; None: they are here.

        Raises:
            RunError: if too few clients succeeded. Completed rounds stay on disk.
        """
        current, arrived = self._current, time.monotonic()
        assert current is not None
        found = collect(current, results)
        if summed is None:
            found = with_collusion(self.squad, current, found)
            replies = validate(current, found, self.rounds, self.setting)
        else:
            replies = withheld(current, found, self.setting)
        if state is not self.state and (wrong := absurd(state.items())):
            raise RunError(
                f"round {current.round}: after its exchanges the server's {wrong}. {self.safe()}"
            )
        release = self.privacy.release(current.round)
        combined, replies, summed = self._combined(current, replies, state, summed, release)
        if summed is not None:
            account = replace(current.account, sums=summed.traffic)
            current = replace(current, account=account)
        self.tracker.clients(client_rows(current, replies))
        if not enough(current, replies, self.rounds):
            self.privacy.aborted()
        require_enough(current, replies, self.rounds, self.emit, self.safe())
        if release is not None:
            self.privacy.released(release, summed.short if summed else None)
        before, self.state = self.state, combined.state
        stage_kept(self.method, before, current, replies, self.client_store)
        self.client_store.commit(current.round)
        record = self._record(current, replies, arrived)
        record |= {} if summed is None else summed.record()
        record |= influence_record(self.robust, combined.influence)
        record |= self.squad.record(current.jobs, combined.influence)
        self._checkpoint(current, record)
        return record

    def _combined(
        self,
        current: TrainingRound,
        replies: Replies,
        state: State,
        summed: Summed | None,
        release: Postprocessor | None,
    ) -> tuple[Combined, Replies, Summed | None]:
        """The next state, the replies of those who are in it, and the secure sum, if one is asked
        for (`usable_sum`, `usable_average`)."""
        now = Moment(self.setting.seed, current.round)
        if self.secagg.on:
            return usable_sum(
                self.method,
                state,
                current,
                replies,
                summed,
                plan=self.sum_plan,
                zero=self._nothing,
                now=now,
                rounds=self.rounds,
                postprocessors=self.postprocess,
                release=release,
                safe=self.safe(),
            )
        virtual = self.virtual
        average = virtual.combine if virtual else partial(combine, zero=self._nothing)
        averaged = usable_average(
            self.method,
            state,
            current,
            replies,
            average=average,
            now=now,
            rounds=self.rounds,
            postprocessors=self.postprocess,
            release=release,
            rule=self.robust,
            safe=self.safe(),
        )
        return *averaged, None

    def _record(self, current: TrainingRound, replies: Replies, arrived: float) -> Record:
        """The record of a round whose updates are aggregated.

        Args:
            current: the round.
            replies: its results.
            arrived: time of the last reply on the monotonic clock, in seconds.
        """
        seconds, updates = time.monotonic() - arrived, replies.updates
        training = arrived - current.started
        record = training_record(current.round, updates, replies.failures, training)
        record |= engine_record(updates, self._notes)
        if replies.bound.median:
            record["round/median_change_norm"] = replies.bound.median
        record |= current.account.record({**replies.by_client, **current.absent})
        record |= {**current.timing, **(self.virtual.report() if self.virtual else {})}
        record |= self.client_store.record()
        record["round/aggregate_seconds"] = seconds
        starts = {i: job.start for i, job in current.jobs.items()}
        known = bool(updates) and self.secagg.kind != REAL  # whose sum alone is seen
        mixed = self.virtual is not None and self.virtual.mixes
        if known and not mixed:  # of one state alone is there an exact mean
            record |= diagnosis(self.method, self.state, self.setting, updates, starts)
        if known:
            record |= self.analyses.record(
                self.method, self.state, self.setting, current.round, updates, starts
            )
        record |= self.method.report(self.state)
        record |= self.privacy.record(current.round)
        if self._state_audit is not None:
            record |= self._state_audit(self.state)
        if self.audit is not None:
            record |= self.audit(self.global_payload())
        record["state/hash"] = checkpoint.state_hash(self.state)[:12]
        record["round/seconds"] = time.monotonic() - current.started
        return record

    def _checkpoint(self, current: TrainingRound, record: Record) -> None:
        """Write the record and the checkpoint of a completed round.

        The record is written first. If the process is killed in between, the resumed run drops the
        record and repeats the round. In the other order the record would be lost.
        """
        self.tracker.round(record)
        folder, index = self.folder / "checkpoints", self.client_store.index()
        extra: dict[str, Any] = {CLIENT_STATE: index} if index else {}
        beside: dict[str, Tensor] = {}
        if self.virtual is not None:
            self.virtual.close()
            extra[VIRTUAL], beside = self.virtual.saved()
        checkpoint.save(
            folder,
            current.round,
            self.state,
            self.rounds.keep,
            config_hash=self.config_hash,
            extra=extra | self.privacy.saved(),
            beside=beside,
            also=[self.standing(self.watch).best_round] if self.watch else (),
        )
        self.client_store.prune(checkpoint.saved_rounds(folder)[0])
        self.done = current.round
        self.emit(round_summary(record | {"rounds": self.rounds.rounds}))
        self._current = None

    # --- evaluation ---------------------------------------------------------------------------

    def global_payload(self, ranks: Ranks | None = None, state: State | None = None) -> Payload:
        """The global model's update (`Method.global_update`) as a payload; of the present state
        unless another is given."""
        update = self.method.global_update(self.state if state is None else state, ranks)
        return self.method.technique.payload(update)

    def evaluate_cohorts(self, round: int) -> list[tuple[str, list[EvaluateJob]]]:
        """Tagged batches of evaluation jobs after this round; empty if no evaluation is due."""
        if not self.schedule.due(round, self.rounds.rounds):
            return []
        batches: list[tuple[str, list[EvaluateJob]]] = []
        evaluated = evaluated_pairs(self.folder, round)
        for group in self.schedule.groups:
            for adapter in self.schedule.adapters:
                if (group, adapter) in evaluated:
                    continue  # a run that was killed between two panels goes on here
                jobs = self._evaluation_jobs(round, group, adapter)
                weights = [evaluation_tokens(self.roster.shards[j.client.id], j.plan) for j in jobs]
                packed = self._packing.evaluation(jobs, weights)
                batches += [(f"{group}:{adapter}", message) for message in packed]
        self._begin_phase(round, "evaluate", sum(len(jobs) for _, jobs in batches))
        self._evaluation_started = time.monotonic()
        return batches

    def _evaluation_jobs(self, round: int, group: str, adapter: str) -> list[EvaluateJob]:
        schedule, roster, split = self.schedule, self.roster, self.schedule.plan.split
        seed = roster.seed if schedule.seed is None else schedule.seed
        if group == "participants":
            clients = [c for c in self.drawn(round + 1) if roster.shards[c.id].holds(split)[0]]
        else:
            clients = panel(roster, group, schedule.clients, seed, split)
        return evaluation_jobs(
            self.method,
            self.state,
            clients,
            adapter,
            schedule.plan,
            max_ranks=self.setting.max_ranks,
            seed=seed,
            round=round,
            kept=self.client_store.get,
        )

    def finish_evaluation(
        self, round: int, results: Mapping[str, Sequence[Evaluation | Failure]]
    ) -> None:
        """Summarise tagged results: one record per tag, ``<group>:<adapter>``."""
        trained = self.client_store.clients()
        for tag, found in results.items():
            seconds = time.monotonic() - self._evaluation_started
            record = recorded(self.tracker, tag, found, self.emit, round, seconds, trained)
            self.emit(round_summary(record | {"rounds": self.rounds.rounds}))
