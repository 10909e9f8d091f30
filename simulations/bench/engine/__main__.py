"""What does a client cost in the engines, beside a plain PEFT loop, a Trainer, and arithmetic?

    python -m simulations.bench.engine               all cases: under an hour on two cores
    python -m simulations.bench.engine --quick       the short-text cases: two minutes
    python -m simulations.bench.engine --sweep all   one thing varied at a time, one core each
    python -m simulations.bench.engine --overhead    what a client costs beyond its passes
    python -m simulations.bench.engine --profile --cases "short tiny"   operators by their time

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
from dataclasses import replace
from pathlib import Path
from typing import Any

from simulations.bench.engine.cases import (
    CASES,
    EXTRA,
    Case,
    variants,
)
from simulations.bench.engine.measure import (
    ENTRIES,
    LABELS,
    Effort,
    Entry,
    measure,
)
from simulations.bench.engine.profile import overhead, profiles
from simulations.bench.engine.sweeps import SWEEPS, run_sweep
from simulations.bench.engine.table import (
    table,
    write_curves,
    write_plot,
)
from simulations.bench.machine import RESULTS, command, load, machine, write

ONE_AT_A_TIME = Effort(repeats=3)


def parser() -> argparse.ArgumentParser:
    """What may be typed."""
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [c.name for c in (*CASES, *EXTRA)]
    words.add_argument("--quick", action="store_true", help="two minutes: short texts alone")
    words.add_argument("--sweep", choices=[*SWEEPS, "all"], help="vary one thing instead")
    words.add_argument("--overhead", action="store_true", help="profile tiny clients instead")
    words.add_argument("--profile", action="store_true", help="operators of the cases instead")
    words.add_argument("--repeats", type=int, default=0, help="0: as many as suit each")
    words.add_argument("--cases", nargs="*", choices=names, help="default: all but the last three")
    words.add_argument("--entries", nargs="*", choices=list(LABELS), help="default: all")
    words.add_argument("--trainer-clients", type=int, default=16, help="stand for all; 0: all")
    words.add_argument("--plain", action="store_true", help="no variants: no dropout, no bfloat16")
    words.add_argument("--out", type=Path, help="the JSON; the plot lies beside it")
    return words


def chosen(args: argparse.Namespace) -> list[Case]:
    """The cases of a command, with their variants; what cannot run here says so and is left out."""
    cases = [c for c in (*CASES, *EXTRA) if c.name in (args.cases or [c.name for c in CASES])]
    if args.quick and not args.cases:
        cases = [c for c in CASES if c.name.startswith("short")]
    for case in cases:
        if case.missing():
            print(f"{case.name}: skipped, {case.missing()}", flush=True)
    cases = [c for c in cases if not c.missing()]
    alone = args.quick or args.plain or args.profile
    return cases if alone else [v for c in cases for v in variants(c)]


def ways(args: argparse.Namespace) -> list[Entry]:
    """The ways to run that were asked for. Without the PEFT loop there is nothing to agree with."""
    return [e for e in ENTRIES if e.label in (args.entries or LABELS)]


def run_cases(args: argparse.Namespace, out: Path) -> dict[str, Any]:
    """Measure and print case after case; what is complete is on disk whatever happens later."""
    records: dict[str, Any] = {}
    for case in chosen(args):
        before, repeats = load(), args.repeats or (2 if args.quick else case.repeats)
        effort = Effort(repeats, 4 if args.quick else args.trainer_clients)
        record = measure(case, ways(args), effort)
        records[case.name] = record | {"load_before": before, "load_after": load()}
        print(table(case.name, record) + "\n", flush=True)
        write(out, {"command": command("engine"), "cases": records})
        write_plot(out.with_suffix(".png"), records)
    return records


def run_sweeps(args: argparse.Namespace, out: Path) -> dict[str, Any]:
    """One sweep or all; the records of all points by sweep and label."""
    effort = replace(ONE_AT_A_TIME, repeats=args.repeats or ONE_AT_A_TIME.repeats)
    sweeps: dict[str, Any] = {}
    for name in SWEEPS if args.sweep == "all" else [args.sweep]:
        before = load()
        sweeps[name] = run_sweep(name, effort)
        busy = {"load_before": before, "load_after": load()}
        write(out, {"command": command("engine"), **busy, "sweeps": sweeps})
        write_curves(out.with_suffix(".png"), sweeps)
    return {f"{n} {label}": r for n, points in sweeps.items() for label, r in points.items()}


def main() -> None:
    """Measure, print, write."""
    args = parser().parse_args()
    warnings.filterwarnings("ignore")
    kind = "sweeps" if args.sweep else "overhead" if args.overhead else "profile"
    name = f"engine-{kind}" if args.sweep or args.overhead or args.profile else "engine"
    usual = f"local/{name}-quick.json" if args.quick else f"{name}-{machine()}.json"
    out = args.out or RESULTS / usual
    if args.overhead:
        write(out, {"command": command("engine"), "sides": overhead(args.repeats or 5)})
    elif args.profile:
        sides = list(dict.fromkeys(e.side for e in ways(args) if e.side != "trainer"))
        write(out, {"command": command("engine"), "cases": profiles(chosen(args), sides)})
    else:
        records = (run_sweeps if args.sweep else run_cases)(args, out)
        wrong = [n for n, r in records.items() if any(e["error"] for e in r["entries"].values())]
        if wrong:
            raise SystemExit(f"sides disagree in {wrong}")


if __name__ == "__main__":
    main()
