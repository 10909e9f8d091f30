"""A whole run on a plain pool of processes, without Flower and Ray: the baseline of `runtime`.

python -m simulations.bench.pool OVERRIDES...
"""

import multiprocessing
import pickle
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fedlora.core.types import (
    Failure,
    TrainJob,
    Update,
)
from fedlora.data.store import TokenStore
from fedlora.engine.sequential import Sequential, SequentialEngine
from fedlora.engine.worker import worker
from fedlora.models.language_model import LanguageModel


@dataclass(frozen=True)
class Stamped(Sequential):
    """The sequential engine, which writes down when its first client begins to train."""

    stamp: str = ""
    """File for the time; written once for all workers."""

    def open(self, model: LanguageModel, store: TokenStore) -> "_StampedEngine":
        """The engine behind a stamp."""
        super().open(model, store)  # threads and memory of the process
        return _StampedEngine(model, store, Path(self.stamp))


class _StampedEngine(SequentialEngine):
    def __init__(self, model: LanguageModel, store: TokenStore, stamp: Path) -> None:
        super().__init__(model, store)
        self._stamp = stamp

    def train(self, jobs: Sequence[TrainJob]) -> Iterator[Update | Failure]:
        """As the sequential engine, after the stamp."""
        with suppress(FileExistsError), self._stamp.open("x") as file:
            file.write(repr(time.time()))
        yield from super().train(jobs)


def open_worker(spec: str) -> None:
    """Build model, data and engine when a process of the pool starts."""
    worker(spec)


def train(task: tuple[str, bytes]) -> bytes:
    """Run one cohort on this process's engine."""
    spec, jobs = task
    return pickle.dumps(list(worker(spec).train(pickle.loads(jobs))))


def say(line: str) -> None:
    """One line, at once."""
    print(line, flush=True)


def main(overrides: list[str]) -> None:
    """The rounds of `simulations.run` with the same overrides."""
    # Here, for every process of the pool imports this module.
    from fedlora.core.files import claim
    from simulations.app.compose import load
    from simulations.app.federate import new_session, open_session
    from simulations.app.inputs import prepare_inputs
    from simulations.app.parts import build_parts
    from simulations.app.run_folder import run_folder

    parts = build_parts(load(overrides))
    inputs = prepare_inputs(parts, say)
    spec = inputs.worker.to_json()
    folder = run_folder(parts)
    session = new_session(parts, inputs, folder, say)
    with claim(folder):
        open_session(session, parts, inputs)
        context = multiprocessing.get_context("spawn")
        with context.Pool(session.workers, open_worker, (spec,)) as pool:
            for round in range(1, session.rounds.rounds + 1):
                tasks = [(spec, pickle.dumps(jobs)) for jobs in session.train_cohorts(round)]
                answers = pool.imap_unordered(train, tasks)
                results = [r for a in answers for r in pickle.loads(a)]
                session.finish_training(results, session.state)


if __name__ == "__main__":
    main(sys.argv[1:])
