"""Four ways to pre-train a small Llama at equal tokens: all weights, LoRA, ReLoRA, SwitchLoRA.

    python -m simulations.bench.switchlora --pilot        learning rates, on fewer tokens
    python -m simulations.bench.switchlora --seeds 0 1 2  the table, at the best of each
    python -m simulations.bench.switchlora --overhead     time of a step with and without exchanges

A row per run goes into the JSON file as soon as there is one, and what is there is not run again.
Perplexity is of a fixed part of the held-out text, evaluated without merging. Bytes are float32: of
what is trained, of its gradients and moments (four numbers for each that is trained), of the frozen
weights and of SwitchLoRA's pools.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from simulations.bench.machine import RESULTS, command, load, machine, over, write
from simulations.pretraining.learner import (
    Learner,
    Method,
    learner,
)
from simulations.pretraining.pretrain import evaluate, train_step
from simulations.pretraining.recipe import Recipe, build_model
from simulations.pretraining.tokens import (
    Text,
    Tokens,
    build_text,
    packed,
)

RECIPE = Recipe(
    tokens=1_200_000, batch=8, length=128, long_every=0, warmup=50, decay=0.0, beta2=0.999
)
PILOT_SHARE = 4
"""The pilot's runs have this fraction of the tokens."""
HELD_OUT_TOKENS = 50_000
RANK = 32
EVERY = 100
"""Steps between two points of a curve."""


@dataclass(frozen=True)
class Side:
    """One row of the table."""

    method: Method
    rates: tuple[float, ...] = ()
    """Learning rates that the pilot tries."""
    like: str = ""
    """Whose learning rate it takes instead."""


SWITCH = Method("switchlora", RANK)
SIDES = {
    "full": Side(Method("full"), (1e-3, 3e-3, 1e-2)),
    "LoRA": Side(Method("lora", RANK), (3e-3, 1e-2, 3e-2)),
    "ReLoRA": Side(Method("relora", RANK, merge_every=100, merge_warmup=10), like="LoRA"),
    "SwitchLoRA": Side(SWITCH, (3e-3, 1e-2, 3e-2)),
    "SwitchLoRA, often": Side(replace(SWITCH, interval=20.0, ratio=0.5), like="SwitchLoRA"),
    "SwitchLoRA, never": Side(replace(SWITCH, interval=1e12), like="SwitchLoRA"),
}
"""The paper's schedule is for 40,000 steps: in a few hundred it exchanges each vector about once,
which is why there is a row with more exchanges beside it."""


def held_out(text: Text) -> list[Tokens]:
    """The first documents of a shuffled held-out text, up to the number of tokens."""
    order = np.random.default_rng(0).permutation(len(text.held_rows))
    found, total = [], 0
    for i in order:
        found.append(text.held_rows[i])
        total += len(found[-1])
        if total >= HELD_OUT_TOKENS:
            break
    return found


def memory(trained: Learner, numbers: dict[str, Any]) -> dict[str, int]:
    """Bytes of what is trained with gradient and moments, of frozen weights, of pools."""
    frozen = sum(p.numel() for p in trained.network.parameters() if not p.requires_grad)
    return {
        "trained_bytes": 16 * int(numbers["trained_parameters"]),
        "frozen_bytes": 4 * frozen,
        "pool_bytes": 4 * int(numbers.get("pool_floats", 0)),
    }


def train(side: Side, recipe: Recipe, text: Text) -> dict[str, Any]:
    """One run from nothing."""
    rows = held_out(text)
    trained = learner(build_model(recipe), recipe, side.method)
    losses: list[float] = []
    curve, began = [], time.perf_counter()
    blocks = packed(text.train, recipe.block, recipe.seed)
    for step, block in zip(range(recipe.steps), blocks, strict=False):
        losses.append(train_step(trained, block, step, recipe))
        if (step + 1) % EVERY == 0:
            curve.append([step + 1, round(statistics.fmean(losses[-EVERY:]), 4)])
    seconds = time.perf_counter() - began
    loss = evaluate(trained.network, rows, recipe.length)
    numbers = trained.report()
    return {
        "loss": round(loss, 4),
        "perplexity": round(math.exp(loss), 2),
        "train_loss": round(statistics.fmean(losses[-EVERY:]), 4),
        **numbers,
        **memory(trained, numbers),
        "steps": recipe.steps,
        "tokens": recipe.steps * recipe.block,
        "seconds": round(seconds, 1),
        "load": load(),
        "curve": curve,
    }


class Record:
    """The JSON file."""

    def __init__(self, path: Path, recipe: Recipe) -> None:
        self.path = path
        old = json.loads(path.read_text()) if path.is_file() else {}
        self.content = {
            "commands": sorted({*old.get("commands", []), command("switchlora")}),
            "recipe": asdict(recipe),
            "sides": {name: asdict(side.method) for name, side in SIDES.items()},
            "pilot": old.get("pilot", {}),
            "runs": old.get("runs", {}),
        }

    def add(self, part: str, name: str, key: str, value: Any) -> None:
        """Write one result."""
        self.content[part].setdefault(name, {})[key] = value
        write(self.path, self.content)

    def has(self, part: str, name: str, key: str) -> bool:
        """Whether it is there."""
        return key in self.content[part].get(name, {})

    def best(self, name: str) -> float:
        """The learning rate with the lowest loss in the pilot."""
        tried = self.content["pilot"].get(SIDES[name].like or name)
        if not tried:
            raise SystemExit(f"no pilot of {name}: run with --pilot first")
        return float(min(tried, key=lambda rate: tried[rate]["loss"]))


