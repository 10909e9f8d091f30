"""Measures fused steps of this model on this machine, for the cost model."""

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
from numpy.typing import NDArray

from fedlora.core.seeding import generator
from fedlora.engine.fused.bank import AdapterBank
from fedlora.engine.fused.batch import Lane
from fedlora.engine.fused.cost import CostModel, Sample, load_or_measure, tuning_key
from fedlora.engine.fused.model import FusedModel
from fedlora.engine.fused.trainer import Chain
from fedlora.engine.memory import return_freed_memory
from fedlora.models.layers import dropped_share
from fedlora.training.loop import clip_and_step, optimizer_for

LENGTH = 128
"""Mean tokens of a probe's sequences: instructions of a sentence or two."""
REPEATS = 3
"""Steps that are measured; the fastest counts."""
QUICK_S = 0.7
"""Seconds; a step that takes longer is not repeated."""


@dataclass(frozen=True, eq=False)
class _Example:
    input_ids: NDArray[np.int64]
    prompt_tokens: int
    responses: None = None


class Prober:
    """Trains random text with copies of one client's start adapter.

    Args:
        fused: the model.
        like: a client; the probe has its ranks, optimizer and precision.
    """

    def __init__(self, fused: FusedModel, like: Chain) -> None:
        self._fused, self._like = fused, like
        self._before = _used(fused.model.device)

    def cost_model(self, threads: int) -> CostModel:
        """The cost model, measured now or before on this machine."""
        # Row lengths within a factor of two share a measurement, hence only their bit length.
        fused, plan = self._fused, self._like.job.plan
        row = self._like.layout.size
        key = tuning_key(
            fused.model.info.fingerprint,
            fused.model.network.dtype,
            fused.model.device,
            threads or torch.get_num_threads(),
            row.bit_length(),
            fused.is_ragged,
            fused.checkpoint,
            plan.autocast,
            plan.dropout > 0,
        )

        # A slot holds four rows [row]: parameters, gradients and Adam's two moments.
        size = fused.model.dtype.itemsize
        return load_or_measure(key, self.sample, row_bytes=4.0 * size * row)

    def sample(self, tokens: int) -> Sample:
        """Measure steps of about ``tokens`` tokens; the fastest counts."""
        # Clients of one sequence each fill the step: about tokens / length of them.
        fused, plan = self._fused, self._like.job.plan
        length = min(LENGTH, fused.model.info.context - 1, tokens)
        clients = max(1, tokens // length)

        # A bank [clients, layout.size] of copies of the start, and a lane of random text each.
        layout, model = self._like.layout, fused.model
        autocast = plan.autocast == "bf16"
        bank = AdapterBank(
            clients, layout.size, model.dtype, model.device, fused.compute_dtype(autocast)
        )
        rows = [bank.load(slot, self._like.start) for slot in range(clients)]
        lengths = _unequal(length, clients, fused.model.info.context - 1)
        dropped = dropped_share(plan.dropout)
        lanes = [
            Lane(slot, layout, [self._example(slot, n)], "full", n, dropped=dropped, seed=slot)
            for slot, n in enumerate(lengths)
        ]

        # Whole training steps. Each has a new optimizer, so all of them allocate its moments.
        times: list[float] = []
        with fused.mounted(bank, autocast):
            while len(times) < REPEATS and (not times or times[-1] < QUICK_S):
                began = time.perf_counter()
                fused.backward(fused.batch(lanes))
                for row, grad in rows:
                    buffer = torch.nn.Parameter(row)
                    buffer.grad = grad
                    clip_and_step(
                        optimizer_for(plan, [buffer]), [buffer], plan.lr, plan.max_grad_norm
                    )
                    grad.zero_()
                if model.device.type == "cuda":
                    torch.cuda.synchronize(model.device)
                times.append(time.perf_counter() - began)

        # At the peak, in the backward pass, the bank's parameters and gradients are held (two rows
        # per client), but Adam's moments are not allocated yet.
        held = 2.0 * layout.size * model.dtype.itemsize * clients
        taken = max(0.0, _peak(model.device) - self._before - held)
        return Sample(clients * length, clients, clients * length, min(times), taken)

    def _example(self, slot: int, length: int) -> _Example:
        random = generator(0, "probe", slot)
        return _Example(random.integers(0, self._fused.model.vocabulary, length + 1), 1)


def _unequal(length: int, clients: int, most: int) -> list[int]:
    """Lengths of the given mean, in pairs that are longer and shorter by up to a half.

    Unequal lengths cost memory in attention and in stacks of clients that equal ones do not.

    Args:
        length: the mean.
        clients: how many lengths.
        most: no length is larger.
    """
    spread = min(length // 2, most - length)
    pairs = [length + spread, length - spread] * (clients // 2)
    return pairs + [length] * (clients % 2)


def _used(device: torch.device) -> float:
    """Bytes in use now. It resets what `_peak` reports."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return float(torch.cuda.memory_allocated(device))
    return_freed_memory()
    with contextlib.suppress(OSError):  # if the kernel refuses, the old peak stays
        Path("/proc/self/clear_refs").write_text("5")
    return float(psutil.Process().memory_info().rss)


def _peak(device: torch.device) -> float:
    """The largest number of bytes in use since `_used`; 0 if the system does not report it."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024.0 * int(line.split()[1])
    return 0.0
