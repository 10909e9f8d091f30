"""Federated SwitchLoRA beside dense averaging and FedIT: loss at equal tokens and at equal bytes.

    python -m simulations.bench.switchlora_rounds --seeds 0      every side, in one process

``dense FedAvg`` trains and averages every weight of the adapted layers (SLoRA's first stage at
density 1). Every side is evaluated after every round on the same clients that never train; the
loss at equal bytes is that of the last round by which a side has sent no more than the alternating
rounds send in the whole run. A row per run goes into the JSON file as soon as there is one.
"""

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedlora.tracking import read_jsonl
from simulations.bench.machine import RESULTS, command, load, machine, write
from simulations.client_app import app
from simulations.compose import load as compose
from simulations.federate import run
from simulations.grid import InProcessGrid

EXPERIMENT = "experiment=switchlora"
FIRST = "alternating"
DENSE = (
    "strategy=slora",
    "strategy.stage1_rounds=1000",
    "strategy.density=1.0",
    "client=adamw",
    "client.dropout=0",
)
SIDES: Mapping[str, Sequence[str]] = {
    FIRST: [],
    "alternating, no exchanges": ["client.switch.interval=1e12"],
    "both factors and residual": ["strategy.mode=sync_product"],
    "dense, clients exchange": ["strategy.mode=dense"],
    "dense FedAvg": [*DENSE, "client.lr=1e-3"],
    "dense FedAvg, lr 3e-4": [*DENSE, "client.lr=3e-4"],
    "FedIT": [
        "strategy=fedit",
        "client=adamw",
        "ranks.alpha=16",
        "client.lr=2e-3",
        "client.dropout=0",
    ],
}


def words(side: str, seed: int, output: str) -> list[str]:
    """The overrides of a side; those that are not SwitchLoRA share all numbers of the experiment
    but the client's."""
    chosen = list(SIDES[side])
    common = [f"seed={seed}", f"output_dir={output}", "runtime=in_process", "report=false"]
    if any(w.startswith("strategy=") for w in chosen):
        plain = ["ranks=homogeneous", "evaluate=loss", "rounds=8", "ranks.rank=16"]
        plain += ["population.clients=120", "population.per_round=6", "evaluate.clients=20"]
        return [*plain, *chosen, "client.steps=10", "client.batch_size=4", *common]
    return [EXPERIMENT, *chosen, *common]


def measure(side: str, seed: int) -> dict[str, Any]:
    """One run: loss by round and bytes sent until then."""
    with tempfile.TemporaryDirectory() as output:
        chosen = words(side, seed, output)
        cfg = compose([*chosen, "engine=sequential"])
        folder = run(cfg, lambda parts: InProcessGrid(app, parts.runtime.nodes), lambda line: None)
        records = read_jsonl(Path(folder) / "metrics.jsonl")
    rounds = [r for r in records if r["kind"] == "round"]
    losses = {r["round"]: r["loss_response"] for r in records if r["kind"] == "evaluate"}
    return {
        "words": [w for w in chosen if not w.startswith("output_dir=")],
        "loss": [round(losses[t], 4) for t in sorted(losses)],
        "up_bytes": [r["wire/up_bytes"] for r in rounds],
        "down_bytes": [r["wire/down_bytes"] for r in rounds],
        "tokens": sum(int(r["train/tokens"]) for r in rounds),
        "train_seconds": round(sum(r["round/train_seconds"] for r in rounds), 1),
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
    """The table, a row per side and seed."""
    lines = ["| side | seed | loss | up MiB | down MiB | loss at equal bytes (round) |"]
    lines.append("|---" * 6 + "|")
    for side, by_seed in runs.items():
        for seed, found in by_seed.items():
            first = runs[FIRST][seed]
            done, loss = at_bytes(found, sum(first["up_bytes"]) + sum(first["down_bytes"]))
            up, down = (sum(found[f"{way}_bytes"]) / 2**20 for way in ("up", "down"))
            lines.append(
                f"| {side} | {seed} | {found['loss'][0]:.3f} → {found['loss'][-1]:.3f} | {up:.1f} "
                f"| {down:.1f} | {loss:.3f} ({done}) |"
            )
    return "\n".join(lines)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m simulations.bench.switchlora_rounds")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0], help="one run per side each")
    parser.add_argument("--sides", nargs="*", choices=SIDES, default=list(SIDES), help="which rows")
    given = parser.parse_args()
    path = RESULTS / f"switchlora-rounds-{machine()}.json"
    old = json.loads(path.read_text()) if path.is_file() else {}
    runs: dict[str, dict[str, Any]] = old.get("runs", {})
    typed = sorted({*old.get("commands", []), command("switchlora_rounds")})
    for seed in given.seeds:
        for side in given.sides:
            if str(seed) not in runs.setdefault(side, {}):
                runs[side][str(seed)] = measure(side, seed)
                write(path, {"commands": typed, "runs": runs})
                print(f"{side}, seed {seed}: {runs[side][str(seed)]['loss'][-1]}", flush=True)
    print(show(runs))


if __name__ == "__main__":
    main()
