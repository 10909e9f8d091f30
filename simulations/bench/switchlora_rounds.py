"""Federated SwitchLoRA compared with dense averaging and FedIT: loss at equal tokens and at equal
bytes.

    python -m simulations.bench.switchlora_rounds --pilot            learning rates, in fewer rounds
    python -m simulations.bench.switchlora_rounds --seeds 0 1 2      every side at the best of each

``dense FedAvg`` trains and averages every weight of the adapted layers (SLoRA's first stage at
density 1). Every side is evaluated after every round on the same clients that never train; the
loss at equal bytes is that of the last round by which a side has sent no more than the alternating
rounds send in the whole run. The pilot has a seed, hence clients, of its own. A row per run goes
into the JSON file as soon as there is one, and what is there is not run again.
"""

import argparse
import json
import logging
import statistics
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.run.tracking import read_jsonl
from simulations.app.client_app import app
from simulations.app.compose import load as compose
from simulations.app.federate import run
from simulations.app.grid import InProcessGrid
from simulations.bench.machine import RESULTS, command, load, machine, over, write

FIRST = "alternating"
PILOT_SEED = 100
PILOT_ROUNDS = 4


@dataclass(frozen=True)
class Side:
    """One row of the table."""

    overrides: tuple[str, ...] = ()
    rates: tuple[float, ...] = ()
    """Learning rates that the pilot tries."""
    like: str = ""
    """Whose learning rate it takes instead."""


SWITCH_RATES = (1e-3, 3e-3, 1e-2, 3e-2)
SIDES: Mapping[str, Side] = {
    FIRST: Side(rates=SWITCH_RATES),
    "alternating, no exchanges": Side(("client.technique.interval=1e12",), like=FIRST),
    "both factors and residual": Side(("strategy.mode=sync_product",), SWITCH_RATES),
    "dense, clients exchange": Side(("strategy.mode=dense",), SWITCH_RATES),
    "dense FedAvg": Side(
        ("strategy=slora", "strategy.stage1_rounds=1000", "strategy.density=1.0"),
        (1e-4, 3e-4, 1e-3),
    ),
    "FedIT": Side(("strategy=fedit", "ranks.alpha=16"), (6e-4, 2e-3, 6e-3)),
}


def words(side: str, rate: float, rounds: int, seed: int, output: str) -> list[str]:
    """The overrides of a side; those that are not SwitchLoRA share all numbers of the experiment
    but the client's."""
    chosen = list(SIDES[side].overrides)
    common = [f"seed={seed}", f"output_dir={output}", "runtime=in_process", "report=false"]
    common += [f"rounds={rounds}", f"client.lr={rate:g}"]
    if any(w.startswith("strategy=") for w in chosen):
        plain = ["ranks=homogeneous", "evaluate=loss", "ranks.rank=16"]
        plain += ["population.clients=120", "population.per_round=6", "evaluate.clients=20"]
        plain += ["client=adamw", "client.dropout=0", "client.steps=10", "client.batch_size=4"]
        return [*plain, *chosen, *common]
    return ["experiment=switchlora", *chosen, *common]


def measure(side: str, rate: float, rounds: int, seed: int) -> dict[str, Any]:
    """One run: loss by round and bytes sent until then."""
    with tempfile.TemporaryDirectory() as output:
        chosen = words(side, rate, rounds, seed, output)
        cfg = compose([*chosen, "engine=sequential"])
        folder = run(cfg, lambda parts: InProcessGrid(app, parts.runtime.nodes), lambda line: None)
        records = read_jsonl(Path(folder) / "metrics.jsonl")
    done = [r for r in records if r["kind"] == "round"]
    losses = {r["round"]: r["loss_response"] for r in records if r["kind"] == "evaluate"}
    return {
        "words": [w for w in chosen if not w.startswith("output_dir=")],
        "loss": [round(losses[t], 4) for t in sorted(losses)],
        "up_bytes": [r["wire/up_bytes"] for r in done],
        "down_bytes": [r["wire/down_bytes"] for r in done],
        "tokens": sum(int(r["train/tokens"]) for r in done),
        "train_seconds": round(sum(r["round/train_seconds"] for r in done), 1),
        "load": load(),
    }


