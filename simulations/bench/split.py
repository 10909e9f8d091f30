"""The cost of a cut: a split step compared with an unsplit one on the same rows.

    python -m simulations.bench.split            two networks, every rule, both paths: three minutes
    python -m simulations.bench.split --flower   rounds of messages through Flower and Ray as well

Three clients of four examples a step. ``unsplit`` is one client with all twelve rows, ``FL-LoRA``
is each client by itself on the whole model. All sides train the same numbers of tokens, in one
process with one thread, in turns; times are medians. The message path here is everything but
Flower: records, node states, another forward for each gradient. What Flower and Ray add is measured
by the round of a real run.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from flwr.app import RecordDict

from fedlora.core.rates import learning_rates
from fedlora.core.types import (
    Adapter,
    Client,
    Factors,
    Failure,
    LocalPlan,
    Ranks,
)
from fedlora.data.store import Example
from fedlora.engine.memory import keep_freed_memory
from fedlora.models.stages import Stages, block_of
from fedlora.split.batches import ROUND, Seeds
from fedlora.split.codec import decode_downs, decode_ups, encode_downs, encode_ups
from fedlora.split.cost import client_part
from fedlora.split.protocol import Cut, Down, InitMessage, Terms, Up
from fedlora.split.rounds import Finished, Link, LocalLink, RoundPlan, run_exchanges
from fedlora.split.server import ClientInfo, Rule, SplitServer
from fedlora.split.trainable import TrainableStage
from fedlora.split.worker import SplitWorker
from fedlora.techniques.lora.layer import LowRank
from fedlora.techniques.lora.payload import LowRankPayload
from fedlora.training.loop import optimise
from fedlora.wire.rows import Wire
from simulations.bench.engine.cases import (
    SEED,
    Case,
    Draw,
    World,
)
from simulations.bench.machine import RESULTS, command, load, machine, write
from simulations.bench.saved_bytes import saved_bytes

CLIENTS = 3
STEPS = 4
PLAN = LocalPlan(
    lr=1e-3, batch_size=4, steps=STEPS, dropout=0.1, max_grad_norm=1.0, schedule="constant"
)
CASES = (
    Case("tiny", "tiny", CLIENTS, PLAN, Draw(50, 90), Draw(16, 16)),
    Case("llama256x8", "llama256x8", CLIENTS, PLAN, Draw(50, 90), Draw(16, 16)),
)


@dataclass(frozen=True)
class Variant:
    """One way to split."""

    rule: Rule = field(default_factory=Rule)
    tail: int = -1
    wire: Wire = field(default_factory=Wire)
    path: str = "local"
    """``local``, ``messages``, or ``messages, graphs kept``."""


VARIANTS: Mapping[str, Variant] = {
    "concat": Variant(),
    "sequential": Variant(Rule("sequential")),
    "per_client": Variant(Rule("per_client")),
    "concat, U-shape": Variant(tail=1),
    "concat, bf16 wire": Variant(wire=Wire("bf16")),
    "concat, int8 wire": Variant(wire=Wire("int8")),
    "concat, messages": Variant(path="messages"),
    "concat, messages, graphs kept": Variant(path="messages, graphs kept"),
}


class MemoryMessages:
    """The message path without Flower: every exchange through records and a node's state."""

    def __init__(self, worker: SplitWorker, inits: Mapping[int, InitMessage]) -> None:
        self.worker, self.inits, self.state = worker, inits, RecordDict()
        self.wire = "float32"
        self._opened: set[int] = set()

    def exchange(self, downs: Mapping[int, Down]) -> Mapping[int, Up | Failure]:
        """One exchange with all clients on one node."""
        new = {i: self.inits[i] for i in downs if i not in self._opened}
        sent = encode_downs(downs, new, worker="", source="", wire=self.wire)
        answers = self.worker.answer(decode_downs(sent), self.state)
        clients = {i: self.inits[i].client for i in downs}
        self._opened |= set(downs)
        return decode_ups(encode_ups(answers, wire=self.wire), clients)


