"""What privacy costs the server: time and memory of an average of 80 clients, with it off and on.

    python -m simulations.bench.privacy                tiny whole, two blocks of SmolLM2-135M
    python -m simulations.bench.privacy --repeats 5 --blocks 6
    fedlora study privacy                              accuracy under epsilon, another command

80 clients in tiers of unequal ranks have trained (random changes, no model); timed is what follows
their replies. ``off`` is the method's own average, ``sum`` the sum of changes without privacy,
``on`` the clip of every change, the sum, its noise and the next state. Each measurement is a
process of its own, whose peak memory before the average is taken off the peak after it.
"""

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fedlora.core.package import ROOT
from fedlora.core.payload import Payload
from fedlora.population.ranks import RankDistribution
from fedlora.privacy.client import Release
from fedlora.privacy.noise import Noise
from fedlora.server.combine import combine
from fedlora.server.postprocess import Moment, Postprocessor
from fedlora.server.training_round import training_jobs
from simulations.bench.aggregation import ALPHA
from simulations.bench.costs.presets import parts_of
from simulations.bench.costs.server import CLIENTS, timed
from simulations.bench.costs.shapes import SEED, Shapes, answered, population, smollm2, tiny
from simulations.bench.machine import RESULTS, command, load, machine, write

METHODS = {
    "ffa": ("ffa",),
    "fedit": ("fedit",),
    "flexlora": ("flexlora", "strategy.residual=carry"),
}
OFF, SUM, ON = "off", "sum", "on"
STD = 0.01


def shapes_named(name: str, blocks: int) -> Shapes:
    """The layers to measure on."""
    return tiny() if name == "tiny" else smollm2(blocks)


def measured(method: str, mode: str, shapes: Shapes, clients: int) -> dict[str, float]:
    """Time and memory of one average in this process.

    Args:
        method: a key of `METHODS`.
        mode: ``off``, ``sum`` or ``on``.
        shapes: of the layers.
        clients: of the round.
    """
    torch.set_num_threads(1)
    setting = population(shapes, RankDistribution("uniform", alpha=ALPHA), clients)
    parts = parts_of(*METHODS[method], "strategy.weights=uniform")
    strategy, state = parts.strategy, parts.strategy.init_state(setting)
    jobs = training_jobs(strategy, state, setting.clients, parts.client, seed=SEED, round=1)
    starts: dict[int, Payload] = {j.client.id: j.start for j in jobs}
    updates, between = [answered(j) for j in jobs], list[Postprocessor]()
    if mode == SUM:
        between = [Postprocessor()]
    if mode == ON:
        between = [Release(1, 1.0, STD, float(clients), Noise(SEED))]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    now = Moment(SEED, 1)
    _, spent = timed(
        lambda: combine(strategy, state, updates, now, starts=starts, postprocessors=between)
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {**spent, "more_mib": (peak - before) / 1024}


def in_a_process(words: Sequence[str]) -> dict[str, float]:
    """One measurement in a new process.

    Raises:
        subprocess.CalledProcessError: if it fails.
    """
    line = [sys.executable, "-m", "simulations.bench.privacy", "--one", *words]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, cwd=ROOT, env=env, stdout=subprocess.PIPE, check=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(words: Sequence[str] | None = None) -> int:
    """Measure every method, mode and model; print a line each and write the JSON file."""
    parser = argparse.ArgumentParser(prog="privacy", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--models", nargs="+", choices=("tiny", "smollm2"))
    parser.add_argument("--blocks", type=int, default=2, help="of SmolLM2's 30, which are alike")
    parser.add_argument("--clients", type=int, default=CLIENTS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / f"privacy-{machine()}.json")
    parser.add_argument("--one", nargs=2, metavar=("METHOD", "MODE"), help="in this process")
    given = parser.parse_args(words)
    models = given.models or ["tiny", "smollm2"]
    if given.one:
        shapes = shapes_named(models[0], given.blocks)
        method, mode = given.one
        print(json.dumps(measured(method, mode, shapes, given.clients)))
        return 0
    rows: list[dict[str, Any]] = []
    for model in models:
        scale = shapes_named(model, given.blocks).scale
        for method in given.methods:
            for mode in (OFF, SUM, ON):
                case = [method, mode, "--models", model, "--blocks", str(given.blocks)]
                case += ["--clients", str(given.clients)]
                found = [in_a_process(case) for _ in range(given.repeats)]
                row = {key: scale * statistics.median(f[key] for f in found) for key in found[0]}
                rows.append({"model": model, "method": method, "mode": mode, **row})
                numbers = "  ".join(f"{k} {v:.1f}" for k, v in row.items() if math.isfinite(v))
                print(f"{model:<8} {method:<9} {mode:<4} {numbers}", flush=True)
    about = {"clients": given.clients, "blocks": given.blocks, "repeats": given.repeats}
    write(given.out, {"command": command("privacy"), "load": load(), **about, "rows": rows})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
