"""Short real runs of every preset: their bytes beside the formulas, and how exact averages are.

Every preset trains three of eight clients in each of six rounds, once with clients of one rank and
once with four tiers of ranks, in this process. A run's ``clients.jsonl`` says what each client was
sent and sent; `simulations.bench.costs.formulas` says what it should be, layer by layer.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fedlora.core.types import Client, Module, Setting
from fedlora.models.stages import block_of
from fedlora.run import checkpoint
from fedlora.run.tracking import read_jsonl
from fedlora.server.base_changes import SENT
from simulations.app.client_app import app
from simulations.app.compose import load
from simulations.app.federate import run
from simulations.app.grid import InProcessGrid
from simulations.app.inputs import prepare_inputs
from simulations.bench.costs.formulas import (
    FORMULAS,
    SLORA_WORDS,
    WIDTH,
    Formula,
    Past,
    Tokens,
    Visit,
)
from simulations.bench.costs.presets import parts_of

ROWS = 2
"""Sequences of a client's one step."""
WORDS = (
    "experiment=smoke",
    "population.clients=8",
    "population.per_round=3",
    "population.unseen_fraction=0",
    "rounds=6",
    "client.steps=1",
    f"client.batch_size={ROWS}",
    "data.clients=400",
    "data.max_length=64",
    "evaluate=none",
    "runtime=in_process",
    "report=false",
)
RANKS: Mapping[str, tuple[str, ...]] = {
    "equal": ("ranks=homogeneous", "ranks.rank=4"),
    "unequal": ("ranks=uniform",),
}
BESIDE: Mapping[str, tuple[str, ...]] = {
    "slora": SLORA_WORDS,
    "spp": ("model.clients=6", "model.samples=1", "model.length=64"),
}
"""What a method needs beside ``strategy=<name>`` in so short a run of so few clients."""
FIRST, NEXT, LATE = "round 1", "took part in the round before", "after longer"


@dataclass(frozen=True)
class Trace:
    """What a run has recorded."""

    preset: str
    setting: Setting
    width: int
    """Scalars of a token's hidden state."""
    clients: Sequence[Mapping[str, Any]]
    """One row per client and round, as in ``clients.jsonl``."""
    rounds: Sequence[Mapping[str, Any]]
    """The records of the rounds."""
    changed: Sequence[Sequence[int]] = ()
    """The rank of each round's change of each layer's base, where the server keeps it."""

    @cached_property
    def blocks(self) -> int:
        """Transformer blocks of the model."""
        return 1 + max(block_of(m.path) or 0 for m in self.setting.modules)


@dataclass(frozen=True)
class Row:
    """What one client of one round was sent and sent, recorded and by formula; bytes."""

    client: int
    round: int
    when: str
    """``round 1``, in the round after its last one, or later."""
    up: int
    down: int
    formula_up: int | None
    formula_down: int | None

    @property
    def compared(self) -> bool:
        """Whether formulas say both."""
        return self.formula_up is not None and self.formula_down is not None

    @property
    def wrong(self) -> str:
        """Which direction differs from its formula, and by how much; empty: none."""
        pairs = (("up", self.up, self.formula_up), ("down", self.down, self.formula_down))
        return "; ".join(
            f"round {self.round}, client {self.client}: {found:,} bytes {way}, {due:,} by formula"
            for way, found, due in pairs
            if due is not None and found != due
        )


def trace(preset: str, ranks: Sequence[str]) -> Trace:
    """Run a preset and read what the run has recorded.

    Raises:
        RuntimeError: if a client failed, whose bytes no formula covers.
    """
    with tempfile.TemporaryDirectory() as folder:
        words = [*WORDS, *ranks, *BESIDE.get(preset, ()), f"output_dir={folder}"]
        cfg = load([f"strategy={preset}", *words])
        done = run(cfg, lambda p: InProcessGrid(app, p.runtime.nodes), _silent)
        clients = read_jsonl(Path(done, "clients.jsonl"))
        rounds = [r for r in read_jsonl(Path(done, "metrics.jsonl")) if r["kind"] == "round"]
        saved = checkpoint.latest(Path(done, "checkpoints"))
        assert saved is not None
        changed = saved.state[SENT].tolist() if SENT in saved.state else ()
    if failed := [c["message"] for c in clients if "failure" in c]:
        raise RuntimeError(f"strategy={preset}: {failed[0]}")
    parts = parts_of(preset, *WORDS, *ranks, *BESIDE.get(preset, ()))
    inputs = prepare_inputs(parts, _silent)
    width = inputs.info.modules[0].d_in  # queries are made of hidden states
    return Trace(preset, inputs.setting(parts), width, clients, rounds, changed)


