"""A Flower grid inside one process: no Ray, but the same messages and bitwise
identical results."""

from collections.abc import Iterable, Mapping, Sequence
from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedlora.core.errors import CLIENT_ERRORS


class InProcessGrid(Grid):
    """Runs the messages in order in this process.

    Flower 1.41 builds messages only inside a task, so this process takes the identity of one: the
    single use of a non-public name.

    Args:
        app: answers the messages.
        nodes: how many there are, with the ids from 1.
        configs: what each node's config has beside its number, as by ``--node-config``.
    """

    def __init__(
        self, app: ClientApp, nodes: int = 4, configs: Sequence[Mapping[str, str]] = ()
    ) -> None:
        TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1
        self._app = app
        self._queue: dict[str, Message] = {}
        own: list[Mapping[str, str]] = [*configs] or [{}] * nodes
        self._contexts = {
            i: Context(
                run_id=1,
                node_id=i,
                node_config={"partition-id": i - 1, "num-partitions": nodes, **own[i - 1]},
                state=RecordDict(),
                run_config={},
            )
            for i in range(1, nodes + 1)
        }

    def set_run(self, run: Run) -> None:
        """One process, one run: nothing to set."""

    @property
    def run(self) -> Run:
        """The run that this grid serves."""
        return Run.create_empty(run_id=1)

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Flower's deprecated constructor."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """The slots."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Queue the messages; they run when replies are pulled."""
        ids = []
        for message in messages:
            key = str(uuid4())
            message.metadata.__dict__["_message_id"] = key
            self._queue[key] = message
            ids.append(key)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Run the oldest queued message; what it raises is an error reply, as in Flower's engine.

        One at a time, so that a caller that polls sees progress.
        """
        wanted = set(message_ids)
        key = next((k for k in self._queue if k in wanted), None)
        if key is None:
            return []
        message = self._queue.pop(key)
        try:
            return [self._app(message, self._contexts[message.metadata.dst_node_id])]
        except CLIENT_ERRORS as error:
            return [Message(Error(code=0, reason=repr(error)), reply_to=message)]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Run all messages in order. There is no timeout, because the work is done in this call."""
        ids = list(self.push_messages(messages))
        return [reply for i in ids for reply in self.pull_messages([i])]
