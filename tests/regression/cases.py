"""Every run that is on record, and every word of its configuration.

All words of the project's configuration that this folder uses are in this file, and all its
imports in `adapter`: whoever renames either has two files to look at.
"""

from collections.abc import Iterator
from dataclasses import dataclass

RENAMED: dict[str, str] = {}
"""Old name -> new name of what records and clients' rows hold (``train/loss``)."""
STATE_RENAMED: dict[str, str] = {}
"""Old beginning -> new beginning of the names of a state's tensors (``global/``)."""


@dataclass(frozen=True)
class Case:
    """One run."""

    name: str
    words: tuple[str, ...]
    """What differs from `SMALL`."""
    quick: bool = False
    cut: int = 0
    """Stop after so many rounds, and go on to the end from the checkpoint."""
    like: str = ""
    """Name of a case whose result must be the same."""


SMALL = (
    "data.clients=400",
    "data.cutoff=96",
    "population.clients=24",
    "population.per_round=4",
    "client.steps=2",
    "client.batch_size=2",
    "client.dropout=0.1",
    "ranks=uniform",
    "ranks.alpha=12",
    "evaluate=none",
    "engine=sequential",
    "runtime=in_process",
    "runtime.nodes=3",
    "report=false",
    "rounds=2",
)
OUTPUT = "output_dir"
FUSED = ("engine=fused", "engine.tokens=512", "engine.slots=4")
ROUNDS, RESUME = "rounds", "resume=auto"
PRUNED = ("model.pattern=2:4", "model.clients=2", "model.samples=1", "model.length=64")
SWITCH = ("strategy=switchlora", "client.technique.interval=10", "strategy.horizon=3")
STRATEGIES: dict[str, tuple[str, ...]] = {
    "fedavg": ("strategy=fedavg",),
    "fedit": ("strategy=fedit",),
    "flexlora": ("strategy=flexlora",),
    "heterolora": ("strategy=heterolora", "strategy.prune=false"),
    "slora": ("strategy=slora", "strategy.stage1_rounds=1"),
    "splitlora": ("strategy=splitlora",),
    "switchlora": SWITCH,
    "spp": ("strategy=spp", *PRUNED),
}
ENGINES: dict[str, tuple[str, ...]] = {"sequential": (), "fused": FUSED}


def strategies() -> Iterator[Case]:
    """Every strategy on both engines, three rounds. SplitLoRA has an execution of its own."""
    for name, words in STRATEGIES.items():
        for engine, more in ENGINES.items():
            if name == "splitlora" and engine == "fused":
                continue
            yield Case(f"{name}-{engine}", (*words, *more, "rounds=3"), quick=True)


def cases() -> list[Case]:
    """All of them, in the order in which they run."""
    found = [*strategies()]
    names = [case.name for case in found]
    assert len(set(names)) == len(names), "two cases of one name"
    return found
