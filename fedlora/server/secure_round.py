"""A round of training whose updates go into a secure sum, through Flower messages.

Each stage of `fedlora.secagg.protocol` is one message to every node and one answer. Clients train
in the stage of vectors. A client that does not answer, or answers what cannot be read, is lost in
that stage, and the others go on as long as there are enough of them.
"""

import secrets
import time
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from fedlora.core.checks import one_line
from fedlora.core.config import describe
from fedlora.core.types import Client, Failure, Update
from fedlora.data.store import TokenStore
from fedlora.secagg.codec import (
    Answer,
    Blocks,
    Request,
    block_of,
    decode_answers,
    encode_request,
    rows_of,
    tensor_block,
)
from fedlora.secagg.config import KEYS, SHARES, STAGES, UNMASK, VECTOR
from fedlora.secagg.cost import BOX, PUBLIC, SHARE
from fedlora.secagg.graph import Graph
from fedlora.secagg.protocol import unmasked
from fedlora.secagg.stages import Stages, not_recovered, too_few
from fedlora.secagg.withheld import Withheld
from fedlora.server.claims import checked
from fedlora.server.headed import Headed
from fedlora.server.method import ClientChannel, Method, RoundOutcome
from fedlora.server.secure_sum import SumPlan, Tally
from fedlora.server.validation import wrong_metrics
from fedlora.wire.messages import encode_jobs

SERVER = "server"
"""Name of the seconds that the server has spent on unmasking."""
Form = tuple[np.dtype[Any], tuple[int, ...]]
"""Type and shape of a block that is due."""
BYTES = np.dtype(np.uint8)


def described(method: Method) -> dict[str, Any]:
    """A method as a client can build it to call `Method.adds` (`fedlora.engine.secure.method_of`):
    its strategy, and how heads are averaged, if they are."""
    if isinstance(method, Headed):
        return {"strategy": describe(method.inner), "head": method.mode}
    return {"strategy": describe(method), "head": ""}


class SecureRound:
    """One round.

    Args:
        plan: of its secure sum.
        channel: to its clients.
        store: what clients hold (`fedlora.server.claims.checked`); None: it is not known.
    """

    def __init__(self, plan: SumPlan, channel: ClientChannel, store: TokenStore | None) -> None:
        self.plan, self.channel, self.store = plan, channel, store
        self.run_token = secrets.token_hex(8)
        self.failures: dict[int, Failure] = {}
        self.reports: dict[int, Update] = {}
        self.seconds = dict.fromkeys((*STAGES, SERVER), 0.0)

    def run(self) -> RoundOutcome:
        """All exchanges.

        Raises:
            RunError: if too many clients are lost.
        """
        tally = Tally(self.plan)
        for exchange in range(self.plan.exchanges):
            Exchange(self, tally, exchange).run()
        summed = tally.summed(self.seconds)
        results: list[Update | Failure] = [
            self.failures.get(i) or self.plan.failure(i, stage)
            for i, stage in sorted(summed.lost.items())
        ]
        results += [r for i, r in sorted(self.reports.items()) if i not in summed.lost]
        return RoundOutcome(self.plan.state, results, summed)


