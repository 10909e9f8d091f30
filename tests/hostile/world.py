"""Whole runs through Flower messages whose clients do not train but move, one of them hostile."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from flwr.app import Context, Message, RecordDict

from fedlora.core.types import Evaluation, Failure, LocalPlan, TrainJob, Update
from fedlora.engine import secure
from fedlora.engine.client import completed
from fedlora.population.sampling import Roster
from fedlora.run.tracking import JsonlTracker, Trackers, read_jsonl
from fedlora.secagg.codec import decode_request, encode_answers
from fedlora.secagg.config import SecAgg
from fedlora.server import flower
from fedlora.server.postprocess import Postprocessor
from fedlora.server.protection import PlannedRun, PrivacySpec
from fedlora.server.schedule import EvaluationSchedule, Rounds
from fedlora.server.session import Session
from fedlora.techniques.lora.payload import LowRankPayload
from fedlora.techniques.spp.technique import Scaling
from fedlora.techniques.switchlora.technique import SwitchTraining
from fedlora.wire.messages import Result, decode_jobs, encode_results
from simulations.app.grid import InProcessGrid
from strategies.base import LoRAStrategy
from strategies.fedit import FedIT
from strategies.fedsb import FedSB
from strategies.flexlora import FlexLoRA
from strategies.heterolora import HeteroLoRA
from strategies.rebase import Rebase
from strategies.slora import SLoRA
from strategies.spp import SPP
from strategies.switchlora import SwitchLoRA
from tests.generators import trained
from tests.strategies.laws import population_for

METHODS: Mapping[str, Callable[[], LoRAStrategy]] = {
    "fedit": FedIT,
    "flexlora": FlexLoRA,
    "sums": lambda: FlexLoRA(residual="carry"),
    "heterolora": HeteroLoRA,
    "flora": Rebase,
    "fedex": lambda: Rebase(hold="mean"),
    "fedsb": FedSB,
    "ravan": lambda: FedSB(heads=3, gains=True, weighting="covered"),
    "spp": SPP,
    "slora": lambda: SLoRA(aggregator=FlexLoRA(), stage1_rounds=1),
    "switchlora": lambda: SwitchLoRA(
        switching=SwitchTraining(interval=10.0, ratio=10.0), steps=3, horizon=200
    ),
}
BAD, NEIGHBOUR = 2, 3
"""The hostile client, and one whose job lies in the same message."""
SIZE = 0.05
"""By how much every number of a client moves in a round."""

Spoil = Callable[[TrainJob, Update], Sequence[Result]]
"""What the hostile client returns in place of its update."""
Edit = Callable[[RecordDict], None]
"""What becomes of the reply that holds the hostile client's update."""


@dataclass(frozen=True)
class Shard:
    """As much of a client's data as a session looks at."""

    id: int
    num_train: int
    category: str = ""

    def holds(self, split: str) -> tuple[int, int]:
        return self.num_train, 10 * self.num_train


def failed(job: TrainJob, update: Update) -> Sequence[Result]:
    """The client gives up."""
    return [Failure(job.client, "PlantedFault", "it gave up")]


def honest(job: TrainJob, update: Update) -> Sequence[Result]:
    return [update]


