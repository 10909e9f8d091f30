"""A metric in one file. ``evaluate.plan.metrics: {length: {_target_: <this file>.ResponseLength}}``
is all that a run needs to measure it."""

from collections.abc import Mapping
from dataclasses import dataclass

from fedlora.core.metric import Metric, Outputs, Scorer


@dataclass(frozen=True)
class ResponseLength(Scorer):
    """Mean tokens of a response in units of ``unit`` tokens, weighted by the response tokens."""

    unit: float = 1.0

    def score(self, outputs: Outputs) -> Mapping[str, Metric]:
        mean = outputs.tokens_response / outputs.examples / self.unit
        return {"response_length": Metric(mean, outputs.tokens_response, interval=True)}
