"""What does secure aggregation cost? (docs/secure_aggregation.md)

    python -m simulations.bench.secagg                              # tiny, 80 clients, FFA-LoRA
    python -m simulations.bench.secagg --shapes smollm2 --clients 20 --blocks 2
    python -m simulations.bench.secagg --strategy flexlora --sketch two strategy.residual=carry

Clients of four tiers of ranks have moved at random instead of training, so that everything measured
is the sum: off (updates are sent and averaged), simulated, and real, all stages with all clients in
one process. Each case runs in a process of its own, one thread; memory is the peak of that process
above what it had before the round, clients included. A client's seconds are the mean of its own
work over all stages.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from flwr.app import RecordDict

from fedlora.core.types import Client, Update
from fedlora.engine import secure
from fedlora.population.ranks import RankDistribution
from fedlora.secagg.codec import decode_request, encode_answers
from fedlora.secagg.config import NONE, REAL, SIMULATED, SKETCHES, SecAgg
from fedlora.secagg.summed import Summed
from fedlora.server.byte_account import ByteAccount
from fedlora.server.method import ClientChannel
from fedlora.server.postprocess import Moment
from fedlora.server.secure_round import SecureRound
from fedlora.server.secure_sum import SumPlan, after_sum, simulate
from fedlora.server.training_round import training_jobs
from simulations.bench.aggregation import ALPHA
from simulations.bench.costs.presets import parts_of
from simulations.bench.costs.shapes import Shapes, answered, population, smollm2, tiny

KINDS = ("off", SIMULATED, REAL)
MIB = 2**20


class Direct(ClientChannel):
    """Clients in this process, one node each, without Flower's transport."""

    worker, source, wire = "", "", "float32"

    def __init__(self) -> None:
        self.seconds = 0.0
        self._states: dict[int, RecordDict] = {}

    def say(self, line: str) -> None:
        """Nothing is said."""

    def on_step(self, step: int, steps: int, loss: float) -> None:
        """Nothing is shown."""

    def exchange(
        self, clients: Sequence[Client], action: str, content: Callable[[Sequence[Client]], Any]
    ) -> list[tuple[Sequence[Client], Any]]:
        """Each client's message, and its answer; its work is timed."""
        return [((c,), self._answer(c, content((c,)))) for c in clients]

    def _answer(self, client: Client, content: RecordDict) -> RecordDict:
        began = time.process_time()
        request = decode_request(content)
        state = self._states.setdefault(client.id, RecordDict())
        found = secure.answer(request, content, state, lambda jobs: [answered(j) for j in jobs])
        self.seconds += time.process_time() - began
        return encode_answers(found, nonce=request.nonce, trained=secure.trained(request))


def measure(
    kind: str, shapes: Shapes, strategy: Sequence[str], clients: int, sketch: str
) -> dict[str, Any]:
    """One case: seconds, bytes of a client, MiB.

    Args:
        kind: one of `KINDS`.
        shapes: of the adapted layers.
        strategy: a preset of conf/strategy, and overrides.
        clients: of the round.
        sketch: how products are summed.
    """
    setting = population(shapes, RankDistribution("uniform", alpha=ALPHA), clients)
    parts = parts_of(*strategy)
    method, state = parts.strategy, parts.strategy.init_state(setting)
    jobs = training_jobs(method, state, setting.clients, parts.client, seed=setting.seed, round=1)
    account = ByteAccount.open(method, state, jobs, "float32")
    before = peak()
    found: dict[str, Any] = {"kind": kind, "client_seconds": 0.0}
    updates = [] if kind == REAL else [answered(j) for j in jobs]
    began = time.process_time()
    if kind == "off":
        method.aggregate(state, updates)
        sent = [account.up(u) for u in updates]
    else:
        config = SecAgg(kind=kind, sketch=sketch)
        plan = SumPlan.open(config, method, state, jobs, (), setting.max_ranks, account.starts, "")
        summed, own = _summed(plan, updates)
        now = Moment(setting.seed, 1)
        after_sum(method, state, summed, now, (), "")
        found["client_seconds"] = own / clients
        sent = [sum(t.up.values()) for t in summed.traffic.values()]
    spent = time.process_time() - began
    return found | {
        "server_seconds": spent - clients * found["client_seconds"],
        "up_bytes": sum(sent) / clients,
        "peak_mib": (peak() - before) / MIB,
    }


def _summed(plan: SumPlan, updates: Sequence[Update]) -> tuple[Summed, float]:
    """The sum, and the seconds of all clients' own work.

    Args:
        plan: of the round.
        updates: of the simulation; none: clients answer messages.
    """
    if updates:
        return simulate(plan, updates), 0.0
    channel = Direct()
    summed = SecureRound(plan, channel, None).run().summed
    assert summed is not None
    return summed, channel.seconds


def peak() -> int:
    """The most memory that this process has had so far, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line for each case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--shapes", default="tiny", choices=("tiny", "smollm2"))
    parser.add_argument("--blocks", type=int, default=30, help="of SmolLM2's 30")
    parser.add_argument("--clients", type=int, default=80)
    parser.add_argument("--strategy", default="ffa", help="a preset of conf/strategy")
    parser.add_argument("--sketch", default=NONE, choices=SKETCHES)
    parser.add_argument("overrides", nargs="*", help="of the preset")
    parser.add_argument("--kind", default="", choices=("", *KINDS), help="one case, as JSON")
    given = parser.parse_args(arguments)
    if given.kind:
        torch.set_num_threads(1)
        shapes = tiny() if given.shapes == "tiny" else smollm2(given.blocks)
        strategy = [given.strategy, *given.overrides]
        case = measure(given.kind, shapes, strategy, given.clients, given.sketch)
        print(json.dumps(case))
        return 0
    words = list(sys.argv[1:] if arguments is None else arguments)
    print(f"{given.strategy} on {given.shapes}, {given.clients} clients")
    for kind in KINDS:
        command = [sys.executable, "-m", "simulations.bench.secagg", "--kind", kind, *words]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        row = json.loads(text.splitlines()[-1])
        print(
            f"{kind:10s} server {row['server_seconds']:7.2f} s   client "
            f"{row['client_seconds']:7.4f} s   up {row['up_bytes']:12,.0f} bytes a client   "
            f"peak {row['peak_mib']:7.0f} MiB",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
