"""Workers are set up before the first client works: what they cannot load is no client's failure.

A worker builds the base model, the data and the engine when its first message comes. A message
without jobs makes it do that and nothing else, so an error in its reply is one of the set-up: a
broken base model, a device that is missing, a cache that its machine does not see.
"""

import time
from collections.abc import Sequence

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedlora.core.errors import RunError

POLL_S = 0.05


def check_workers(
    grid: Grid, nodes: Sequence[int], workers: int, content: RecordDict, timeout_s: float
) -> None:
    """Set up every worker, each by a message of its own.

    Args:
        grid: of Flower.
        nodes: registered.
        workers: processes that work at once, as far as the server knows.
        content: of a message without jobs (`fedlora.wire.messages.encode_jobs`).
        timeout_s: seconds to wait for all of them.

    Raises:
        RunError: with the first error that a worker reports.
    """
    messages = [Message(content, node, MessageType.TRAIN) for node in nodes[: max(1, workers)]]
    pending = set(grid.push_messages(messages))
    deadline = time.monotonic() + timeout_s
    while pending and time.monotonic() < deadline:
        arrived = list(grid.pull_messages(pending))
        for reply in arrived:
            pending.discard(reply.metadata.reply_to_message_id)
            if reply.has_error():
                raise RunError(
                    "a worker cannot be set up, so no client has begun: "
                    f"{reason(reply.error.reason or f'error code {reply.error.code}')}"
                )
        if pending and not arrived:
            time.sleep(POLL_S)
    if pending:
        raise RunError(
            f"{len(pending)} of {len(messages)} workers were not set up within {timeout_s:g} s "
            "(federation.timeout_s, but at least 600)"
        )


def reason(text: str) -> str:
    """What an error reply says, without traces: its last line that names an error."""
    lines = [line.strip() for line in text.replace("\\n", "\n").splitlines() if line.strip()]
    telling = [line for line in lines if "Error" in line or "died" in line]
    return (telling or lines or ["unknown"])[-1][:1000]
