r"""The loss of a pruned model, before and after training that keeps its zeros.

    python -m simulations.bench.sparse                    the tiny model at 50 % and 2:4
    python -m simulations.bench.sparse --model smollm2 --patterns 2:4 --one-shot \
        --others magnitude --steps 8 --rates 0.3 --length 64 --train 32 --held 16 \
        --samples 32 --repeats 2

State of the Union addresses: text of training clients prunes (Wanda, sequential) and trains, other
clients' text chooses the learning rate, a third part is what the table shows. Every technique takes
the same steps on the same tokens. SPP has twice LoRA's rank, which is about its number of
parameters. Times per step are CPU time on one thread, in turns, medians; both techniques then have
the same rank.
"""

import argparse
import dataclasses
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedlora.core.cache import cache_root
from fedlora.core.types import LocalPlan
from fedlora.data.sotu import Sotu
from fedlora.data.store import TokenStore, prepare
from fedlora.engine.memory import keep_freed_memory
from fedlora.models.language_model import LanguageModel
from fedlora.models.layers import dense_weight, stored_transposed
from fedlora.models.masks import check_zeros, identity
from fedlora.models.spec import ModelSpec, SmolLM2, Tiny
from fedlora.prune.prune import Pruning, prune, sparsity
from fedlora.prune.statistics import windows
from fedlora.training.loop import optimise
from simulations.bench.machine import RESULTS, command, load, machine, write
from simulations.centralized.baselines import (
    BATCH,
    Mount,
    Start,
    mount_lora,
    mount_masked_full,
    mount_masked_lora,
    mount_spp,
)
from simulations.centralized.baselines import loss_of as mean_loss

MODELS: Mapping[str, ModelSpec] = {"tiny": Tiny(), "smollm2": SmolLM2()}
SHARES = {"test": 0, "validation": 1}
"""Split -> which of every ten clients is set apart for it; the others train."""


@dataclass(frozen=True)
class Window:
    """A sequence of consecutive tokens, all of which are learnt."""

    input_ids: NDArray[np.int64]
    prompt_tokens: int = 1
    responses: None = None
    label: int = -1
    states: None = None


@dataclass(frozen=True)
class Texts:
    """Windows of training clients, of those who choose, and of those who judge."""

    train: Sequence[Window]
    validation: Sequence[Window]
    test: Sequence[Window]


@dataclass(frozen=True)
class Technique:
    """One way to train a pruned model."""

    mount: Mount
    rank: int
    lr: float


def texts_of(spec: ModelSpec, length: int = 256, train: int = 256, held: int = 24) -> Texts:
    """Windows of ``length`` tokens from 400 clients of State of the Union addresses."""
    tokenizer, name = spec.tokenizer(), spec.tokenizer_id()
    store = TokenStore(prepare(Sotu(clients=400), tokenizer, name, cache_root()))

    def cut(digits: Sequence[int], count: int) -> list[Window]:
        ids = [c.id for c in store.clients if c.id % 10 in digits]
        found = (e.input_ids.tolist() for i in ids for e in store.examples(i, "train"))
        return [Window(w[0].numpy()) for w in windows(found, count, length)]

    apart = list(SHARES.values())
    rest = [d for d in range(10) if d not in apart]
    return Texts(cut(rest, train), cut([SHARES["validation"]], held), cut([SHARES["test"]], held))


def loss_of(model: LanguageModel, texts: Texts | Sequence[Window]) -> float:
    """Mean loss per token, in nats, of what is mounted; of `Texts`, their test part."""
    return mean_loss(model, texts.test if isinstance(texts, Texts) else texts)


TECHNIQUES: Mapping[str, Technique] = {
    "SPP": Technique(mount_spp, 16, 5e-2),
    "LoRA": Technique(mount_lora, 8, 5e-3),
    "masked LoRA": Technique(mount_masked_lora, 8, 5e-3),
    "masked full": Technique(mount_masked_full, 1, 1e-3),
}


