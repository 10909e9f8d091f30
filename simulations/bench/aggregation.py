"""How should the server decompose a round's average, and what does each way cost in accuracy?

    python -m simulations.bench.aggregation

80 clients in four tiers send factors of the 210 linear layers of SmolLM2-135M. The layers have
four distinct kinds; one layer of each kind is decomposed by every backend of
`fedlora.algebra.linalg.svd_of_product`, and its time counts as often as the model has such layers.
Updates are what training gives: a common part with a decaying spectrum, cut to each client's
rank, and noise of the client's own. Errors are taken against a float64 SVD of the dense product.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedlora.algebra.linalg import (
    BACKENDS,
    backend_flops,
    cheapest_backend,
    stack,
    svd_of_product,
)
from fedlora.core.seeding import torch_generator
from fedlora.core.types import Factors, Module
from fedlora.population.ranks import (
    RankDistribution,
    module_ranks,
    quotas,
)
from simulations.bench.machine import RESULTS, command, load, machine, write

LAYERS = 30
PARAMETERS = 134_515_008
KINDS = (
    ("q_proj, o_proj", "attention", 576, 576, 2),
    ("k_proj, v_proj", "attention", 192, 576, 2),
    ("gate_proj, up_proj", "mlp", 1536, 576, 2),
    ("down_proj", "mlp", 576, 1536, 1),
)
"""Names, kind, d_out, d_in and number per layer of SmolLM2-135M's linear layers."""
ALPHA = 16.0
NOISE = 0.1
"""Norm of a client's own part relative to the common part."""


@dataclass(frozen=True)
class Case:
    """One kind of layer with a round's stacked factors."""

    name: str
    count: int
    b: Tensor
    a: Tensor
    stack_ms: float
    top: int
    """The largest rank of any client: how many directions are kept."""

    @property
    def sizes(self) -> tuple[int, int, int]:
        """``m, n, R`` of ``B [m, R] @ A [R, n]``."""
        return self.b.shape[0], self.a.shape[1], self.b.shape[1]


def modules() -> list[Module]:
    """The 210 adapted modules, by their shapes alone."""
    return [
        Module(f"{layer}.{names}.{i}", "attention" if kind == "attention" else "mlp", d_out, d_in)
        for layer in range(LAYERS)
        for names, kind, d_out, d_in, count in KINDS
        for i in range(count)
    ]


def factors(module: Module, ranks: Sequence[int]) -> list[Factors]:
    """One client's update of a module per rank: ``T_r(W) + noise``, ``W`` with ``s_i = 1 / i``."""
    g = torch_generator(5, "bench", module.d_out, module.d_in)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    u, _ = torch.linalg.qr(normal(module.d_out, module.max_rank))
    v, _ = torch.linalg.qr(normal(module.d_in, module.max_rank))
    s = 1.0 / torch.arange(1, module.max_rank + 1)
    out = []
    for r in ranks:
        scale, root = ALPHA / r, s[:r].sqrt()
        b, a = u[:, :r] * root / scale, root[:, None] * v[:, :r].T
        noise_b, noise_a = normal(*b.shape), normal(*a.shape)
        b = b + NOISE * noise_b * b.norm() / noise_b.norm()
        a = a + NOISE * noise_a * a.norm() / noise_a.norm()
        out.append(Factors(a=a, b=b, alpha=ALPHA))
    return out


def cases(distribution: RankDistribution, clients: int) -> list[Case]:
    """One case per kind of layer."""
    held = modules()
    tiers = distribution.resolve(held, PARAMETERS)
    numbers = quotas([t.fraction for t in tiers], clients)
    ranks = [module_ranks(t, held, clamp=True) for t in tiers]
    out = []
    for names, _, _, _, count in KINDS:
        module = next(m for m in held if m.path == f"0.{names}.0")
        mine = [r[module.path] for r, n in zip(ranks, numbers, strict=True) for _ in range(n)]
        updates = factors(module, mine)
        began = time.process_time()
        b, a = stack(updates, [1 / clients] * clients)
        spent = (time.process_time() - began) * 1e3
        out.append(Case(names, count * LAYERS, b, a, spent, max(mine)))
    return out


