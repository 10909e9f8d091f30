"""The Flower ClientApp: a slot that runs whatever virtual clients a message names."""

import sys

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedlora.codec import Result, decode_jobs, encode_results
from fedlora.identity import ROOT, source_hash
from fedlora.types import EvaluateJob, TrainJob
from fedlora.worker import worker

app = ClientApp()


def answer(message: Message) -> Message:
    """Run the jobs of one message on this process's engine; failures are results too.

    Raises:
        RuntimeError: if this process imported other sources than the server's.
    """
    envelope = decode_jobs(message.content)
    if envelope.source != source_hash():
        raise RuntimeError(
            f"worker sources {source_hash()} in {ROOT} differ from the server's {envelope.source}: "
            "the SuperLink was started from another checkout. Stop it, or use "
            "`python -m simulations.run`, which keeps its own"
        )
    engine = worker(envelope.worker)
    results: list[Result] = []
    results += engine.train([j for j in envelope.jobs if isinstance(j, TrainJob)])
    results += engine.evaluate([j for j in envelope.jobs if isinstance(j, EvaluateJob)])
    sys.stdout.flush()
    content = encode_results(results, wire=envelope.wire, notes=engine.notes())
    return Message(content, reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the virtual clients that the message names."""
    return answer(message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate the virtual clients that the message names."""
    return answer(message)
