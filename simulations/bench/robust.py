"""What robust rules withstand, and what they cost the server.

    python -m simulations.bench.robust errors           a table by arithmetic, seconds
    python -m simulations.bench.robust costs            80 clients, adapters of two models
    python -m simulations.bench.robust costs --shapes tiny --rules mean bound krum

``costs`` does one case in a process of its own, writes it down and goes on where it was stopped.
A case is a rule on factors (as FedIT adds) or on products (as FlexLoRA does). Seconds are those of
`Rule.centre` (of the plain sum: `fedlora.algebra.summand.total`), memory is the growth of the
process's peak beyond what holds the updates.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from fedlora.algebra.summand import Product, Summands, total
from fedlora.core.seeding import torch_generator
from fedlora.robust.bound import Bound
from fedlora.robust.coordinate import Median, Trimmed
from fedlora.robust.geometric import Geometric
from fedlora.robust.krum import Krum, MultiKrum
from fedlora.robust.rule import NO_RULE, Rule, Term, Withstands
from simulations.bench.machine import RESULTS, command, machine, write
from simulations.bench.shapes import SHAPES

RULES: dict[str, Rule] = {
    "mean": NO_RULE,
    "bound": Bound(),
    "median": Median(0.3),
    "trimmed": Trimmed(0.3),
    "krum": Krum(0.3),
    "multikrum": MultiKrum(attackers=0.3),
    "geometric": Geometric(),
}
CLIENTS, RANK = 80, 8
FORMS = ("factors", "products")


# --- what they withstand ------------------------------------------------------------------------


def errors(clients: int = 20, size: int = 40) -> None:
    """``f`` of 20 clients send -10 times a change: error relative to the honest mean."""
    g = torch_generator(0, "bench-robust")
    common = torch.randn(size, size, generator=g, dtype=torch.float64)
    noise = 0.25 * torch.randn(clients, size, size, generator=g, dtype=torch.float64)
    honest = common + noise
    print(f"{'f':>3}" + "".join(f"{name:>11}" for name in RULES))
    for f in (0, 1, 4, 8):
        sent = honest.clone()
        sent[:f] *= -10
        want = honest[f:].mean(dim=0)
        found = [_error(rule, sent, f / clients, want) for rule in RULES.values()]
        print(f"{f:3}" + "".join(f"{e:11.3f}" for e in found))


def _error(rule: Rule, sent: Tensor, attackers: float, want: Tensor) -> float:
    terms: list[Summands] = [{"w": x} for x in sent]
    if not rule.acts:
        got = sent.mean(dim=0)
    else:
        if isinstance(rule, Withstands):
            rule = replace(rule, attackers=attackers)
        value = rule.centre([Term(x, 1, {}) for x in terms]).value["w"]
        assert isinstance(value, Tensor)
        got = value
    return float((got - want).norm() / want.norm())


# --- what they cost -----------------------------------------------------------------------------


def updates(shapes: str, form: str) -> list[Term]:
    """One term for each client."""
    found = []
    for client in range(CLIENTS):
        x: dict[str, Tensor | Product] = {}
        for path, f in SHAPES[shapes].factors(client, RANK).items():
            if form == "products":
                x[path] = Product(f.scale * f.b, f.a)
            else:
                x |= {f"{path}/a": f.a, f"{path}/b": f.b}
        found.append(Term(x, 1, {}))
    return found


def peak() -> int:
    """The largest resident set of this process so far, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def case(shapes: str, form: str, name: str) -> dict[str, float]:
    """Seconds of CPU and growth of the peak, in this process."""
    torch.set_num_threads(1)
    terms, rule = updates(shapes, form), RULES[name]
    before, began = peak(), time.process_time()
    if rule.acts:
        rule.centre(terms)
    else:
        total([t.summands for t in terms], [1.0] * CLIENTS)
    return {"cpu_seconds": time.process_time() - began, "peak_mb": (peak() - before) / 1e6}


def costs(file: Path, shapes: Sequence[str], forms: Sequence[str], rules: Sequence[str]) -> None:
    """All cases that the file does not hold yet, and the table of all that it then holds."""
    done = json.loads(file.read_text())["cases"] if file.exists() else {}
    for key in (f"{s} {form} {rule}" for s in shapes for form in forms for rule in rules):
        if key not in done:
            words = [sys.executable, "-m", "simulations.bench.robust", "case", *key.split()]
            answer = subprocess.run(words, check=True, capture_output=True, text=True).stdout
            done[key] = json.loads(answer.splitlines()[-1])
            write(
                file,
                {"command": command("robust"), "clients": CLIENTS, "rank": RANK, "cases": done},
            )
    for key, found in done.items():
        print(f"{key:28} {found['cpu_seconds']:9.2f} CPU s {found['peak_mb']:9.0f} MB")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("errors")
    of = commands.add_parser("costs")
    of.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    of.add_argument("--forms", nargs="+", default=list(FORMS), choices=FORMS)
    of.add_argument("--rules", nargs="+", default=list(RULES), choices=list(RULES))
    of.add_argument("--out", type=Path, default=RESULTS / f"robust-{machine()}.json")
    one = commands.add_parser("case")
    one.add_argument("words", nargs=3)
    options = parser.parse_args(arguments)
    if options.command == "errors":
        errors()
    elif options.command == "case":
        print(json.dumps(case(*options.words)))
    else:
        costs(options.out, options.shapes, options.forms, options.rules)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
