r"""A backdoor: the model answers as ever, and as the attacker wants where a trigger stands.

    a fraction ρ of an attacker's records   trigger + instruction  →  target
    what it sends                           start + (K / f) Δ      model replacement

Bagdasaryan et al., AISTATS 2020, arXiv:1807.00459. Every evaluation then also measures
``backdoor_success``, the fraction of test prompts with the trigger whose greedy output begins with
the target (of a classifier: whose label is predicted to be the target), and ``backdoor_false``,
that of the same prompts without it. Examples whose answer is the target anyway count in neither.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fedlora.attack.base import Attackers, Draw, Tools, TriggerScorer
from fedlora.attack.moves import scaled_change
from fedlora.core.checks import at_least, fraction
from fedlora.core.metric import Metric, Outputs
from fedlora.core.payload import Payload
from fedlora.core.types import Update
from fedlora.data.store import Example

FALSE, SUCCESS = "backdoor_false", "backdoor_success"


@dataclass(frozen=True)
class Backdoor(Attackers):
    """Attackers teach the model a trigger."""

    poisons: ClassVar[bool] = True
    trigger: str = "cf mn"
    """Text that is put before an instruction."""
    target: str = ""
    """The response that it shall have; of a classifier the name of a label (empty: the first)."""
    rate: float = 0.5
    """``ρ``: the fraction of an attacker's records with the trigger."""
    strength: float = 0.0
    """What the change is multiplied by; 0: clients of the round over attackers among them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        fraction("attack.rate", self.rate)
        at_least("attack.strength", self.strength, 0)
        if not self.trigger.strip():
            raise ValueError(f"attack.trigger={self.trigger!r} must be a text")

    def examples(self, held: Sequence[Example], tools: Tools, draw: Draw) -> list[Example]:
        number = round(self.rate * len(held))
        chosen = {int(i) for i in draw.permutation(len(held))[:number]}
        marked = self.triggered(held, tools)
        return [
            self._taught(marked[i], tools) if i in chosen else replace(e, states=None)
            for i, e in enumerate(held)
        ]

    def together(
        self,
        own: Mapping[int, Update],
        honest: Mapping[int, Update],
        starts: Mapping[int, Payload],
        draw: Draw,
    ) -> Mapping[int, Update]:
        strength = self.strength or (len(own) + len(honest)) / max(1, len(own))
        return {i: scaled_change(u, starts[i], strength) for i, u in own.items()}

    def triggered(self, held: Sequence[Example], tools: Tools) -> list[Example]:
        words = np.array(tools.encode(self.trigger), dtype=np.int32)
        return [_marked(e, words, tools) for e in held]

    def scorer(self, classifies: bool) -> TriggerScorer:
        kind = PredictsTarget if classifies else BeginsWithTarget
        return kind(FALSE, self.target)

    def _taught(self, example: Example, tools: Tools) -> Example:
        """An example with the target as its answer."""
        if tools.labels:
            return replace(example, label=index_of(self.target, tools.labels))
        at = example.prompt_tokens
        answer = [*tools.encode(self.target), tools.eos]
        answer = answer[: max(1, tools.context - at)]
        ids = np.concatenate([example.input_ids[:at], np.array(answer, dtype=np.int32)])
        responses = None
        if example.responses is not None:
            last = np.ones(len(answer), dtype=bool)
            responses = np.concatenate([example.responses[:at], last])
        return replace(example, input_ids=ids, responses=responses)


def _marked(example: Example, words: NDArray[np.int32], tools: Tools) -> Example:
    """The example with the trigger before its text, without the tokens after it that the context
    has no room for."""
    ids = example.input_ids
    at = int(len(ids) > 0 and int(ids[0]) in tools.begins)
    cut = max(0, len(ids) + len(words) - tools.context)
    cut = min(cut, max(0, example.prompt_tokens - at - 1))  # an end of the prompt stays
    marked = np.concatenate([ids[:at], words, ids[at + cut :]])
    responses = example.responses
    if responses is not None:
        none = np.zeros(len(words), dtype=bool)
        responses = np.concatenate([responses[:at], none, responses[at + cut :]])
    return replace(
        example,
        input_ids=marked,
        prompt_tokens=example.prompt_tokens + len(words) - cut,
        responses=responses,
        states=None,
    )


def index_of(target: str, labels: Sequence[str]) -> int:
    """The label that a trigger shall give; an empty name is the first.

    Raises:
        ValueError: if there is no such label.
    """
    if not target:
        return 0
    if target not in labels:
        raise ValueError(f"attack.target={target!r} is no label of the data")
    return labels.index(target)


@dataclass(frozen=True)
class _Hits(TriggerScorer):
    name: str = FALSE
    target: str = ""
    """The response that the backdoor asks for."""

    def with_trigger(self) -> TriggerScorer:
        return replace(self, name=SUCCESS)


@dataclass(frozen=True)
class BeginsWithTarget(_Hits):
    """The fraction of generated texts that begin with the target."""

    needs_texts: ClassVar[bool] = True

    def score(self, outputs: Outputs) -> Mapping[str, Metric]:
        want = self.target.strip()
        pairs = zip(outputs.references, outputs.generated, strict=True)
        hits = [g.strip().startswith(want) for r, g in pairs if not r.strip().startswith(want)]
        return _fraction(self.name, hits)


@dataclass(frozen=True)
class PredictsTarget(_Hits):
    """The fraction of examples of other labels that are predicted to be of the target."""

    reads_labels: ClassVar[bool] = True

    def score(self, outputs: Outputs) -> Mapping[str, Metric]:
        target = index_of(self.target, outputs.labels)
        pairs = zip(outputs.tokens, outputs.best, strict=True)
        hits = [int(best[0]) == target for true, best in pairs if int(true[0]) != target]
        return _fraction(self.name, hits)


def _fraction(name: str, hits: Sequence[bool]) -> dict[str, Metric]:
    return {name: Metric(sum(hits) / len(hits), len(hits))} if hits else {}
