"""A model of what a fused step costs, from the base model's shape and the kind of device alone.

    work of a step (FLOP)  = STEP_FLOP * modules + tokens * (4 N + ELEMENT_FLOP * E)
    memory of a step       = tokens * SAVED * E * bytes of a scalar
    N = parameters of the base,   E = Σ (d_in + d_out) over all linear layers

A frozen weight costs ``2`` FLOP a token forward and ``2`` for the gradient of its input. What is
not a product (norms, activations, adapters, memory traffic) is counted as FLOP that would take as
long. Nothing is measured when a run starts, so a run's choices depend on neither the load of the
machine nor on what ran before. `simulations.bench.budget` measures time and memory by budget; what
it last found lies in ``simulations/bench/results/budget-amd-epyc-2cpu.json``, whose record also
says how busy the machine was (docs/performance.md).
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch

from fedlora.engine.fused.schedule import Schedule, Work, cost
from fedlora.models.modules import ModelInfo

STEP_FLOP = 4e7
"""Fixed cost of a step per adapted module, on one CPU core: 0.4 to 0.6 ms on a quiet machine. The
record, of a busy one (load 4 to 10), has 0.6 to 0.7 ms at d = 64 and 128, 1.1 at 256 and 2.6 at
576; the budgets chosen cost 2 to 11 % more time a token than the best that was tried."""
ELEMENT_FLOP = 400.0
"""Cost of a scalar that enters or leaves a linear layer, on one CPU core: about 5 ns."""
SAVED = 2.25
"""Scalars that the backward pass keeps for each scalar that enters or leaves a linear layer. An
upper bound: 1.7 to 2.2 in the record, in float32."""
OVERHEAD = 0.05
"""The budget is where the fixed cost of a step is this fraction of the cost of its tokens."""
CPU_TOKENS = (512, 4096)
"""Bounds of the budget on a CPU: beyond the upper one, steps outgrow the caches."""
CLASSIFIER_TOKENS = (4096, 8192)
"""The same of a classifier, whose token costs less than the rest of the model says: it has no
logits over a vocabulary, its last block computes one token of a text, and blocks before the first
adapter are left out. A batch of short texts is small, too: one or two fill a step of 512 badly."""
ACCELERATOR_TOKENS = 8192
"""The budget on an accelerator, whose products need to be large. Not measured."""
SPARE = 1.5
"""Slots per client that fills a step: some residents do not fit into a step, or finish."""


@dataclass(frozen=True)
class CostModel:
    """Predicts work and memory of fused steps."""

    step_flop: float
    token_flop: float
    token_bytes: float

    @classmethod
    def of(cls, info: ModelInfo, dtype: torch.dtype) -> "CostModel":
        """The cost of steps of a base model that computes in ``dtype``.

        If only some of its linear layers are adapted, the others are assumed to have the same mean
        shape; embeddings count as linear layers, so E is an upper bound. Not those of a classifier:
        it has no output embedding, and half of a small encoder is its vocabulary.
        """
        adapted = sum(m.d_in * m.d_out for m in info.modules)
        parameters = info.parameters
        if info.classifies:
            parameters -= info.vocabulary * min(m.d_in for m in info.modules)
        elements = sum(m.d_in + m.d_out for m in info.modules) * parameters / adapted
        return cls(
            step_flop=STEP_FLOP * len(info.modules),
            token_flop=4.0 * parameters + ELEMENT_FLOP * elements,
            token_bytes=SAVED * dtype.itemsize * elements,
        )

    def predict(self, schedule: Schedule) -> float:
        """FLOP of a whole round. It consumes the schedule: pass a fresh one."""
        works = schedule.works
        total = 0.0
        for step in schedule:
            forwards = [works[client].forwards[index] for client, _, index in step.active]
            total += self.step_flop + self.token_flop * cost(forwards, schedule.padded)
        return total

    def one_by_one(self, works: Sequence[Work]) -> float:
        """FLOP of the same clients with one step for each of their forward passes."""
        forwards = [f for work in works for f in work.forwards]
        padded = sum(f.rows * f.width for f in forwards)
        return self.step_flop * len(forwards) + self.token_flop * padded

    def memory(self, tokens: int) -> float:
        """Bytes beyond the model and the slots, at the peak of a step."""
        return self.token_bytes * tokens

    def budget(self, device: torch.device, classifies: bool = False) -> int:
        """Tokens of a step: the power of two nearest to where its fixed cost is 5 % of the rest.

        Args:
            device: that computes it.
            classifies: whether texts are labelled; else tokens are predicted.
        """
        if device.type != "cpu":
            return ACCELERATOR_TOKENS
        low, high = CLASSIFIER_TOKENS if classifies else CPU_TOKENS
        tokens = self.step_flop / (OVERHEAD * self.token_flop)
        return int(min(high, max(low, 2 ** round(math.log2(tokens)))))

    def fitting(self, budget: int, memory: float) -> int:
        """The budget, halved until a step fits into ``memory`` bytes; at least 1."""
        while budget > 1 and self.memory(budget) > memory:
            budget //= 2
        return budget


def slots_for(
    budget: int, works: Sequence[Work], memory: float, row_bytes: float, padded: bool = False
) -> int:
    """The number of clients to keep resident: 1.5 times as many as fill the budget.

    Args:
        budget: tokens of a step.
        works: the clients' chains.
        memory: bytes that all slots may take together.
        row_bytes: bytes of a slot: ``16 P`` for ``P`` float32 parameters, gradients and Adam's
            two moments.
        padded: whether the budget counts padding.

    Returns:
        At least 1, at most the number of clients.
    """
    sizes = [cost([f], padded) for w in works for f in w.forwards]
    slots = math.ceil(SPARE * budget / statistics.median(sizes)) if sizes else 1
    return max(1, min(slots, len(works), int(min(len(works), max(0.0, memory) / row_bytes))))


def total_memory(device: torch.device) -> float:
    """Bytes of the machine or accelerator, whatever else uses them now. A server may decide for
    workers whose accelerator it does not see: then there is no limit."""
    if device.type == "cuda":
        if not torch.cuda.is_available():
            return math.inf
        return float(torch.cuda.get_device_properties(device).total_memory)
    return float(psutil.virtual_memory().total)
