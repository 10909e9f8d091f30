"""The Flower ClientApp: a slot that runs the virtual clients that a message names, or a silo.

A node whose config names a silo card (`fedlora.silo.card`) is one client, with records of its own.
What goes wrong there is told in the silo's own log: the text and the trace of an exception can
quote a record, so the server hears its kind alone, or a sentence of this project that quotes none.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import cast

import psutil
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedlora.core.errors import CLIENT_ERRORS, ConfigError, ModelError
from fedlora.core.package import ROOT
from fedlora.core.source_hash import source_hash
from fedlora.core.types import EvaluateJob, Failure, TrainJob, Update
from fedlora.engine.memory import limit_freed_memory
from fedlora.engine.secure import answer as answer_stage
from fedlora.engine.secure import trained
from fedlora.engine.worker import worker
from fedlora.secagg.codec import decode_request, encode_answers
from fedlora.silo.card import KEY, SiloCard, read_card
from fedlora.silo.memory import SiloMemory, memory_of
from fedlora.silo.site import MARK, Assignment, introduce, worker_of
from fedlora.split.codec import decode_downs, encode_ups
from fedlora.split.context import split_worker
from fedlora.wire.messages import Result, decode_jobs, encode_results
from simulations.app.own_modules import find_own_modules

app = ClientApp()
find_own_modules()


def card_of(context: Context) -> SiloCard | None:
    """The card of the silo that this node is; None: it is a slot.

    Raises:
        ConfigError: if the card cannot be read.
    """
    path = context.node_config.get(KEY)
    if path is None:
        return None
    card = read_card(str(path))
    card.settle()
    return card


def answer(message: Message, card: SiloCard | None = None) -> Message:
    """Run the jobs of one message on this process's engine; failures are results too.

    Raises:
        RuntimeError: if this process imported other sources than the server's.
        ConfigError: if the message is for silos and this node is none, or the other way round.
    """
    limit_freed_memory()  # what the last message has left
    envelope = decode_jobs(message.content, lambda text: remembered(card, text))
    check_source(envelope.source)
    engine = worker(described_for(envelope.worker, card)())
    results: list[Result] = [*envelope.lost]
    results += engine.train([j for j in envelope.jobs if isinstance(j, TrainJob)])
    results += engine.evaluate([j for j in envelope.jobs if isinstance(j, EvaluateJob)])
    sys.stdout.flush()
    if card is not None:
        results = [discreet(r, card) for r in results]
    content = encode_results(
        results,
        wire=envelope.wire,
        notes=engine.notes(),
        jobs=envelope.jobs,
        nonce=envelope.nonce,
        up=envelope.up,
        memory=envelope.memory,
    )
    return Message(content, reply_to=message)


def remembered(card: SiloCard | None, text: str) -> SiloMemory:
    """What this silo keeps of the run of a message.

    Args:
        card: of the silo that this node is; None: it is a slot.
        text: what the message says of the worker.

    Raises:
        ConfigError: if this node is none.
    """
    if card is None:
        raise not_a_silo()
    return memory_of(card, text)


def described_for(text: str, card: SiloCard | None) -> Callable[[], str]:
    """What this process has to open for a message, when it is called.

    Args:
        text: what the message says of it.
        card: of the silo that this node is; None: it is a slot.

    Raises:
        ConfigError: if the message is for silos and this node is none.
    """
    if card is not None:
        return lambda: worker_of(card, text).to_json()
    if f'"{MARK}":' in text:
        raise not_a_silo()
    return lambda: text


class SourceError(RuntimeError):
    """This process imported other sources than the server's."""


def check_source(source: str) -> None:
    """Raise a RuntimeError unless this process imported the server's sources."""
    if source != source_hash():
        raise SourceError(
            f"worker sources {source_hash()} in {ROOT} differ from the server's {source}: the "
            "SuperLink was started from another checkout. Stop it, or use "
            "`python -m simulations.run`, which keeps its own"
        )


def not_a_silo() -> ConfigError:
    """What a slot answers to a message for a silo."""
    return ConfigError(
        "this node is no silo, for its SuperNode was started without a silo card: "
        f"--node-config '{KEY}=\"/path/of/the/card.yaml\"' (docs/deployment.md)"
    )


