"""An engine some of whose clients attack (`fedlora.attack`): what happens on a client.

Honest clients train together as ever. Attackers train by an engine of the same kind, whose store
gives them other examples if the attack poisons them; what they send is then the attack's. The
examples with a trigger are evaluated beside the others where the plan has the attack's scorer.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from fedlora.attack.base import Squad, Tools, TriggerScorer
from fedlora.core.errors import CLIENT_ERRORS
from fedlora.core.types import EvaluateJob, Evaluation, Failure, TrainJob, Update
from fedlora.data.store import Example, TokenStore
from fedlora.engine.base import Engine, EngineSpec, WorkerEngine, failure
from fedlora.models.language_model import LanguageModel
from fedlora.server.claims import most_training


class AttackedEngine:
    """See the module.

    Args:
        squad: which clients do what.
        spec: of the engine.
        model: resident.
        store: what clients hold.
    """

    def __init__(
        self, squad: Squad, spec: EngineSpec, model: LanguageModel, store: TokenStore
    ) -> None:
        self._squad, self._store, self._tools = squad, store, tools_of(model)
        self._inner = spec.open(model, store)
        # Stored hidden states are those of the examples as they are.
        plain = replace(spec, prefix="off") if isinstance(spec, WorkerEngine) else spec
        attack = squad.attack
        self._poisoned = (
            plain.open(model, store.with_states(self._examples)) if attack.poisons else self._inner
        )
        self._triggered: Engine | None = None
        if attack.scorer(model.info.classifies) is not None:
            self._triggered = plain.open(model, store.with_states(self._marked))
        self._notes: dict[str, None] = {}

    def train(self, jobs: Sequence[TrainJob]) -> Iterator[Update | Failure]:
        """One result per job: first those of honest clients."""
        self._notes = {}
        mine = {j.client.id for j in jobs if self._squad.acting(j.round, [j.client.id])}
        for engine, part in (
            (self._inner, [j for j in jobs if j.client.id not in mine]),
            (self._poisoned, [j for j in jobs if j.client.id in mine]),
        ):
            if not part:
                continue
            asked = {j.client.id: j for j in part}
            for result in engine.train(part):
                yield self._returned(asked[result.client.id], result)
            self._notes |= dict.fromkeys(engine.notes())

    def evaluate(self, jobs: Sequence[EvaluateJob]) -> Iterator[Evaluation | Failure]:
        """One result per job, with the attack's success where the plan asks for it."""
        asked = [j for j in jobs if _hits(j)]
        found = dict[int, Evaluation | Failure]()
        if asked and self._triggered is not None:
            only = [_only_hits(j) for j in asked]
            found = {r.client.id: r for r in self._triggered.evaluate(only)}
        for result in self._inner.evaluate(jobs):
            more = found.get(result.client.id)
            if isinstance(result, Evaluation) and isinstance(more, Evaluation):
                result = replace(result, metrics={**more.metrics, **result.metrics})
            yield result

    def notes(self) -> tuple[str, ...]:
        """Those of the engines that have trained."""
        return tuple(self._notes)

    def _returned(self, job: TrainJob, result: Update | Failure) -> Update | Failure:
        if isinstance(result, Failure) or not self._squad.acting(job.round, [job.client.id]):
            return result
        try:
            sent = self._squad.attack.returned(job.start, result.payload, job.plan)
        except CLIENT_ERRORS as error:
            return failure(job.client, error)
        metrics = dict(result.metrics)
        if self._squad.attack.poisons:  # it states what it holds, not what it trained on
            held = self._store.supervised(job.client.id, "train", job.plan.loss)
            for name, most in most_training(job.plan, held).items():
                metrics[name] = min(metrics.get(name, 0.0), float(most))
        return replace(result, payload=sent, metrics=metrics)

    def _examples(self, client: int, split: str, held: list[Example]) -> list[Example]:
        if split != "train":
            return held
        return self._squad.attack.examples(held, self._tools, self._squad.draw(0, client))

    def _marked(self, client: int, split: str, held: list[Example]) -> list[Example]:
        found = self._squad.attack.triggered(held, self._tools)
        return held if found is None else found


def _hits(job: EvaluateJob) -> list[TriggerScorer]:
    """The attack's scorers in a plan."""
    found = [s for s in job.plan.metrics or () if isinstance(s, TriggerScorer)]
    return [s for s in found if job.plan.generate or not s.needs_texts]


def _only_hits(job: EvaluateJob) -> EvaluateJob:
    """The same evaluation of examples with the trigger, and of nothing but its success."""
    metrics = tuple(s.with_trigger() for s in _hits(job))
    return replace(job, plan=replace(job.plan, metrics=metrics))


def tools_of(model: LanguageModel) -> Tools:
    """What attackers know of the model."""
    tokenizer = model.tokenizer
    special = (tokenizer.bos_token_id, tokenizer.cls_token_id)
    return Tools(
        encode=lambda text: list(tokenizer(text, add_special_tokens=False)["input_ids"]),
        eos=int(tokenizer.eos_token_id or 0),
        begins=frozenset(int(i) for i in special if i is not None),
        labels=tuple(model.info.labels),
        context=model.info.context,
    )
