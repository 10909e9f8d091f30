"""What does a client cost in the sequential engine, beside a plain PEFT loop and a Trainer?

    python -m simulations.bench.engine

Three sides train the same clients from the same start, one after another on one base model:

    sequential   `fedlora.engine.sequential`
    peft loop    a PEFT model built once, weights reset per client, AdamW, LambdaLR, clipping
    trainer      the same PEFT model under one `transformers.Trainer` per client

Sides are interleaved, and CPU time is what counts: other jobs may share the cores. Before
anything is timed the sides must agree on every client's loss and on the adapter it ends with. All
sides run in one process, so `fedlora.engine.memory` speeds up the other two as well.
"""

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from fedlora.batches import step_indices
from fedlora.config import describe
from fedlora.data.store import Example
from fedlora.engine.sequential import Sequential
from fedlora.environment import environment
from fedlora.models.language_model import LanguageModel
from fedlora.models.modules import ModelInfo, find_modules
from fedlora.models.spec import Tiny
from fedlora.types import Adapter, Client, Factors, LocalPlan, Ranks, TrainJob, Update

RESULTS = Path(__file__).parent / "results"
ALPHA = 16.0
RANK = 8


@dataclass(frozen=True)
class Setting:
    """A base model and the shape of its clients' data."""

    name: str
    """The network's name, then what distinguishes the data."""
    clients: int
    examples: int
    tokens: tuple[int, int]
    """Shortest and longest example."""
    plan: LocalPlan

    @property
    def network(self) -> str:
        """Which network it trains."""
        return self.name.split()[0]


SETTINGS = (
    Setting("tiny", 12, 5, (160, 260), LocalPlan(lr=2e-3, batch_size=4, dropout=0.0)),
    Setting("llama256 8x128", 4, 8, (128, 128), LocalPlan(lr=2e-3, batch_size=4, dropout=0.0)),
    Setting("llama256 16x128", 4, 16, (128, 128), LocalPlan(lr=2e-3, batch_size=8, dropout=0.0)),
)


class Memory:
    """Random examples in memory, in place of a token store."""

    def __init__(self, setting: Setting, vocabulary: int) -> None:
        rng = np.random.default_rng(7)
        low, high = setting.tokens
        self.held = {
            k: [
                Example(rng.integers(3, vocabulary, rng.integers(low, high + 1), np.int32), 1)
                for _ in range(setting.examples)
            ]
            for k in range(setting.clients)
        }

    def count(self, client: int, split: str) -> int:
        """How many examples a client holds."""
        return len(self.held[client])

    def examples(self, client: int, split: str) -> list[Example]:
        """A client's examples."""
        return list(self.held[client])


def network(name: str) -> Any:
    """The base model, the same at every call."""
    if name == "tiny":
        return LlamaForCausalLM.from_pretrained(Tiny().folder(), local_files_only=True)
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=2048,
            hidden_size=256,
            intermediate_size=688,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=8,
            max_position_embeddings=512,
        )
    )


def start_adapter(model: LanguageModel) -> Adapter:
    """Random A, zero B."""
    g = torch.Generator().manual_seed(1)
    return {
        m.path: Factors(
            torch.randn(RANK, m.d_in, generator=g) / m.d_in**0.5,
            torch.zeros(m.d_out, RANK),
            ALPHA,
        )
        for m in model.info.modules
    }


