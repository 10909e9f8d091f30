"""The time of a side by activity: forward, backward and the rest; operators; Python functions.

CPU time of one thread throughout, so that others who use the core do not count.
"""

import cProfile
import io
import pstats
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from simulations.bench.engine.cases import (
    SHORT,
    Case,
    Draw,
    sample,
)
from simulations.bench.engine.hosts import Opened, hosts
from simulations.bench.engine.sides import ENGINES

TINY_CLIENTS = Case("tiny clients", "tiny", 256, SHORT, Draw(4, 4), Draw(1, 1))
"""One step of one example of four tokens: what is left is the cost of being a client."""
PROFILED = 32
"""Clients in a profile of operators: it takes long to add up."""
SIDES = ("peft loop", *ENGINES)


class Parts:
    """CPU seconds within the base model's forward and within backward passes."""

    def __init__(self) -> None:
        self.forward = self.backward = 0.0
        self._entered = 0.0

    @contextmanager
    def watching(self, network: Any) -> Iterator[None]:
        """Count while this lasts. Head and decoder stack are watched, not what calls them."""
        watched = [network.base_model, network.get_output_embeddings()]
        handles = [m.register_forward_pre_hook(self._enter) for m in watched]
        handles += [m.register_forward_hook(self._leave) for m in watched]
        backward, grad = torch.autograd.backward, torch.autograd.grad
        torch.autograd.backward, torch.autograd.grad = self._timed(backward), self._timed(grad)
        try:
            yield
        finally:
            torch.autograd.backward, torch.autograd.grad = backward, grad
            for handle in handles:
                handle.remove()

    def _enter(self, *_: Any) -> None:
        self._entered = time.process_time()

    def _leave(self, *_: Any) -> None:
        self.forward += time.process_time() - self._entered

    def _timed(self, function: Callable[..., Any]) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.process_time()
            result = function(*args, **kwargs)
            self.backward += time.process_time() - began
            return result

        return call


def divided(opened: Opened, repeats: int) -> list[dict[str, float]]:
    """Milliseconds per client, repeat by repeat: in all, forward, backward, and the rest."""
    jobs, found = opened.world.jobs, []
    torch.set_num_threads(1)
    for _ in range(repeats + 1):
        parts, began = Parts(), time.process_time()
        with parts.watching(opened.side.network):
            opened.side.work(jobs)
        total = time.process_time() - began
        seconds = {"total": total, "forward": parts.forward, "backward": parts.backward}
        seconds["rest"] = total - parts.forward - parts.backward
        found.append({name: s / len(jobs) * 1e3 for name, s in seconds.items()})
    return found[1:]  # the first one warms up


def operators(opened: Opened, rows: int) -> list[tuple[str, float, int]]:
    """The operators that take longest: name, share of all operators' own time, calls."""
    torch.set_num_threads(1)
    jobs = sample(opened.world.jobs, [j.client.num_examples for j in opened.world.jobs], PROFILED)
    opened.side.work(jobs)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        opened.side.work(jobs)
    events = sorted(seen.key_averages(), key=lambda e: -e.self_cpu_time_total)
    total = sum(e.self_cpu_time_total for e in events)
    return [(e.key, e.self_cpu_time_total / total, int(e.count)) for e in events[:rows]]


def functions(opened: Opened, rows: int) -> str:
    """The Python functions that take longest by themselves, as `pstats` prints them."""
    watch = cProfile.Profile()
    watch.enable()
    opened.side.work(opened.world.jobs)
    watch.disable()
    text = io.StringIO()
    pstats.Stats(watch, stream=text).strip_dirs().sort_stats("tottime").print_stats(rows)
    return text.getvalue()


def overhead(repeats: int) -> dict[str, Any]:
    """What a client costs beyond its forward and backward passes; printed and returned."""
    n = TINY_CLIENTS.clients
    print(
        f"{n} clients, one step of one example of four tokens: CPU ms per client, least of repeats"
    )
    print(f"{'':<14}{'total':>9}{'forward':>9}{'backward':>9}{'the rest':>9}")
    records: dict[str, Any] = {}
    with hosts(TINY_CLIENTS, dict.fromkeys(SIDES, 1)) as opened:
        for side in SIDES:
            found = opened[side][0].call(divided, repeats)
            least = {k: min(f[k] for f in found) for k in found[0]}
            records[side] = {"repeats": found, "least": least}
            print(f"{side:<14}" + "".join(f"{v:>9.3f}" for v in least.values()), flush=True)
        engine = list(ENGINES)[-1]
        records["functions"] = opened[engine][0].call(functions, 15)
    print(f"\nPython functions of {engine}:\n{records['functions']}", flush=True)
    return records


def profiles(cases: Sequence[Case], sides: Sequence[str]) -> dict[str, Any]:
    """The operators of each side on each case; printed and returned."""
    records: dict[str, Any] = {}
    for case in cases:
        with hosts(case, dict.fromkeys(sides, 1)) as opened:
            records[case.name] = {s: opened[s][0].call(operators, 16) for s in sides}
        print(_operators(case.name, records[case.name]) + "\n", flush=True)
    return records


def _operators(name: str, found: Mapping[str, Sequence[tuple[str, float, int]]]) -> str:
    lines = []
    for side, rows in found.items():
        lines.append(f"{name}, {side}: share of the operators' own time, calls")
        lines += [f"  {share:>6.1%}{calls:>9}  {op}" for op, share, calls in rows]
    return "\n".join(lines)
