"""Silos for tests: records, cards, a grid of them in one process, and the simulation of the same
clients."""

import json
from pathlib import Path

from flwr.app import Message
from flwr.serverapp import Grid

from fedlora.population.ranks import Tier, quotas
from fedlora.population.sampling import _assign
from simulations.app.client_app import app
from simulations.app.compose import load
from simulations.app.federate import run
from simulations.app.grid import InProcessGrid
from tests.simulations.conftest import Run

RANKS = {"alba": 4, "bern": 8, "cusco": 2}
"""Rank by name; names in order, as client ids follow them."""
WORDS = [
    "experiment=silos",
    "client.steps=2",
    "client.batch_size=2",
    "data.max_length=64",
    "report=false",
    "evaluate=none",
    "rounds=2",
]


def sentence(name: str, i: int) -> str:
    """An output that nobody else has: long, and different for each record."""
    return f"{name} keeps the number {i * i + 7} in drawer {i} of the {name} archive"


def write_records(folder: Path, names=RANKS) -> Path:
    """A folder with one JSONL file per silo."""
    folder.mkdir(parents=True, exist_ok=True)
    for k, name in enumerate(names):
        rows = [
            {"instruction": f"Where does {name} keep number {i}?", "output": sentence(name, i)}
            for i in range(10 + 3 * k)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def write_cards(folder: Path, data: Path, ranks=RANKS, **more: str) -> dict[str, Path]:
    """The silo card of each, in the two forms."""
    cards = {}
    for name, rank in ranks.items():
        card = {"name": name, "records": str(data / f"{name}.jsonl"), "device": "cpu", **more}
        toml = name == min(ranks)
        cards[name] = folder / f"{name}.{'toml' if toml else 'yaml'}"
        sign = " =" if toml else ":"
        lines = [f"{k}{sign} {json.dumps(v)}\n" for k, v in (card | {"rank": rank}).items()]
        cards[name].write_text("".join(lines))
    return cards


class SiloGrid(InProcessGrid):
    """Silos in this process: every reply is kept, and nodes can go and come back."""

    def __init__(self, cards) -> None:
        super().__init__(app, len(cards), [{"silo": str(path)} for path in cards])
        self.away: set[int] = set()
        self.replies: list[Message] = []

    def get_node_ids(self):
        return [i for i in super().get_node_ids() if i not in self.away]

    def pull_messages(self, message_ids):
        found = list(super().pull_messages(message_ids))
        self.replies += found
        return found

    def move(self, node: int) -> int:
        """The node comes back under another id, as without node authentication."""
        new = max(self._contexts) + 1
        self._contexts[new] = self._contexts.pop(node)
        self._contexts[new].node_id = new
        return new


def federate(output: Path, grid: Grid, *overrides: str, nodes: int = len(RANKS)) -> Run:
    """A run of silos."""
    said: list[str] = []
    words = [f"runtime.silos={nodes}", "runtime.poll_s=0.01", f"output_dir={output}", "name=silos"]
    folder = run(load([*WORDS, *words, *overrides]), lambda _: grid, said.append)
    return Run(folder, said)


def simulate(output: Path, data: Path, *overrides: str, ranks=RANKS) -> Run:
    """The simulation of the same clients: a folder with a file for each."""
    tiers = [f"t{i}" for i in range(len(ranks))]
    share = 1 / len(ranks)
    assert quotas([share] * len(ranks), len(ranks)) == [1] * len(ranks)
    drawn = _assign([Tier(t, share, 1, 1) for t in tiers], len(ranks), "exact", 0)
    of = dict(zip(drawn, ranks, strict=True))
    rows = [
        f"{{name:{t},fraction:{share!r},attention:{ranks[of[t]]},mlp:{ranks[of[t]]}}}"
        for t in tiers
    ]
    words = [
        "runtime=in_process",
        f"data.path={data}",
        "ranks=custom",
        f"ranks.tiers=[{','.join(rows)}]",
        f"output_dir={output}",
        "name=simulation",
    ]
    said: list[str] = []
    grid_of = lambda parts: InProcessGrid(app, parts.runtime.nodes)
    return Run(run(load([*WORDS, *words, *overrides]), grid_of, said.append), said)