def collator(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Right-padded ids, attention mask and labels."""
    width = max(len(r["input_ids"]) for r in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, -100)
    for i, row in enumerate(rows):
        tokens = torch.from_numpy(row["input_ids"])
        ids[i, : len(tokens)] = labels[i, : len(tokens)] = tokens
        mask[i, : len(tokens)] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


Outcome = tuple[float, Tensor]
"""Mean loss of the steps, and the trained adapter as one row of numbers."""


class SequentialSide:
    """Our engine."""

    def __init__(self, setting: Setting) -> None:
        base = network(setting.network)
        info = ModelInfo(setting.name, find_modules(base, "all-linear"), 0, 512, "")
        tokenizer: Any = None  # training needs none
        self.model = LanguageModel(base, tokenizer, info)
        self.memory: Any = Memory(setting, base.config.vocab_size)
        self.engine = Sequential().open(self.model, self.memory)
        self.start = start_adapter(self.model)
        self.setting = setting

    def train(self, client: int) -> Outcome:
        """One client through the engine."""
        ranks = Ranks(dict.fromkeys(self.start, RANK))
        who = Client(client, ranks, self.setting.examples)
        (update,) = self.engine.train([TrainJob(0, 1, who, self.start, self.setting.plan)])
        if not isinstance(update, Update):
            raise RuntimeError(update.traceback)
        row = torch.cat([t.reshape(-1) for f in update.adapter.values() for t in (f.a, f.b)])
        # The loops below report means of step losses.
        n = update.metrics["steps"]
        first, last = update.metrics["loss_first"], update.metrics["loss_last"]
        return ((first + last) / 2 if n == 2 else update.metrics["loss"]), row


class PeftLoop:
    """What one would write by hand around PEFT, with the model built once."""

    def __init__(self, setting: Setting, model: LanguageModel, memory: Memory) -> None:
        start = start_adapter(model)
        config = peft.LoraConfig(
            r=RANK,
            lora_alpha=int(ALPHA),
            lora_dropout=setting.plan.dropout,
            target_modules=list(start),
        )
        self.network = peft.get_peft_model(network(setting.network), config)
        self.network.config.use_cache = False
        self.network.train()
        layers = {p: self.network.base_model.model.get_submodule(p) for p in start}
        self.trained = [
            w for x in layers.values() for w in (x.lora_A.default.weight, x.lora_B.default.weight)
        ]
        self.start = [t for f in start.values() for t in (f.a, f.b)]
        self.setting, self.memory = setting, memory

    def batches(self, client: int) -> list[list[dict[str, Any]]]:
        """The rows of every optimizer step, in the engine's order."""
        plan, held = self.setting.plan, self.memory.examples(client, "train")
        order = step_indices(len(held), plan, seed=0, round=1, client=client)
        return [[{"input_ids": held[i].input_ids} for i in rows] for rows in order]

    def reset(self) -> None:
        """The start adapter, in place."""
        with torch.no_grad():
            for p, value in zip(self.trained, self.start, strict=True):
                p.copy_(value)

    def result(self) -> Tensor:
        """The adapter as one row."""
        return torch.cat([p.detach().reshape(-1) for p in self.trained])

    def train(self, client: int) -> Outcome:
        """One client through a plain loop."""
        self.reset()
        plan, batches = self.setting.plan, self.batches(client)
        optimizer = torch.optim.AdamW(
            self.trained, plan.lr, plan.betas, plan.eps, plan.weight_decay
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 - i / len(batches))
        losses = []
        for rows in batches:
            optimizer.zero_grad()
            loss = self.network(**collator(rows)).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.trained, plan.clip)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        return sum(losses) / len(losses), self.result()


