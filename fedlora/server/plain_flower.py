"""The hooks of a method in Flower's own loop, with clients that are Flower nodes.

Every node is one client with an adapter and data of its own. It needs nothing of this project: the
messages are those of Flower's own averages (records ``arrays``, ``config`` and ``metrics``), and
the arrays are named as PEFT names them, so that a client's ``get_peft_model_state_dict`` and
``set_peft_model_state_dict`` speak the same language:

    base_model.model.<module path>.lora_A.weight   [r, d_in]
    base_model.model.<module path>.lora_B.weight   [d_out, r]

A client trains at whatever rank it can hold, up to that of the initial arrays. Until it has
answered once it is sent the largest; from then on it is sent the rank of its last answer. The nodes
of the first round are the clients of the run. How many examples a node holds is known from its
answers alone: its first one, in training and in evaluation, binds it for the run, and a later
answer that counts others is refused.
`fedlora.server.flower.FederatedRun` is the other driver of the same hooks: there a node is a slot
that serves many virtual clients.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import numpy as np
import torch
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedlora.algebra.state import State
from fedlora.core.checks import is_real, one_line
from fedlora.core.errors import RunError
from fedlora.core.payload import Payload, plain_factors
from fedlora.core.types import (
    Adapter,
    Client,
    Expected,
    Factors,
    LocalPlan,
    Module,
    Ranks,
    Setting,
    Update,
)
from fedlora.robust.rule import NO_RULE, Rule
from fedlora.server.combine import NUMERICAL, combine, unusable
from fedlora.server.flower import essence, nodes_of
from fedlora.server.method import Method
from fedlora.server.norm_bound import Move, compare, furthest, move
from fedlora.server.postprocess import Moment
from fedlora.server.validation import LARGEST_METRIC, check_update, wrong_metrics

log = logging.getLogger(__name__)

R = TypeVar("R")

ALPHA = "lora_alpha"
"""Key of the train config: LoRA's alpha, needed to compute an update from its factors."""
TRAIN_A, TRAIN_B = "train_a", "train_b"
"""Keys of the train config, written here: whether a node is to train A, and B, in this round."""
EXAMPLES = "num-examples"
"""Key of a reply's metrics, as in Flower's own strategies."""
PREFIX, A, B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"


def to_arrays(adapter: Adapter) -> ArrayRecord:
    """Factors under PEFT's names, float32."""
    arrays = {}
    for path, f in adapter.items():
        for name, t in ((A, f.a), (B, f.b)):
            arrays[f"{PREFIX}{path}{name}"] = Array(t.detach().to(torch.float32).numpy())
    return ArrayRecord(arrays)


def from_arrays(arrays: ArrayRecord, alpha: float) -> dict[str, Factors]:
    """The inverse of `to_arrays`, in the order of the record.

    Raises:
        ValueError: naming the first array that is no factor, is not float32, or has no partner that
            fits.
    """
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, array in arrays.items():
        part = next((p for p in (A, B) if name.endswith(p)), None)
        if part is None or not name.startswith(PREFIX):
            raise ValueError(
                f"array {name!r} is no LoRA factor: names are {PREFIX}<module path>{A} and "
                f"...{B}, as PEFT's get_peft_model_state_dict gives them"
            )
        values = array.numpy()
        if values.dtype != np.float32:
            raise ValueError(f"array {name!r} is {values.dtype}, factors travel as float32")
        tensor = torch.from_numpy(np.array(values))
        found.setdefault(name[len(PREFIX) : -len(part)], {})[part] = tensor
    if not found:
        raise ValueError("there are no arrays: an adapter has lora_A and lora_B of some module")
    for path, parts in found.items():
        if len(parts) < 2:
            raise ValueError(f"{path} has {', '.join(parts)} and not its partner")
    return {path: Factors(parts[A], parts[B], alpha) for path, parts in found.items()}


@dataclass(frozen=True)
class _Asked:
    """The client and the start that were sent to a node in this round."""

    client: Client
    start: Payload
    plan: LocalPlan
    """Which factors it is to train."""


