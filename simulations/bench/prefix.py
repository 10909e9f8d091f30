"""What do frozen blocks save that are computed once per example (`fedlora.engine.prefix`)?

    fedlora bench prefix                          SmolLM2, top 2 of 30 blocks, Natural Instructions
    fedlora bench prefix --model minilm           MiniLM, top 2 of 6 blocks, BANKING77, 30 clients
    fedlora bench prefix --model tiny --clients 8 seconds, for a try

All sides train the first cohort of a run in this process on one thread: a plain PEFT loop with the
same adapters, our engines through all blocks, and our engines with states. They must agree on every
client's losses before anything is timed; repeats are interleaved and CPU time counts. States are
computed into an empty folder, which is removed at the end.
"""

import argparse
import gc
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedlora.core import variables
from fedlora.core.types import TrainJob
from fedlora.data.store import Example
from fedlora.engine.base import WorkerEngine
from fedlora.engine.fused import Fused
from fedlora.engine.memory import keep_freed_memory
from fedlora.engine.sequential import Sequential
from fedlora.models.language_model import LanguageModel
from simulations.app.compose import load as compose
from simulations.app.parts import build_parts
from simulations.bench.engine.cases import first_cohort, prepared
from simulations.bench.engine.measure import differences, trains_otherwise
from simulations.bench.engine.sides import EngineSide, PeftLoop
from simulations.bench.machine import RESULTS, command, load, machine, write

CPU = torch.device("cpu")
LORA = ("strategy=fedit", "ranks=homogeneous", "ranks.rank=8", "model.layers=top:2")
CASES: Mapping[str, tuple[str, ...]] = {
    "smollm2": ("model=smollm2", "data=natural_instructions", "client.loss=response"),
    "minilm": ("model=minilm", "data=intents", "population.unseen_fraction=0"),
    "tiny": ("model=tiny", "data=sotu"),
}
ENGINES: Mapping[str, WorkerEngine] = {"sequential": Sequential(), "fused": Fused()}
LOOP = "peft loop"


class Run:
    """The model, the tokens and the first jobs of a configured run, in this process.

    Args:
        words: of the configuration.
        clients: how many of the first cohort; 0: all.
    """

    def __init__(self, words: Sequence[str], clients: int) -> None:
        parts = build_parts(
            compose([*words, *([f"population.per_round={clients}"] * (clients > 0))])
        )
        spec = parts.model.resolved()
        self.store: Any = prepared(parts, spec)
        if spec.classifies:
            spec = spec.with_labels(self.store.labels, parts.seed)
        self._spec, self.info = spec, spec.describe()
        self.jobs: list[TrainJob] = first_cohort(parts, self.info, self.store, dropout=0.0)

    @cached_property
    def network(self) -> Any:
        """The base as transformers makes it. It is wrapped in place by `model`."""
        return self.model.network

    @cached_property
    def model(self) -> LanguageModel:
        """The base in the library's wrapper."""
        return self._spec.load(CPU)

    def plain(self) -> "Run":
        """The same with a network of its own, unwrapped."""
        other = object.__new__(Run)
        vars(other).update({k: v for k, v in vars(self).items() if k not in ("model", "network")})
        vars(other)["network"] = self._spec.network(CPU)
        return other

    def positions(self) -> int:
        """Tokens of all examples of the jobs' clients."""
        held = (self.store.examples(j.client.id, "train") for j in self.jobs)
        return sum(len(e.input_ids) for examples in held for e in examples)


class Loop(PeftLoop):
    """`PeftLoop` whose base has no dropout, as ours has none, and for labels too."""

    def __init__(self, run: Any) -> None:
        super().__init__(run)
        self.model.eval()

    def rows(self, batch: Sequence[Example], loss: str) -> dict[str, Tensor]:
        """A batch as the network takes it."""
        if batch[0].label < 0:
            return super().rows(batch, loss)
        width = max(len(e.input_ids) for e in batch)
        lengths = torch.tensor([len(e.input_ids) for e in batch])
        pad = int(self.network.config.pad_token_id)
        ids = [
            np.pad(e.input_ids, (0, width - len(e.input_ids)), constant_values=pad) for e in batch
        ]
        return {
            "input_ids": torch.from_numpy(np.stack(ids)).long(),
            "attention_mask": (torch.arange(width) < lengths[:, None]).long(),
            "labels": torch.tensor([e.label for e in batch]),
        }


