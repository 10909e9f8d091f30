"""What a run's model answers to prompts that a user gives: one, a file of them, a conversation.

A prompt is laid out as the examples that the run was trained on.
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedlora.core.config import build
from fedlora.core.errors import ConfigError
from fedlora.data.encode import RecordEncoder
from fedlora.data.records import Record, Turn
from fedlora.data.source import Source
from fedlora.engine.worker import resolve_device
from fedlora.evaluation.beam_search import Decoding, Hypothesis, search
from fedlora.evaluation.metrics import Ids
from fedlora.models.language_model import LanguageModel
from simulations.tools.base_model import language_model_of
from simulations.tools.final_payload import final_payload, run_config

GREEDY = Decoding(beams=1, no_repeat=0, max_new_tokens=128)
"""How prompts are answered unless options say otherwise."""
FIELDS = ("instruction", "prompt", "input")
EXIT, NEW = "/exit", "/new"


@dataclass(frozen=True)
class Question:
    """A prompt as text."""

    instruction: str
    input: str = ""


@dataclass(frozen=True, eq=False)
class Answerer:
    """A model with what a prompt and an answer look like to it."""

    model: LanguageModel
    encoder: RecordEncoder
    decoding: Decoding

    def prompt(self, question: Question, before: Sequence[Turn] = ()) -> Ids:
        """Everything that the model reads before it answers, ``[t]``.

        Args:
            question: the last one.
            before: the conversation so far.
        """
        turns = (*before, Turn("user", question.instruction)) if before else ()
        asked = Question("") if turns else question
        record = Record(0, "test", "", asked.instruction, asked.input, "", turns=turns)
        (found,) = self.encoder.encode([record])
        return np.array(found.ids[: max(1, found.prompt_tokens)])

    def answer(self, prompts: Sequence[Ids]) -> list[Hypothesis]:
        """The best continuation of each prompt."""
        return search(self.model, prompts, self.decoding)


def answerer(
    run: Path, adapter: str, device: str, decoding: Decoding, emit: Callable[[str], object]
) -> Answerer:
    """Load the model of a run.

    Args:
        run: its folder.
        adapter: ``final``, or ``none`` for the base model as it is.
        device: as in `fedlora.engine.worker.resolve_device`.
        decoding: how to answer.
        emit: shows one line.

    Raises:
        ConfigError, CheckpointError, DataError, ModelError: one sentence each.
    """
    model = load_model(run, adapter, device, emit)
    source = build(run_config(run).data, Source, "data")  # type: ignore[type-abstract]
    source = dataclasses.replace(source, max_length=max(32, model.info.context))
    return Answerer(model, source.encoder(model.tokenizer), decoding)


def load_model(
    run: Path, adapter: str, device: str, emit: Callable[[str], object]
) -> LanguageModel:
    """The base model of a run with the run's final payload mounted, or ``none``."""
    config = run_config(run)
    model = language_model_of(run, config.model, emit).load(resolve_device(device))
    model.mount(final_payload(run, config, model.info, emit) if adapter == "final" else None)
    return model


def questions(file: Path) -> list[Question]:
    """The prompts of a file: one a line, or JSON lines with ``instruction`` (or ``prompt``) and
    perhaps ``input``.

    Raises:
        ConfigError: naming the file, the line and what is allowed.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--file {file} cannot be read: {error}") from error
    read = _from_json if file.suffix in (".jsonl", ".json") else _from_text
    found = [read(file, n, line) for n, line in enumerate(lines, start=1) if line.strip()]
    if not found:
        raise ConfigError(f"--file {file} has no prompt")
    return found


def _from_text(file: Path, number: int, line: str) -> Question:
    return Question(line)


def _from_json(file: Path, number: int, line: str) -> Question:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{file}, line {number} is no JSON: {error}") from error
    asked = (row.get("instruction") or row.get("prompt")) if isinstance(row, dict) else None
    given = row.get("input") or "" if isinstance(row, dict) else ""
    if not isinstance(asked, str) or not isinstance(given, str):
        raise ConfigError(
            f"{file}, line {number} must be an object with a text in instruction or prompt, and "
            "perhaps one in input"
        )
    return Question(asked, given)


def answer_file(answers: Answerer, file: Path, show: Callable[[str], object] = print) -> None:
    """Answer every prompt of a file; one JSON object a line, in the order of the prompts."""
    asked = questions(file)
    found = answers.answer([answers.prompt(q) for q in asked])
    for question, answer in zip(asked, found, strict=True):
        row = dataclasses.asdict(question) | {"output": answer.text, "ended": answer.ended}
        show(json.dumps(row, ensure_ascii=False))


def chat(answers: Answerer, lines: Iterator[str], show: Callable[[str], object] = print) -> None:
    """Answer line after line; the exchanges so far come before each question, as in a conversation
    of the training data. What does not fit into the context loses its first exchanges."""
    before: list[Turn] = []
    for line in lines:
        text = line.strip()
        if text == EXIT:
            return
        if text == NEW:
            before = []
        if text in ("", NEW):
            continue
        (answer,) = answers.answer([answers.prompt(Question(text), before)])
        before += [Turn("user", text), Turn("assistant", answer.text)]
        show(answer.text)


def typed() -> Iterator[str]:
    """What a person types, with a prompt where the input is a terminal, until its end."""
    asking = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            yield input(asking)
        except EOFError:
            return