class Exchange:
    """One instance of the protocol.

    Args:
        round: that it belongs to.
        tally: of the exchanges before it; takes in its sum.
        number: counted from 0.
    """

    def __init__(self, round: SecureRound, tally: Tally, number: int) -> None:
        self.round, self.plan, self.tally, self.number = round, round.plan, tally, number
        self.instance = f"{round.run_token}|{round.plan.now.round}|{number}"
        self.bases: Mapping[str, Tensor] = tally.bases
        self.keys: dict[int, bytes] = {}
        self.boxes: dict[int, dict[int, bytes]] = {}
        self.graph: Graph = {}

    def run(self) -> None:
        """All stages.

        Raises:
            RunError: if too many clients are lost.
        """
        stages = Stages(frozenset(self.tally.members))
        stages = Stages(stages.asked, self._keys(stages.asked))
        self._require(too_few(stages, KEYS, self.plan.needed))
        self.graph = self.plan.graph(stages.keys, self.number)
        stages = Stages(stages.asked, stages.keys, self._shares(stages.keys))
        self._require(too_few(stages, SHARES, self.plan.needed))
        vectors, cut = self._vectors(stages.shares)
        stages = Stages(stages.asked, stages.keys, stages.shares, frozenset(vectors))
        self._require(too_few(stages, VECTOR, self.plan.needed))
        self._require(self.plan.hidden(stages, self.number))
        told = self._unmask(stages)
        done = stages.asked, stages.keys, stages.shares, stages.vector
        stages = Stages(*done, frozenset(told))
        self._require(not_recovered(stages, self.graph, self.plan.needed))
        began = time.monotonic()
        total = np.zeros(next(iter(vectors.values())).size, self.plan.form.fixed.dtype)
        for vector in vectors.values():
            total += vector
        try:
            codes = unmasked(
                total,
                self.graph,
                self.keys,
                sorted(stages.vector),
                sorted(stages.lost),
                told,
                instance=self.instance,
                needed=self.plan.needed,
            )
        except ValueError as error:
            self._require(f"secure aggregation cannot unmask its sum: {error}")
        self.tally.add(stages, self.graph, codes, cut)
        self.round.seconds[SERVER] += time.monotonic() - began

    def _require(self, why: str) -> None:
        if why:
            lost = list(self.round.failures.values())
            first = f"; first failure: {lost[0].kind}: {lost[0].message}" if lost else ""
            self.plan.end(f"{why}{first}")

    # --- stages -------------------------------------------------------------------------------

    def _keys(self, clients: Collection[int]) -> frozenset[int]:
        form = dict.fromkeys(clients, (BYTES, (PUBLIC,)))
        found = self._ask(KEYS, clients, form, common={"needed": self.plan.needed})
        self.keys = {i: a.block.tobytes() for i, a in found.items()}
        return frozenset(found)

    def _shares(self, clients: Collection[int]) -> frozenset[int]:
        near = {i: self.graph[i] for i in clients}
        form = {i: (BYTES, (len(near[i]), BOX)) for i in clients}
        own = {i: {"ids": list(near[i])} for i in clients}
        blocks = {f"{i}/keys": block_of([self.keys[j] for j in near[i]], PUBLIC) for i in clients}
        found = self._ask(SHARES, clients, form, own=own, blocks=blocks)
        for i, answer in found.items():
            self.boxes[i] = dict(zip(near[i], rows_of(answer.block, BOX), strict=True))
        return frozenset(found)

    def _vectors(self, clients: Collection[int]) -> tuple[dict[int, Any], int]:
        """The vectors by client, and how many of their numbers were cut."""
        plan = self.plan
        dtype = plan.form.fixed.dtype
        size = plan.form.size(plan.template, self.number, self.bases)
        near = {i: [j for j in self.graph[i] if j in clients] for i in clients}
        own = {i: {"ids": near[i], "weight": plan.weights[i]} for i in clients}
        blocks = {f"{i}/boxes": block_of([self.boxes[j][i] for j in near[i]], BOX) for i in clients}
        common = {
            "exchange": self.number,
            "exchanges": plan.exchanges,
            "form": plan.form.to_json(),
            "method": described(plan.method),
            "postprocess": [describe(p) for p in plan.postprocessors],
        }
        shared = {"bases": self.bases} if self.number else {"state": self._state()}
        blocks |= {name: tensor_block(t) for name, t in shared.items()}
        form = dict.fromkeys(clients, (dtype, (size,)))
        found = self._ask(VECTOR, clients, form, own=own, blocks=blocks, common=common)
        kept = {i: a for i, a in found.items() if self._accepted(i, a)}
        cut = sum(int(a.report["cut"]) for a in kept.values())
        return {i: a.block for i, a in kept.items()}, cut

    def _state(self) -> Mapping[str, Tensor]:
        return self.plan.method.adds_state(self.plan.state)

    def _accepted(self, i: int, answer: Answer) -> bool:
        """Whether a client's report is as it can be; the first exchange's is its record."""
        job = self.plan.jobs[i]
        report, client = answer.report, job.client
        cut, claimed = report.get("cut"), report.get("num_examples", client.num_examples)
        wrong = wrong_metrics(report.get("metrics", {}))
        if type(cut) is not int or not 0 <= cut <= answer.block.size:
            wrong = wrong or f"it says that {cut!r:.40} of its numbers were cut"
        if claimed != client.num_examples:
            said = f"{claimed!r:.40} examples, the client has {client.num_examples}"
            wrong = wrong or f"it claims {said}"
        if not wrong and self.number == 0:
            update = Update(client, Withheld(), client.num_examples, report.get("metrics", {}))
            result = checked(job, update, self.round.store)
            if isinstance(result, Update):
                self.round.reports[i] = result
                return True
            wrong = result.message if isinstance(result, Failure) else ""
        if wrong:
            self._lose(i, Failure(client, "RejectedUpdate", one_line(wrong, 1000)))
        return not wrong

    def _unmask(self, stages: Stages) -> dict[int, dict[int, bytes]]:
        """Holder -> owner -> share."""
        own, form = {}, {}
        for i in stages.vector:
            near = {i, *self.graph[i]}
            survivors, lost = sorted(near & stages.vector), sorted(near & stages.lost)
            own[i] = {"survivors": len(survivors)}
            form[i] = (BYTES, (len(survivors) + len(lost), SHARE))
        asked = {i: self._owners(i, stages) for i in stages.vector}
        blocks: dict[str, Blocks] = {
            f"{i}/ids": np.array(ids, dtype=np.int64) for i, ids in asked.items()
        }
        found = self._ask(UNMASK, stages.vector, form, own=own, blocks=blocks)
        return {
            i: dict(zip(asked[i], rows_of(a.block, SHARE), strict=True)) for i, a in found.items()
        }

    def _owners(self, i: int, stages: Stages) -> list[int]:
        """The clients of whom one is asked a share: the survivors first, then the lost."""
        near = {i, *self.graph[i]}
        return [*sorted(near & stages.vector), *sorted(near & stages.lost)]

    # --- messages -----------------------------------------------------------------------------

    def _ask(
        self,
        stage: str,
        clients: Collection[int],
        form: Mapping[int, Form],
        *,
        own: Mapping[int, Mapping[str, Any]] | None = None,
        blocks: Mapping[str, Blocks] | None = None,
        common: Mapping[str, Any] | None = None,
    ) -> dict[int, Answer]:
        """One stage: send, wait, and note who was lost.

        Args:
            stage: of the protocol.
            clients: that are asked.
            form: of each one's answer.
            own: what each is told alone.
            blocks: ``<client>/<what>``, and those of all.
            common: what all are told.
        """
        began, nonce = time.monotonic(), secrets.token_hex(8)

        def content(who: Sequence[Client]) -> Any:
            return self._content(stage, nonce, [c.id for c in who], own or {}, blocks or {}, common)

        found: dict[int, Answer] = {}
        asked = [self.plan.jobs[i].client for i in sorted(clients)]
        for who, answer in self.round.channel.exchange(asked, "secagg", content):
            for i, one in _read(answer, who, form, nonce).items():
                if self.plan.lost(i, self.number, stage):
                    one = self.plan.failure(i, stage)
                if isinstance(one, Failure):
                    self._lose(i, one)
                else:
                    found[i] = one
        self.round.seconds[stage] += time.monotonic() - began
        return found

    def _content(
        self,
        stage: str,
        nonce: str,
        ids: Sequence[int],
        own: Mapping[int, Mapping[str, Any]],
        blocks: Mapping[str, Blocks],
        common: Mapping[str, Any] | None,
    ) -> Any:
        """A stage's message to some clients on one node."""
        channel, jobs = self.round.channel, [self.plan.jobs[i] for i in ids]
        prefixes = tuple(f"{i}/" for i in ids)
        worker = channel.worker_of([j.client for j in jobs])
        request = Request(
            stage=stage,
            instance=self.instance,
            clients={i: own.get(i, {}) for i in ids},
            common=common or {},
            blocks={n: b for n, b in blocks.items() if "/" not in n or n.startswith(prefixes)},
            worker=worker,
            source=channel.source,
            nonce=nonce,
        )
        train = stage == VECTOR and self.number == 0
        told = partial(encode_jobs, worker=worker, source=channel.source, wire=channel.wire)
        return encode_request(request, told(jobs, nonce=nonce) if train else None)

    def _lose(self, i: int, failure: Failure) -> None:
        self.round.failures.setdefault(i, failure)


def _read(
    answer: Any, who: Sequence[Client], form: Mapping[int, Form], nonce: str
) -> dict[int, Answer | Failure]:
    """What a node answered for some clients, whatever it is."""
    if isinstance(answer, str):
        return {c.id: Failure(c, "WorkerError", answer) for c in who}
    try:
        return decode_answers(answer, {c.id: c for c in who}, form, nonce)
    except Exception as error:  # a reply is foreign input: it must not end the run
        why = one_line(f"its reply cannot be read: {type(error).__name__}: {error}")
        return {c.id: Failure(c, "WorkerError", why) for c in who}
