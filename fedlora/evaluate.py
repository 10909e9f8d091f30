"""What a mounted model does on held-out examples: losses, generation scores, counts.

    loss_full, loss_response   mean negative log-likelihood per token: after BOS; of the response
    perplexity                 exp(loss_response)
    accuracy                   share of response tokens that are the most likely one
    rouge_l, rouge_l_unicode   ROUGE-L F1 of greedy generation after the prompt (`fedlora.rouge`)
    exact_match                share of generations that equal the reference
    rouge_l_teacher_forced     ROUGE-L of the argmax of every next token, given the true ones before

The last is what the FlexLoRA code reports. Nine tenths of its tokens are prompt, so it tells how
predictable the instructions are; it is never called ROUGE-L here. Responses end with EOS, which
counts as one of their tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from fedlora.batches import TokenExample, collate, first_target, subset
from fedlora.engine.forward import supervised_logits
from fedlora.models.language_model import LanguageModel
from fedlora.rouge import exact_match, rouge_l
from fedlora.types import EvaluatePlan

Ids = NDArray[Any]


def measure(
    model: LanguageModel,
    examples: Sequence[TokenExample],
    references: Sequence[str] | None,
    plan: EvaluatePlan,
    *,
    seed: int,
    client: int,
) -> dict[str, float]:
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
        The metrics above and the counts ``examples``, ``tokens_full``, ``tokens_response`` and
        (with generation) ``truncated_prompts``. A metric of response tokens is absent where no
        response is left after truncation.
    """
    chosen = subset(len(examples), plan.max_examples, seed, "evaluate", client)
    examples = [examples[i] for i in chosen]
    metrics = likelihoods(model, examples, plan)
    if plan.generate:
        if references is None:
            raise ValueError("evaluate.generate needs the reference texts")
        metrics |= generation(model, examples, [references[i] for i in chosen], plan)
    return metrics


def by_length(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Indices in batches of similar length, longest first, so that memory peaks at once."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return [order[i : i + size] for i in range(0, len(order), size)]


@dataclass
class _Sums:
    full: float = 0.0
    response: float = 0.0
    hits: int = 0
    tokens_full: int = 0
    tokens_response: int = 0


def likelihoods(
    model: LanguageModel, examples: Sequence[TokenExample], plan: EvaluatePlan
) -> dict[str, float]:
    """Everything that needs only the true tokens."""
    sums, scores = _Sums(), []
    for rows in by_length([len(e.input_ids) for e in examples], plan.batch_size):
        group = [examples[i] for i in rows]
        nll, best = next_tokens(model, group)
        sizes = [max(0, len(e.input_ids) - 1) for e in group]
        for e, loss, guess in zip(group, nll.split(sizes), best.split(sizes), strict=True):
            _add(sums, e, loss, guess)
            if plan.teacher_forced_rouge:
                texts = (_text(model, e.input_ids[1:]), _text(model, guess.numpy()))
                scores.append(rouge_l(*texts))
    metrics = {
        "examples": float(len(examples)),
        "tokens_full": float(sums.tokens_full),
        "tokens_response": float(sums.tokens_response),
    }
    if sums.tokens_full:
        metrics["loss_full"] = sums.full / sums.tokens_full
    if sums.tokens_response:
        loss = sums.response / sums.tokens_response
        accuracy = sums.hits / sums.tokens_response
        metrics |= {"loss_response": loss, "perplexity": perplexity(loss), "accuracy": accuracy}
    if plan.teacher_forced_rouge:
        metrics["rouge_l_teacher_forced"] = math.fsum(scores) / len(scores)
    return metrics


def _add(sums: _Sums, example: TokenExample, loss: Tensor, guess: Tensor) -> None:
    at = min(first_target(example, "response") - 1, len(loss))
    true = torch.from_numpy(example.input_ids[1:].astype(np.int64))
    sums.full += float(loss.sum())
    sums.response += float(loss[at:].sum())
    sums.hits += int((guess[at:] == true[at:]).sum())
    sums.tokens_full += len(loss)
    sums.tokens_response += len(loss) - at


def next_tokens(model: LanguageModel, examples: Sequence[TokenExample]) -> tuple[Tensor, Tensor]:
    """Of every token after BOS, example after example: its negative log-likelihood (float64) and
    the most likely token in its place. Both ``[Σ(t - 1)]``, on the CPU."""
    batch = collate(examples, "full").to(model.device)
    if batch.tokens == 0:
        return torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.int64)
    with torch.no_grad():
        logits = supervised_logits(model.network, batch)
        nll = functional.cross_entropy(logits, batch.targets, reduction="none")
        return nll.double().cpu(), logits.argmax(-1).cpu()


def perplexity(loss: float) -> float:
    """``exp(loss)``, infinite where a float ends."""
    return math.exp(loss) if loss < 709 else math.inf


def generation(
    model: LanguageModel,
    examples: Sequence[TokenExample],
    references: Sequence[str],
    plan: EvaluatePlan,
) -> dict[str, float]:
    """Scores of what the model writes after each prompt."""
    room = max(1, model.info.context - plan.max_new_tokens)
    whole = [e.input_ids[: max(1, e.prompt_tokens)] for e in examples]
    prompts = [trimmed(ids, room) for ids in whole]
    texts = generate(model, prompts, plan)
    scored = list(zip(references, texts, strict=True))
    n = len(scored)
    return {
        "rouge_l": math.fsum(rouge_l(r, t) for r, t in scored) / n,
        "rouge_l_unicode": math.fsum(rouge_l(r, t, unicode=True) for r, t in scored) / n,
        "exact_match": math.fsum(exact_match(r, t) for r, t in scored) / n,
        "truncated_prompts": float(sum(len(ids) > room for ids in whole)),
    }


def trimmed(ids: Ids, room: int) -> Ids:
    """A prompt that fits: the first token (BOS) and as much of its end as there is room for."""
    if len(ids) <= room:
        return ids
    return np.concatenate([ids[:1], ids[len(ids) - room + 1 :]])


def generate(model: LanguageModel, prompts: Sequence[Ids], plan: EvaluatePlan) -> list[str]:
    """Greedy continuations as text, up to EOS or ``plan.max_new_tokens``."""
    texts = [""] * len(prompts)
    for rows in by_length([len(p) for p in prompts], plan.batch_size):
        new = _greedy(model, [prompts[i] for i in rows], plan.max_new_tokens)
        for i, ids in zip(rows, new, strict=True):
            texts[i] = _text(model, ids)
    return texts


def _greedy(model: LanguageModel, prompts: Sequence[Ids], max_new_tokens: int) -> list[Ids]:
    """New token ids of each prompt, without EOS and what follows it."""
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
    network.generation_config = type(shipped)(
        do_sample=False,
        max_new_tokens=min(max_new_tokens, max(1, model.info.context - width)),
        use_cache=True,
        eos_token_id=eos,
        pad_token_id=eos,
    )
    try:
        out = network.generate(
            input_ids=torch.from_numpy(ids).to(model.device),
            attention_mask=torch.from_numpy(mask).to(model.device),
        )
    finally:
        network.generation_config = shipped
    new = out[:, width:].cpu().numpy()
    return [row[: _until(row, eos)] for row in new]


def _until(row: Ids, eos: int) -> int:
    ends = np.flatnonzero(row == eos)
    return int(ends[0]) if len(ends) else len(row)


def _text(model: LanguageModel, ids: Ids) -> str:
    return str(model.tokenizer.decode(ids.tolist(), skip_special_tokens=True))
