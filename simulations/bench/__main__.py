"""The benchmarks by name: ``fedlora bench compare``, ``fedlora bench engine --quick``."""

import importlib
import sys
from collections.abc import Sequence

BENCHMARKS = {
    "compare": "our engines, a plain PEFT loop and Apple's pfl on the same clients",
    "methods": "one experiment under every method: quality over seeds, bytes and CPU time",
    "costs": "every method beside FedIT: times, traffic by formula, exactness, what clients keep",
    "prefix": "frozen blocks once per example, beside a plain PEFT loop with the same adapters",
    "privacy": "time and memory of a private average, beside the same without",
    "silos": "seconds a round for three silos over TLS, beside the floor of Flower's transport",
    "gpu": "everything to check on a GPU, within ten minutes",
}
"""Those with a command of their own. The others: python -m simulations.bench.NAME --help."""


def main(words: Sequence[str] | None = None) -> int:
    """Do one benchmark; its exit code. 2 for one that does not exist."""
    given = list(sys.argv[1:] if words is None else words)
    if not given or given[0] not in BENCHMARKS:
        known = "\n".join(f"  {name:<9}{about}" for name, about in BENCHMARKS.items())
        help_asked = bool({"-h", "--help"} & set(given))
        text = f"usage: fedlora bench NAME [words ...]\n\n{known}"
        print(text, file=sys.stdout if help_asked else sys.stderr)
        raise SystemExit(0 if help_asked else 2)
    return int(importlib.import_module(f"simulations.bench.{given[0]}").main(given[1:]))


if __name__ == "__main__":
    raise SystemExit(main())