def measure(case: Case, backend: str, repeats: int, exact: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """CPU and wall milliseconds of every repeat, and errors of the leading ``top`` directions."""
    wall, cpu = [], []
    for _ in range(repeats):
        w0, c0 = time.perf_counter(), time.process_time()
        found = svd_of_product(case.b, case.a, backend, case.top)
        wall.append((time.perf_counter() - w0) * 1e3)
        cpu.append((time.process_time() - c0) * 1e3)
    values, best = exact
    k = min(case.top, found.rank)
    missing = values[k : case.top]
    gap = torch.cat([found.s[:k].double() - values[:k], missing]).abs().max()
    cut = (found.u[:, :k].double() * found.s[:k].double()) @ found.v[:k].double()
    return {
        "wall_ms": wall,
        "cpu_ms": cpu,
        "singular_value_error": float(gap / values[0]),
        "update_error": float((cut - best).norm() / best.norm()),
    }


def run(case: Case, repeats: int, limit: float) -> dict[str, Any]:
    """Every backend on one case; those above the limit of operations are left out."""
    m, n, inner = case.sizes
    u, s, v = torch.linalg.svd(case.b.double() @ case.a.double(), full_matrices=False)
    exact = s, (u[:, : case.top] * s[: case.top]) @ v[: case.top]
    found: dict[str, Any] = {}
    for backend in BACKENDS[1:]:
        flops = backend_flops(backend, m, n, inner, case.top)
        found[backend] = {"estimated_gflop": flops / 1e9}
        if flops <= limit:
            found[backend] |= measure(case, backend, repeats, exact)
    return {
        "modules": case.count,
        "shape": [m, n],
        "stacked_rank": inner,
        "kept_rank": case.top,
        "stack_ms": case.stack_ms,
        "auto": cheapest_backend(m, n, inner, case.top),
        "backends": found,
    }


def table(title: str, results: dict[str, Any]) -> str:
    """Median CPU milliseconds per module and whole rounds in seconds, ``*`` where ``auto`` goes."""
    names = BACKENDS[1:]
    lines = [
        title,
        f"{'module (one of)':<27}{'B A':>19}" + "".join(f"{n + ' ms':>11}" for n in names),
    ]
    total: dict[str, float] = dict.fromkeys((*names, "auto", "stack"), 0.0)
    for name, r in results.items():
        m, n = r["shape"]
        cells = ""
        for backend in names:
            times = r["backends"][backend].get("cpu_ms")
            ms = statistics.median(times) if times else float("nan")
            total[backend] += ms * r["modules"] / 1e3
            if r["auto"] == backend:
                total["auto"] += ms * r["modules"] / 1e3
            mark = "*" if r["auto"] == backend else " "
            cells += f"{ms:>10.1f}{mark}" if times else f"{'-':>10} "
        total["stack"] += r["stack_ms"] * r["modules"] / 1e3
        product = f"{m}x{r['stacked_rank']}x{n}"
        lines.append(f"{name + ' (' + str(r['modules']) + ')':<27}{product:>19}{cells}")
    whole = "".join(f"{total[n]:>10.2f} " for n in names).replace("nan", "  -")
    lines.append(f"{'whole round, CPU s':<46}{whole}")
    lines.append(f"auto {total['auto']:.2f} s, and stacking {total['stack']:.2f} s")
    for what in ("singular_value_error", "update_error"):
        worst = {
            n: [r["backends"][n][what] for r in results.values() if what in r["backends"][n]]
            for n in names
        }
        row = "".join(f"{max(w):>10.1e} " if w else f"{'-':>10} " for w in worst.values())
        lines.append(f"{what.replace('_', ' '):<46}{row}")
    return "\n".join(lines)


def main() -> None:
    """Both presets of ranks, tables, one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=80)
    parser.add_argument("--distribution", default="uniform")
    parser.add_argument("--presets", nargs="*", default=["scaled", "paper"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit-gflop", type=float, default=500.0, help="skip what costs more")
    parser.add_argument("--out", type=Path, default=RESULTS / f"aggregation-{machine()}.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    record: dict[str, Any] = {
        "command": command("aggregation"),
        "config": {k: v for k, v in vars(args).items() if k != "out"} | {"noise": NOISE},
        "sampling": "one module of each kind, times its number of modules",
        "load_before": load(),
        "presets": {},
    }
    for preset in args.presets:
        distribution = RankDistribution(args.distribution, preset=preset, alpha=ALPHA)
        tiers = distribution.resolve(modules(), PARAMETERS)
        results = {
            case.name: run(case, args.repeats, args.limit_gflop * 1e9)
            for case in cases(distribution, args.clients)
        }
        ranks = ", ".join(f"{t.name} {t.attention}/{t.mlp}" for t in tiers)
        title = f"{preset} ranks ({ranks}), {args.distribution}, {args.clients} clients"
        print(table(f"{title}, {args.threads} thread(s)", results) + "\n", flush=True)
        record["presets"][preset] = {"tiers": [vars(t) for t in tiers], "kinds": results}
    record["load_after"] = load()
    print(f"load {record['load_before']} before, {record['load_after']} after")
    write(args.out, record)


if __name__ == "__main__":
    main()
