"""What every method costs beside FedIT: times, traffic, exactness, and what clients keep."""

from collections.abc import Sequence


def main(words: Sequence[str] | None = None) -> int:
    """The command (``fedlora bench costs``); its exit code."""
    from simulations.bench.costs.__main__ import main as measure  # imports PyTorch

    return measure(words)
