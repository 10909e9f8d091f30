"""The server of ``runtime=silos``: it asks connected nodes who they are, and opens no data.

Two questions before round 1. ``query.hello``: a silo's name; clients get their ids in the order of
names. ``query.card``: the silo, which knows its id now, builds its token store and counts.
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedlora.core.checks import one_line
from fedlora.core.errors import RunError
from fedlora.core.source_hash import source_hash
from fedlora.core.types import Client, Module
from fedlora.data.jsonl import Jsonl
from fedlora.engine.base import EngineSpec
from fedlora.engine.worker import WorkerSpec
from fedlora.models.modules import ModelInfo
from fedlora.population.ranks import Tier, module_ranks
from fedlora.population.sampling import Roster, enroll
from fedlora.server.flower import essence
from fedlora.server.homes import Homes, wait_for_nodes
from fedlora.silo.site import Assignment, SiloInfo
from simulations.app.parts import Parts
from simulations.app.silo_runtime import SiloRuntime

HELLO, CARD = "query.hello", "query.card"
SILO = "silo"
"""The record of both questions and both answers."""


@dataclass(frozen=True)
class Silos:
    """The silos of a run, in the order of their client ids."""

    infos: tuple[SiloInfo, ...]
    nodes: tuple[int, ...]
    assignments: tuple[Assignment, ...]

    @property
    def key(self) -> str:
        """Identity of the clients: their names, ranks and records."""
        rows = [[i.name, i.attention, i.mlp, i.records] for i in self.infos]
        return f"silos-{hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]}"

    def enroll(self, parts: Parts, info: ModelInfo) -> Roster:
        """The population: one client a silo, with the ranks of its card.

        Raises:
            ConfigError: as `fedlora.population.sampling.enroll`.
        """
        shards = [one.shard(i) for i, one in enumerate(self.infos)]
        roster = enroll(
            parts.population,
            parts.ranks,
            shards,
            info.modules,
            info.parameters,
            parts.seed,
            parts.client.loss,
        )
        clients = [self._client(c, info.modules, parts.ranks.clamp) for c in roster.clients]
        return dataclasses.replace(roster, clients=tuple(clients))

    def _client(self, client: Client, modules: Sequence[Module], clamp: bool) -> Client:
        silo = self.infos[client.id]
        tier = Tier(silo.name, 1.0, silo.attention, silo.mlp)
        ranks = module_ranks(tier, modules, clamp=clamp)
        return dataclasses.replace(client, ranks=ranks, tier=silo.name)

    def homes(self, runtime: SiloRuntime, worker: WorkerSpec, run: str) -> Homes:
        """Where messages to each client go.

        Args:
            runtime: of the run.
            worker: its engine and its model's number format as they were decided when it began.
            run: names it for what silos keep of it.
        """
        names = [one.name for one in self.infos]

        def find(grid: Grid, nodes: Sequence[int]) -> Mapping[int, int]:
            answers = ask(grid, dict.fromkeys(nodes, ""), HELLO, runtime)
            said = {node: a for node, a in answers.items() if not isinstance(a, Exception)}
            return {node: names.index(a) for node, a in said.items() if a in names}

        workers = {}
        for a in self.assignments:
            model = dataclasses.replace(a.model, dtype=worker.model.dtype)
            began = dataclasses.replace(a, engine=worker.engine, model=model, run=run)
            workers[a.client] = began.to_json()
        return Homes(
            dict(enumerate(names)), workers, dict(enumerate(self.nodes)), find, runtime.poll_s
        )


def meet(
    grid: Grid, parts: Parts, info: ModelInfo, engine: EngineSpec, emit: Callable[[str], None]
) -> Silos:
    """Wait for the silos, and ask them for their names and for what they hold.

    Args:
        grid: of Flower.
        parts: of the run.
        info: the server's base model.
        engine: settled.
        emit: shows one line.

    Raises:
        RunError: one sentence on the first silo that cannot take part.
    """
    runtime, data = parts.runtime, parts.data
    assert isinstance(runtime, SiloRuntime)
    assert isinstance(data, Jsonl)
    emit(f"waiting for {runtime.silos} silos (runtime.silos)")
    nodes = wait_for_nodes(grid, runtime.silos, runtime.patience_s, runtime.poll_s)
    if len(nodes) < runtime.silos:
        raise RunError(
            f"{len(nodes)} SuperNodes are connected after {runtime.patience_s:g} s "
            f"(runtime.patience_s), runtime.silos={runtime.silos}"
        )
    named = names_of(_all(ask(grid, dict.fromkeys(nodes, ""), HELLO, runtime)))
    assignments = [
        Assignment(name, i, parts.model, data, engine, info.fingerprint)
        for i, name in enumerate(named)
    ]
    told = {named[a.silo]: a.to_json() for a in assignments}
    answers = _all(ask(grid, told, CARD, runtime))
    infos = []
    for a in assignments:
        silo = _info(answers[named[a.silo]], a.silo)
        infos.append(silo)
        emit(
            f"silo {silo.name}: client {a.client}, rank {silo.attention}"
            f"{f'/{silo.mlp}' if silo.mlp != silo.attention else ''}, device {silo.device}, "
            f"{silo.counts['num_train']:,} training examples"
            f"{f', {silo.cut:,} examples are cut to data.max_length' if silo.cut else ''}"
        )
    joined = [
        dataclasses.replace(a, records=i.records) for a, i in zip(assignments, infos, strict=True)
    ]
    return Silos(tuple(infos), tuple(named[a.silo] for a in assignments), tuple(joined))


def names_of(said: Mapping[int, str]) -> dict[str, int]:
    """Node ids by name, in order of the names.

    Args:
        said: name by node id.

    Raises:
        RunError: if two silos have one name.
    """
    names = sorted(said.values())
    if twice := [name for name in names if names.count(name) > 1]:
        nodes = sorted(node for node, name in said.items() if name == twice[0])
        raise RunError(f"two silos say that they are {twice[0]} (nodes {nodes}): names must differ")
    return {said[node]: node for node in sorted(said, key=lambda n: said[n])}


def ask(
    grid: Grid, told: Mapping[int, str], kind: str, runtime: SiloRuntime
) -> dict[int, str | Exception]:
    """One question to some nodes, and what each answered, or why it did not.

    Args:
        grid: of Flower.
        told: the text for each node, by id.
        kind: `HELLO` or `CARD`.
        runtime: how long to wait.
    """
    source = source_hash()
    messages = [
        Message(RecordDict({SILO: ConfigRecord({"text": text, "source": source})}), node, kind)
        for node, text in told.items()
    ]
    pending = dict(zip(grid.push_messages(messages), told, strict=True))
    deadline, found = time.monotonic() + runtime.patience_s, dict[int, str | Exception]()
    while pending and time.monotonic() < deadline:
        arrived = list(grid.pull_messages(pending))
        for reply in arrived:
            node = pending.pop(reply.metadata.reply_to_message_id, None)
            if node is not None:
                found[node] = _text(reply)
        if pending and not arrived:
            time.sleep(runtime.poll_s)
    late = f"no answer within {runtime.patience_s:g} s (runtime.patience_s)"
    return found | {node: RunError(f"node {node}: {late}") for node in pending.values()}


def _text(reply: Message) -> str | Exception:
    """What a node answered."""
    node = reply.metadata.src_node_id
    if reply.has_error():
        return RunError(f"node {node}: {essence(reply.error.reason or 'unknown error')}")
    try:
        return str(reply.content.config_records[SILO]["text"])
    except (KeyError, TypeError, ValueError) as error:
        return RunError(f"node {node}: its answer cannot be read: {one_line(error)}")


def _all(answers: Mapping[int, str | Exception]) -> dict[int, str]:
    """The answers, if no silo failed.

    Raises:
        RunError: the first failure, and how many there are.
    """
    failed = [a for a in answers.values() if isinstance(a, Exception)]
    if failed:
        more = f" (and {len(failed) - 1} other silos failed)" if len(failed) > 1 else ""
        raise RunError(f"a silo cannot take part, so no round has begun: {failed[0]}{more}")
    return {node: a for node, a in answers.items() if isinstance(a, str)}


def _info(text: str, name: str) -> SiloInfo:
    """A silo's description of itself.

    Raises:
        RunError: if it cannot be read, or is of another silo.
    """
    try:
        info = SiloInfo.from_json(text)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"silo {name}: its answer cannot be read: {one_line(error)}") from error
    if info.name != name:
        raise RunError(f"silo {name}: it now says that it is {one_line(info.name, 64)}")
    return info
