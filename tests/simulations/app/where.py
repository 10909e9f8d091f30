"""An engine that says where each client ran: process, GPU and Ray node, as metrics."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import ray

from fedlora.core.types import EvaluateJob, Evaluation, Failure, TrainJob, Update
from fedlora.data.store import TokenStore
from fedlora.engine.base import Engine
from fedlora.engine.sequential import Sequential
from fedlora.models.language_model import LanguageModel


@dataclass(frozen=True)
class Where(Sequential):
    """The sequential engine, with an address on every update."""

    def open(self, model: LanguageModel, store: TokenStore) -> Engine:
        return _Located(super().open(model, store))


class _Located:
    def __init__(self, inner: Engine) -> None:
        self._inner = inner

    def train(self, jobs: Sequence[TrainJob]) -> Iterator[Update | Failure]:
        for result in self._inner.train(jobs):
            if isinstance(result, Update):
                result = replace(result, metrics={**result.metrics, **_here()})
            yield result

    def evaluate(self, jobs: Sequence[EvaluateJob]) -> Iterator[Evaluation | Failure]:
        return self._inner.evaluate(jobs)

    def notes(self) -> tuple[str, ...]:
        return self._inner.notes()


def _here() -> dict[str, float]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or "-1"
    (assigned,) = ray.get_gpu_ids() or [-1]
    node = ray.get_runtime_context().get_node_id()
    return {
        "pid": float(os.getpid()),
        "gpu_visible": float(visible),  # raises if Ray shows more than one
        "gpu_assigned": float(assigned),
        "node": float(int(node[:12], 16)),
    }
