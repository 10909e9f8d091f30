"""What a mounted model does on held-out examples: likelihoods, greedy texts, and their metrics.

One forward pass gives the likelihood of every true token; where the plan says so, greedy generation
after each prompt gives texts. Both together are the `Outputs` that the plan's scorers
(`fedlora.evaluation.scorers`) turn into metrics.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from fedlora.core.metric import Metric, Outputs, count
from fedlora.core.types import EvaluatePlan
from fedlora.data.batches import (
    TokenExample,
    first_target,
    subset,
    supervised_tokens,
)
from fedlora.evaluation.scorers import scorers_of
from fedlora.models.language_model import LanguageModel

Ids = NDArray[Any]


def measure(
    model: LanguageModel,
    examples: Sequence[TokenExample],
    references: Sequence[str] | None,
    plan: EvaluatePlan,
    *,
    seed: int,
    client: int,
) -> dict[str, Metric]:
    """Measure what is mounted on one client's examples.

    With ``plan.max_examples`` a client's part is drawn once from ``(seed, client)``: it is the same
    in every round, so that rounds can be compared.

    Args:
        model: with an adapter mounted without dropout, or bare.
        examples: at least one.
        references: response texts in the order of the examples; needed for generation.
        plan: what to measure.
        seed: of the run.
        client: whose examples.

    Returns:
        As `metrics_of`.
    """
    if plan.generate and model.info.classifies:
        raise ValueError("evaluate.plan.generate=true: a classifier writes no text; use false")
    panel = select_panel(examples, references, plan, seed=seed, client=client)
    guesses = likelihoods(model, panel.examples, plan)
    texts: list[str] = []
    if plan.generate:
        texts = generate(model, prompts(model, panel.examples, plan), plan)
    return metrics_of(outputs_of(model, panel, guesses, texts, plan), plan)


@dataclass(frozen=True)
class Panel:
    """The examples of one client that are measured."""

    examples: list[TokenExample]
    references: list[str]
    """Reference texts of the examples; empty without generation."""


def select_panel(
    examples: Sequence[TokenExample],
    references: Sequence[str] | None,
    plan: EvaluatePlan,
    *,
    seed: int,
    client: int,
) -> Panel:
    """Draw the examples of a client that are measured; the arguments are those of `measure`.

    Raises:
        ValueError: if there is generation and no references.
    """
    if plan.generate and references is None:
        raise ValueError("evaluate.generate needs the reference texts")
    indices = subset(len(examples), plan.max_examples, seed, "evaluate", client)
    texts = [references[i] for i in indices] if plan.generate and references is not None else []
    return Panel([examples[i] for i in indices], texts)


def by_length(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Indices in batches of similar length, longest first, so that memory peaks at once."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return [order[i : i + size] for i in range(0, len(order), size)]


Guess: TypeAlias = tuple[Tensor, Tensor]
"""For every token of an example after BOS: its negative log-likelihood (float64) and the most
likely token in its place, both ``[t - 1]``, on the CPU. For an example with a label: of the label,
both ``[1]``."""


def likelihoods(
    model: LanguageModel, examples: Sequence[TokenExample], plan: EvaluatePlan
) -> list[Guess]:
    """The guesses of each example, in batches of similar length."""
    guesses: dict[int, Guess] = {}
    for rows in by_length([len(e.input_ids) for e in examples], plan.batch_size):
        group = [examples[i] for i in rows]
        guesses |= zip(rows, next_tokens(model, group), strict=True)
    return [guesses[i] for i in range(len(examples))]


def outputs_of(
    model: LanguageModel,
    panel: Panel,
    guesses: Sequence[Guess],
    texts: Sequence[str],
    plan: EvaluatePlan,
) -> Outputs:
    """What scorers read, of one client.

    Args:
        model: whose task, context and tokenizer.
        panel: the client's examples.
        guesses: of each of them.
        texts: generated after each prompt; empty without generation.
        plan: of the evaluation.
    """
    if model.info.classifies:
        return _labelled(model, panel, guesses)
    examples, room = panel.examples, _room(model, plan)
    starts = [first_target(e, "response") - 1 for e in examples]
    return Outputs(
        tokens=[e.input_ids[1:] for e in examples],
        response_at=[min(at, len(nll)) for at, (nll, _) in zip(starts, guesses, strict=True)],
        nll=[nll for nll, _ in guesses],
        best=[best for _, best in guesses],
        decode=lambda ids: _text(model, ids),
        references=panel.references,
        generated=texts,
        truncated=sum(len(_prompt(e)) > room for e in examples) if plan.generate else 0,
    )


def _labelled(model: LanguageModel, panel: Panel, guesses: Sequence[Guess]) -> Outputs:
    """The same of a classifier: an example's one label stands where its tokens would."""
    names = model.info.labels
    return Outputs(
        tokens=[np.array([e.label]) for e in panel.examples],
        response_at=[0] * len(panel.examples),
        nll=[nll for nll, _ in guesses],
        best=[best for _, best in guesses],
        decode=lambda ids: names[int(ids[0])],
        labels=names,
    )