def discreet(result: Result, card: SiloCard) -> Result:
    """A silo's result as the server may have it: failures without text and trace, which stay in the
    silo's log, and updates with the seconds that the process has cost."""
    if isinstance(result, Failure):
        print(f"{result.kind}: {result.message}\n{result.traceback}", flush=True)
        return Failure(result.client, result.kind, f"the log of silo {card.name} says why")
    if isinstance(result, Update):
        spent = time.time() - psutil.Process().create_time()
        return replace(result, metrics={**result.metrics, "process_seconds": spent})
    return result


def at_home(context: Context, do: Callable[[SiloCard | None], Message]) -> Message:
    """Call with the silo's card, if this node is one; what is raised there is told discreetly.

    Raises:
        RuntimeError: in place of what a silo's own libraries raise: the kind of error alone.
    """
    try:
        card = card_of(context)
    except ConfigError as error:
        print(f"ConfigError: {error}", flush=True)
        raise ConfigError("a silo's card cannot be used: its log says why") from None
    if card is None:
        return do(None)
    said = f"the log of silo {card.name} says why"
    try:
        return do(card)
    except CLIENT_ERRORS as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        ours = isinstance(error, ConfigError | ModelError | SourceError)
        told = str(error) if ours else f"{type(error).__name__}: {said}"
    raise RuntimeError(told)


@app.query("hello")
def hello(message: Message, context: Context) -> Message:
    """The name of this silo."""

    def named(card: SiloCard | None) -> Message:
        if card is None:
            raise not_a_silo()
        check_source(str(message.content.config_records[KEY]["source"]))
        return _reply(card.name, message)

    return at_home(context, named)


@app.query("card")
def card(message: Message, context: Context) -> Message:
    """What this silo holds, in numbers; its records are tokenised first."""

    def counted(card: SiloCard | None) -> Message:
        if card is None:
            raise not_a_silo()
        request = message.content.config_records[KEY]
        check_source(str(request["source"]))
        assignment = Assignment.from_json(str(request["text"]))
        return _reply(introduce(card, assignment).to_json(), message)

    return at_home(context, counted)


def _reply(text: str, message: Message) -> Message:
    return Message(RecordDict({KEY: ConfigRecord({"text": text})}), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the virtual clients that the message names, or the silo's own."""
    return at_home(context, lambda card: answer(message, card))


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate the virtual clients that the message names, or the silo's own."""
    return at_home(context, lambda card: answer(message, card))


@app.train("secagg")
def secagg(message: Message, context: Context) -> Message:
    """Answer one stage of a secure sum for the clients of this node."""
    return at_home(context, lambda card: summed(message, context, card))


def summed(message: Message, context: Context, card: SiloCard | None) -> Message:
    """The clients' part in one stage of a secure sum.

    Raises:
        RuntimeError: if this process imported other sources than the server's.
        ConfigError: if the message is for silos and this node is none, or the other way round.
    """
    request = decode_request(message.content)
    check_source(request.source)
    described = described_for(request.worker, card)
    notes: list[str] = []

    def train(jobs: Sequence[TrainJob]) -> list[Update | Failure]:
        limit_freed_memory()
        engine = worker(described())
        results = list(engine.train(jobs))
        notes.extend(engine.notes())
        return [cast(Update | Failure, discreet(r, card)) if card else r for r in results]

    answers = answer_stage(request, message.content, context.state, train)
    if card is not None:
        answers = {
            i: cast(Failure, discreet(a, card)) if isinstance(a, Failure) else a
            for i, a in answers.items()
        }
    sys.stdout.flush()
    content = encode_answers(answers, nonce=request.nonce, notes=notes, trained=trained(request))
    return Message(content, reply_to=message)


@app.train("split")
def split(message: Message, context: Context) -> Message:
    """Answer one message of a split round for the virtual clients of this node.

    Raises:
        RuntimeError: if this process imported other sources than the server's.
    """
    request = decode_downs(message.content)
    check_source(request.source)
    answers = split_worker(request.worker).answer(request, context.state)
    content = encode_ups(answers, wire=request.wire, nonce=request.nonce)
    return Message(content, reply_to=message)