def at_bytes(found: Mapping[str, Any], budget: int) -> tuple[int, float]:
    """The last round by which no more was sent, up and down, and the loss after it."""
    sent, done = 0, 0
    for up, down in zip(found["up_bytes"], found["down_bytes"], strict=True):
        sent += up + down
        if sent > budget:
            break
        done += 1
    return done, found["loss"][done]


def show(runs: Mapping[str, Mapping[str, Any]]) -> str:
    """The table, means over the seeds. Seeds differ in their clients, so differences between sides
    are taken seed by seed."""
    lines = [
        "| side | lr | seeds | loss | minus the first side's | up, down MiB "
        "| loss at equal bytes (after round) |",
        "|---" * 7 + "|",
    ]
    for side, by_seed in runs.items():
        found = list(by_seed.values())
        sums = {w: [sum(f[f"{w}_bytes"]) for f in found] for w in ("up", "down")}
        first = runs.get(FIRST, {})
        apart = [f["loss"][-1] - first[k]["loss"][-1] for k, f in by_seed.items() if k in first]
        budgets = {k: sum(f["up_bytes"]) + sum(f["down_bytes"]) for k, f in first.items()}
        equal = [at_bytes(f, budgets[k]) for k, f in by_seed.items() if k in budgets]
        up, down = (statistics.fmean(sums[way]) / 2**20 for way in ("up", "down"))
        rounds = "/".join(str(done) for done in sorted({done for done, _ in equal}))
        at_equal = f"{over([loss for _, loss in equal])} ({rounds})" if equal else "-"
        lines.append(
            f"| {side} | {found[0]['lr']:g} | {len(found)} "
            f"| {over([f['loss'][0] for f in found])} → {over([f['loss'][-1] for f in found])} "
            f"| {over(apart) if apart else '-'} "
            f"| {up:.1f}, {down:.1f} | {at_equal} |"
        )
    return "\n".join(lines)


class Record:
    """The JSON file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        old = json.loads(path.read_text()) if path.is_file() else {}
        self.pilot: dict[str, dict[str, Any]] = old.get("pilot", {})
        self.runs: dict[str, dict[str, Any]] = old.get("runs", {})
        self.commands = sorted({*old.get("commands", []), command("switchlora_rounds")})

    def add(self, part: dict[str, dict[str, Any]], side: str, key: str, found: Any) -> None:
        """Write one result."""
        part.setdefault(side, {})[key] = found
        content = {"commands": self.commands, "pilot": self.pilot, "runs": self.runs}
        write(self.path, content)
        print(f"{side}, {key}: {found['loss'][-1]}", flush=True)

    def best(self, side: str) -> float:
        """The learning rate with the lowest last loss in the pilot."""
        tried = self.pilot.get(SIDES[side].like or side)
        if not tried:
            raise SystemExit(f"no pilot of {side}: run with --pilot first")
        return float(min(tried, key=lambda rate: tried[rate]["loss"][-1]))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m simulations.bench.switchlora_rounds")
    parser.add_argument("--pilot", action="store_true", help="try learning rates")
    parser.add_argument("--seeds", type=int, nargs="*", default=[], help="one run per side each")
    parser.add_argument("--sides", nargs="*", choices=SIDES, default=list(SIDES), help="which rows")
    parser.add_argument("--rounds", type=int, default=12, help="of each run")
    given = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.WARNING)
    record = Record(RESULTS / f"switchlora-rounds-{given.rounds}-{machine()}.json")
    for side in given.sides if given.pilot else []:
        for rate in SIDES[side].rates:
            if f"{rate:g}" not in record.pilot.get(side, {}):
                found = measure(side, rate, PILOT_ROUNDS, PILOT_SEED)
                record.add(record.pilot, side, f"{rate:g}", found)
    for seed in given.seeds:
        for side in given.sides:
            if str(seed) not in record.runs.get(side, {}):
                rate = record.best(side)
                found = measure(side, rate, given.rounds, seed) | {"lr": rate}
                record.add(record.runs, side, str(seed), found)
    print(show(record.runs))


if __name__ == "__main__":
    main()
