"""Processes that train: each holds one side, opened on one case, and waits for jobs.

A side's memory is its own, warm-up included, because nothing else ever ran in its process. Our
engines use two such processes of one thread, as the runtime does; PEFT's sides use one process and
as many threads as they like best.
"""

import gc
import multiprocessing
import os
import pickle
import re
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedlora.core.types import TrainJob
from fedlora.engine.base import EngineSpec
from fedlora.engine.memory import keep_freed_memory
from fedlora.population.sampling import deal
from fedlora.wire.messages import decode_jobs, encode_jobs
from simulations.bench.engine.cases import (
    SHORT,
    Case,
    World,
)
from simulations.bench.engine.sides import (
    Outcome,
    Side,
    open_side,
)

START_S = 300.0
"""Seconds that a process may take to be ready."""


@dataclass
class Count:
    """What went through a base model."""

    positions: int = 0
    """Tokens and padding."""
    forwards: int = 0


@dataclass(frozen=True)
class Done:
    """The end of a host's answer."""

    cpu: float
    """CPU seconds of the process for this work."""
    count: Count


@dataclass(frozen=True)
class Run:
    """One cohort, trained."""

    wall: float
    cpu: float
    """Seconds of all processes that took part, the dealing one included."""
    outcomes: list[Outcome]
    count: Count


# --------------------------------------------------------------------------------- in the process


class Opened:
    """A side in this process, and what passes through its base model."""

    def __init__(self, side: str | EngineSpec, case: Case) -> None:
        self.world = World(case)
        self.side: Side = open_side(side, self.world)
        self.count = Count()
        self.side.network.get_input_embeddings().register_forward_pre_hook(self._note)

    def _note(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.count.positions += args[0].numel()
        self.count.forwards += 1


def serve(connection: Connection, side: str | EngineSpec, case: Case) -> None:
    """Answer until the other end closes."""
    warnings.filterwarnings("ignore")
    try:
        keep_freed_memory()  # for every side, so that no side is slower for want of it
        warm_up()
        opened = Opened(side, case)
        gc.collect()
        reset_peak()
        before = resident("VmRSS")
        connection.send(None)
        while True:
            answer(connection, opened, before)
    except EOFError:
        return
    except Exception:
        connection.send(RuntimeError(f"{side} on {case.name}:\n{traceback.format_exc()}"))


def answer(connection: Connection, opened: Opened, before: float) -> None:
    """One request: jobs to train, a function to call, or how much memory was used."""
    kind, *content = pickle.loads(connection.recv_bytes())
    if kind == "train":
        threads, message = content
        cpu, opened.count = time.process_time(), Count()
        torch.set_num_threads(threads)
        jobs = [j for j in decode_jobs(message).jobs if isinstance(j, TrainJob)]
        for outcome in opened.side.train(jobs):
            connection.send(outcome)
        connection.send(Done(time.process_time() - cpu, opened.count))
    elif kind == "call":
        function, arguments = content
        connection.send(function(opened, *arguments))
    else:
        connection.send(peaks(opened.world.network.device, before))


def peaks(device: torch.device, before: float) -> tuple[float, float]:
    """MB: growth of the peak beyond ``before``, and the peak itself; on an accelerator the peak of
    its own memory, base included."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 1e6
        return peak, peak
    peak = resident("VmHWM")
    return peak - before, peak


def notes_of(opened: Opened) -> tuple[str, ...]:
    """What a side says of itself, such as its token budget."""
    return opened.side.notes()


def warm_up() -> None:
    """Load the code that training runs, so that it is not counted as a side's memory."""
    case = Case("warm-up", "llama64x1", 1, SHORT)
    world = World(case)
    tokens = torch.ones(2, 16, dtype=torch.int64)
    world.network(input_ids=tokens, labels=tokens).loss.backward()


def resident(field: str) -> float:
    """``VmRSS`` or ``VmHWM`` (its highest value) of this process in MB; 0 where Linux is not."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0.0
    match = re.search(rf"^{field}:\s+(\d+) kB", status.read_text(), re.MULTILINE)
    return int(match[1]) / 1e3 if match else 0.0


def reset_peak() -> None:
    """Forget the highest resident memory so far, where the kernel allows."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


# -------------------------------------------------------------------------------- from the outside


class Host:
    """One process with one side."""

    def __init__(self, side: str | EngineSpec, case: Case) -> None:
        self.connection, theirs = _context().Pipe()
        self.process = _context().Process(target=serve, args=(theirs, side, case), daemon=True)
        self.process.start()
        theirs.close()

    def ready(self) -> None:
        """Wait until the side is open."""
        if not self.connection.poll(START_S):
            raise RuntimeError(f"a process was not ready after {START_S:.0f} s")
        self.receive()

    def send(self, *request: Any) -> None:
        """Ask for something."""
        self.connection.send_bytes(pickle.dumps(request))

    def receive(self) -> Any:
        """The next part of the answer.

        Raises:
            RuntimeError: with the traceback of the process.
        """
        try:
            part = self.connection.recv()
        except EOFError:
            self.process.join()
            raise RuntimeError(f"a process ended with {self.process.exitcode}") from None
        if isinstance(part, RuntimeError):
            raise part
        return part

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run ``function(opened, *arguments)`` there; all of it must be picklable."""
        self.send("call", function, arguments)
        return self.receive()

    def close(self) -> None:
        """End the process."""
        self.connection.close()
        self.process.join(10)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


class Group:
    """Processes with the same side that share a cohort."""

    def __init__(self, hosts: Sequence[Host]) -> None:
        self.hosts = list(hosts)

    def train(self, jobs: Sequence[TrainJob], weights: Sequence[float], threads: int = 1) -> Run:
        """Deal, train, collect.

        Args:
            jobs: of a cohort.
            weights: predicted tokens of each.
            threads: of each process.
        """
        wall, cpu = time.perf_counter(), time.process_time()
        hands = deal(weights, len(self.hosts))
        busy = {}
        for host, hand in zip(self.hosts, hands, strict=False):
            part = [jobs[i] for i in hand]
            host.send("train", threads, encode_jobs(part, worker="", source="", wire="float32"))
            busy[host.connection] = host
        outcomes, count, theirs = [], Count(), 0.0
        while busy:
            for connection in wait(list(busy)):
                part = busy[connection].receive()
                if isinstance(part, Done):
                    del busy[connection]
                    theirs += part.cpu
                    count.positions += part.count.positions
                    count.forwards += part.count.forwards
                else:
                    outcomes.append(part)
        wall = time.perf_counter() - wall
        return Run(wall, theirs + time.process_time() - cpu, outcomes, count)

    def memory(self) -> tuple[float, float]:
        """MB: growth of the peak since the sides were opened, and the peak itself, in all."""
        for host in self.hosts:
            host.send("memory")
        found = [host.receive() for host in self.hosts]
        return sum(g for g, _ in found), sum(p for _, p in found)


def _context() -> Any:
    """Processes forked from one that has imported everything and computed nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


@contextmanager
def hosts(
    case: Case, counts: Mapping[str, int], sides: Mapping[str, EngineSpec] | None = None
) -> Iterator[dict[str, list[Host]]]:
    """Processes by side, opened on a case one after another and closed at the end.

    Args:
        case: for all of them.
        counts: processes of each side.
        sides: engines for names that `engine_sides` does not know.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    opened: dict[str, list[Host]] = {name: [] for name in counts}
    try:
        for name, count in counts.items():
            for _ in range(count):
                opened[name].append(Host((sides or {}).get(name, name), case))
                opened[name][-1].ready()
        yield opened
    finally:
        for host in (h for group in opened.values() for h in group):
            host.close()
