"""How many tokens should a fused step have? Time and memory by budget, beside the engine's choice.

    python -m simulations.bench.budget             three minutes on one core
    python -m simulations.bench.budget --networks tiny llama576x4
    python -m simulations.bench.budget --networks minilm --out FILE       classification

Every network trains the same clients with each budget, interleaved, in one process of one thread;
the CPU time of the fastest repeat counts. Memory is the peak of a step beyond the adapters, in
processes of their own. The engine takes its budget from the constants of
`fedlora.engine.fused.cost`, which are checked here and not measured by a run.
"""

import argparse
import gc
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fedlora.engine.fused import Fused
from fedlora.engine.fused.cost import CostModel
from simulations.bench.engine.cases import SHORT, Case, Draw, World, real_tokens
from simulations.bench.engine.hosts import Opened, hosts, reset_peak, resident
from simulations.bench.engine.sides import EngineSide
from simulations.bench.machine import RESULTS, command, load, machine, write
from simulations.bench.prefix import Run

NETWORKS = ("tiny", "llama64x4", "llama256x4", "llama576x2")
BUDGETS = (256, 512, 1024, 2048, 4096, 8192)
CLASSIFIERS = {
    "minilm": ("experiment=intents_banking77", "strategy=flexlora", "client.dropout=0.05", "seed=0")
}
"""Runs whose first eight clients train, with states behind the frozen blocks."""
TOKENS = {"tiny": 12288, "llama64x4": 24576}
"""Tokens of all clients; 6,144 for wider networks."""
RANK = 4


def case_of(network: str) -> Case:
    """Clients with two steps of two short texts each, of 12 to 36 tokens."""
    clients = TOKENS.get(network, 6144) // 96
    draws = Draw(12, 36), Draw(4, 4)
    return Case(network, network, clients, replace(SHORT, dropout=0.05), *draws, (RANK,))


def spec(budget: int) -> Fused:
    """The engine with this budget; 0: its own choice."""
    return Fused(layout="ragged", tokens=budget)


def seconds(world: Any, prefix: str, repeats: int) -> dict[str, Any]:
    """CPU seconds per token of every budget that the clients fill, and the engine's choice."""
    tokens = sum(real_tokens(job, world.store) for job in world.jobs)
    sides = {
        b: EngineSide(world, replace(spec(b), prefix=prefix)) for b in BUDGETS if 2 * b <= tokens
    }
    times: dict[int, list[float]] = {b: [] for b in sides}
    for repeat in range(repeats + 1):  # the first warms up
        for budget, side in sides.items():
            began = time.process_time()
            side.work(world.jobs)
            if repeat:
                times[budget].append((time.process_time() - began) / tokens)
    info = world.model.info
    model = CostModel.of(info, world.model.network.dtype)
    chosen = model.budget(world.model.device, info.classifies)
    return {"tokens": tokens, "chosen": chosen, "cpu_s_per_token": times}


def step_bytes(opened: Opened) -> float:
    """The peak of training beyond what was there before, without the clients' rows."""
    world = opened.world
    floats = sum(RANK * (m.d_in + m.d_out) for m in world.modules)
    gc.collect()
    reset_peak()
    before = 1e6 * resident("VmRSS")
    opened.side.work(world.jobs)
    return 1e6 * resident("VmHWM") - before - 16.0 * floats * len(world.jobs)


def memory(case: Case, budget: int) -> dict[str, float]:
    """Bytes per token of a step of ``budget`` tokens: measured, and predicted."""
    one = replace(case, clients=budget // 40)
    engine = replace(spec(budget), slots=one.clients, reuse_memory=False)
    with hosts(one, {"fused": 1}, {"fused": engine}) as opened:
        measured = opened["fused"][0].call(step_bytes) / budget
    model = World(one).model
    predicted = CostModel.of(model.info, model.network.dtype).token_bytes
    return {"measured": measured, "predicted": predicted}


def measured(network: str, repeats: int) -> dict[str, Any]:
    """Time and memory of one network; of a classifier, time alone."""
    if network in CLASSIFIERS:
        return seconds(Run(CLASSIFIERS[network], 8), "on", repeats)
    case = case_of(network)
    return seconds(World(case), "off", repeats) | {"memory": memory(case, 1024)}


def line(network: str, record: dict[str, Any]) -> str:
    """One network: microseconds per token by budget, the chosen one marked."""
    cells = [
        f"{b}{'*' if b == record['chosen'] else ''}: {1e6 * min(times):.1f}"
        for b, times in record["cpu_s_per_token"].items()
    ]
    found = f"{network:<12}{'   '.join(cells)} us per token"
    held = record.get("memory")
    if held is None:
        return found
    return (
        f"{found};   {held['measured'] / 1e3:.0f} kB per token, "
        f"predicted {held['predicted'] / 1e3:.0f}"
    )


def main(words: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / f"budget-{machine()}.json")
    args = parser.parse_args(words)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    before, networks = load(), {}
    for network in args.networks:
        networks[network] = measured(network, args.repeats)
        print(line(network, networks[network]), flush=True)
    record = {"command": command("budget"), "load_before": before, "load_after": load()}
    write(args.out, record | {"networks": networks})


if __name__ == "__main__":
    main()
