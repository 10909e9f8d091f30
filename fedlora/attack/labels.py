"""Label flipping: attackers train on their own texts with each other's answers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fedlora.attack.base import Attackers, Draw, Tools
from fedlora.data.store import Example


@dataclass(frozen=True)
class Labels(Attackers):
    """The responses of an attacker's records change places at random; of a classifier the labels.
    Training is as it should be."""

    poisons: ClassVar[bool] = True

    def examples(self, held: Sequence[Example], tools: Tools, draw: Draw) -> list[Example]:
        others = [held[int(i)] for i in draw.permutation(len(held))]
        if tools.labels:
            return [
                replace(e, label=o.label, states=None) for e, o in zip(held, others, strict=True)
            ]
        longest = max((len(e.input_ids) for e in held), default=0)
        return [answered(e, o, longest) for e, o in zip(held, others, strict=True)]


def answered(example: Example, other: Example, longest: int) -> Example:
    """A prompt with the last answer of another example, cut to ``longest`` tokens.

    An example whose prompt leaves no room for an answer stays as it is.
    """
    at, answer = example.prompt_tokens, other.input_ids[other.prompt_tokens :]
    answer = answer[: max(0, longest - at)]
    if not len(answer):
        return replace(example, states=None)
    ids: NDArray[np.int32] = np.concatenate([example.input_ids[:at], answer])
    responses = None
    if example.responses is not None:
        last = np.ones(len(answer), dtype=bool)
        responses = np.concatenate([example.responses[:at], last])
    return replace(example, input_ids=ids, responses=responses, states=None)
