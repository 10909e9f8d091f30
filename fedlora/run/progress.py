"""Progress of a run as plain lines that stay readable in a streamed log."""

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

log = logging.getLogger(__name__)

RANKS_OF = {"own": "cut to each client's ranks", "largest": "cut to the largest ranks"}
"""How an evaluated adapter that is not the full update was made."""

_OF_TOKENS = (
    ("loss_response", "response loss"),
    ("perplexity", "perplexity"),
    ("accuracy", "token accuracy"),
    ("exact_match", "exact match"),
)
_OF_LABELS = (
    ("loss_weighted", "loss"),
    ("accuracy_weighted", "accuracy"),
    ("accuracy_worst_tenth", "of the worst tenth"),
    ("macro_f1_weighted", "macro F1"),
)
"""What is said of an evaluation, of all examples together."""


@dataclass
class RoundProgress:
    """Counts the clients of one phase of one round and says now and then how far it is.

    For example ``round 3/20  train  48/80 clients  loss 3.214  12.1 clients/s  ETA 0:03``.
    """

    total: int
    """Clients of this phase."""
    label: str
    """What every line begins with, for example ``round 3/20  train``."""
    now: Callable[[], float] = time.monotonic
    emit: Callable[[str], object] = log.info
    min_interval: float = 2.0
    """Seconds between two lines, and before the first one."""
    clients: int = field(default=0, init=False)
    """Clients that have replied so far, the failed ones included."""
    failed: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._losses: list[float] = []
        self._began = self._last = self.now()

    def done(self, clients: int, losses: Iterable[float] = (), failed: int = 0) -> None:
        """Count clients that have replied.

        Args:
            clients: how many, the failed ones included.
            losses: of those that reported one.
            failed: how many of ``clients`` failed.
        """
        self.clients += clients
        self.failed += failed
        self._losses += losses
        now = self.now()
        if now - self._last >= self.min_interval:
            self._last = now
            self.emit(self.line(now))

    def on_step(self, step: int, steps: int, loss: float) -> None:
        """Say now and then how far clients are that take their steps together.

        For example ``round 3/20  train  step 12/33  loss 3.214  ETA 0:08``.
        """
        now = self.now()
        if now - self._last >= self.min_interval:
            self._last = now
            left = (steps - step) * (now - self._began) / step
            parts = [self.label, f"step {step}/{steps}", f"loss {loss:.3f}", f"ETA {clock(left)}"]
            self.emit("  ".join(parts))

    def line(self, now: float) -> str:
        """The progress of the phase at a time of the clock."""
        parts = [self.label, f"{self.clients}/{self.total} clients"]
        if self.failed:
            parts.append(f"{self.failed} failed")
        if self._losses:
            parts.append(f"loss {sum(self._losses) / len(self._losses):.3f}")
        seconds = now - self._began
        if self.clients and seconds > 0:
            rate = self.clients / seconds
            left = max(0, self.total - self.clients) / rate
            parts += [f"{rate:.1f} clients/s", f"ETA {clock(left)}"]
        return "  ".join(parts)


def clock(seconds: float) -> str:
    """Seconds as ``m:ss``, or ``h:mm:ss`` from one hour on; rounded up, so that 0:00 means done."""
    whole = math.ceil(seconds - 1e-9)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def size(num_bytes: float) -> str:
    """A number of bytes with a binary unit, for example ``3.2 MiB``."""
    value, units = float(num_bytes), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{value:.0f} B" if units[0] == "B" else f"{value:.1f} {units[0]}"


def round_summary(record: Mapping[str, Any]) -> str:
    """The one line that a finished round or evaluation leaves in the log.

    Args:
        record: as in ``metrics.jsonl``; keys that are missing or null are left out.
    """
    given = {key: value for key, value in record.items() if value is not None}
    number = f"round {given['round']}" + (f"/{given['rounds']}" if "rounds" in given else "")
    show = _evaluation if given.get("kind") == "evaluate" else _training
    return "  ".join([number, *show(given)])


def _training(record: Mapping[str, Any]) -> list[str]:
    parts = ["done"]
    if "clients" in record:
        parts.append(f"{record['clients']} clients")
    parts += [f"{record[key]} {key}" for key in ("failed", "rejected") if record.get(key)]
    for key, name in (("device/late", "late"), ("device/away", "went away")):
        parts += [f"{record[key]} {name}"] if record.get(key) else []
    if "train/loss" in record:
        ends = [record.get(f"train/loss_{end}") for end in ("first", "last")]
        steps = f" (first step {ends[0]:.3f}, last {ends[1]:.3f})" if None not in ends else ""
        parts.append(f"loss {record['train/loss']:.3f}{steps}")
    if "aggregate/update_norm" in record:
        parts.append(f"‖ΔW‖ {record['aggregate/update_norm']:.3g}")
    if "wire/up_bytes" in record:
        down = record.get("wire/down_bytes", 0)
        parts.append(f"sent {size(record['wire/up_bytes'])}, received {size(down)}")
    if "time/virtual" in record:
        parts.append(f"virtual time {clock(record['time/virtual'])}")
    if "round/seconds" in record:
        parts.append(f"{record['round/seconds']:.1f} s")
    if "state/hash" in record:
        parts.append(f"state {str(record['state/hash'])[:12]}")
    return parts


def _evaluation(record: Mapping[str, Any]) -> list[str]:
    adapter = record.get("adapter", "full")
    at = f" ({RANKS_OF[adapter]})" if adapter in RANKS_OF else ""
    parts = [f"evaluate {record.get('group', '')}".strip() + at]
    if "clients" in record:
        parts.append(f"{record['clients']} clients")
    if record.get("failed"):
        parts.append(f"{record['failed']} failed")
    for key, name in _OF_LABELS if "accuracy_worst_tenth" in record else _OF_TOKENS:
        if key in record:
            parts.append(f"{name} {record[key]:.3f}")
    if "rouge_l" in record:
        bounds = [record.get("rouge_l_low"), record.get("rouge_l_high")]
        interval = f" (95 %: {bounds[0]:.3f} to {bounds[1]:.3f})" if None not in bounds else ""
        parts.append(f"ROUGE-L {record['rouge_l']:.3f}{interval}")
    return parts
