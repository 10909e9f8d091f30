"""What do the analyses of a round cost the server? (docs/analyses.md)

    python -m simulations.bench.analyses                  # MiniLM, adapters in all six blocks
    python -m simulations.bench.analyses --layers top:2   # as in experiment=intents_banking77

30 clients of ranks 8, 16, 32 and 64 whose factors have moved at random, in the second round; one
thread, in seconds of processor time, which other work on the machine disturbs little.
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from fedlora.algebra.state import State
from fedlora.core.payload import Payload
from fedlora.core.seeding import torch_generator
from fedlora.core.types import Client, Factors, Module, Ranks, Setting, Update
from fedlora.models.minilm import MiniLM
from fedlora.server.analyses import ALL, NONE, Analyses
from fedlora.techniques.lora.payload import LowRankPayload
from strategies.base import LoRAStrategy
from strategies.flexlora import FlexLoRA
from strategies.heterolora import HeteroLoRA
from strategies.rebase import Rebase

METHODS: Mapping[str, LoRAStrategy] = {
    "flexlora": FlexLoRA(),
    "heterolora": HeteroLoRA(),
    "flora": Rebase(),
}
OF: Mapping[str, Analyses] = {
    "default": Analyses(),
    "spectrum=all": Analyses(spectrum=ALL),
    "lost": Analyses(spectrum=NONE, lost=True),
    "drift": Analyses(spectrum=NONE, drift=True),
}
RANKS = (8, 16, 32, 64)
CLIENTS = 30


def population(modules: Sequence[Module], parameters: int) -> Setting:
    """Clients of four tiers of ranks."""
    ranks = [Ranks({m.path: r for m in modules}) for r in RANKS]
    clients = tuple(
        Client(i, ranks[i % len(RANKS)], 100 + i, f"T{i % len(RANKS) + 1}") for i in range(CLIENTS)
    )
    return Setting(tuple(modules), parameters, 16.0, clients, 0)


def cohort(
    rule: LoRAStrategy, state: State, setting: Setting, round: int
) -> tuple[dict[int, Payload], list[Update]]:
    """Starts and updates of a round in which all factors move by 0.01 times a normal draw."""
    g = torch_generator(0, "bench", round)
    starts: dict[int, Payload] = {}
    updates = []
    for client in (rule.enlist(state, c) for c in setting.clients):
        start = starts[client.id] = rule.technique.payload(rule.client_start(state, client))
        moved = {
            path: replace(
                f,
                a=f.a + 0.01 * torch.randn(f.a.shape, generator=g),
                b=f.b + 0.01 * torch.randn(f.b.shape, generator=g),
            )
            for path, f in _factors(start).items()
        }
        updates.append(Update(client, LowRankPayload(moved), client.num_examples, {}))
    return starts, updates


def _factors(start: Payload) -> Mapping[str, Factors]:
    found = start.low_rank()
    assert found is not None
    return found


def seconds(work: Callable[[], object]) -> float:
    """Processor seconds of some work."""
    began = time.process_time()
    work()
    return time.process_time() - began


def costs(rule: LoRAStrategy, setting: Setting) -> dict[str, float]:
    """Processor seconds of the aggregation and of each analysis in the second round."""
    first = rule.init_state(setting)
    state = rule.aggregate(first, cohort(rule, first, setting, 1)[1])
    starts, updates = cohort(rule, state, setting, 2)
    after = rule.aggregate(state, updates)
    found = {"aggregate": seconds(lambda: rule.aggregate(state, updates))}
    for name, of in OF.items():
        found[name] = seconds(lambda of=of: of.record(rule, after, setting, 2, updates, starts))  # type: ignore[misc]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line for each method."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--layers", default="all", help="blocks with adapters: all, top:2")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    info = MiniLM(layers=given.layers).resolved().describe()
    setting = population(info.modules, info.parameters)
    print(f"{len(info.modules)} modules, {CLIENTS} clients; processor seconds")
    for name, rule in METHODS.items():
        shown = (f"{what} {spent:.2f}" for what, spent in costs(rule, setting).items())
        print(f"{name:12s}{'   '.join(shown)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
