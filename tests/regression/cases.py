"""Every run that is on record: what a case is, and the list of all.

Words of the project's configuration are in `cases` and `options` alone, and all imports from the
project in `adapter`: whoever renames either has three files to look at.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from tests.regression import options

RENAMED: dict[str, str] = {"scores.rouge_l": "scores.rouge_l_e2e"}
"""Old name -> new name of numbers in records and in rows of clients (``train/loss``)."""
ADDED: frozenset[str] = frozenset({"round/median_change_norm", "change_norm"})
"""Names of numbers that were not there when the reference was recorded, and are not compared."""
STATE_RENAMED: dict[str, str] = {}
"""Old beginning -> new beginning of the names of a state's tensors (``global/``)."""


@dataclass(frozen=True)
class Case:
    """One run."""

    name: str
    words: tuple[str, ...]
    """What differs from `SMALL`; of another kind, the command's own words."""
    kind: str = "federated"
    """``federated``, ``merged`` (the same, and its update merged into the base), ``scored`` (the
    same, and texts generated from it), ``finetune`` or ``pretrain``."""
    quick: bool = False
    cut: int = 0
    """Stop after so many rounds, and go on to the end from the checkpoint."""
    like: str = ""
    """Name of a case whose result must be the same."""

    @property
    def all_words(self) -> tuple[str, ...]:
        """What is run."""
        if self.kind in ("finetune", "pretrain"):
            return self.words
        texts = () if any(word.startswith("data=") for word in self.words) else TEXTS
        return (*texts, *SMALL, *self.words)


OUTPUT, ROUNDS, RESUME = "output_dir", "rounds", "resume=auto"
TEXTS = ("data=jsonl", "data.path={texts}")
"""The data of runs that name no other: records of unequal length of clients that hold unequally
many, in a file made for the run."""
SMALL = (
    "data.max_length=64",
    "population.per_round=3",
    "client.steps=2",
    "client.batch_size=2",
    "client.dropout=0.1",
    "ranks=uniform",
    "ranks.alpha=12",
    "evaluate=none",
    "analyses=none",
    "engine=sequential",
    "runtime=in_process",
    "runtime.nodes=3",
    "report=false",
    "rounds=2",
    "seed=7",
)
THREE = ("rounds=3",)
FUSED = ("engine=fused", "engine.tokens=160", "engine.slots=4")
"""Few tokens, so that a step is several and their order matters."""
PRUNED = ("model.pattern=2:4", "model.clients=2", "model.samples=1", "model.length=64")
STRATEGIES: Mapping[str, tuple[str, ...]] = {
    "fedavg": ("strategy=fedavg",),
    "feddyn": ("strategy=feddyn",),
    "fedex": ("strategy=fedex", "strategy.heterogeneous=own"),
    "fedit": ("strategy=fedit",),
    "fedrot": ("strategy=fedrot",),
    "fedsa": ("strategy=fedsa",),
    "fedsb": ("strategy=fedsb",),
    "fedsvd": ("strategy=fedsvd",),
    "ffa": ("strategy=ffa",),
    "flexlora": ("strategy=flexlora",),
    "flora": ("strategy=flora",),
    "heterolora": ("strategy=heterolora", "strategy.prune=false"),
    "local": ("strategy=local",),
    "lora_a2": ("strategy=lora_a2",),
    "rbla": ("strategy=rbla",),
    "ravan": ("strategy=ravan",),
    "rolora": ("strategy=rolora",),
    "scaffold": ("strategy=scaffold",),
    "slora": ("strategy=slora", "strategy.stage1_rounds=1"),
    "splitlora": ("strategy=splitlora",),
    "switchlora": ("strategy=switchlora", "client.technique.interval=10", "strategy.horizon=3"),
    "spp": ("strategy=spp", *PRUNED),
}
RESUMED = (
    "fedit",
    "fedsa",
    "fedsb",
    "flexlora",
    "lora_a2",
    "rolora",
    "scaffold",
    "slora",
    "switchlora",
    "spp",
    "splitlora",
)


def strategies() -> Iterator[Case]:
    """Every strategy on both engines. SplitLoRA is executed by neither of them."""
    for name, words in STRATEGIES.items():
        yield Case(f"{name}-sequential", (*words, *THREE), quick=True)
        if name != "splitlora":
            yield Case(f"{name}-fused", (*words, *FUSED, *THREE), quick=True)


def resumed() -> Iterator[Case]:
    """Cut after the first round and gone on: the same as whole."""
    for name in RESUMED:
        like = f"{name}-sequential"
        yield Case(f"{name}-resumed", (*STRATEGIES[name], *THREE), cut=1, like=like)


def of_strategies() -> Iterator[Case]:
    """Options of the strategies, one run each."""
    for strategy, table in options.OF_STRATEGIES.items():
        for name, words in table.items():
            yield Case(f"{strategy}-{name}", (*STRATEGIES[strategy], *words.split()))


def of_clients() -> Iterator[Case]:
    """What a client does in a round; what an engine may do otherwise is run on both."""
    for name, words in options.OF_CLIENTS.items():
        yield Case(f"client-{name}", (*STRATEGIES["flexlora"], *words.split()))
    for name in options.ON_BOTH:
        words = options.OF_CLIENTS[name].split()
        yield Case(f"client-{name}-fused", (*STRATEGIES["flexlora"], *words, *FUSED))


def of_groups() -> Iterator[Case]:
    """Ranks, data, models, engines, evaluation, federation: words that name all they need."""
    for group, table in options.OF_GROUPS.items():
        for name, words in table.items():
            more = FUSED if name.startswith("fused") else ()
            yield Case(f"{group}-{name}", (*more, *words.split()))


def commands() -> Iterator[Case]:
    """The commands beside a run."""
    for kind, table in options.COMMANDS.items():
        for name, words in table.items():
            yield Case(f"{kind}-{name}", tuple(words.split()), kind=kind)


def cases() -> list[Case]:
    """All of them, in the order in which they run."""
    parts = (strategies, resumed, of_strategies, of_clients, of_groups, commands)
    found = [case for part in parts for case in part()]
    names = [case.name for case in found]
    assert len(set(names)) == len(names), f"two cases of one name in {sorted(names)}"
    return found
