"""The Flower ClientApp: a slot that runs the virtual clients that a message names."""

import sys

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedlora.core.package import ROOT
from fedlora.core.source_hash import source_hash
from fedlora.core.types import EvaluateJob, TrainJob
from fedlora.engine.memory import limit_freed_memory
from fedlora.engine.worker import worker
from fedlora.split.codec import decode_downs, encode_ups
from fedlora.split.context import split_worker
from fedlora.wire.messages import Result, decode_jobs, encode_results
from simulations.app.own_modules import find_own_modules

app = ClientApp()
find_own_modules()


def answer(message: Message) -> Message:
    """Run the jobs of one message on this process's engine; failures are results too.

    Raises:
        RuntimeError: if this process imported other sources than the server's.
    """
    limit_freed_memory()  # what the last message has left
    envelope = decode_jobs(message.content)
    check_source(envelope.source)
    engine = worker(envelope.worker)
    results: list[Result] = []
    results += engine.train([j for j in envelope.jobs if isinstance(j, TrainJob)])
    results += engine.evaluate([j for j in envelope.jobs if isinstance(j, EvaluateJob)])
    sys.stdout.flush()
    content = encode_results(
        results,
        wire=envelope.wire,
        notes=engine.notes(),
        jobs=envelope.jobs,
        nonce=envelope.nonce,
    )
    return Message(content, reply_to=message)


def check_source(source: str) -> None:
    """Raise a RuntimeError unless this process imported the server's sources."""
    if source != source_hash():
        raise RuntimeError(
            f"worker sources {source_hash()} in {ROOT} differ from the server's {source}: the "
            "SuperLink was started from another checkout. Stop it, or use "
            "`python -m simulations.run`, which keeps its own"
        )


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the virtual clients that the message names."""
    return answer(message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate the virtual clients that the message names."""
    return answer(message)


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
