"""The cost of a fused step in seconds and bytes, fitted to a few probe steps on this machine.

    seconds = step + token * tokens + client * clients
    bytes   = base + token * tokens + supervised * supervised tokens + row * slots

The time of a step is bound by its fixed cost and by the caches for a small model, by its tokens for
a large one. The token budget is therefore measured once per machine and model, and kept.
"""

import hashlib
import itertools
import json
import logging
import math
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fedlora.core.cache import cache_root
from fedlora.core.checks import at_least
from fedlora.core.files import locked, write_file
from fedlora.engine.fused.schedule import Schedule, Work, cost

log = logging.getLogger(__name__)

FORMAT = 1  # of the tuning file; a file of another format is measured again
CANDIDATES = (256, 512, 1024, 2048, 4096)
"""Token budgets that are measured, ascending. An accelerator may need larger ones."""
TOLERANCE = 0.05
"""A budget is as good as the best one if a token costs at most this much more."""
SPARE = 1.5
"""Slots per client that fills a step: some residents do not fit into a step, or finish."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Sample:
    """One measured training step, from the forward pass to the optimizer."""

    tokens: int
    """Tokens of the step, as `schedule.cost` counts them."""
    clients: int
    supervised: int
    """Tokens with a loss."""
    seconds: float
    bytes: float
    """Peak memory beyond the model and the adapter bank; 0 if the system does not report it."""

    def __post_init__(self) -> None:
        at_least("tokens", self.tokens, 1)
        at_least("clients", self.clients, 1)
        at_least("supervised", self.supervised, 0)
        at_least("seconds", self.seconds, 0, strict=True)
        at_least("bytes", self.bytes, 0)


@dataclass(frozen=True)
class CostModel:
    """Predicts steps and rounds. No coefficient is negative."""

    step_seconds: float
    token_seconds: float
    client_seconds: float
    """Per client in a step. It can be separated from the cost of tokens only if probes differ in
    tokens per client."""
    base_bytes: float
    token_bytes: float
    supervised_bytes: float
    row_bytes: float
    """Bytes of a slot: ``16 P`` for ``P`` float32 parameters, their gradients and two moments."""
    samples: tuple[Sample, ...]

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name != "samples":
                at_least(name, value, 0)
        if not self.samples:
            raise ValueError("a cost model needs at least one sample")

    def seconds(self, tokens: int, clients: int) -> float:
        """Seconds of one step."""
        return self.step_seconds + self.token_seconds * tokens + self.client_seconds * clients

    def memory(self, tokens: int, supervised: int, slots: int) -> float:
        """Bytes beyond the model, at the peak of a step."""
        step = self.base_bytes + self.token_bytes * tokens + self.supervised_bytes * supervised
        return step + self.row_bytes * slots

    def predict(self, schedule: Schedule) -> float:
        """Seconds of a whole round. It consumes the schedule: pass a fresh one."""
        works = schedule.works
        total = 0.0
        for step in schedule:
            forwards = [works[client].forwards[index] for client, _, index in step.active]
            total += self.seconds(cost(forwards, schedule.padded), len(forwards))
        return total

    def dump(self) -> str:
        """The model as JSON, which `load` reads."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=2)

    @classmethod
    def load(cls, text: str) -> "CostModel":
        """The model that `dump` wrote.

        Raises:
            ValueError: if `dump` did not write the text, or wrote it in another format.
        """
        try:
            fields = json.loads(text)
            if fields.pop("format") != FORMAT:
                raise ValueError("another format")
            samples = tuple(Sample(**sample) for sample in fields.pop("samples"))
            return cls(**fields, samples=samples)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"no cost model: {type(error).__name__}: {error}") from error


# --- fitting -------------------------------------------------------------------------------------