class InOrder(Trainer):
    """A Trainer that keeps the data set's order, so that all sides see the same batches."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return torch.utils.data.SequentialSampler(train_dataset or self.train_dataset)


class TrainerSide(PeftLoop):
    """One `transformers.Trainer` per client on the same PEFT model and arguments."""

    def __init__(self, setting: Setting, model: LanguageModel, memory: Memory) -> None:
        super().__init__(setting, model, memory)
        plan = setting.plan
        self.arguments = TrainingArguments(
            output_dir="unused",
            use_cpu=True,
            per_device_train_batch_size=plan.batch_size,
            num_train_epochs=plan.epochs,
            learning_rate=plan.lr,
            lr_scheduler_type="linear",
            max_grad_norm=plan.clip,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        )

    def train(self, client: int) -> Outcome:
        """One client through a Trainer of its own."""
        self.reset()
        rows = [row for batch in self.batches(client) for row in batch]
        trainer = InOrder(
            model=self.network, args=self.arguments, train_dataset=rows, data_collator=collator
        )
        trainer.remove_callback(transformers.PrinterCallback)
        return float(trainer.train().training_loss), self.result()


def agreement(sides: dict[str, Callable[[int], Outcome]], clients: int) -> dict[str, float]:
    """Largest differences to the first side, over all clients.

    Raises:
        RuntimeError: if the sides do not train the same thing.
    """
    outcomes = {name: [train(k) for k in range(clients)] for name, train in sides.items()}
    first, *others = outcomes.values()
    loss = max(abs(a[0] - b[0]) for o in others for a, b in zip(first, o, strict=True))
    adapter = max(
        float((a[1] - b[1]).norm() / a[1].norm())
        for o in others
        for a, b in zip(first, o, strict=True)
    )
    if loss > 1e-4 or adapter > 1e-2:
        raise RuntimeError(f"the sides differ: loss by {loss}, adapter by {adapter}")
    return {"largest_loss_difference": loss, "largest_relative_adapter_difference": adapter}


def measure(train: Callable[[int], Outcome], clients: int) -> dict[str, float]:
    """Milliseconds per client, of CPU and of the clock."""
    wall, cpu = time.perf_counter(), time.process_time()
    for k in range(clients):
        train(k)
    return {
        "cpu_ms": (time.process_time() - cpu) / clients * 1e3,
        "wall_ms": (time.perf_counter() - wall) / clients * 1e3,
    }


def run(setting: Setting, repeats: int) -> dict[str, Any]:
    """All repeats of one setting, sides interleaved and rotated."""
    ours = SequentialSide(setting)
    sides: dict[str, Callable[[int], Outcome]] = {
        "sequential": ours.train,
        "peft loop": PeftLoop(setting, ours.model, ours.memory).train,
        "trainer": TrainerSide(setting, ours.model, ours.memory).train,
    }
    same = agreement(sides, setting.clients) if setting.plan.dropout == 0 else {}
    names = list(sides)
    repeated: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for r in range(repeats):
        for name in names[r % len(names) :] + names[: r % len(names)]:
            repeated[name].append(measure(sides[name], setting.clients))
    return {"agreement": same, "repeats": repeated}


def table(title: str, result: dict[str, Any]) -> str:
    """Medians and the smallest repeat, beside the ratio of medians to the first side."""
    lines = [
        title,
        f"{'side':<12}{'CPU ms':>9}{'(least)':>9}{'wall ms':>9}{'clients/s':>11}{'ratio':>7}",
    ]
    first = None
    for name, found in result["repeats"].items():
        cpu = statistics.median(f["cpu_ms"] for f in found)
        wall = statistics.median(f["wall_ms"] for f in found)
        first = first or cpu
        least = min(f["cpu_ms"] for f in found)
        lines.append(
            f"{name:<12}{cpu:>9.1f}{least:>9.1f}{wall:>9.1f}{1e3 / wall:>11.1f}{cpu / first:>7.2f}"
        )
    return "\n".join([*lines, *(f"{k}: {v:.1e}" for k, v in result["agreement"].items())])


def main() -> None:
    """Measure every setting with and without dropout, print tables, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--settings", nargs="*", default=[s.name for s in SETTINGS])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "engine.json")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    results = {}
    for setting in SETTINGS:
        for dropout in (0.0, 0.05):
            if setting.name not in args.settings:
                continue
            case = replace(setting, plan=replace(setting.plan, dropout=dropout))
            torch.set_num_threads(args.threads)
            result = run(case, args.repeats)
            name = f"{setting.name}, dropout {dropout}"
            print(table(f"{name}, {args.threads} thread(s)", result) + "\n", flush=True)
            config = {**vars(case), "plan": describe(case.plan), "rank": RANK, "alpha": ALPHA}
            results[name] = {"config": config, **result}
    machine = {k: v for k, v in environment().items() if k not in ("executable", "host")}
    command = (
        f"python -m simulations.bench.engine --repeats {args.repeats} --threads {args.threads}"
    )
    record = {"command": command, "threads": args.threads}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(
        json.dumps({**record, "environment": machine, "settings": results}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