@contextmanager
def empty_cache() -> Iterator[Path]:
    """A folder of its own for what this process caches, removed at the end."""
    before = os.environ.get(variables.CACHE)
    with tempfile.TemporaryDirectory(prefix="fedlora-prefix-") as folder:
        os.environ[variables.CACHE] = folder
        try:
            yield Path(folder)
        finally:
            os.environ.pop(variables.CACHE)
            if before is not None:
                os.environ[variables.CACHE] = before


def compare(
    words: Sequence[str], clients: int, repeats: int, sides: Sequence[str]
) -> dict[str, Any]:
    """CPU seconds of the cohort on each side, and what states cost."""
    run = Run(words, clients)
    plain, tokens = run.plain(), run.positions()
    with empty_cache() as folder:
        opened: dict[str, Any] = {LOOP: Loop(plain)} if LOOP in sides else {}
        for name, spec in ENGINES.items():
            if name in sides:
                opened[name] = EngineSide(run, replace(spec, prefix="off"))  # type: ignore[arg-type]
                opened[f"{name}, states"] = EngineSide(run, replace(spec, prefix="on"))  # type: ignore[arg-type]
        filled = fill(opened, run.jobs, folder)
        outcomes = {name: list(side.train(run.jobs)) for name, side in opened.items()}
        reference = outcomes.get(LOOP) or next(iter(outcomes.values()))
        gaps = {name: differences(run.jobs, o, reference) for name, o in outcomes.items()}
        seconds: dict[str, list[float]] = {name: [] for name in opened}
        for r in range(repeats):
            names = list(opened)
            for name in names[r % len(names) :] + names[: r % len(names)]:
                gc.collect()
                began = time.process_time()
                opened[name].work(run.jobs)
                seconds[name].append(time.process_time() - began)
        notes = {name: side.notes() for name, side in opened.items()}
    return {
        "words": list(words),
        "clients": len(run.jobs),
        "blocks": [run.info.frozen_blocks, run.info.blocks],
        "tokens_held": tokens,
        "fill": filled,
        "cpu_s": seconds,
        "loss_difference": {name: gap[0] for name, gap in gaps.items()},
        "adapter_difference": {name: gap[1] for name, gap in gaps.items()},
        "notes": notes,
    }


def fill(opened: Mapping[str, Any], jobs: Sequence[TrainJob], folder: Path) -> dict[str, float]:
    """Compute the states of the jobs' clients: CPU seconds and bytes."""
    began = time.process_time()
    for side in [s for name, s in opened.items() if name.endswith(", states")][:1]:
        for job in jobs:
            side.engine.store.examples(job.client.id, "train")
    spent = time.process_time() - began
    return {"cpu_s": spent, "bytes": sum(f.stat().st_size for f in folder.rglob("*.safetensors"))}


def table(record: Mapping[str, Any]) -> str:
    """A line per side, and one on the states."""
    medians = {name: statistics.median(s) for name, s in record["cpu_s"].items()}
    base = medians.get(LOOP, next(iter(medians.values())))
    lines = [f"{'':<22}{'CPU s':>8}{'x PEFT loop':>13}{'difference of a loss':>22}"]
    for name, s in medians.items():
        gap = record["loss_difference"][name]
        lines.append(f"{name:<22}{s:>8.2f}{base / s:>13.2f}{gap:>22.1e}")
    frozen, blocks = record["blocks"]
    lines.append(
        f"{record['clients']} clients; states behind {frozen} of {blocks} blocks, of "
        f"{record['tokens_held']:,} tokens: {record['fill']['cpu_s']:.2f} CPU s once, "
        f"{record['fill']['bytes'] / 1e6:.1f} MB"
    )
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> int:
    """Measure, print, write; 1 if a side trains something else."""
    parser = argparse.ArgumentParser("fedlora bench prefix", description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", help="of the configuration: client.lr=...")
    parser.add_argument("--model", choices=tuple(CASES), default="smollm2")
    parser.add_argument("--clients", type=int, default=0, help="of the cohort; 0: 4, MiniLM: 30")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sides", nargs="+", default=[LOOP, *ENGINES], choices=[LOOP, *ENGINES])
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_intermixed_args(words)
    warnings.filterwarnings("ignore")
    keep_freed_memory()
    torch.set_num_threads(1)
    clients = args.clients or (30 if args.model == "minilm" else 4)
    before = load()
    record = compare(
        [*CASES[args.model], *LORA, *args.overrides], clients, args.repeats, args.sides
    )
    print(table(record))
    record = {"command": command("prefix"), "load_before": before, "load_after": load(), **record}
    write(args.out or RESULTS / f"prefix-{args.model}-{machine()}.json", record)
    return int(trains_otherwise(record))


if __name__ == "__main__":
    raise SystemExit(main())
