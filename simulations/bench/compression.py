"""What a change loses, weighs and costs in every format.

    python -m simulations.bench.compression
    python -m simulations.bench.compression --shapes smollm2

An adapter of rank 8 whose numbers are of the size of a start moves by 1e-3 a number. Errors are
those *of the change*, sent as a value and as a change, seconds those of one thread for encoding
and decoding.
"""

import argparse
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from fedlora.core.seeding import torch_generator
from fedlora.wire.tensors import Format
from simulations.bench.shapes import SHAPES

FORMATS = {
    "fp32": Format("fp32"),
    "bf16": Format("bf16"),
    "fp16": Format("fp16"),
    "int8": Format("int8", stochastic=False),
    "int8 random": Format("int8"),
    "int4": Format("int4", group=32, stochastic=False),
    "int4 random": Format("int4", group=32),
    "sparse 25 %": Format("sparse", density=0.25),
    "sparse 10 %": Format("sparse", density=0.1),
    "sparse 1 %": Format("sparse", density=0.01),
}
MOVED = 1e-3


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="tiny", choices=list(SHAPES))
    parser.add_argument("--rank", type=int, default=8)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    start, moved = dict[str, Tensor](), dict[str, Tensor]()
    for path, f in SHAPES[options.shapes].factors(0, options.rank).items():
        for name, t in ((f"{path}/a", f.a), (f"{path}/b", f.b)):
            g = torch_generator(7, "bench-compression", len(moved))
            start[name] = t / t.std() / max(t.shape) ** 0.5
            moved[name] = MOVED * torch.randn(t.shape, generator=g)
    size = sum(t.numel() for t in moved.values())
    shapes = {name: tuple(t.shape) for name, t in moved.items()}
    whole = torch.cat([t.reshape(-1) for t in moved.values()])
    print(
        f"{f'{size:,} numbers':>16} {'bytes':>13} {'a number':>9} {'as value':>9} "
        f"{'as change':>9} {'ms':>8}"
    )
    for name, form in FORMATS.items():
        began = time.process_time()
        data = form.encode(moved, torch_generator(0, "r"))
        read = form.decode(data, shapes)
        milliseconds = 1e3 * (time.process_time() - began)
        value = {n: start[n] + moved[n] for n in moved}
        told = form.decode(form.encode(value, torch_generator(0, "r")), shapes)
        lost = [
            torch.cat([(t[n] - x[n]).reshape(-1) for n in x]).norm() / whole.norm()
            for t, x in ((told, value), (read, moved))
        ]
        print(
            f"{name:>16} {len(data):13,} {len(data) / size:9.3f} {float(lost[0]):9.2%} "
            f"{float(lost[1]):9.2%} {milliseconds:8.1f}"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
