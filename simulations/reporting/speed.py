"""The table of costs: times, traffic and memory of the benchmarks, each beside its goal."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from simulations.reporting.tables import (
    Records,
    change,
    code,
    deviation,
    markdown,
    percent,
    times,
)

DTYPES = ("float32", "bfloat16")
BACKENDS = ("dense", "core", "random")


@dataclass(frozen=True)
class Cost:
    """One question, which record answers it and how."""

    question: str
    record: str
    answer: Callable[[Any], str]
    goal: str = ""


def speed(records: Records) -> str:
    """Every question with its answer, its command and its goal."""
    rows = []
    for cost in COSTS:
        found = records[cost.record]
        rows.append([cost.question, cost.answer(found), cost.goal, code(found["command"])])
    return markdown(["question", "measured", "goal", "command"], rows)


def rate(entry: Any, clock: str = "wall_s") -> float:
    """Tokens per second, by the median of the repeats."""
    return float(entry["tokens"] / statistics.median(r[clock] for r in entry["repeats"]))


def against(case: Any, other: str, processes: int = 0) -> str:
    """How many times as fast two fused processes are as the best arrangement of another side,
    in so many processes (0: any)."""
    rivals = [
        rate(e)
        for name, e in case["entries"].items()
        if name.startswith(other) and not e["error"] and processes in (0, e["processes"])
    ]
    return times(rate(case["entries"]["ragged 2x1"]) / max(rivals))


def _beside(case: Any) -> str:
    one, two = (against(case, "peft loop", n) for n in (1, 2))
    return (
        f"{one} and {two} a plain PEFT loop (one process, two), "
        f"{against(case, 'trainer')} one `Trainer` per client"
    )


def of_limit(case: Any) -> str:
    """The speed of the fused engine as a fraction of the speed of its matrix products alone."""
    limit = max(case["gemm_peaks"]) / (case["flop"] / case["tokens"])
    return f"{100 * rate(case['entries']['ragged 1x1']) / limit:.0f} %"


def _engines(found: Any) -> str:
    return "; ".join(f"{_beside(case)} ({name})" for name, case in found["cases"].items())


def _limits(found: Any) -> str:
    return ", ".join(f"{of_limit(c)} ({name})" for name, c in found["cases"].items())


def _policies(found: Any) -> str:
    best: dict[str, float] = {}
    for name, result in found["policies"].items():
        layout, seconds = name.split()[0], statistics.median(result["seconds"])
        best[layout] = min(seconds, best.get(layout, seconds))
    return ", ".join(f"{seconds:.1f} s {layout}" for layout, seconds in best.items())


def _bfloat16(found: Any) -> str:
    sides = found["sweeps"]["bf16"]

    def gain(width: int) -> float:
        full, half = (sides[f"{width} {d}"]["entries"]["ragged 1x1"] for d in DTYPES)
        return rate(half, "cpu_s") / rate(full, "cpu_s")

    return ", ".join(f"{times(gain(width))} (d = {width})" for width in (768, 256))


def beside(found: Any, side: str, other: str = "peft loop") -> str:
    """How many times the CPU time of a side another one takes."""
    mine, theirs = (statistics.median(found["cpu_s"][name]) for name in (side, other))
    return times(theirs / mine)


def _classifiers(found: Any) -> str:
    return ", ".join(
        f"{beside(found, side)} a plain PEFT loop ({side})" for side in ("fused", "sequential")
    )


def _states(found: Any) -> str:
    sides = [side for side in found["cpu_s"] if side.endswith(", states")]
    frozen, blocks = found["blocks"]
    fill = found["fill"]
    return (
        ", ".join(f"{beside(found, s)} ({s.removesuffix(', states')})" for s in sides)
        + f"; {frozen} of {blocks} blocks frozen, {fill['cpu_s']:.0f} CPU s and "
        f"{fill['bytes'] / 1e6:,.0f} MB once for {found['clients']} clients"
    )


def _formats(found: Any) -> str:
    spent = {(s["engine"], s["format"]): statistics.median(s["cpu_s"]) for s in found["sides"]}
    engines = dict.fromkeys(engine for engine, _ in spent)
    return ", ".join(f"{times(spent[e, DTYPES[0]] / spent[e, DTYPES[1]])} ({e})" for e in engines)


def _split(found: Any) -> str:
    def ratio(case: str, side: str) -> float:
        rows = found["cases"][case]
        cpu = {row["name"]: float(statistics.median(row["cpu_ms"])) for row in rows}
        return cpu[side] / cpu["unsplit"]

    sides = {"split, one client": "one client", "split concat": "three clients"}
    sides["split concat, messages"] = "as messages"
    cases = {"tiny": "d = 128", "llama256x8": "d = 256"}
    return "; ".join(
        f"{name} " + ", ".join(f"{times(ratio(c, side))} ({cases[c]})" for c in cases)
        for side, name in sides.items()
    )


def _sparse_step(found: Any) -> str:
    spp = {t["dropout"]: t["ratio"] for t in found["times"] if t["name"] == "SPP"}
    return ", ".join(
        f"{times(ratio)}{f' with dropout {p:g}' if p else ''}" for p, ratio in spp.items()
    )


def _switch_step(found: Any) -> str:
    return f"{times(1 + found['over_lora'])} (d = {found['width']})"


def _runtime(found: Any) -> str:
    flower, pool = (found["sides"][side][0] for side in ("flower", "pool"))
    seconds = [statistics.median(r["s"] for r in side["rounds"][1:4]) for side in (flower, pool)]
    return f"{seconds[0]:.1f} s and {seconds[1]:.1f} s a round: {times(seconds[1] / seconds[0])}"


def _startup(found: Any) -> str:
    flower, pool = (found["sides"][side][0]["startup_s"] for side in ("flower", "pool"))
    return f"{flower:.0f} s (pool: {pool:.0f} s)"


def _memory(found: Any) -> str:
    m = found["memory"]
    return (
        f"{m['rounds_5_to_9']:,.0f} MB in rounds 5 to 9, {m['last_5']:,.0f} MB in the last five: "
        f"+{100 * m['growth']:.1f} %"
    )


def _svd(found: Any) -> str:
    def seconds(preset: str, backend: str) -> float:
        kinds = found["presets"][preset]["kinds"].values()
        each = ((k["modules"], statistics.median(k["backends"][backend]["cpu_ms"])) for k in kinds)
        return float(sum(n * ms for n, ms in each)) / 1000

    return "; ".join(
        f"{preset} ranks: " + ", ".join(f"{b} {seconds(preset, b):.1f} s" for b in BACKENDS)
        for preset in found["presets"]
    )


COSTS = (
    Cost("80 clients with short texts, two processes", "engine-short", _engines, "8x and 20x"),
    Cost("80 clients of Natural Instructions, two processes", "engine-ni", _engines, "3x, 5x"),
    Cost("2,000 short-text clients on one core, best policy", "scheduler", _policies),
    Cost("fraction of the limit set by matrix products", "engine-short", _limits, "60 %"),
    Cost("the same, Natural Instructions", "engine-ni", _limits, "60 %"),
    Cost("the same, wide layers", "engine-d768", _limits, "85 %"),
    Cost("bfloat16 base against float32, CPU time", "engine-sweep-bf16", _bfloat16, "1.4x"),
    Cost("the same, SmolLM2-135M, all blocks adapted", "formats-smollm2", _formats, "1.8x"),
    Cost("MiniLM, BANKING77, 30 clients, all blocks", "classification-banking77", _classifiers),
    Cost("the same, 1,000 clients of 8 examples", "classification-small", _classifiers),
    Cost("frozen blocks once, MiniLM, a plain PEFT loop's time", "prefix-minilm", _states, "4x"),
    Cost("the same, SmolLM2-135M, Natural Instructions", "prefix-smollm2", _states, "8x"),
    Cost("split step against an unsplit one, CPU time", "split", _split, "1.15x, one process"),
    Cost("SwitchLoRA step against LoRA's", "switchlora-steps-d128", _switch_step, "1.1x"),
    Cost("the same, wide layers", "switchlora-steps-d768", _switch_step, "1.1x"),
    Cost("SPP step against LoRA's, tiny", "sparse-tiny", _sparse_step, "1.3x"),
    Cost("SPP step against LoRA's, SmolLM2-135M", "sparse-smollm2", _sparse_step, "1.3x"),
    Cost("Flower and Ray against a pool of processes", "runtime-intel", _runtime, "0.9x"),
    Cost("start-up to the first training step", "runtime-intel", _startup, "30 s"),
    Cost("memory over 50 rounds, all processes", "runtime-memory", _memory, "5 %"),
    Cost("the server's SVDs, 80 clients, SmolLM2 shapes", "aggregation", _svd),
)


def overview(records: Records) -> str:
    """README's rows."""
    runs = {r["command"].split(maxsplit=3)[-1]: r for r in records["runs"]["rows"]}
    split = {r["experiment"]: r for r in records["e2e"]["rows"]}
    switch, spp = records["switchlora-d"], records["sparse-smollm2"]
    pruned = {r["name"]: r["perplexity"] for r in spp["patterns"]["2:4"]}

    def losses(key: str) -> str:
        first, last = runs[key]["first"], runs[key]["last"]
        return f"loss {change(first['loss_response'], last['loss_response'])}"

    def seeds(side: str) -> str:
        return f"{statistics.mean(r['perplexity'] for r in switch['runs'][side].values()):.1f}"

    banking = records["methods-intents_banking77"]["runs"]

    def accuracy(method: str) -> str:
        return f"`{method}` {deviation(percent(banking[method].values()))}"

    default, instructions = "strategy=flexlora", "experiment=ni1613_flexlora engine=fused"
    fused = records["engine-short"]
    tiny = next(iter(fused["cases"].values()))
    faster = " and ".join(against(tiny, "peft loop", n) for n in (1, 2))
    rows = [
        ["FlexLoRA, 1,600 clients, default", losses(default), runs[default]["command"]],
        ["FlexLoRA, Natural Instructions", losses(instructions), runs[instructions]["command"]],
        [
            "BANKING77, 30 clients, three seeds",
            "accuracy, % "
            + ", ".join(map(accuracy, ("heterolora", "fedit", "flexlora", "flora", "fedsa"))),
            "python -m simulations.bench.methods --seeds 0 1 2",
        ],
        [
            "SplitLoRA on E2E",
            f"perplexity {split['e2e_splitlora']['perplexity']:.3f}; "
            f"FL-LoRA {split['e2e_fedit']['perplexity']:.3f}",
            split["e2e_splitlora"]["command"],
        ],
        [
            "SwitchLoRA, pre-training",
            f"perplexity {seeds('SwitchLoRA')}; LoRA {seeds('LoRA')}, all weights {seeds('full')}",
            switch["commands"][0],
        ],
        [
            "SPP, SmolLM2-135M pruned 2:4",
            f"perplexity {pruned['pruned, wanda']:.0f} → {pruned['SPP']:.1f}; "
            f"LoRA pruned again {pruned['LoRA, pruned again']:.1f}",
            spp["command"],
        ],
        [
            "fused engine, short texts",
            f"{faster} a plain PEFT loop in one process and in two",
            fused["command"],
        ],
    ]
    return markdown(["claim", "measured", "command"], [[a, b, code(c)] for a, b, c in rows])
