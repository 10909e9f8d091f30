"""Answers split messages in a worker process: it loads clients from their node's state, lets them
do their part of the exchange, and stores them again.

Flower gives a message to any free process, so everything that a client needs is in its node's
state. The exception is the graph of a forward pass that waits for its gradient: it is computed
again (its dropout masks are functions of the step) or, with ``keep_graphs``, reused if this process
has made it.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from uuid import uuid4

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor

from fedlora.core.errors import CLIENT_ERRORS
from fedlora.core.payload import Payload, plain_factors
from fedlora.core.types import (
    Client,
    Failure,
    Ranks,
)
from fedlora.data.batches import TokenExample
from fedlora.engine.base import Faults
from fedlora.models.stages import Stages
from fedlora.split.client import SplitClient
from fedlora.split.codec import Arrays, Request, init_header, read_init
from fedlora.split.protocol import Down, InitMessage, Up
from fedlora.split.rounds import failure_of
from fedlora.techniques.lora.payload import LowRankPayload


class SplitWorker:
    """Clients of a split on this process's model.

    Args:
        stages: of the resident model.
        examples: returns the training examples of a client.
        faults: planted ones, for rehearsals.
    """

    def __init__(
        self,
        stages: Stages,
        examples: Callable[[InitMessage], Sequence[TokenExample]],
        faults: Faults | None = None,
    ) -> None:
        self.stages, self.examples, self.faults = stages, examples, faults
        self._live: dict[int, tuple[str, SplitClient]] = {}  # client -> (its state's stamp, it)

    def answer(self, request: Request, state: RecordDict) -> dict[int, Up | Failure]:
        """Do one exchange with the clients of a node and update the node's state.

        If a client raises, the work that it did before the error is stored.
        """
        return {i: self._one(i, down, request, state) for i, down in request.downs.items()}

    def _one(self, i: int, down: Down, request: Request, state: RecordDict) -> Up | Failure:
        began = request.inits.get(i)
        live = self._live.pop(i, None)
        try:
            client = self._open(began) if began else self._recall(i, down, state, live)
        except CLIENT_ERRORS as error:
            return failure_of(began.client if began else _client_of(i, state), error)
        if (planted := self._planted(client.init, down)) is not None:
            return planted
        answer: Up | Failure
        try:
            answer = self._spoiled(client.init, client.receive(down))
        except CLIENT_ERRORS as error:
            answer = failure_of(client.init.client, error)
        stamp = _store(state, i, client)
        if client.init.terms.keep_graphs and client.pending >= 0:
            self._live[i] = stamp, client
        return answer

    def _planted(self, init: InitMessage, down: Down) -> Failure | None:
        """The planted failure of a client in this exchange, before it has done anything."""
        if self.faults is None:
            return None
        learns = down.gradient is not None
        return self.faults.before(init.terms.seed, init.round, init.client, learns=learns)

    def _spoiled(self, init: InitMessage, up: Up) -> Up:
        """An answer whose adapters are as planted."""
        if self.faults is None or up.adapter is None:
            return up
        payload: Payload = LowRankPayload(up.adapter)
        payload = self.faults.spoiled(init.terms.seed, init.round, init.client, payload)
        return replace(up, adapter=plain_factors(payload))

    def _open(self, begun: InitMessage) -> SplitClient:
        return SplitClient(self.stages, self.examples(begun), begun)

    def _recall(
        self, i: int, down: Down, state: RecordDict, live: tuple[str, SplitClient] | None
    ) -> SplitClient:
        held = _load(state, i)
        known = live is not None and live[0] == held.stamp
        client = live[1] if live is not None and known else self._open(held.init)
        learns = down.gradient is not None
        goes_on = held.pending >= 0 and (learns or down.middle is not None)
        if goes_on and not client.ready(held.pending, graph=learns):
            client.resume(held.pending, held.grads, forward=learns)
        return client


@dataclass(frozen=True)
class _StoredClient:
    """A client in a node's state."""

    init: InitMessage
    """Its `InitMessage` with the present adapters and optimizer state."""
    stamp: str
    """Identifies this state: a client that a process kept may be older."""
    pending: int
    """The step whose gradient is still to come; -1: none."""
    grads: Mapping[str, Tensor]
    """Gradients from a U-shape's tail, by buffer."""


def _store(state: RecordDict, i: int, client: SplitClient) -> str:
    """Put a client into its node's state. Returns the stamp of that state."""
    stamp = uuid4().hex
    arrays: Arrays = {}
    trained = client.trainable
    now = replace(client.init, adapter=trained.adapter(), optimizer_state=trained.optimizer_state())
    exact = "float64" if client.model.dtype == torch.float64 else "float32"
    header = {
        "init": init_header(i, now, arrays, exact),
        "stamp": stamp,
        "pending": client.pending,
    }
    if client.init.cut.u_shaped and client.pending >= 0:
        arrays |= {f"{i}/grads/{k}": g.cpu().numpy() for k, g in client.grads().items()}
    state[f"split/{i}"] = ConfigRecord({"header": json.dumps(header)})
    state[f"split/{i}/arrays"] = ArrayRecord({name: Array(a) for name, a in arrays.items()})
    return stamp


def _load(state: RecordDict, i: int) -> _StoredClient:
    """Read a client from a node's state.

    Raises:
        ValueError: if the node has never opened the client.
    """
    if f"split/{i}" not in state:
        raise ValueError(f"client {i} has not been opened on this node")
    header = json.loads(str(state.config_records[f"split/{i}"]["header"]))
    found = {name: a.numpy() for name, a in state.array_records[f"split/{i}/arrays"].items()}
    start = f"{i}/grads/"
    return _StoredClient(
        init=read_init(i, header["init"], found),
        stamp=str(header["stamp"]),
        pending=int(header["pending"]),
        grads={
            name[len(start) :]: torch.from_numpy(np.array(a))
            for name, a in found.items()
            if name.startswith(start)
        },
    )


def _client_of(i: int, state: RecordDict) -> Client:
    """The client whose failure is reported, as far as the node knows it."""
    return _load(state, i).init.client if f"split/{i}" in state else Client(i, Ranks({}), 0)
