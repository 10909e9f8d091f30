"""Answers the stages of a secure sum in a worker process, or at a silo.

Secrets and what a second exchange needs are in the node's state; an update leaves the process only
masked. What a client adds is computed here, by the method and the postprocessors of the run.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from flwr.app import RecordDict
from torch import Tensor

from fedlora.algebra.summand import Product, Summand, Summands
from fedlora.core.config import build
from fedlora.core.errors import CLIENT_ERRORS
from fedlora.core.types import Client, Expected, Failure, Ranks, TrainJob, Update
from fedlora.engine.base import failure
from fedlora.secagg.codec import (
    Answer,
    Request,
    block_of,
    load_member,
    rows_of,
    store_member,
    store_tensors,
    take_tensors,
    tensors_of,
)
from fedlora.secagg.config import KEYS, SHARES, UNMASK, VECTOR
from fedlora.secagg.cost import BOX, PUBLIC, SHARE
from fedlora.secagg.form import Form
from fedlora.secagg.protocol import Member
from fedlora.server.combine import added
from fedlora.server.headed import Headed
from fedlora.server.method import Method
from fedlora.server.postprocess import Moment, Postprocessor
from fedlora.server.validation import check_update
from fedlora.wire.messages import decode_jobs

Train: TypeAlias = Callable[[Sequence[TrainJob]], Sequence[Update | Failure]]
"""Trains jobs on this process's model and data."""


def method_of(described: Mapping[str, Any]) -> Method:
    """A method from `fedlora.server.secure_round.described`."""
    method: Method = build(described["strategy"], Method, "strategy")  # type: ignore[type-abstract]
    head = str(described["head"])
    return Headed(method, {}, head) if head else method


def trained(request: Request) -> bool:
    """Whether clients train in this stage."""
    return request.stage == VECTOR and int(request.common["exchange"]) == 0


def answer(
    request: Request, content: RecordDict, state: RecordDict, train: Train
) -> dict[int, Answer | Failure]:
    """Do one stage with the clients of a node, and update the node's state.

    Args:
        request: that the content holds.
        content: of the message; jobs in it are read in the stage of vectors.
        state: of the node.
        train: of this process.
    """
    if request.stage == VECTOR:
        return _vectors(request, content, state, train)
    steps = {KEYS: _keys, SHARES: _shares, UNMASK: _unmask}
    step, found = steps[request.stage], dict[int, Answer | Failure]()
    for i in request.clients:
        try:
            member, reply = step(i, request, state)
            store_member(state, member)
            found[i] = reply
        except CLIENT_ERRORS as error:
            found[i] = failure(Client(i, Ranks({}), 0), error)
    return found


def _keys(i: int, request: Request, state: RecordDict) -> tuple[Member, Answer]:
    member = Member.begin(i, request.instance, int(request.common["needed"]))
    return member, Answer(np.frombuffer(member.public, dtype=np.uint8))


def _shares(i: int, request: Request, state: RecordDict) -> tuple[Member, Answer]:
    near = request.clients[i]["ids"]
    keys = dict(zip(near, request.rows(f"{i}/keys", PUBLIC), strict=True))
    member, boxes = load_member(state, i, request.instance).shared(keys)
    return member, Answer(block_of([boxes[j] for j in near], BOX))


def _unmask(i: int, request: Request, state: RecordDict) -> tuple[Member, Answer]:
    ids = request.blocks[f"{i}/ids"].tolist()
    n = int(request.clients[i]["survivors"])
    member, shares = load_member(state, i, request.instance).revealed(ids[:n], ids[n:])
    return member, Answer(block_of([shares[j] for j in ids], SHARE))


def _vectors(
    request: Request, content: RecordDict, state: RecordDict, train: Train
) -> dict[int, Answer | Failure]:
    """Train, and add masks to what each client adds; or go on with what it has kept."""
    exchange, last = int(request.common["exchange"]), int(request.common["exchanges"]) - 1
    changes: dict[int, Callable[[], Summands]] = {}
    metrics: dict[int, Mapping[str, Any]] = {}
    found: dict[int, Answer | Failure] = {}
    if trained(request):
        method, post = method_of(request.common["method"]), _postprocessors(request)
        known = tensors_of(request.blocks["state"])
        jobs = {j.client.id: j for j in decode_jobs(content).jobs if isinstance(j, TrainJob)}
        for result in train(list(jobs.values())):
            i = result.client.id
            if isinstance(result, Failure):
                found[i] = result
                continue
            changes[i] = _change(method, known, jobs[i], result, post)
            metrics[i] = {"num_examples": result.num_examples, "metrics": dict(result.metrics)}
    else:
        changes = {i: _kept(state, i) for i in request.clients}
    for i, change in changes.items():
        try:
            x = change()
            found[i] = _masked(i, request, state, x, metrics.get(i, {}))
            if exchange < last:
                store_tensors(state, i, _tensors(x))
        except CLIENT_ERRORS as error:
            found[i] = failure(Client(i, Ranks({}), 0), error)
    return found


def _masked(
    i: int, request: Request, state: RecordDict, x: Summands, report: Mapping[str, Any]
) -> Answer:
    """A client's vector."""
    member = load_member(state, i, request.instance)
    own, exchange = request.clients[i], int(request.common["exchange"])
    form = Form.from_json(request.common["form"])
    bases = tensors_of(request.blocks["bases"]) if exchange else {}
    codes, cut = form.codes(x, float(own["weight"]), i, exchange, bases)
    boxes = dict(zip(own["ids"], rows_of(request.blocks[f"{i}/boxes"], BOX), strict=True))
    member, vector = member.masked(codes, boxes)
    store_member(state, member)
    return Answer(vector, {**report, "cut": cut})


def _change(
    method: Method,
    known: Mapping[str, Tensor],
    job: TrainJob,
    update: Update,
    postprocessors: Sequence[Postprocessor],
) -> Callable[[], Summands]:
    """What a client adds. It checks its own update, for nobody else can."""

    def change() -> Summands:
        check_update(update, Expected(job.client, job.start, job.plan), 0.0)
        now = Moment(job.seed, job.round)
        return added(method, known, job.start, update, now, postprocessors)

    return change


def _kept(state: RecordDict, i: int) -> Callable[[], Summands]:
    return lambda: _summands(take_tensors(state, i))


def _postprocessors(request: Request) -> list[Postprocessor]:
    return [build(p, Postprocessor, "postprocess") for p in request.common["postprocess"]]


B, A = "|b", "|a"


def _tensors(x: Summands) -> dict[str, Tensor]:
    """Summands as tensors that can be kept."""
    found: dict[str, Tensor] = {}
    for name, one in x.items():
        found |= {f"{name}{B}": one.b, f"{name}{A}": one.a} if isinstance(one, Product) else {}
        found |= {} if isinstance(one, Product) else {name: one}
    return found


def _summands(tensors: Mapping[str, Tensor]) -> dict[str, Summand]:
    """The inverse of `_tensors`."""
    found: dict[str, Summand] = {}
    for name, t in tensors.items():
        if name.endswith(B):
            path = name.removesuffix(B)
            found[path] = Product(t, tensors[f"{path}{A}"])
        elif not name.endswith(A):
            found[name] = t
    return found
