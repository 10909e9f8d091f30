"""Values of different groups that must agree, compared before the run has a folder.

A class checks its own fields; what one group asks for and another limits is checked here.
docs/configuration.md has the table of all of them.
"""

from collections.abc import Callable
from typing import Protocol

from fedlora.core.errors import ConfigError
from fedlora.core.types import EvaluatePlan
from fedlora.data.build import moved_text
from fedlora.data.source import Source
from fedlora.data.store import TokenStore
from fedlora.models.modules import ModelInfo
from fedlora.population.sampling import Roster
from fedlora.server.schedule import EvaluationSchedule, Rounds


class Asked(Protocol):
    """The groups that are compared (`simulations.app.parts.Parts`)."""

    @property
    def data(self) -> Source: ...
    @property
    def evaluate(self) -> EvaluationSchedule: ...
    @property
    def federation(self) -> Rounds: ...


def check_model(parts: Asked, info: ModelInfo) -> None:
    """Compare lengths with the model's positions, before any text is read.

    Raises:
        ConfigError: naming both values and the largest that is allowed.
    """
    check_length(parts.data, info)
    if parts.evaluate.every:
        check_generation(parts.evaluate.plan, info)


def check_length(data: Source, info: ModelInfo) -> None:
    """Refuse examples that may be longer than the model's context.

    They are not cut to it in silence: ``data.max_length`` is part of what identifies a run.

    Raises:
        ConfigError: naming both lengths.
    """
    if info.context_stated and data.max_length > info.context:
        raise ConfigError(
            f"data.max_length={data.max_length} exceeds the {info.context} positions of "
            f"{info.name}: use data.max_length={info.context} or less (longer examples are then "
            "cut as data.truncation says), or a model with more positions"
        )


def check_generation(plan: EvaluatePlan, info: ModelInfo) -> None:
    """Refuse generation that leaves no room for a prompt.

    Raises:
        ConfigError: naming both lengths.
    """
    if plan.generate and plan.max_new_tokens >= info.context:
        raise ConfigError(
            f"evaluate.plan.max_new_tokens={plan.max_new_tokens} leaves no room for a prompt in "
            f"the {info.context} positions of {info.name}: use less than {info.context}"
        )


def check_tokens(store: TokenStore, info: ModelInfo) -> None:
    """Refuse text whose token ids the model has no embedding for.

    Raises:
        ConfigError: naming the largest id and the rows of the embedding.
    """
    if info.vocabulary and store.largest_token >= info.vocabulary:
        raise ConfigError(
            f"the tokenizer of {info.name} made token {store.largest_token} of the data, and the "
            f"model has embeddings for 0..{info.vocabulary - 1}: tokenizer and weights in "
            "model.path are of different models, or tokens were added without new embeddings"
        )


def check_rounds(rounds: Rounds, roster: Roster, emit: Callable[[str], None]) -> None:
    """Refuse a round that cannot have enough clients, and say which setting never takes effect.

    Raises:
        ConfigError: naming both numbers.
    """
    if rounds.min_clients > roster.per_round:
        raise ConfigError(
            f"federation.min_clients={rounds.min_clients} can never be met with "
            f"{roster.per_round} clients per round: lower it, or raise population.per_round"
        )
    if rounds.lr_decay != 1 and rounds.lr_decay_round >= rounds.rounds:
        emit(
            f"federation.lr_decay={rounds.lr_decay} acts after round {rounds.lr_decay_round}, and "
            f"the run has {rounds.rounds}: the learning rate never changes"
        )


def data_notes(store: TokenStore) -> tuple[str, ...]:
    """What was done to the examples so that they fit, for the header of a run: how many are cut to
    ``data.max_length``, and how many a partition moved."""
    cut, moved, total = store.cut_examples, store.moved_examples, store.num_examples
    where = "the longer text" if store.labels else f"data.truncation={store.source['truncation']}"
    length = f"data.max_length={store.source['cutoff']} tokens ({where})"
    notes = (f"{cut:,} of {total:,} examples are cut to {length}", moved_text(moved, total))
    return tuple(note for note, count in zip(notes, (cut, moved), strict=True) if count)