def metrics_of(outputs: Outputs, plan: EvaluatePlan) -> dict[str, Metric]:
    """What the plan's scorers say of one client, behind the counts ``examples`` and (of a language
    model) ``tokens_full``, ``tokens_response`` and, with generation, ``truncated_prompts``.

    Raises:
        ValueError: if two scorers use one name.
    """
    metrics, classifies = {"examples": count(outputs.examples)}, bool(outputs.labels)
    if not classifies:
        metrics["tokens_full"] = count(outputs.tokens_full)
        metrics["tokens_response"] = count(outputs.tokens_response)
    if plan.generate:
        metrics["truncated_prompts"] = count(outputs.truncated)
    for scorer in scorers_of(plan, classifies):
        found: Mapping[str, Metric] = scorer.score(outputs)
        if twice := sorted(metrics.keys() & found.keys()):
            raise ValueError(
                f"evaluate.plan.metrics: {type(scorer).__name__} measures {twice}, which another "
                "metric measures too; give each a name of its own"
            )
        metrics |= found
    return metrics


def next_tokens(model: LanguageModel, examples: Sequence[TokenExample]) -> list[Guess]:
    """The guesses of each example, in one forward pass."""
    batch = model.collate(examples, "full").to(model.device)
    if batch.tokens == 0:
        return guesses_of(torch.zeros(0, 1), batch.targets, examples)
    with torch.no_grad():
        return guesses_of(model.logits(batch), batch.targets, examples)


def guesses_of(logits: Tensor, targets: Tensor, examples: Sequence[TokenExample]) -> list[Guess]:
    """Logits ``[n, classes]`` and targets ``[n]`` of the examples' tokens after BOS, or of their
    labels, as guesses example by example."""
    nll = functional.cross_entropy(logits, targets, reduction="none").double().cpu()
    best = logits.argmax(-1).cpu()
    sizes = [supervised_tokens(e, "full") for e in examples]
    return list(zip(nll.split(sizes), best.split(sizes), strict=True))


def prompts(
    model: LanguageModel, examples: Sequence[TokenExample], plan: EvaluatePlan
) -> list[Ids]:
    """What each example's response is generated after, with room for it in the context."""
    return [trim(ids, _room(model, plan)) for ids in map(_prompt, examples)]


def _prompt(example: TokenExample) -> Ids:
    return example.input_ids[: max(1, example.prompt_tokens)]


def _room(model: LanguageModel, plan: EvaluatePlan) -> int:
    return max(1, model.info.context - plan.max_new_tokens)


def trim(ids: Ids, room: int) -> Ids:
    """A prompt that fits: the first token (BOS) and as much of its end as there is room for."""
    if len(ids) <= room:
        return ids
    return np.concatenate([ids[:1], ids[len(ids) - room + 1 :]])


def generate(model: LanguageModel, prompts: Sequence[Ids], plan: EvaluatePlan) -> list[str]:
    """Greedy continuations as text, up to EOS or ``plan.max_new_tokens``."""
    texts: dict[int, str] = {}
    for rows in by_length([len(p) for p in prompts], plan.batch_size):
        batch = [prompts[i] for i in rows]
        texts |= zip(rows, greedy(model, batch, plan.max_new_tokens), strict=True)
    return [texts[i] for i in range(len(prompts))]


def greedy(model: LanguageModel, prompts: Sequence[Ids], max_new_tokens: int) -> list[str]:
    """The continuation of each prompt, all in one batch."""
    return [_text(model, ids) for ids in _greedy(model, prompts, max_new_tokens)]


def _greedy(model: LanguageModel, prompts: Sequence[Ids], max_new_tokens: int) -> list[Ids]:
    """New token ids of each prompt, without EOS and what follows it."""
    eos = model.tokenizer.eos_token_id
    new = generate_ids(model, prompts, max_new_tokens)[:, max(map(len, prompts)) :].cpu().numpy()
    return [row[: _until(row, eos)] for row in new]


def generate_ids(
    model: LanguageModel,
    prompts: Sequence[Ids],
    max_new_tokens: int,
    processors: Sequence[Any] = (),
    **settings: Any,
) -> Any:
    """Continue prompts with transformers' ``generate``, all in one batch; greedily by default.

    Args:
        model: as mounted.
        prompts: token ids ``[t]`` of each; padded on the left to the longest.
        max_new_tokens: fewer where the context ends.
        processors: transformers' logits processors.
        settings: of its ``GenerationConfig``, in place of these.

    Returns:
        Token ids ``[rows, longest prompt + new]`` with EOS after a row's end, or transformers'
        record if the settings ask for one.
    """
    eos, width = model.tokenizer.eos_token_id, max(len(p) for p in prompts)
    ids = np.full((len(prompts), width), eos, dtype=np.int64)
    mask = np.zeros((len(prompts), width), dtype=np.int64)
    for row, prompt in enumerate(prompts):  # on the left: every row goes on at its right end
        ids[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    network: Any = model.network
    shipped = network.generation_config
    # What a call leaves open, transformers takes from the model: some ship sampling or a repetition
    # penalty as their defaults. A fresh config has neither.
    plain: dict[str, Any] = {
        "do_sample": False,
        "max_new_tokens": min(max_new_tokens, max(1, model.info.context - width)),
        "use_cache": True,
        "eos_token_id": eos,
        "pad_token_id": eos,
    }
    network.generation_config = type(shipped)(**(plain | settings))
    try:
        return network.generate(
            input_ids=torch.from_numpy(ids).to(model.device),
            attention_mask=torch.from_numpy(mask).to(model.device),
            logits_processor=list(processors),
        )
    finally:
        network.generation_config = shipped


def _until(row: Ids, eos: int) -> int:
    ends = np.flatnonzero(row == eos)
    return int(ends[0]) if len(ends) else len(row)


def _text(model: LanguageModel, ids: Ids) -> str:
    return str(model.tokenizer.decode(ids.tolist(), skip_special_tokens=True))