@dataclass
class World:
    """A run of one method in a folder. Clients 2 and 3 share a message."""

    method: LoRAStrategy
    folder: Path
    attack: Callable[[int], tuple[Spoil, Edit | None]] = lambda _: (honest, None)
    """By round."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The records of the rounds."""
    said: list[str] = field(default_factory=list)
    secagg: SecAgg = field(default_factory=SecAgg)
    postprocess: Sequence[Postprocessor] = ()
    privacy: PrivacySpec = field(default_factory=PrivacySpec)

    def play(self, rounds: int) -> "World":
        """Run, or go on from the checkpoint, to the end of a round."""
        population = population_for(self.method)
        population = replace(
            population, clients=tuple(replace(c, num_examples=40) for c in population.clients)
        )
        ids = tuple(c.id for c in population.clients)
        shards = tuple(Shard(c.id, c.num_examples) for c in population.clients)
        plan = LocalPlan(steps=3)
        if isinstance(self.method, SwitchLoRA):
            plan = replace(plan, technique=self.method.switching)
        if isinstance(self.method, SPP):
            plan = replace(plan, technique=Scaling())
        sums = isinstance(self.method, FlexLoRA) and not self.method.needs_updates
        options = {"min_success": 0.1, "clients_per_message": 2, "keep": 1, **self.options}
        roster = Roster(population.clients, ids, {"seen": ids}, len(ids), shards, 0)
        session = Session(
            method=self.method,
            setting=population,
            roster=roster,
            plan=plan,
            schedule=EvaluationSchedule(every=0),
            rounds=Rounds(rounds=rounds, **options),
            workers=1,
            folder=self.folder,
            tracker=Trackers(()),
            emit=self.said.append,
            postprocess=(Postprocessor(),) if sums and not self.secagg.on else self.postprocess,
            secagg=self.secagg,
            privacy=self.privacy.begin(PlannedRun(roster, plan, 0, rounds, self.folder)),
        )
        session.resume()
        session.tracker = Trackers([JsonlTracker(self.folder, session.done or -1)])
        grid = InProcessGrid(self.on_message, 3)
        with mock.patch.object(flower, "nodes_of", lambda grid: sorted(grid.get_node_ids())):
            flower.FederatedRun(session, worker="{}", source="").start(grid)
        assert session.done == rounds
        return self

    @property
    def hashes(self) -> list[str]:
        """Of the state after each round."""
        return [r["state/hash"] for r in read_jsonl(self.folder / "metrics.jsonl")]

    def rows(self, round: int) -> dict[int, dict[str, Any]]:
        """The round's records of clients, by id."""
        rows = read_jsonl(self.folder / "clients.jsonl")
        return {r["client"]: r for r in rows if r["round"] == round}

    def on_message(self, message: Message, context: Context) -> Message:
        """A whole round's work, or a stage of a secure sum."""
        if message.metadata.message_type == "train.secagg":
            return self.answer_stage(message, context)
        return self.answer(message)

    def answer(self, message: Message) -> Message:
        """All jobs of a message one after another, as a worker does them."""
        envelope = decode_jobs(message.content)
        spoil, edit = self.attack(envelope.jobs[0].round) if envelope.jobs else (honest, None)
        results: list[Result] = []
        for job in sorted(envelope.jobs, key=lambda j: j.client.id):
            assert isinstance(job, TrainJob)
            update = moved(job)
            results += spoil(job, update) if job.client.id == BAD else [update]
        content = encode_results(
            results, wire=envelope.wire, jobs=envelope.jobs, nonce=envelope.nonce
        )
        if edit is not None and any(j.client.id == BAD for j in envelope.jobs):
            edit(content)
        return Message(content, reply_to=message)

    def answer_stage(self, message: Message, context: Context) -> Message:
        """A stage of a secure sum."""
        request = decode_request(message.content)

        def train(jobs: Sequence[TrainJob]) -> list[Update | Failure]:
            found: list[Update | Failure] = []
            for job in jobs:
                spoil, _ = self.attack(job.round)
                update = moved(job)
                results = spoil(job, update) if job.client.id == BAD else [update]
                found += [r for r in results if not isinstance(r, Evaluation)]
            return found

        answers = secure.answer(request, message.content, context.state, train)
        content = encode_answers(answers, nonce=request.nonce, trained=secure.trained(request))
        return Message(content, reply_to=message)


def moved(job: TrainJob) -> Update:
    """An honest update: every number that the client trains has moved at random."""
    start, plan = job.start, job.plan
    end = trained(start, 1000 * job.round + job.client.id, SIZE)
    factors = start.low_rank()
    if factors is not None and isinstance(end, LowRankPayload):
        frozen = {"a": not plan.train_a, "b": not plan.train_b}
        sent = {
            n: getattr(factors[n[:-2]], n[-1]) if frozen[n[-1]] else t for n, t in end.tensors()
        }
        end = end.from_header(end.header(), sent)
    end = end.from_header(end.header(), {n: t.clone().float() for n, t in end.tensors()})
    metrics = {"loss": 2.0, "tokens": 40.0, "examples": 12.0, "steps": 3.0}
    return completed(job, end, metrics, job.client.num_examples)


def tensors(update: Update) -> dict[str, torch.Tensor]:
    """Copies of what an update sends."""
    return {n: t.clone() for n, t in update.payload.tensors()}


def with_tensors(update: Update, sent: Mapping[str, torch.Tensor]) -> Update:
    payload = update.payload
    return replace(update, payload=payload.from_header(payload.header(), sent))