def pilot(record: Record, recipe: Recipe, text: Text, names: Sequence[str]) -> None:
    """Try the learning rates of each side."""
    short = replace(recipe, tokens=recipe.tokens // PILOT_SHARE)
    for name in names:
        for rate in SIDES[name].rates:
            if not record.has("pilot", name, f"{rate:g}"):
                found = train(SIDES[name], replace(short, lr=rate), text)
                record.add("pilot", name, f"{rate:g}", found)
                print(f"pilot {name} lr {rate:g}: {found['loss']}", flush=True)


def table(
    record: Record, recipe: Recipe, text: Text, names: Sequence[str], seeds: Sequence[int]
) -> None:
    """One run per side and seed."""
    for seed in seeds:
        for name in names:
            if record.has("runs", name, str(seed)):
                continue
            lr = record.best(name)
            found = train(SIDES[name], replace(recipe, lr=lr, seed=seed), text)
            record.add("runs", name, str(seed), found | {"lr": lr})
            print(f"{name} seed {seed}: {found['loss']} {found['update_rank']}", flush=True)


def overhead(recipe: Recipe, text: Text, repeats: int = 60) -> None:
    """Seconds of a step, interleaved, at the start of a run where exchanges are most frequent."""
    sides = {
        "LoRA": SIDES["LoRA"],
        "SwitchLoRA": SIDES["SwitchLoRA"],
        "never": SIDES["SwitchLoRA, never"],
    }
    long = replace(recipe, tokens=10**9)  # the interval stays near 40
    learners = {n: learner(build_model(long), long, s.method) for n, s in sides.items()}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    blocks = packed(text.train, recipe.block, 0)
    for step, block in zip(range(repeats), blocks, strict=False):
        for name, trained in learners.items():
            began = time.process_time()
            train_step(trained, block, step, long)
            seconds[name].append(time.process_time() - began)
    medians = {name: statistics.median(s[5:]) for name, s in seconds.items()}
    means = {name: statistics.fmean(s[5:]) for name, s in seconds.items()}
    result = {
        "cpu_seconds_median": medians,
        "cpu_seconds_mean": means,
        "over_never": means["SwitchLoRA"] / means["never"] - 1,
        "over_lora": means["SwitchLoRA"] / means["LoRA"] - 1,
        "exchanged": learners["SwitchLoRA"].report()["exchanged"],
        "tokens": recipe.block,
        "width": recipe.hidden,
        "rank": RANK,
        "load": load(),
        "command": command("switchlora"),
    }
    write(RESULTS / f"switchlora-steps-d{recipe.hidden}-{machine()}.json", result)
    print(json.dumps(result), flush=True)


def show(record: Record) -> str:
    """The table, as in the documentation."""
    lines = [
        "| method | lr | held-out perplexity | seeds | trained | MB trained, pools | update rank |",
        "|---" * 7 + "|",
    ]
    for name, runs in record.content["runs"].items():
        found = list(runs.values())
        ranks = [f["update_rank"]["mean"] for f in found]
        first = found[0]
        lines.append(
            f"| {name} | {first['lr']:g} | {over([f['perplexity'] for f in found], 1)} "
            f"| {len(found)} | {first['trained_parameters']:,} "
            f"| {first['trained_bytes'] / 1e6:.1f}, {first['pool_bytes'] / 1e6:.1f} "
            f"| {over(ranks, 1)} of {first['update_rank']['possible']} |"
        )
    return "\n".join(lines)


def curves(record: Record) -> str:
    """Training loss, means over seeds and over the steps since the column before."""
    runs = record.content["runs"]
    steps = [step for step, _ in next(iter(next(iter(runs.values())).values()))["curve"]]
    lines = [f"| step | {' | '.join(map(str, steps))} |", "|---" * (len(steps) + 1) + "|"]
    for name, by_seed in runs.items():
        losses = zip(*(run["curve"] for run in by_seed.values()), strict=True)
        means = [statistics.fmean(loss for _, loss in at) for at in losses]
        lines.append(f"| {name} | {' | '.join(f'{m:.3f}' for m in means)} |")
    return "\n".join(lines)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m simulations.bench.switchlora")
    option = parser.add_argument
    option("--pilot", action="store_true", help="try learning rates")
    option("--overhead", action="store_true", help="time steps")
    option("--seeds", type=int, nargs="*", default=[], help="of the runs of the table")
    option("--sides", nargs="*", choices=SIDES, default=list(SIDES), help="which rows")
    option("--tokens", type=int, default=RECIPE.tokens, help="of each run")
    option("--hidden", type=int, default=RECIPE.hidden, help="width")
    given = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    intermediate = RECIPE.intermediate * given.hidden // RECIPE.hidden
    recipe = replace(RECIPE, tokens=given.tokens, hidden=given.hidden, intermediate=intermediate)
    name = f"switchlora-d{recipe.hidden}-{recipe.tokens // 1000}k-{machine()}.json"
    text = build_text(recipe)
    if given.overhead:
        overhead(recipe, text)
        return
    record = Record(RESULTS / name, recipe)
    if given.pilot:
        pilot(record, recipe, text, given.sides)
    table(record, recipe, text, given.sides, given.seeds)
    if record.content["runs"]:
        print(show(record), curves(record), sep="\n\n")


if __name__ == "__main__":
    main()
