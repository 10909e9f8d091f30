"""What can only be checked on a GPU, in one command of at most ten minutes.

    make gpu-check
    fedlora bench gpu

The tests marked ``gpu``; then, in float32 and bfloat16, on short texts and on wide layers: both
engines and a plain PEFT loop train the same clients and must agree; their tokens per second beside
what a large matrix product of this GPU would allow; one process and two on the one GPU; the peak of
the GPU's memory. Time is by the clock, after synchronising: the GPU must be free.
"""

import argparse
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from simulations.bench.engine.cases import SHORT, WIDE, Case, Draw
from simulations.bench.engine.measure import Effort, Entry, limit, measure, rate
from simulations.bench.machine import RESULTS, command, write

LIMIT_S = 600.0
TESTS_S = 180.0
"""Seconds that the tests may take."""
CASE_S = 120.0
"""Seconds that must be left for another case to begin."""
ENTRIES = (Entry("peft loop"), Entry("sequential"), Entry("ragged"), Entry("ragged", processes=2))
CASES = (
    Case("short", "tiny", 80, SHORT),
    Case("wide", "llama768x4", 32, WIDE, Draw(129, 129), Draw(8, 8)),
)


def run_tests(words: Sequence[str] = ("-m", "gpu"), seconds: float = TESTS_S) -> dict[str, Any]:
    """The tests that ``words`` select: pytest's exit code and its last line."""
    line = [sys.executable, "-m", "pytest", "-q", "-n", "0", *words]
    try:
        done = subprocess.run(line, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return {"exit_code": -1, "summary": f"stopped after {seconds:.0f} s"}
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or [""]
    return {"exit_code": done.returncode, "summary": lines[-1]}


def measured(
    cases: Sequence[Case], device: str, seconds: float, repeats: int = 3
) -> dict[str, Any]:
    """The record of every case in both types of the base, as far as the time allows."""
    end, found = time.monotonic() + seconds, dict[str, Any]()
    for case in cases:
        for dtype in ("float32", "bfloat16"):
            if end - time.monotonic() < CASE_S:
                print(f"{case.name} {dtype}: left out, the time is over")
                continue
            record = measure(replace(case, dtype=dtype, device=device), ENTRIES, Effort(repeats))
            found[f"{case.name} {dtype}"] = record
            print(table(f"{case.name} {dtype}", record), flush=True)
    return found


def table(name: str, record: Mapping[str, Any]) -> str:
    """A line per entry: tokens per second, fraction of the limit, memory, difference of losses."""
    lines = [
        f"{name:<28}{'tokens/s':>12}{'x PEFT loop':>13}{'of limit':>10}{'MB':>9}{'d loss':>10}"
    ]
    loop, most = rate(record["entries"]["peft loop 1x1"]), limit(record)
    for label, entry in record["entries"].items():
        if entry["error"]:
            lines.append(f"  {label:<26}{entry['error']}")
            continue
        speed = rate(entry)
        lines.append(
            f"  {label:<26}{speed:>12,.0f}{speed / loop:>13.2f}{speed / most:>10.1%}"
            f"{entry['peak_mb']:>9,.0f}{entry['loss_difference']:>10.1e}"
        )
    return "\n".join(lines)


def wrong(record: Mapping[str, Any]) -> list[str]:
    """What failed: tests, entries that train something else."""
    tests = record["tests"]
    found = [f"tests: {tests['summary']}"] if tests["exit_code"] else []
    for name, case in record["cases"].items():
        found += [f"{name}, {k}: {e['error']}" for k, e in case["entries"].items() if e["error"]]
    return found


def main(words: Sequence[str] | None = None) -> int:
    """Check, print, write; 1 if anything is wrong, or if there is no GPU."""
    parser = argparse.ArgumentParser("fedlora bench gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="the JSON; by default named after the GPU")
    args = parser.parse_args(words)
    if not torch.cuda.is_available():
        print("gpu-check needs a GPU, and PyTorch sees none on this machine", file=sys.stderr)
        return 1
    warnings.filterwarnings("ignore")
    began, name = time.monotonic(), torch.cuda.get_device_name()
    record: dict[str, Any] = {"command": command("gpu"), "gpu": name, "tests": run_tests()}
    print(f"{name}; tests: {record['tests']['summary']}", flush=True)
    record["cases"] = measured(CASES, "cuda", LIMIT_S - (time.monotonic() - began))
    write(args.out or RESULTS / f"gpu-{name.lower().replace(' ', '-')}.json", record)
    for text in (failed := wrong(record)):
        print(text, file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