class PlainFlower(Strategy):
    """A Flower strategy that calls a method's hooks for starts and for averages.

    Args:
        method: one that trains LoRA's factors.
        seed: seed of the method's random values, such as the first A.
        min_nodes: number of accepted answers below which a round fails.
        max_update_norm: bound on the change of the effective weights, Frobenius; 0: none.
        norm_factor: medians of a round's changes up to which an answer is averaged
            (`fedlora.server.norm_bound`; how many steps a node takes is not known); 0: any.
        max_examples: up to which a node's claim to examples counts; 0: as it claims at first.
        robust: what takes the place of the method's mean (`fedlora.robust`); clients count
            alike, or as its ``cap`` says.

    Raises:
        ValueError: with a rule, if the method says of no sum what a client adds to it.
    """

    def __init__(
        self,
        method: Method,
        *,
        seed: int = 0,
        min_nodes: int = 1,
        max_update_norm: float = 0.0,
        norm_factor: float = 50.0,
        max_examples: int = 0,
        robust: Rule = NO_RULE,
    ) -> None:
        if robust.acts and method.needs_updates:
            raise ValueError(f"robust={type(robust).__name__}: {method.needs_updates}")
        self.robust = robust
        self.method, self.seed, self.min_nodes = method, seed, min_nodes
        self.max_update_norm, self.norm_factor = max_update_norm, norm_factor
        self.max_examples = max_examples
        self.state: State = {}
        self._modules: tuple[Module, ...] = ()
        self._alpha = 0.0
        self._largest = Ranks({})
        self._plan = LocalPlan()
        self._clients: dict[int, Client] = {}
        """Clients by node id; client ids follow the order of the node ids."""
        self._asked: dict[int, _Asked] = {}
        self._declared: dict[tuple[str, int], int] = {}
        """Examples that a node has said it holds for a kind of message."""

    def summary(self) -> None:
        """One line for Flower's log."""
        log.info("%s over Flower nodes, each with an adapter of its own rank", self.method)

    # --- training -----------------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The start of every node, at its own rank.

        Raises:
            RunError: if ``config`` has no ``lora_alpha``, or the initial arrays are no adapter.
        """
        nodes = nodes_of(grid)
        if not self._modules:
            self._begin(arrays, config, nodes)
        self._asked, messages = {}, []
        for node in self._known(nodes):
            client = self.method.enlist(self.state, self._clients[node])
            start = self._start(client)
            plan = self._planned(client)
            self._asked[node] = _Asked(client, start, plan)
            said = ConfigRecord({**config, TRAIN_A: plan.train_a, TRAIN_B: plan.train_b})
            messages.append(_message(self._factors(start), said, node, MessageType.TRAIN))
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The next state from what nodes answered; a bad answer is named and left out.

        Raises:
            RunError: if fewer than ``min_nodes`` sent something that can be averaged.
        """
        moves: dict[int, Move] = {}
        refused: list[str] = []
        answered: set[int] = set()

        def refuse(node: int, why: object) -> None:
            refused.append(one_line(f"node {node}: {why}"))
            log.warning("round %d: %s", server_round, refused[-1])

        for reply in replies:
            node = reply.metadata.src_node_id
            if node in answered:
                refuse(node, "it has answered before; its first answer counts")
                continue
            answered.add(node)
            try:
                moves[node] = self._accept(node, reply)
            except Exception as error:  # an answer is foreign input: it must not end the run
                refuse(node, error)
        nodes = {m.update.client.id: node for node, m in moves.items()}
        if self.norm_factor:
            for cid, why in compare(list(moves.values()), self.norm_factor).refused.items():
                del moves[nodes[cid]]
                refuse(nodes[cid], why)
        self._aggregate(server_round, moves, refused, refuse)
        for node, accepted in moves.items():
            self._clients[node] = accepted.update.client
        return to_arrays(self._global(self._largest)), _weighted(_updates(moves))

    def _aggregate(
        self,
        server_round: int,
        moves: dict[int, Move],
        refused: Sequence[str],
        refuse: Callable[[int, object], None],
    ) -> None:
        """Average what was accepted; answers that would spoil the model are taken out of it.

        Args:
            server_round: counted from 1.
            moves: by node.
            refused: what was said of answers that were left out.
            refuse: says it of one more.

        Raises:
            RunError: if fewer than ``min_nodes`` are left, or too few for the rule.
        """
        clients = {node: m.update.client for node, m in moves.items()}
        starts = {c.id: self._expected(self._asked[n], c).start for n, c in clients.items()}
        now, rule = Moment(self.seed, server_round), self.robust
        while len(moves) >= max(1, self.min_nodes):
            try:
                updates = _updates(moves)
                done = combine(self.method, self.state, updates, now, starts=starts, rule=rule)
                after = done.state
                wrong = unusable(self.method, after)
            except NUMERICAL as error:
                wrong = f"the average cannot be computed: {error}"
            if not wrong:
                self.state = after
                return
            far = furthest(list(moves.values()))
            node = next(n for n, m in moves.items() if m is far)
            del moves[node]
            refuse(node, f"with it, {wrong}; of all updates it moved furthest")
        first = f"; first: {refused[0]}" if refused else "; no reply came"
        raise RunError(
            f"round {server_round}: {len(moves)} nodes sent an update that can be averaged, "
            f"min_nodes={self.min_nodes}{first}"
        )

    # --- evaluation ---------------------------------------------------------------------------

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The global update, at each node's rank."""
        messages = []
        for node in self._known(nodes_of(grid)):
            ranks = self.method.evaluated_ranks(self.state, self._clients[node])
            messages.append(_message(self._global(ranks), config, node, MessageType.EVALUATE))
        return messages

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Means over the examples that nodes have said they hold."""
        found: dict[int, tuple[dict[str, float], int]] = {}
        for reply in replies:
            node = reply.metadata.src_node_id
            try:
                if node not in found:
                    metrics, claimed = _metrics(reply)
                    found[node] = metrics, self._weight(MessageType.EVALUATE, node, claimed)
            except Exception as error:  # as in training
                why = one_line(error)
                log.warning("round %d: evaluation of node %d: %s", server_round, node, why)
        return _mean(list(found.values()))

    # --- inside -------------------------------------------------------------------------------

    def _begin(self, arrays: ArrayRecord, config: ConfigRecord, nodes: Iterable[int]) -> None:
        """Learn from the initial arrays what is adapted and how large ranks may be."""
        alpha = config.get(ALPHA)
        if not isinstance(alpha, int | float) or not alpha > 0:
            raise RunError(
                f"train_config[{ALPHA!r}]={alpha!r} must be LoRA's alpha, a number > 0: pass "
                f"start(grid, initial_arrays, train_config=ConfigRecord({{{ALPHA!r}: 16.0}}))"
            )
        if self.method.private:
            raise RunError(
                f"{self.method.label} leaves {self.method.private.upper()} with each client, and "
                "Flower's own clients keep nothing between rounds: use "
                "fedlora.server.flower.FederatedRun, or a method with a global model, such as FedIT"
            )
        self._alpha = float(alpha)
        try:
            given = from_arrays(arrays, self._alpha)
        except ValueError as error:
            raise RunError(f"initial_arrays: {error}") from error
        self._modules = tuple(
            Module(path, _kind(path), f.b.shape[0], f.a.shape[1]) for path, f in given.items()
        )
        self._largest = Ranks({path: f.rank for path, f in given.items()})
        self._clients = {n: Client(i, self._largest, num_examples=1) for i, n in enumerate(nodes)}
        known = sum(m.d_out * m.d_in for m in self._modules)  # the server holds no base model
        clients = tuple(self._clients.values())
        setting = Setting(self._modules, known, self._alpha, clients, self.seed)
        self.state = self.method.init_state(setting)
        if any(bool(f.b.any()) for f in given.values()):
            deltas = {path: f.delta() for path, f in given.items()}
            self.state = self.method.adopt(self.state, deltas)

    def _known(self, nodes: Iterable[int]) -> list[int]:
        """Those that were there when the run began."""
        found = [node for node in nodes if node in self._clients]
        if late := [node for node in nodes if node not in self._clients]:
            log.warning("nodes that came after the first round are not asked: %s", late)
        return found

    def _start(self, client: Client) -> Payload:
        start = self._plan.technique.payload(self.method.client_start(self.state, client))
        if start.linear() is not None:
            raise RunError(
                f"{self.method.label} sends its clients a correction of their gradient, which "
                "Flower's own clients do not add: use fedlora.server.flower.FederatedRun, or a "
                "method without, such as FedIT"
            )
        if start.parametrisation(torch.float32, torch.device("cpu")) is not None:
            raise RunError(
                f"{self.method.label} sends its clients {start.noun}, and Flower's own clients "
                "train LoRA's A and B: use fedlora.server.flower.FederatedRun, or a method whose "
                "clients train factors, such as FedIT"
            )
        return start

    def _planned(self, client: Client) -> LocalPlan:
        """Which factors a node is to train; how it trains them is its own affair."""
        plan = self.method.plan(self.state, client, self._plan)
        if plan.choice is not None:
            raise RunError(
                f"{self.method.label} has its clients choose the rank indices that they train, "
                "which Flower's own clients do not: use fedlora.server.flower.FederatedRun, or a "
                "method without a choice, such as RoLoRA"
            )
        return replace(self._plan, train_a=plan.train_a, train_b=plan.train_b)

    def _factors(self, payload: Payload) -> Adapter:
        factors = plain_factors(payload)
        if factors is None:
            raise RunError(
                f"{type(self.method).__name__} sends its clients {payload.noun}, which no PEFT "
                "adapter can hold: Flower's own clients train LoRA's A and B; use a method whose "
                "clients start from factors, such as FlexLoRA or FedIT"
            )
        return factors

    def _global(self, ranks: Ranks) -> Adapter:
        update = self.method.global_update(self.state, ranks)
        return self._factors(self._plan.technique.payload(update))

    def _accept(self, node: int, reply: Message) -> Move:
        """A reply as an update that may be averaged, with how far it has moved.

        Raises:
            ValueError: saying what is wrong with it.
        """
        if node not in self._asked:
            raise ValueError("it was not asked in this round")
        asked = self._asked[node]
        metrics, claimed = _metrics(reply)
        examples = self._weight(MessageType.TRAIN, node, claimed)
        found = from_arrays(_only(reply.content.array_records, "arrays"), self._alpha)
        factors = {p: found[p] for p in self._largest if p in found} | found  # in our order
        ranks = Ranks({path: f.rank for path, f in factors.items()})
        client = replace(asked.client, ranks=ranks, num_examples=examples)
        expected = self._expected(asked, client)
        update = Update(client, asked.start.trained(factors), examples, metrics)
        check_update(replace(update, metrics={}), expected, self.max_update_norm)
        # A claim to many examples cannot be checked, so it gives no room for a larger change.
        unknown = replace(expected.client, num_examples=1)
        return move(update, replace(expected, client=unknown))

    def _weight(self, kind: str, node: int, claimed: int) -> int:
        """The examples that an answer counts for.

        Raises:
            ValueError: if the node has said that it holds another number.
        """
        declared = self._declared.setdefault((kind, node), claimed)
        if claimed != declared:
            raise ValueError(
                f"metrics[{EXAMPLES!r}]={claimed}, and its first answer said {declared}: the "
                "number of examples of a node is fixed for the run"
            )
        return min(claimed, self.max_examples or claimed)

    def _expected(self, asked: _Asked, client: Client) -> Expected:
        """What an answer is held against: a start of its own rank, where ranks may differ.

        Raises:
            ValueError: if a rank is larger than that of the initial arrays, or the method gives
                all clients another.
        """
        if client.ranks.keys() == self._largest.keys():
            for path, rank in client.ranks.items():
                if rank > self._largest[path]:
                    raise ValueError(
                        f"{path} has rank {rank}, above the {self._largest[path]} of initial_arrays"
                    )
            enlisted = self.method.enlist(self.state, client)
            return Expected(enlisted, self._start(enlisted), asked.plan)
        return Expected(asked.client, asked.start, asked.plan)


def _kind(path: str) -> Literal["attention", "mlp"]:
    return "attention" if "attn" in path or "attention" in path else "mlp"


def _message(adapter: Adapter, config: ConfigRecord, node: int, kind: str) -> Message:
    content = RecordDict({"arrays": to_arrays(adapter), "config": config})
    return Message(content, node, kind)


def _only(records: Mapping[str, R], what: str) -> R:
    if len(records) != 1:
        raise ValueError(f"it holds {len(records)} records of {what}, expected one")
    return next(iter(records.values()))


def _metrics(reply: Message) -> tuple[dict[str, float], int]:
    """A reply's metrics and the number of examples behind them.

    Raises:
        ValueError: for an error reply, or one without a whole number of examples.
    """
    if reply.has_error():
        raise ValueError(essence(reply.error.reason or f"error code {reply.error.code}"))
    record = _only(reply.content.metric_records, "metrics")
    examples = record.get(EXAMPLES)
    if not is_real(examples) or not 1 <= examples <= LARGEST_METRIC or examples != int(examples):
        raise ValueError(f"metrics[{EXAMPLES!r}]={examples!r} must be a whole number >= 1")
    numbers = {k: float(v) for k, v in record.items() if is_real(v) and k != EXAMPLES}
    if wrong := wrong_metrics(numbers, reserved=frozenset()):
        raise ValueError(wrong)
    return numbers, int(examples)


def _updates(moves: Mapping[int, Move]) -> list[Update]:
    """The updates by client id."""
    return sorted((m.update for m in moves.values()), key=lambda u: u.client.id)


def _weighted(updates: Iterable[Update]) -> MetricRecord | None:
    return _mean([(u.metrics, u.num_examples) for u in updates])


def _mean(found: Sequence[tuple[Mapping[str, float], int]]) -> MetricRecord | None:
    """Means of the metrics that all have, weighted by examples."""
    if not found:
        return None
    total = sum(n for _, n in found)
    names = [k for k in found[0][0] if all(k in m for m, _ in found)]
    return MetricRecord({k: sum(m[k] * n for m, n in found) / total for k in names})
