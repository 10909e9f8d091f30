"""Record what small runs compute, or compare with what is on record.

python -m tests.regression compare [--quick] [--only PATTERN] [--list]
python -m tests.regression record [--only PATTERN]
"""

import argparse
import fnmatch
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.regression import machine
from tests.regression.cases import Case, cases
from tests.regression.outcome import Outcome, apart, differences

REFERENCE = Path(__file__).parent / "reference"
SAME, NEW, CLOSE, DIFFERS = "same", "new", "close", "DIFFERS"


def say(line: str) -> None:
    """One line, at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.regression", description=__doc__)
    parser.add_argument("task", choices=("record", "compare"))
    parser.add_argument("--only", default="", help="cases whose name has this, or matches this *")
    parser.add_argument("--quick", action="store_true", help="one per strategy and engine")
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    return parser.parse_args(arguments)


def chosen(only: str, quick: bool) -> list[Case]:
    """The cases asked for."""
    pattern = only if any(c in only for c in "*?[") else f"*{only}*"
    return [c for c in cases() if fnmatch.fnmatch(c.name, pattern) and (c.quick or not quick)]


def load(file: Path) -> dict[str, Any]:
    """A reference; empty if nothing was recorded on such a machine."""
    if not file.is_file():
        return {"machine": {}, "cases": {}}
    return dict(json.loads(file.read_text(encoding="utf-8")))


def store(file: Path, reference: dict[str, Any]) -> None:
    """One line per part of a case: small, and a change shows what changed."""
    lines = []
    for name, outcome in sorted(reference["cases"].items()):
        parts = [f"  {json.dumps(k)}: {_compact(v)}" for k, v in outcome.items()]
        lines.append(f" {json.dumps(name)}: {{\n" + ",\n".join(parts) + "\n }")
    about = json.dumps(reference["machine"], indent=1).replace("\n", "\n ")
    text = f'{{\n "machine": {about},\n "cases": {{\n' + ",\n".join(lines) + "\n }\n}\n"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def judge(old: Outcome | None, new: Outcome, strict: bool) -> tuple[str, str]:
    """A verdict and its reason."""
    if old is None:
        return NEW, "not in the reference"
    different = differences(old, new)
    if not different:
        return SAME, ""
    numbers = apart(old, new)
    if strict or numbers:
        return DIFFERS, "; ".join([*different, *numbers[:3]])
    return CLOSE, "; ".join(different[:2])


def attempt(case: Case) -> tuple[Outcome | None, str]:
    """What a case gives, or in one line why it gives nothing."""
    from tests.regression.adapter import outcome  # after `machine.restart`

    try:
        return outcome(case), ""
    except Exception as error:
        return None, f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def work(options: argparse.Namespace, picked: Sequence[Case]) -> int:
    """Do the cases; the exit code."""
    file = REFERENCE / f"{machine.key()}.json"
    reference, here = load(file), machine.description()
    there = reference["machine"]
    changed = [f"{k} {v} (here {here.get(k)})" for k, v in there.items() if here.get(k) != v]
    if changed and options.task == "compare":
        say(f"recorded with {', '.join(changed)}")
    strict = there.get("cpu") == here["cpu"]
    counts, results, began = dict.fromkeys((SAME, NEW, CLOSE, DIFFERS), 0), {}, time.perf_counter()
    for case in picked:
        start = time.perf_counter()
        new, why = attempt(case)
        verdict = DIFFERS
        if new is not None:
            verdict, why = judge(reference["cases"].get(case.name), new, strict)
            results[case.name] = new
            if case.like in results and differences(results[case.like], new):
                verdict, why = DIFFERS, f"not as {case.like}; {why}"
        counts[verdict] += 1
        seconds = time.perf_counter() - start
        say(f"{case.name:40} {seconds:5.1f} s  {verdict}{': ' if why else ''}{why}")
    total = ", ".join(f"{n} {v}" for v, n in counts.items() if n)
    passed = f"{time.perf_counter() - began:.0f} s ({time.process_time():.0f} s of one core)"
    say(f"{total}; {passed}; reference {file.stem}")
    if counts[CLOSE]:
        say("close: on another processor hashes differ and metrics are within 1e-4")
    if options.task == "compare":
        return int(counts[DIFFERS] + counts[NEW] > 0)
    return record(file, reference, here, picked, results, partly=options.only or options.quick)


def record(
    file: Path,
    reference: dict[str, Any],
    here: dict[str, str],
    picked: Sequence[Case],
    results: dict[str, Outcome],
    partly: bool,
) -> int:
    """Write the reference, unless a case gave nothing."""
    if missing := [c.name for c in picked if c.name not in results]:
        say(f"nothing recorded: {', '.join(missing)} did not run")
        return 1
    if partly and reference["machine"] not in ({}, here):
        say("nothing recorded: the rest of the reference is of another machine; record all of it")
        return 1
    store(file, {"machine": here, "cases": (reference["cases"] if partly else {}) | results})
    say(f"recorded {len(results)} cases in {file.name}, {file.stat().st_size:,} bytes")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit code."""
    options = parse(arguments)
    picked = chosen(options.only, options.quick)
    if options.list:
        for case in picked:
            say(f"{case.name:40} {'quick ' if case.quick else '      '}{' '.join(case.words)}")
        return 0
    if not picked:
        say(f"no case is called {options.only!r}")
        return 2
    machine.restart()
    with tempfile.TemporaryDirectory(prefix="regression-cache-") as cache:
        from tests.regression.adapter import prepare

        prepare(Path(cache))
        return work(options, picked)


if __name__ == "__main__":
    sys.exit(main())
