"""Sweeps over one variable at a time: when is training clients together faster?

Every side has one core here, so that a line shows an engine and not a number of processes, and
speed is per second of CPU, so that others who use the core do not count. Only the sweep over
processes has two cores and looks at the clock on the wall.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from simulations.bench.engine.cases import (
    SHORT,
    Case,
    Draw,
)
from simulations.bench.engine.measure import (
    Effort,
    Entry,
    limit,
    measure,
    rate,
)
from simulations.bench.engine.sides import ENGINES

ONE_CORE = (Entry("peft loop"), *(Entry(engine) for engine in ENGINES))
TWO_CORES = (*ONE_CORE, Entry("peft loop", processes=2), *(Entry(e, 2) for e in ENGINES))
Points = Iterator[tuple[str, Case]]


def clients() -> Points:
    """How many clients there are: 2 steps of 2 short texts each."""
    for k in (1, 2, 4, 8, 16, 32, 64, 128):
        yield str(k), Case(f"{k} clients", "tiny", k, SHORT, examples=Draw(4, 4))


def tokens() -> Points:
    """Real tokens in a client's step: 16 clients, 2 steps."""
    for batch, length in ((1, 16), (1, 32), (2, 32), (4, 32), (4, 64), (4, 128), (8, 128)):
        plan = replace(SHORT, batch_size=batch)
        draws = Draw(length + 1, length + 1), Draw(2 * batch, 2 * batch)
        yield f"{batch * length}", Case(f"{batch}x{length}", "tiny", 16, plan, *draws)


def width() -> Points:
    """Hidden size: 8 clients, 2 steps of 4 x 32 tokens."""
    plan = replace(SHORT, batch_size=4)
    for network in ("llama64x4", "llama128x4", "llama256x4", "llama512x2", "llama768x2", "smollm2"):
        case = Case(network, network, 8, plan, Draw(33, 33), Draw(8, 8))
        if not case.missing():
            yield network, case


def ranks() -> Points:
    """Which ranks clients hold: 32 clients, 3 steps of 2 short texts."""
    mixes = {"1": (1,), "4": (4,), "15": (15,), "64": (64,), "mixed": (15, 15, 15, 2, 1)}
    for name, mix in mixes.items():
        yield name, Case(f"ranks {name}", "tiny", 32, SHORT, ranks=mix)


def spread() -> Points:
    """How unequal lengths are, around 40 tokens: 32 clients, 2 steps of 2."""
    draws = {
        "equal": Draw(40, 40),
        "20-72": Draw(20, 72),
        "8-128": Draw(8, 128),
        "lognormal 4-400": Draw(4, 400, median=28, sigma=1.0),
    }
    for name, draw in draws.items():
        yield name, Case(f"lengths {name}", "tiny", 32, SHORT, draw, Draw(4, 4))


def processes() -> Points:
    """One process and two, on work of different size."""
    plan = replace(SHORT, batch_size=4)
    yield "short", Case("short", "tiny", 64, SHORT)
    yield "4x128", Case("4x128", "tiny", 16, plan, Draw(129, 129), Draw(8, 8))
    yield "d256 4x128", Case("d256", "llama256x4", 8, plan, Draw(129, 129), Draw(4, 4))


def bf16() -> Points:
    """The type of the frozen base: 8 clients, 2 steps of 4 x 64 tokens."""
    plan = replace(SHORT, batch_size=4)
    for network in ("llama256x4", "llama768x2"):
        for dtype in ("float32", "bfloat16"):
            name = f"{network.removeprefix('llama').split('x')[0]} {dtype}"
            yield name, Case(name, network, 8, plan, Draw(65, 65), Draw(8, 8), dtype=dtype)


SWEEPS = {f.__name__: f for f in (clients, tokens, width, ranks, spread, processes, bf16)}


def run_sweep(name: str, effort: Effort) -> dict[str, Any]:
    """Measure and print one sweep; the record of every point by its label."""
    ways = TWO_CORES if name == "processes" else ONE_CORE
    print(f"{name}: {(SWEEPS[name].__doc__ or '').strip()}", flush=True)
    clock = clock_of(name)
    print(heading([e.label for e in ways], clock), flush=True)
    records = {}
    for label, case in SWEEPS[name]():
        records[label] = measure(case, ways, effort)
        print(line(label, records[label], clock), flush=True)
    print(flush=True)
    return records


def clock_of(name: str) -> str:
    """By which of a repeat's times a sweep's speeds are told."""
    return "wall_s" if name == "processes" else "cpu_s"


def heading(labels: list[str], clock: str) -> str:
    """Tokens per second of each entry, then ratios to the first."""
    names = "".join(f"{x:>16}" for x in labels)
    unit = "tokens/s" if clock == "wall_s" else "tokens/CPU s"
    return f"{unit:<18}{names}{'limit/core':>12}   times the loop; padding of padded"


def line(label: str, record: Mapping[str, Any], clock: str) -> str:
    """One point of a sweep."""
    found = record["entries"].values()
    rates = [rate(e, clock=clock) if e["repeats"] else float("nan") for e in found]
    ratios = " ".join(f"{r / rates[0]:.2f}" for r in rates[1:])
    padded = record["entries"]["padded 1x1"]["padding_share"]
    share = "-" if padded is None else f"{padded:.0%}"
    numbers = "".join(f"{r:>16.0f}" for r in rates)
    errors = "".join(f"\n    {e['side']}: {e['error']}" for e in found if e["error"])
    return f"{label:<18}{numbers}{limit(record):>12.0f}   {ratios}; {share}{errors}"