class Bench:
    """A case with everything that its sides share."""

    def __init__(self, case: Case) -> None:
        world = World(case)
        self.case, self.model, self.network = case, world.model, world.network
        start = world.jobs[0].start.low_rank()
        assert start is not None
        self.whole: Mapping[str, Factors] = start
        self.held = {i: world.store.examples(i, "train") for i in range(CLIENTS)}
        self.stages = Stages(self.model)
        self.cut = -(-self.stages.blocks // 4)

    def unsplit(self) -> None:
        """One client with everybody's rows: as many tokens a step as all clients have."""
        rows = [e for i in range(CLIENTS) for e in self.held[i]]
        self._train(rows, replace(PLAN, batch_size=CLIENTS * PLAN.batch_size), 0)

    def federated(self) -> None:
        """Every client the whole model."""
        for i in range(CLIENTS):
            self._train(self.held[i], PLAN, i)

    def split(self, variant: Variant, joined: bool = False) -> dict[int, Finished | Failure]:
        """One round of a split; ``joined``: of one client with everybody's rows."""
        plan, held = PLAN, dict(self.held)
        if joined:
            plan = replace(PLAN, batch_size=CLIENTS * PLAN.batch_size)
            held = {0: [e for rows in held.values() for e in rows]}
        inits = self.inits(variant, plan, held)
        server = self.server(variant, plan, inits)
        rates = learning_rates(STEPS, plan)
        round_plan = RoundPlan(
            starts={i: o.adapter for i, o in inits.items()},
            done=dict.fromkeys(inits, 0),
            steps=dict.fromkeys(inits, STEPS),
            server_rates=rates,
            client_rates=rates,
        )
        return run_exchanges(self.link(variant, inits, held), server, round_plan, lambda a: a)

    def inits(
        self, variant: Variant, plan: LocalPlan, held: Mapping[int, Sequence[Example]]
    ) -> dict[int, InitMessage]:
        """The first message of every client."""
        cut = Cut(self.cut, variant.tail)
        own = self._part(cut, client=True)
        ranks = Ranks({path: f.rank for path, f in own.items()})
        kept = variant.path.endswith("kept")
        terms = Terms(SEED, activations=variant.wire, gradients=variant.wire, keep_graphs=kept)
        return {
            i: InitMessage(Client(i, ranks, len(rows)), plan, cut, terms, own, {}, 1)
            for i, rows in held.items()
        }

    def server(
        self, variant: Variant, plan: LocalPlan, inits: Mapping[int, InitMessage]
    ) -> SplitServer:
        """With what it trains."""
        first = inits[0]
        own = self._part(first.cut, client=False)
        keys = list(inits) if variant.rule.update == "per_client" else [-1]
        clients = {
            i: ClientInfo(o.client, o.cut, Seeds(seed=SEED, client=i)) for i, o in inits.items()
        }
        trainables = {key: self._trainable(own, plan) for key in keys}
        return SplitServer(self.stages, trainables, clients, plan, variant.rule, first.terms)

    def link(
        self,
        variant: Variant,
        inits: Mapping[int, InitMessage],
        held: Mapping[int, Sequence[Example]],
    ) -> Link:
        """The transport of the variant's path."""

        def examples(init: InitMessage) -> Sequence[Example]:
            return held[init.client.id]

        if variant.path == "local":
            return LocalLink(self.stages, inits, examples)
        return MemoryMessages(SplitWorker(self.stages, examples), inits)

    def memory_unsplit(self) -> float:
        """Bytes that one unsplit step of everybody's rows saves for its backward pass."""
        rows = [e for i in range(CLIENTS) for e in self.held[i]]
        plan = replace(PLAN, batch_size=CLIENTS * PLAN.batch_size, steps=1)
        with saved_bytes(self.network.parameters()) as saved:
            self._train(rows, plan, 0)
        return float(saved.bytes)

    def memory(self, variant: Variant) -> dict[str, float]:
        """Bytes that one step saves for its backward pass: one client's, and the server's."""
        inits = self.inits(variant, PLAN, self.held)
        link = self.link(variant, inits, self.held)
        server = self.server(variant, PLAN, inits)
        base = list(self.network.parameters())
        with saved_bytes(base) as of_clients:
            ups = link.exchange({i: Down(step=0, forward=True) for i in inits})
        assert all(isinstance(up, Up) for up in ups.values())
        good = {i: up for i, up in ups.items() if isinstance(up, Up)}
        for i, up in good.items():
            server.store(i, server.activations(i, up))
        with saved_bytes(base) as of_server:
            server.learn(good, 0.0)
        return {"client": of_clients.bytes / CLIENTS, "server": float(of_server.bytes)}

    def formula(self, variant: Variant) -> dict[str, float]:
        """What `fedlora.split.cost` says of the first client: memory, and bytes of the round."""
        ranks = {p: f.rank for p, f in self.whole.items()}
        part = client_part(self.network, ranks, Cut(self.cut, variant.tail))
        tokens = self._tokens(0)
        up, down = part.traffic(tokens, variant.wire, variant.wire, labels=tokens)
        padded = PLAN.batch_size * max(len(e.input_ids) - 1 for e in self.held[0])
        saved = part.memory(padded, dropout=PLAN.dropout > 0).saved
        return {"up": up, "down": down, "client": saved}

    def _tokens(self, client: int) -> int:
        """Tokens of a client's mean step, padding included."""
        rows = [len(e.input_ids) - 1 for e in self.held[client]]
        return round(PLAN.batch_size * sum(rows) / len(rows))

    def _train(self, rows: Sequence[Example], plan: LocalPlan, client: int) -> None:
        parameters = self.model.mount(LowRankPayload(self.whole), dropout=plan.dropout)
        optimise(self.model, parameters, rows, plan, seed=SEED, round=ROUND, client=client)
        self.model.unmount()

    def _part(self, cut: Cut, *, client: bool) -> Adapter:
        blocks = self.stages.blocks
        return {p: f for p, f in self.whole.items() if cut.owns(block_of(p) or 0, blocks) == client}

    def _trainable(self, own: Adapter, plan: LocalPlan) -> TrainableStage:
        updates = LowRankPayload(own).updates(self.model, plan.dropout)
        return TrainableStage({p: u for p, u in updates.items() if isinstance(u, LowRank)}, plan)


@dataclass
class Row:
    """One side of a case."""

    name: str
    wall_ms: list[float] = field(default_factory=list)
    """Per step of all clients together."""
    cpu_ms: list[float] = field(default_factory=list)
    up: float = 0.0
    """Bytes that a client sends in a step, without its adapters."""
    down: float = 0.0
    saved_client: float = 0.0
    """Bytes that one client's forward leaves for its backward."""
    saved_server: float = 0.0
    formula: dict[str, float] = field(default_factory=dict)


def sides(bench: Bench) -> dict[str, Callable[[], Any]]:
    """What takes turns."""
    found: dict[str, Callable[[], Any]] = {
        "unsplit": bench.unsplit,
        "split, one client": lambda: bench.split(VARIANTS["concat"], joined=True),
        "FL-LoRA": bench.federated,
    }
    for name, variant in VARIANTS.items():
        found[f"split {name}"] = partial(bench.split, variant)
    return found


def measure(case: Case, repeats: int) -> list[Row]:
    """All sides of a case, in turns."""
    bench = Bench(case)
    running = sides(bench)
    rows = {name: Row(name) for name in running}
    rows["unsplit"].saved_server = bench.memory_unsplit()
    for name, variant in VARIANTS.items():
        row = rows[f"split {name}"]
        ends = [e for e in bench.split(variant).values() if isinstance(e, Finished)]
        row.up = statistics.mean(e.metrics["exchanged_up"] for e in ends) / STEPS
        row.down = statistics.mean(e.metrics["exchanged_down"] for e in ends) / STEPS
        if variant.tail < 0:
            found = bench.memory(variant)
            row.saved_client, row.saved_server = found["client"], found["server"]
            row.formula = bench.formula(variant)
    names = list(running)
    for r in range(repeats + 1):
        for name in names[r % len(names) :] + names[: r % len(names)]:
            wall, cpu = time.perf_counter(), time.process_time()
            running[name]()
            if r:  # the first time warms up
                rows[name].wall_ms.append(1e3 * (time.perf_counter() - wall) / STEPS)
                rows[name].cpu_ms.append(1e3 * (time.process_time() - cpu) / STEPS)
    return list(rows.values())


def table(case: Case, rows: Sequence[Row]) -> str:
    """For people."""
    unsplit = statistics.median(rows[0].cpu_ms)
    lines = [
        f"{case.name}: {CLIENTS} clients, {PLAN.batch_size} examples of about 70 tokens a step",
        f"{'':38}{'ms wall':>9}{'ms CPU':>9}{'x unsplit':>11}{'KB up':>8}{'KB down':>9}"
        f"{'MB client':>11}{'(formula)':>11}{'MB server':>11}",
    ]
    for row in rows:
        wall, cpu = statistics.median(row.wall_ms), statistics.median(row.cpu_ms)
        line = f"{row.name:38}{wall:9.1f}{cpu:9.1f}{cpu / unsplit:11.2f}"
        line += f"{row.up / 1e3:8.0f}{row.down / 1e3:9.0f}" if row.up else ""
        if row.saved_server and not row.saved_client:
            line += f"{'':39}{row.saved_server / 1e6:11.1f}"
        if row.saved_client:
            line += f"{row.saved_client / 1e6:11.1f}{row.formula['client'] / 1e6:11.1f}"
            line += f"{row.saved_server / 1e6:11.1f}"
        lines.append(line)
    return "\n".join(lines) + "\n"


def through_flower(steps: int) -> dict[str, float]:
    """Seconds per exchange of a real run, on the tiny model and the shipped data."""
    found: dict[str, float] = {}
    for transport in ("local", "messages"):
        with tempfile.TemporaryDirectory() as folder:
            overrides = [
                "strategy=splitlora", f"strategy.transport={transport}", "ranks=homogeneous",
                "population.per_round=3", f"client.steps={steps}", "rounds=3", "evaluate.every=0",
                "report=false", f"output_dir={folder}", "name=exchange",
            ]  # fmt: skip
            subprocess.run([sys.executable, "-m", "simulations.run", *overrides], check=True)
            lines = (Path(folder) / "exchange" / "metrics.jsonl").read_text().splitlines()
        seconds = [json.loads(line)["round/train_seconds"] for line in lines]
        found[transport] = statistics.median(seconds[1:]) / (steps + 1)
    return found


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--flower", action="store_true", help="also through Flower and Ray")
    parser.add_argument("--steps", type=int, default=33, help="of a round through Flower")
    parser.add_argument("--out", type=Path, default=RESULTS / f"split-{machine()}.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    record: dict[str, Any] = {"command": command("split"), "load_before": load(), "cases": {}}
    for case in CASES:
        rows = measure(case, given.repeats)
        print(table(case, rows), flush=True)
        record["cases"][case.name] = [asdict(row) for row in rows]
    if given.flower:
        record["seconds_per_exchange"] = through_flower(given.steps)
        for transport, seconds in record["seconds_per_exchange"].items():
            print(f"through Flower and Ray, {transport}: {seconds:.3f} s per exchange")
    write(given.out, record | {"load_after": load()})


if __name__ == "__main__":
    main()