def fit(samples: Sequence[Sample], row_bytes: float) -> CostModel:
    """The non-negative coefficients with the least relative squared error.

    If samples do not determine which term a cost belongs to, fewer terms are used, tokens first.

    Args:
        samples: at least one; three with different tokens per client determine all terms.
        row_bytes: memory of a slot, `CostModel.row_bytes`.
    """
    # One column per term, [n]: tokens first, because `nonnegative` tries columns in this order.
    ones = np.ones(len(samples))
    tokens = np.array([s.tokens for s in samples], dtype=np.float64)
    clients = np.array([s.clients for s in samples], dtype=np.float64)
    supervised = np.array([s.supervised for s in samples], dtype=np.float64)
    seconds = np.array([s.seconds for s in samples])
    memory = np.array([s.bytes for s in samples], dtype=np.float64)

    # seconds ~ [n, 3] (tokens, 1, clients); bytes ~ [n, 3] (tokens, 1, supervised tokens).
    time_fit = nonnegative(np.stack([tokens, ones, clients], axis=1), seconds)
    memory_fit = nonnegative(np.stack([tokens, ones, supervised], axis=1), memory)
    return CostModel(
        step_seconds=time_fit[1],
        token_seconds=time_fit[0],
        client_seconds=time_fit[2],
        base_bytes=memory_fit[1],
        token_bytes=memory_fit[0],
        supervised_bytes=memory_fit[2],
        row_bytes=row_bytes,
        samples=tuple(samples),
    )


def nonnegative(columns: Array, target: Array) -> list[float]:
    """``argmin_x Σ_i ((columns x - target)_i / target_i)²`` over ``x >= 0``.

    The optimum is the ordinary least-squares solution on its own support (the columns whose
    coefficients are positive). There are few columns, so all supports are tried, small ones first.

    Args:
        columns: ``[n, c]``, not negative.
        target: ``[n]``, not negative. Entries below a thousandth of the largest entry get the
            weight of that thousandth.

    Returns:
        ``c`` coefficients.
    """
    if not target.any():
        return [0.0] * columns.shape[1]

    # Relative errors: divide each row by its target. Columns get unit norm, [n, c], so that the
    # least-squares problem is well conditioned.
    weight = 1 / np.maximum(target, target.max() / 1000)
    goal = target * weight
    scaled = columns * weight[:, None]
    norms = np.maximum(np.linalg.norm(scaled, axis=0), np.finfo(np.float64).tiny)

    # All supports, [n, size] each; a larger one must be better than all smaller ones.
    best, least = np.zeros(columns.shape[1]), float(goal @ goal)
    for size in range(1, columns.shape[1] + 1):
        for support in itertools.combinations(range(columns.shape[1]), size):
            chosen = list(support)
            part = scaled[:, chosen] / norms[chosen]
            solution = np.linalg.lstsq(part, goal, rcond=None)[0]
            error = float(np.sum((part @ solution - goal) ** 2))
            if (solution >= 0).all() and error < least - 1e-12:
                best, least = np.zeros(columns.shape[1]), error
                best[chosen] = solution / norms[chosen]
    return [float(x) for x in best]


# --- what to use ---------------------------------------------------------------------------------


def best_budget(model: CostModel, memory: float = math.inf, slots: int = 1) -> int:
    """The smallest budget whose measured time per token is within 5 % of the best one's.

    Args:
        model: with the samples to choose from.
        memory: bytes that steps and slots may take; budgets that took more are excluded. If none
            is left, the smallest is returned with a warning.
        slots: how many clients are resident.
    """
    samples = sorted(model.samples, key=lambda s: s.tokens)
    fitting = [s for s in samples if s.bytes + model.row_bytes * slots <= memory]
    if not fitting:
        log.warning(
            "the smallest probed step takes %.0f MiB with %d slots, the limit is %.0f MiB",
            (samples[0].bytes + model.row_bytes * slots) / 2**20,
            slots,
            memory / 2**20,
        )
        return samples[0].tokens
    least = min(s.seconds / s.tokens for s in fitting)
    return next(s.tokens for s in fitting if s.seconds / s.tokens <= least * (1 + TOLERANCE))