def _silent(line: str) -> None:
    """A run in a table says nothing."""


def rows(trace: Trace) -> list[Row]:
    """Every client of every round, beside its formula if there is one."""
    formula, found = FORMULAS.get(trace.preset), []
    last: dict[int, int] = {}
    for record in trace.clients:
        client, t = trace.setting.clients[record["client"]], int(record["round"]) - 1
        known = last.get(client.id, 0)
        when = FIRST if t == 0 else NEXT if last.get(client.id) == t - 1 else LATE
        up = down = None
        if formula is not None:
            visits = list(_visits(trace, client, t, known))
            up, down = _due(formula, visits, _tokens(trace, record))
        sent, received = record["bytes_up"], record["bytes_down"]
        found.append(Row(client.id, t + 1, when, sent, received, up, down))
        last[client.id] = t
    return found


def _due(formula: Formula, visits: Sequence[Visit], tokens: Tokens) -> tuple[int | None, int]:
    """Bytes up and down by formula, all layers together; ``None``: no formula says."""
    trained = [formula.trained(v) for v in visits]
    up, down = sum(map(formula.count_up, trained)), sum(map(formula.count_down, trained))
    up += formula.beside_up(tokens) if formula.beside_up else 0
    down += formula.beside_down(tokens) if formula.beside_down else 0
    unknown = formula.chooses and any(v.r < v.highest for v in visits)
    return None if unknown else WIDTH * up, WIDTH * down


def _tokens(trace: Trace, record: Mapping[str, Any]) -> Tokens:
    return Tokens(int(record.get("exchanged_tokens", 0)), trace.width, ROWS)


def _visits(trace: Trace, client: Client, t: int, known: int) -> Iterator[Visit]:
    """A client's layers in round ``t``, counted from 0, if it knows the results of the rounds
    before ``known``."""
    setting = trace.setting
    lowest, highest = setting.min_ranks, setting.max_ranks
    adapter = sum(client.ranks[m.path] * (m.d_out + m.d_in) for m in setting.modules)
    for i, m in enumerate(setting.modules):
        yield Visit(
            path=m.path,
            m=m.d_out,
            n=m.d_in,
            r=client.ranks[m.path],
            lowest=lowest[m.path],
            highest=highest[m.path],
            round=t,
            missed=tuple(_past(trace, m, i, s) for s in range(known, t)),
            budget=min(1.0, adapter / setting.model_parameters),
            block=block_of(m.path) or 0,
            blocks=trace.blocks,
            seed=setting.seed,
        )


def _past(trace: Trace, module: Module, index: int, round: int) -> Past:
    held = [
        trace.setting.clients[c["client"]].ranks[module.path]
        for c in trace.clients
        if c["round"] == round + 1
    ]
    changed = trace.changed[round][index] if trace.changed else 0
    return Past(round, tuple(held), changed)


# --- records --------------------------------------------------------------------------------------


def traffic(traces: Mapping[str, Trace]) -> dict[str, Any]:
    """The bytes of one preset, for the record.

    Args:
        traces: of the preset, by name of the ranks.
    """
    preset = next(iter(traces.values())).preset
    formula = FORMULAS.get(preset)
    found: dict[str, Any] = {
        "up": formula.up if formula else "",
        "down": formula.down if formula else "",
        "smallest": formula.smallest if formula else False,
    }
    for name, one in traces.items():
        seen = rows(one)
        down = {w: _range(r.down for r in seen if r.when == w) for w in (FIRST, NEXT, LATE)}
        found[name] = {
            "modules": len(one.setting.modules),
            "client_rounds": len(seen),
            "compared": sum(r.compared for r in seen),
            "up_bytes": _range(r.up for r in seen),
            "down_bytes": {w: r for w, r in down.items() if r},
            "wrong": [r.wrong for r in seen if r.wrong],
        }
    return found


def _range(values: Iterator[int]) -> list[int]:
    """The smallest and the largest; nothing of nothing."""
    held = list(values)
    return [min(held), max(held)] if held else []


def exactness(traces: Mapping[str, Trace]) -> dict[str, Any]:
    """The recorded gaps of one preset: ``||aggregate - Σ p_k ΔW_k||``, of every round that has one.

    Args:
        traces: of the preset, by name of the ranks.
    """
    found = {}
    for name, one in traces.items():
        found[name] = {
            kind: [r[key] for r in one.rounds if key in r]
            for kind, key in (
                ("gap", "aggregate/exactness_gap"),
                ("relative", "aggregate/exactness_gap_relative"),
                ("norm", "aggregate/update_norm"),
            )
        }
    return found
