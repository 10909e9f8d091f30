"""A round's exchanges through Flower messages."""

import secrets
from collections.abc import Mapping, Sequence

from flwr.app import RecordDict

from fedlora.core.types import Client, Failure
from fedlora.server.method import ClientChannel
from fedlora.split.codec import decode_ups, encode_downs, unreadable
from fedlora.split.protocol import Down, InitMessage, Up


class MessageLink:
    """Clients behind Flower nodes: one message per node and exchange.

    Args:
        channel: to the round's clients.
        inits: of these clients, by id.
    """

    def __init__(self, channel: ClientChannel, inits: Mapping[int, InitMessage]) -> None:
        self.channel, self.inits = channel, inits
        self._opened: set[int] = set()

    @property
    def wire(self) -> str:
        """Number format of adapters."""
        return self.channel.wire

    def exchange(self, downs: Mapping[int, Down]) -> Mapping[int, Up | Failure]:
        """Send and wait. If a node does not answer, all its clients have failed."""

        nonce = secrets.token_hex(8)

        def content(who: Sequence[Client]) -> RecordDict:
            new = {c.id: self.inits[c.id] for c in who if c.id not in self._opened}
            mine = {c.id: downs[c.id] for c in who}
            channel = self.channel
            return encode_downs(
                mine,
                new,
                worker=channel.worker,
                source=channel.source,
                wire=channel.wire,
                nonce=nonce,
            )

        found: dict[int, Up | Failure] = {}
        clients = [self.inits[i].client for i in sorted(downs)]
        for who, answer in self.channel.exchange(clients, "split", content):
            if isinstance(answer, str):
                found |= {c.id: Failure(c, "WorkerError", answer) for c in who}
                continue
            asked = {c.id: c for c in who}
            try:
                found |= decode_ups(answer, asked, wire=self.wire, nonce=nonce)
            except Exception as error:  # a reply is foreign input: it must not end the run
                found |= {c.id: Failure(c, "WorkerError", unreadable(error)) for c in who}
        self._opened |= {i for i, up in found.items() if isinstance(up, Up)}
        return found
