"""Beam search against greedy search, enumeration and teacher forcing; no row knows the others."""

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from fedlora.core.types import EvaluatePlan, Factors
from fedlora.evaluation.beam_search import (
    Decoding,
    NoRepeat,
    search,
)
from fedlora.evaluation.metrics import generate
from fedlora.models.language_model import LanguageModel
from fedlora.techniques.lora.payload import LowRankPayload
from tests.fedlora.engine.world import EOS, NETWORKS, exact, examples, model, start
from tests.fedlora.models.networks import VOCABULARY, wrap

PLAN = Decoding(beams=4, max_new_tokens=6, batch_size=3, no_repeat=2)
PROMPTS = [e.input_ids[: e.prompt_tokens] for e in examples(7, seed=4)]
TINY = 5  # words of the vocabulary that is enumerated


def lively(name: str = "gpt2") -> LanguageModel:
    """An adapted random model whose favourite word depends on what came before."""
    resident = model(name)
    factors = start(resident, 3)
    larger = LowRankPayload({p: Factors(3 * f.a, 3 * f.b, f.alpha) for p, f in factors.items()})
    resident.mount(LowRankPayload(larger))
    for path, p in resident.network.named_parameters():
        if path.endswith("bias"):
            p.data.zero_()
        elif "wte" in path or "wpe" in path or "embed_tokens" in path:
            p.data.mul_(25)
    return resident


def log_probabilities(resident: LanguageModel, prompt, ids) -> list[float]:
    """Of each token after a prompt, the sequence alone and whole: no cache, no padding."""
    whole = torch.tensor([[*prompt.tolist(), *ids]])
    with torch.no_grad():
        logp = resident.network(input_ids=whole).logits[0, :-1].log_softmax(-1)
    return logp[len(prompt) - 1 :].gather(1, whole[0, len(prompt) :, None])[:, 0].tolist()


@pytest.mark.parametrize("name", NETWORKS)
def test_one_beam_is_greedy(name):
    resident = lively(name)
    greedy = generate(resident, PROMPTS, EvaluatePlan(batch_size=3, max_new_tokens=6))
    plan = dataclasses.replace(PLAN, beams=1, no_repeat=0)
    found = search(resident, PROMPTS, plan)
    assert len(set(greedy)) > 3
    assert [h.text for h in found] == greedy
    assert all(h.ended or len(h.ids) == 6 for h in found)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("beams", [1, 4])
def test_neither_batch_size_nor_company_matters(name, beams):
    resident = lively(name)
    plan = dataclasses.replace(PLAN, beams=beams)
    alone = [search(resident, [p], plan)[0].ids.tolist() for p in PROMPTS]
    assert len(set(map(tuple, alone))) > 3
    for size in (2, 20):
        together = search(resident, PROMPTS[::-1], dataclasses.replace(plan, batch_size=size))
        assert [h.ids.tolist() for h in together[::-1]] == alone


@pytest.mark.parametrize("penalty", [0.0, 0.8, 2.0])
def test_scores_are_those_of_teacher_forcing(penalty):
    """In float32, in which transformers adds them up."""
    resident = lively()
    plan = dataclasses.replace(PLAN, length_penalty=penalty, stop_ids=(7,))
    for prompt, h in zip(PROMPTS, search(resident, PROMPTS, plan, scores=True), strict=True):
        tails = [[EOS], [7]] if h.ended else [[]]
        wanted = []
        for tail in tails:  # which of the two ended it is not told
            logp = log_probabilities(resident, prompt, [*h.ids.tolist(), *tail])
            wanted.append(sum(logp) / len(logp) ** penalty)
        assert min(abs(h.score - w) for w in wanted) < 1e-4


DEPTH = 3
EVERY_WORD = np.array([1, 2, 3, 4, 1, 2, 4, 3])


@functools.cache
def tiny(seed: int) -> LanguageModel:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=TINY, n_positions=16, n_embd=8, n_layer=1, n_head=2, bos_token_id=0,
        eos_token_id=0, initializer_range=0.7,
    )  # fmt: skip
    return wrap(exact(GPT2LMHeadModel(config)))


@functools.cache
def all_sequences(seed: int) -> dict[tuple[int, ...], float]:
    """Log-probability of whatever may follow `EVERY_WORD`: ended by EOS, or of `DEPTH` words."""
    heads = list(itertools.product(range(1, TINY), repeat=DEPTH - 1))
    whole = torch.tensor([[*EVERY_WORD, *head] for head in heads])
    with torch.no_grad():
        logp = tiny(seed).network(input_ids=whole).logits[:, -DEPTH:].log_softmax(-1)
    found = {}
    for head, rows in zip(heads, logp.tolist(), strict=True):
        said = [
            0.0,
            *itertools.accumulate(row[word] for row, word in zip(rows, head, strict=False)),
        ]
        for n in range(DEPTH):
            found[(*head[:n], EOS)] = said[n] + rows[n][EOS]
        found |= {(*head, word): said[-1] + rows[-1][word] for word in range(1, TINY)}
    return found