class Bench:
    """One base model, one pattern after another."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        spec = MODELS[options.model]
        self.model = spec.load(torch.device("cpu"))
        self.texts = texts_of(spec, options.length, options.train, options.held)
        self.dense = {p: x.weight.clone() for p, x in self.model.layers.items()}

    def put(self, weights: Mapping[str, Tensor]) -> None:
        """Give the base these stored weights."""
        for path, layer in self.model.layers.items():
            layer.base.weight = nn.Parameter(weights[path].clone(), requires_grad=False)

    def prune(self, pruning: Pruning) -> dict[str, Tensor]:
        """Prune what is there; the masks."""
        ids = [torch.from_numpy(w.input_ids)[None] for w in self.texts.train]
        masks = prune(
            self.model.network, list(self.model.layers), pruning, ids[: self.options.samples]
        )
        self.model.info = dataclasses.replace(self.model.info, mask=identity(masks))
        return masks

    def row(self, name: str, parameters: int = 0, lr: float = 0.0) -> dict[str, Any]:
        """What is measured of the model as it stands."""
        loss = loss_of(self.model, self.texts.test)
        zeros = sparsity(self.model.network, list(self.model.layers))
        row = {"name": name, "perplexity": math.exp(loss), "sparsity": zeros}
        row |= {"parameters": parameters, "lr": lr}
        print(
            f"{name:<22} {row['perplexity']:>10.3f} {zeros:>9.4f} {parameters:>10,} {lr:>9.2g}",
            flush=True,
        )
        return row

    def train(self, technique: Technique, lr: float) -> list[nn.Parameter]:
        """Mount and train from the start."""
        parameters = technique.mount(self.model, Start(technique.rank))
        plan = LocalPlan(lr=lr, batch_size=BATCH, steps=self.options.steps, dropout=0.0)
        plan = dataclasses.replace(plan, warmup=0.05)
        optimise(self.model, parameters, self.texts.train, plan, seed=0, round=1, client=0)
        return parameters

    def trained(self, name: str, masks: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        """The technique at the learning rate that its validation loss chooses, merged."""
        technique, pruned = TECHNIQUES[name], self.stored()
        found: list[tuple[float, float, dict[str, Tensor], int]] = []
        for factor in self.options.rates:
            parameters = self.train(technique, technique.lr * factor)
            loss = loss_of(self.model, self.texts.validation)
            count = sum(p.numel() for p in parameters)
            found.append((loss, technique.lr * factor, self.stored(), count))
        _, lr, weights, count = min(found, key=lambda x: x[0])
        self.model.unmount()
        self.put(weights)
        rows = []
        if name == "LoRA":
            rows.append(self.row("LoRA, zeros filled", count, lr))
            self.prune(Pruning("wanda", self.pattern, not self.options.one_shot))
            rows.append(self.row("LoRA, pruned again", count, lr))
        else:
            layers = self.model.layers
            check_zeros(masks, lambda p: dense_weight(layers[p].base), name)
            rows.append(self.row(name, count, lr))
        self.put(pruned)
        self.model.info = dataclasses.replace(self.model.info, mask=identity(masks))
        return rows

    def stored(self) -> dict[str, Tensor]:
        """The effective weights of what is mounted, as the base stores them."""
        out = {}
        for path, layer in self.model.layers.items():
            weight = layer.effective_weight(layer.update)
            weight = weight.T if stored_transposed(layer.base) else weight
            out[path] = weight.to(layer.weight.dtype).contiguous()
        return out

    def run(self, pattern: str) -> list[dict[str, Any]]:
        """The table of one pattern."""
        self.pattern = pattern
        self.put(self.dense)
        print(f"\n{pattern:<22} {'perplexity':>10} {'sparsity':>9} {'parameters':>10} {'lr':>9}")
        rows = [self.row("dense")]
        for method in (*self.options.others, "wanda"):
            self.put(self.dense)
            masks = self.prune(Pruning(method, pattern, not self.options.one_shot))
            rows.append(self.row(f"pruned, {method}"))
        for name in TECHNIQUES:
            rows += self.trained(name, masks)
        return rows

    def times(self, rank: int = 16, steps: int = 3) -> list[dict[str, Any]]:
        """CPU seconds per training step of SPP and LoRA at one rank, in turns."""
        sides = {"LoRA": mount_lora, "SPP": mount_spp}
        spent: dict[tuple[str, float], list[float]] = {}
        for _ in range(self.options.repeats):
            for dropout in (0.0, 0.05):
                for name, mount in sides.items():
                    parameters = mount(self.model, Start(rank, dropout=dropout))
                    plan = LocalPlan(lr=1e-4, batch_size=BATCH, steps=steps, dropout=dropout)
                    start = time.process_time()
                    optimise(
                        self.model, parameters, self.texts.train, plan, seed=0, round=1, client=0
                    )
                    spent.setdefault((name, dropout), []).append(
                        (time.process_time() - start) / steps
                    )
        self.model.unmount()
        medians = {key: statistics.median(v) for key, v in spent.items()}
        rows = []
        for (name, dropout), seconds in medians.items():
            ratio = seconds / medians["LoRA", dropout]
            rows.append({"name": name, "dropout": dropout, "seconds": seconds, "ratio": ratio})
            print(f"step of {name}, dropout {dropout}: {seconds:.3f} s, {ratio:.2f} of LoRA's")
        return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=list(MODELS), default="tiny")
    parser.add_argument("--patterns", nargs="+", default=["0.5", "2:4"])
    parser.add_argument("--steps", type=int, default=200, help="of training")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.3, 1.0, 3.0])
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--train", type=int, default=800, help="sequences to train on")
    parser.add_argument("--held", type=int, default=48, help="sequences to choose, and to judge")
    parser.add_argument("--samples", type=int, default=64, help="sequences that calibrate")
    parser.add_argument("--one-shot", action="store_true", help="prune all blocks at once")
    parser.add_argument("--others", nargs="*", default=["magnitude", "sparsegpt"], help="pruners")
    parser.add_argument("--repeats", type=int, default=5, help="of the times per step; 0: none")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    keep_freed_memory()
    bench, before = Bench(options), load()
    record: dict[str, Any] = {"command": command("sparse"), "load": before}
    target = RESULTS / f"sparse-{options.model}-{machine()}.json"
    record["patterns"] = {}
    for pattern in options.patterns:
        record["patterns"][pattern] = bench.run(pattern)
        write(target, record)  # hours of a large model: what is there is kept
    record["times"] = bench.times() if options.repeats else []
    write(target, record)


if __name__ == "__main__":
    main()
