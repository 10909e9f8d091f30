"""Seconds a round for three silos, beside a trivial app that moves the same bytes.

    fedlora bench silos                   0.6 MiB (tiny, rank 16) and 100 MiB (SmolLM2, rank 86)
    fedlora bench silos --quick           0.6 MiB, one round

A SuperLink and three SuperNodes on loopback, over TLS with node authentication. The floor is an app
whose clients send back the array that they are sent: what Flower's processes, polls and transfers
take. Silos train two steps a round on records of their own. Both look for replies every second.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.run.tracking import read_jsonl
from simulations.bench.loopback import Loopback, words_of
from simulations.bench.machine import RESULTS, command, load, machine, over, write
from simulations.tools.keys import write_keys

NAMES = ("alba", "bern", "cusco")
PATIENCE_S = 3600.0
MARK = "SECONDS "
FLOOR_SERVER = f'''
import time
import numpy as np
from flwr.app import Array, ArrayRecord, Message, MessageType, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()


@app.main()
def main(grid, context):
    while len(nodes := list(grid.get_node_ids())) < {len(NAMES)}:
        time.sleep(1.0)
    array = np.zeros(int(context.run_config["bytes"]) // 4, np.float32)
    for _ in range(int(context.run_config["rounds"])):
        began = time.monotonic()
        array += 1.0  # a round's start is new bytes: what is stored already is not sent again
        content = RecordDict({{"arrays": ArrayRecord({{"x": Array(array)}})}})
        waiting = set(grid.push_messages([Message(content, n, MessageType.TRAIN) for n in nodes]))
        while waiting:
            for reply in grid.pull_messages(waiting):
                assert not reply.has_error(), reply.error
                waiting.discard(reply.metadata.reply_to_message_id)
            time.sleep(1.0 if waiting else 0.0)
        print("{MARK}%.3f" % (time.monotonic() - began), flush=True)
'''
FLOOR_CLIENT = """
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message, context):
    array = message.content["arrays"]["x"].numpy() + context.node_id % 7
    content = RecordDict({"arrays": ArrayRecord({"x": Array(array)})})
    return Message(content, reply_to=message)
"""
FLOOR_PROJECT = """
[project]
name = "floor"
version = "0.1.0"
dependencies = []

[tool.flwr.app]
publisher = "bench"

[tool.flwr.app.components]
serverapp = "server_app:app"
clientapp = "client_app:app"

[tool.flwr.app.config]
bytes = 0
rounds = 1
"""


@dataclass(frozen=True)
class Case:
    """One size of adapter."""

    name: str
    model: str
    """Choice of conf/model."""
    rank: int


CASES = (Case("0.6 MiB", "tiny", 16), Case("100 MiB", "smollm2", 86))


def main(words: Sequence[str] | None = None) -> int:
    """The benchmark; its exit code."""
    parser = argparse.ArgumentParser("fedlora bench silos", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=4, help="the first is left out of means")
    parser.add_argument("--quick", action="store_true", help="0.6 MiB and one round, not recorded")
    parser.add_argument("--out", type=Path, default=RESULTS / f"silos-{machine()}.json")
    given = parser.parse_args(words)
    cases, rounds = (CASES[:1], 1) if given.quick else (CASES, given.rounds)
    before, found = load(), []
    for case in cases:
        row = measured(case, rounds)
        found.append(row)
        print(
            f"{case.name}: {over(row['silos_s'], 1)} s a round ({row['bytes'] / 2**20:.2f} MiB "
            f"each way), floor {over(row['floor_s'], 1)} s, a client's process "
            f"{over(row['process_s'], 1)} s",
            flush=True,
        )
    record = {"command": command("silos"), "load": [before, load()], "cases": found}
    if not given.quick:
        write(given.out, record)
        print(given.out)
    return 0


def measured(case: Case, rounds: int) -> dict[str, Any]:
    """Seconds of each round, of silos and of the floor, without the first of several."""
    with tempfile.TemporaryDirectory(prefix="fedlora-silos-") as place:
        folder = Path(place)
        write_keys(folder / "keys", ["127.0.0.1"], NAMES)
        with deployed(folder, case) as silos:
            overrides = [
                *("experiment=silos", f"model={case.model}", f"rounds={rounds}"),
                *("runtime.silos=3", "evaluate=none", "client.steps=2", "client.batch_size=1"),
                *("data.max_length=64", "report=false", f"output_dir={folder}/out", "name=bench"),
            ]
            completed(silos, words_of(overrides))
            metrics = read_jsonl(folder / "out/bench/metrics.jsonl")
            clients = read_jsonl(folder / "out/bench/clients.jsonl")
            size = max(int(row["bytes_up"]) for row in clients)
            silos.app = folder / "floor"
            log = completed(silos, f"bytes={size} rounds={rounds}")
    floor = [float(s.removeprefix(MARK)) for s in log.splitlines() if s.startswith(MARK)]
    seconds = [float(r["round/seconds"]) for r in metrics if r["kind"] == "round"]
    first = 1 if rounds > 1 else 0
    return {
        "adapter": case.name,
        "model": case.model,
        "rank": case.rank,
        "bytes": size,
        "silos_s": seconds[first:],
        "floor_s": floor[first:],
        "process_s": [float(r["process_seconds"]) for r in clients if r["round"] > first],
        "over_floor": statistics.median(seconds[first:]) / statistics.median(floor[first:]),
    }


@contextmanager
def deployed(folder: Path, case: Case) -> Iterator[Loopback]:
    """Three silos with records, cards and keys, and the app of the floor in ``floor/``."""
    app = folder / "floor"
    app.mkdir()
    for name, text in (
        ("server_app.py", FLOOR_SERVER),
        ("client_app.py", FLOOR_CLIENT),
        ("pyproject.toml", FLOOR_PROJECT),
    ):
        (app / name).write_text(text)
    with Loopback(folder, keys=folder / "keys") as silos:
        for name in NAMES:
            rows: list[Mapping[str, str]] = [
                {"instruction": f"Count, {name}: {i}", "output": "one two three"} for i in range(12)
            ]
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
            card = folder / f"{name}.yaml"
            card.write_text(
                f"name: {name}\nrecords: {name}.jsonl\nrank: {case.rank}\ndevice: cpu\n"
            )
            silos.register(name)
            silos.start_node(name, card)
        yield silos


def completed(silos: Loopback, config: str) -> str:
    """The log of a run.

    Raises:
        RuntimeError: with its end, if the run did not complete.
    """
    run = silos.submit(config)
    status, log = silos.wait(run, PATIENCE_S), silos.log(run)
    if status != "finished:completed":
        raise RuntimeError(f"the run is {status}: {log[-3000:]}")
    return log


if __name__ == "__main__":
    sys.exit(main())