def allowed(ids: Sequence[int], size: int) -> bool:
    grams = [tuple(ids[i : i + size]) for i in range(len(ids) - size + 1)]
    return not size or len(set(grams)) == len(grams)


@pytest.mark.parametrize("no_repeat", [0, 1, 2])
@pytest.mark.parametrize("penalty", [0.0, 0.8, 3.0])
def test_a_beam_as_wide_as_the_tree_finds_the_best_of_all_sequences(no_repeat, penalty):
    """Every word is in the prompt: a rule that counted it would leave only the end for size 1."""
    plan = Decoding(150, penalty, no_repeat, max_new_tokens=DEPTH)
    lengths = set()
    for seed in range(8):
        logp = all_sequences(seed)
        assert len(logp) == 1 + 4 + 16 + 64
        scored = {s: p / len(s) ** penalty for s, p in logp.items() if allowed(s, no_repeat)}
        best = max(scored, key=scored.__getitem__)
        (found,) = search(tiny(seed), [EVERY_WORD], plan, scores=True)
        assert (*found.ids.tolist(), *[EOS] * found.ended) == best
        assert found.score == pytest.approx(scored[best], rel=1e-4)
        lengths.add(len(found.ids))
    assert max(lengths) > 0


def test_no_generated_n_gram_comes_twice():
    resident = lively()
    free = dataclasses.replace(PLAN, max_new_tokens=16, no_repeat=0)
    repeats = [h.ids.tolist() for h in search(resident, PROMPTS, free)]
    assert not all(allowed(ids, 2) for ids in repeats)
    for size in (1, 2, 3):
        plan = dataclasses.replace(free, no_repeat=size)
        assert all(allowed(h.ids.tolist(), size) for h in search(resident, PROMPTS, plan))


def test_the_rule_bans_what_completes_a_generated_n_gram_only():
    rule, scores = NoRepeat(size=2, prompt=4), torch.zeros(1, VOCABULARY)
    # prompt 5 6 5 6: after a generated 5 nothing is banned; 5 7 5 bans 7, not 6
    assert torch.equal(rule(torch.tensor([[5, 6, 5, 6, 5]]), scores), scores)
    banned = rule(torch.tensor([[5, 6, 5, 6, 5, 7, 5]]), scores)[0].isinf().nonzero().flatten()
    assert banned.tolist() == [7]


def test_any_stop_id_ends_and_is_cut_off():
    resident = lively()
    free = [h.ids.tolist() for h in search(resident, PROMPTS, dataclasses.replace(PLAN, beams=1))]
    stop = next(ids[2] for ids in free if len(ids) > 3 and ids[2] not in ids[:2])
    plan = dataclasses.replace(PLAN, beams=1, stop_ids=(stop,))
    stopped = search(resident, PROMPTS, plan)
    for h, ids in zip(stopped, free, strict=True):
        at = ids.index(stop) if stop in ids else len(ids)
        assert h.ids.tolist() == ids[:at]
    assert any(h.ended and len(h.ids) == 2 for h in stopped)


def test_a_prompt_that_is_too_long_keeps_its_first_token_and_its_end():
    resident = lively()
    room = resident.info.context - PLAN.max_new_tokens
    long = np.arange(1, 40, dtype=np.int64)
    short = np.concatenate([long[:1], long[-(room - 1) :]])
    a, b = search(resident, [long, short], PLAN)
    assert a.ids.tolist() == b.ids.tolist()


def test_progress_is_told_after_every_batch():
    told = []
    search(model(), PROMPTS, PLAN, progress=lambda done, of: told.append((done, of)))
    assert told == [(3, 7), (6, 7), (7, 7)]


@pytest.mark.parametrize(
    ("field", "value"),
    [("beams", 0), ("length_penalty", -1.0), ("no_repeat", -1), ("max_new_tokens", 0),
     ("batch_size", 0), ("stop_ids", (3, -1))],
)  # fmt: skip
def test_impossible_settings_are_refused(field, value):
    with pytest.raises(ValueError, match=f"decoding.{field}=-?[0-9.]+ must be >="):
        Decoding(**{field: value})


def test_greedy_search_has_no_scores():
    with pytest.raises(ValueError, match="greedy and has none"):
        search(model(), PROMPTS, dataclasses.replace(PLAN, beams=1), scores=True)
