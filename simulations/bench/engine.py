"""What does a client cost in the engines, beside a plain PEFT loop, a Trainer, and arithmetic?

    python -m simulations.bench.engine               all cases: half an hour on two cores
    python -m simulations.bench.engine --quick       the short-text cases: two minutes
    python -m simulations.bench.engine --sweep all   one thing varied at a time, one core each
    python -m simulations.bench.engine --overhead    where the time of tiny clients goes

Rows of a case, on the same data, batches and start adapters:

    one Trainer per client   the same PEFT model under one `transformers.Trainer` per client
    plain PEFT loop          PEFT model built once, weights reset per client, AdamW, clipping
    sequential engine        `fedlora.engine.sequential`
    fused, padded            `fedlora.engine.fused`, right-padded batches of similar lengths
    fused, ragged, refill    `fedlora.engine.fused`, without padding
    physical limit           `simulations.bench.peak`: a large matrix product's speed

Before anything is timed the sides must agree with the PEFT loop on every client's losses and on
the adapter it ends with; one that does not is an error, not a number. With dropout engines draw
masks of their own, so agreement is checked on the same case without. Repeats are interleaved in a
rotating order. Every side has processes of its own, and all may keep freed memory
(`fedlora.engine.memory`). Loop and Trainer run on one and on two threads, and the better setting is
the row; engines run in one and in two processes of one thread, among which clients are dealt by
tokens, and so does a second row of the loop. Time is measured where the cohort is: dealing,
sending, training and collecting count.
"""

import argparse
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from simulations.bench.engine_cases import CASES, EXTRA, Case, Draw, variants
from simulations.bench.engine_measure import ENTRIES, LABELS, Effort, Entry, measure
from simulations.bench.engine_table import table, write_plot
from simulations.bench.machine import RESULTS, command, load, machine, write

QUICK = Effort(repeats=2, trainer_clients=4)


def parser() -> argparse.ArgumentParser:
    """What may be typed."""
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [c.name for c in (*CASES, *EXTRA)]
    words.add_argument("--quick", action="store_true", help="two minutes: short texts alone")
    words.add_argument("--repeats", type=int, default=0, help="0: 5, or 2 with --quick")
    words.add_argument("--cases", nargs="*", choices=names, help="default: all but the last")
    words.add_argument("--entries", nargs="*", choices=list(LABELS), help="sides to run")
    words.add_argument("--trainer-clients", type=int, default=16, help="stand for all; 0: all")
    words.add_argument("--plain", action="store_true", help="no variants: no dropout, no bfloat16")
    words.add_argument("--out", type=Path, help="the JSON; the plot lies beside it")
    return words


def chosen(args: argparse.Namespace) -> list[Case]:
    """The cases of a command, with their variants; what cannot run here says so and is left out."""
    cases = [c for c in (*CASES, *EXTRA) if c.name in (args.cases or [c.name for c in CASES])]
    if args.quick and not args.cases:
        cases = [c for c in CASES if c.name.startswith("short")]
    if not args.quick and not args.plain:
        cases = [v for c in cases for v in variants(c)]
    for case in cases:
        if case.missing():
            print(f"{case.name}: skipped, {case.missing()}", flush=True)
    return [c for c in cases if not c.missing()]


def entries(args: argparse.Namespace) -> list[Entry]:
    """The ways to run that were asked for; the PEFT loop is always among them."""
    named = args.entries or [e.label for e in ENTRIES]
    found = [e for e in ENTRIES if e.label in named]
    return found if any(e.side == "peft loop" for e in found) else [Entry("peft loop"), *found]


def run_cases(cases: Sequence[Case], ways: Sequence[Entry], effort: Effort) -> dict[str, Any]:
    """Measure and print case after case."""
    records = {}
    for case in cases:
        before = load()
        record = measure(case, ways, effort)
        records[case.name] = record | {"load_before": before, "load_after": load()}
        print(table(case.name, record) + "\n", flush=True)
    return records


def main() -> None:
    """Measure, print, write."""
    args = parser().parse_args()
    warnings.filterwarnings("ignore")
    default = RESULTS / ("local/engine-quick.json" if args.quick else f"engine-{machine()}.json")
    out = args.out or default
    effort = QUICK if args.quick else Effort(trainer_clients=args.trainer_clients)
    effort = replace(effort, repeats=args.repeats or effort.repeats)
    records = run_cases(chosen(args), entries(args), effort)
    write(out, {"command": command("engine"), "effort": vars(effort), "cases": records})
    if records:
        write_plot(out.with_suffix(".png"), records)
    wrong = [n for n, r in records.items() if any(e["error"] for e in r["entries"].values())]
    if wrong:
        raise SystemExit(f"sides disagree: {wrong}")


if __name__ == "__main__":
    main()
