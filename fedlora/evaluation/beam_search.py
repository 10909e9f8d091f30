"""Beam search with a mounted adapter, as the E2E results of LoRA and SplitLoRA are decoded.

The score of a sequence is ``sum log p / length^penalty``; the end token counts in both, and a
sequence that was not ended within ``max_new_tokens`` competes with those that were. An n-gram may
not come twice among the *generated* tokens. transformers' own rule would ban the prompt's n-grams
too, and the prompt is what a good answer repeats.

The search is transformers' and differs from the official ``gpt2_beam.py`` in what a finished beam
leaves behind: the official one gives up its place, so that the search narrows, and the loop always
runs to the last token. Here the next best candidate takes the place, so that ``beams`` sequences
stay open, and a context is done when its best open sequence, scored at its present length, is no
better than the worst of ``beams`` finished ones. (Both look for ends among the best ``beams``
candidates only.) The official code also renormalises probabilities after banning a token; here the
others keep theirs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, NoRepeatNGramLogitsProcessor

from fedlora.core.checks import at_least
from fedlora.evaluation.metrics import (
    Ids,
    by_length,
    generate_ids,
    trim,
)
from fedlora.models.language_model import LanguageModel


@dataclass(frozen=True)
class Decoding:
    """How to search; the defaults are those of the published E2E results."""

    beams: int = 10
    """1: greedy."""
    length_penalty: float = 0.8
    """0: the most likely sequence; larger favours longer ones."""
    no_repeat: int = 4
    """No n-gram of this size twice in the generated tokens; 0: anything may come again."""
    max_new_tokens: int = 64
    stop_ids: tuple[int, ...] = ()
    """Token ids that end a sequence, besides the tokenizer's EOS."""
    batch_size: int = 8
    """Contexts at a time; each takes ``beams`` rows of the network."""

    def __post_init__(self) -> None:
        at_least("decoding.beams", self.beams, 1)
        at_least("decoding.length_penalty", self.length_penalty, 0)
        at_least("decoding.no_repeat", self.no_repeat, 0)
        at_least("decoding.max_new_tokens", self.max_new_tokens, 1)
        at_least("decoding.batch_size", self.batch_size, 1)
        for token in self.stop_ids:
            at_least("decoding.stop_ids", token, 0)


@dataclass(frozen=True, eq=False)
class Hypothesis:
    """What was generated after one prompt."""

    ids: Ids
    """Without the token that ended it, ``[t]``."""
    text: str
    ended: bool
    """Whether an end token ended it, not ``max_new_tokens``."""
    score: float | None = None
    """The score of the search, if `search` was asked for it."""


def search(
    model: LanguageModel,
    prompts: Sequence[Ids],
    plan: Decoding,
    *,
    scores: bool = False,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> list[Hypothesis]:
    """The best continuation of each prompt. Neither batch size nor the other prompts matter.

    Args:
        model: with an adapter mounted without dropout, or bare.
        prompts: token ids ``[t]``, each at least one; longer ones than the context has room for
            lose tokens after their first, as in `fedlora.evaluation.metrics`.
        plan: how to search.
        scores: whether to keep the scores. transformers then holds the log-probabilities of all
            steps: ``batch_size · beams · vocabulary`` scalars for each token. Not for one beam.
        progress: told how many prompts are done, of how many, after every batch.

    Returns:
        In the order of the prompts.

    Raises:
        ValueError: if scores are wanted of a greedy search.
    """
    if scores and plan.beams == 1:
        raise ValueError("scores are of beam search; decoding.beams=1 is greedy and has none")
    room = max(1, model.info.context - plan.max_new_tokens)
    fitting = [trim(p, room) for p in prompts]
    found: dict[int, Hypothesis] = {}
    for rows in by_length([len(p) for p in fitting], plan.batch_size):
        found |= zip(rows, _batch(model, [fitting[i] for i in rows], plan, scores), strict=True)
        progress(len(found), len(prompts))
    return [found[i] for i in range(len(prompts))]


class NoRepeat(LogitsProcessor):
    """Bans what would repeat an n-gram of the generated tokens; the prompt's may come again."""

    def __init__(self, size: int, prompt: int) -> None:
        self._rule = NoRepeatNGramLogitsProcessor(size)
        self._prompt = prompt

    def __call__(self, input_ids: Any, scores: Any) -> Tensor:
        banned: Tensor = self._rule(input_ids[:, self._prompt :], scores)
        return banned


def _batch(
    model: LanguageModel, prompts: Sequence[Ids], plan: Decoding, scores: bool
) -> list[Hypothesis]:
    width = max(len(p) for p in prompts)
    ends = [int(model.tokenizer.eos_token_id), *plan.stop_ids]
    settings: dict[str, Any] = {"eos_token_id": ends, "return_dict_in_generate": True}
    if plan.beams > 1:
        settings |= {"num_beams": plan.beams, "length_penalty": plan.length_penalty}
        settings |= {"early_stopping": False, "output_scores": scores}
    rules = [NoRepeat(plan.no_repeat, width)] if plan.no_repeat else []
    with torch.no_grad():
        out = generate_ids(model, prompts, plan.max_new_tokens, rules, **settings)
    reached = out.sequences_scores.tolist() if scores else [None] * len(prompts)
    new = out.sequences[:, width:].cpu().numpy()
    return [_hypothesis(model, row, ends, s) for row, s in zip(new, reached, strict=True)]


def _hypothesis(
    model: LanguageModel, row: Ids, ends: Sequence[int], score: float | None
) -> Hypothesis:
    at = np.flatnonzero(np.isin(row, ends))
    ids = row[: at[0]] if len(at) else row
    text = model.tokenizer.decode(ids.tolist(), skip_special_tokens=True)
    return Hypothesis(ids, str(text), bool(len(at)), score)