def slots_for(
    budget: int,
    works: Sequence[Work],
    model: CostModel | None = None,
    memory: float = math.inf,
    padded: bool = False,
) -> int:
    """The number of clients to keep resident: 1.5 times as many as fill the budget.

    Args:
        budget: tokens of a step.
        works: the clients' chains.
        model: the cost of memory; needed only with a limit.
        memory: bytes that a step of the whole budget and the slots may take together, if the
            fraction of supervised tokens is that of the probe steps.
        padded: whether the budget counts padding.

    Returns:
        At least 1, at most the number of clients.
    """
    # Forward passes of median size that fill the budget, with some to spare.
    sizes = [cost([f], padded) for w in works for f in w.forwards]
    slots = math.ceil(SPARE * budget / statistics.median(sizes)) if sizes else 1

    # At most as many rows as fit into the memory that a step of the whole budget leaves.
    if model is not None and model.row_bytes > 0 and memory < math.inf:
        supervised = max(s.supervised / s.tokens for s in model.samples)
        left = memory - model.memory(budget, math.ceil(supervised * budget), 0)
        slots = min(slots, math.floor(left / model.row_bytes))
    return max(1, min(slots, len(works)))


# --- measuring once ------------------------------------------------------------------------------

Probe = Callable[[int], Sample]
"""Runs training steps of a given number of tokens and returns the cost of one."""


def measure(
    probe: Probe, candidates: Sequence[int] = CANDIDATES, limit_s: float = 2.0
) -> list[Sample]:
    """Probe growing budgets until one takes too long or does not fit; at least one sample.

    Args:
        probe: measures one budget.
        candidates: token budgets, ascending.
        limit_s: after a probe that took longer, warm-up and repeats included, no more follow.

    Raises:
        MemoryError, torch.OutOfMemoryError: if the first budget does not fit.
    """
    samples: list[Sample] = []
    for tokens in candidates:
        start = time.perf_counter()
        try:
            samples.append(probe(tokens))
        except (MemoryError, torch.OutOfMemoryError):
            if not samples:
                raise
            log.info("a step of %d tokens does not fit into memory", tokens)
            break
        if time.perf_counter() - start > limit_s:
            break
    return samples


def load_or_measure(
    key: str,
    probe: Probe,
    row_bytes: float,
    folder: Path | None = None,
    candidates: Sequence[int] = CANDIDATES,
    limit_s: float = 2.0,
) -> CostModel:
    """The cost model of this machine and model, measured once and kept in a file.

    If several processes call it together, the first takes a lock and measures; the others wait and
    read the file. If a file cannot be read, the cost is measured again.

    Args:
        key: identifies what the measurement depends on, `tuning_key`.
        probe: measures one budget; called only if there is no usable file.
        row_bytes: `CostModel.row_bytes`, which is not measured and not part of the key.
        folder: the folder of the files; by default ``tuning`` in the cache.
        candidates: as in `measure`.
        limit_s: as in `measure`.
    """
    path = (folder or cache_root() / "tuning") / f"{key}.json"
    found = _read(path)
    if found is None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_suffix(".lock")):
            found = _read(path)  # another process may have measured while this one waited
            if found is None:
                found = fit(measure(probe, candidates, limit_s), row_bytes)
                write_file(path, found.dump())
    return replace(found, row_bytes=row_bytes)


def _read(path: Path) -> CostModel | None:
    try:
        return CostModel.load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        log.warning("%s cannot be read (%s): measuring again", path, error)
        return None


def tuning_key(
    model: str, dtype: torch.dtype, device: torch.device, threads: int, *details: object
) -> str:
    """A hash, 16 hexadecimal digits, of everything that a measurement depends on.

    Args:
        model: fingerprint of the base model.
        dtype: the type that it computes in.
        device: the device that it computes on; an accelerator counts by its name.
        threads: intra-op threads of a step.
        details: other conditions, such as the length of a bank row and the layout.
    """
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else device.type
    parts = [_cpu(), torch.__version__, threads, name, model, dtype, FORMAT, *details]
    return hashlib.sha256(json.dumps([str(p) for p in parts]).encode()).hexdigest()[:16]


def _cpu() -> str:
    """The processor's name, as far as the system reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
