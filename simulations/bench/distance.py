"""How far a run's global model ended from that of another run, such as one without attackers.

    python -m simulations.bench.distance outputs/CLEAN outputs/ATTACKED [outputs/ATTACKED ...]

The distance is ``||W_attacked - W_clean|| / ||W_clean||`` of what the last checkpoints add to the
frozen base, over all modules together, after the last round that both have checkpoints of.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from omegaconf import OmegaConf

from fedlora.core.config import build
from fedlora.core.payload import Payload
from fedlora.run import checkpoint
from strategies.base import LoRAStrategy


def model_of(run: Path, round: int) -> Payload:
    """What the global model of a run adds to its base after a round.

    Raises:
        SystemExit: if there is no checkpoint of it.
    """
    found = checkpoint.of_round(run / "checkpoints", round)
    if found is None:
        raise SystemExit(f"{run} has no checkpoint of round {round}")
    config = OmegaConf.load(run / "config.yaml")
    method = build(config.strategy, LoRAStrategy, "strategy")  # type: ignore[type-abstract]
    return method.technique.payload(method.global_update(dict(found.state)))


def distance(clean: Payload, other: Payload) -> float:
    """``||W_other - W_clean|| / ||W_clean||``."""
    zero = {name: torch.zeros_like(t) for name, t in clean.tensors()}
    nothing = type(clean).from_header(clean.header(), zero)
    return other.change_norm(clean) / clean.change_norm(nothing)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one line for each attacked run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("clean", type=Path)
    parser.add_argument("attacked", type=Path, nargs="+")
    options = parser.parse_args(arguments)
    saved = {
        run: set(checkpoint.saved_rounds(run / "checkpoints"))
        for run in (options.clean, *options.attacked)
    }
    for run in options.attacked:
        common = saved[run] & saved[options.clean]
        if not common:
            raise SystemExit(f"{run} and {options.clean} have no checkpoint of one round")
        last = max(common)
        clean, other = model_of(options.clean, last), model_of(run, last)
        print(f"round {last:4}  distance {distance(clean, other):8.4f}  {run}")


if __name__ == "__main__":
    main()
