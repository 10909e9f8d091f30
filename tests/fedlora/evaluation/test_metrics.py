"""Evaluation against hand-computed likelihoods and one-by-one generation."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from fedlora.core.config import build, describe
from fedlora.core.errors import ConfigError
from fedlora.core.types import EvaluatePlan, Factors
from fedlora.evaluation import metrics as evaluate
from fedlora.evaluation.metrics import Panel, generate, trim
from fedlora.evaluation.rouge import rouge_l
from fedlora.evaluation.scorers import (
    DEFAULT,
    Classification,
    ExactMatch,
    Likelihood,
    TeacherForcedRouge,
)
from fedlora.models.spec import HuggingFace
from fedlora.server.schedule import EvaluationSchedule
from fedlora.techniques.lora.payload import LowRankPayload
from simulations.app.compose import load
from tests.fedlora.engine.world import EOS, NETWORKS, example, examples, model, start
from tests.fedlora.evaluation.toy_metric import ResponseLength
from tests.fedlora.models.networks import VOCABULARY, save_gpt2_tokenizer

TEXT_SCORES = ("rouge_l", "rouge_l_unicode", "exact_match", "truncated_prompts")
PLAN = EvaluatePlan(batch_size=3, max_new_tokens=6)
HELD = examples(8, seed=4)


def ready(name="gpt2", rank=3, size=1.0):
    resident = model(name)
    factors = start(resident, rank)
    larger = LowRankPayload(
        {p: Factors(size * f.a, size * f.b, f.alpha) for p, f in factors.items()}
    )
    resident.mount(LowRankPayload(larger))
    return resident


def measure(*arguments, **named):
    """What is measured, as plain values."""
    return {n: m.scalar for n, m in evaluate.measure(*arguments, **named).items()}


def one_by_one(resident, held):
    """Log-likelihood of each example alone, without padding, from full logits."""
    found = []
    with torch.no_grad():
        for e in held:
            ids = torch.tensor(e.input_ids, dtype=torch.int64)[None]
            logp = resident.network(input_ids=ids).logits[0, :-1].log_softmax(-1)
            found.append((-logp.gather(1, ids[0, 1:, None])[:, 0], logp.argmax(-1)))
    return found


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("batch_size", [1, 3, 20])
def test_losses_equal_those_of_each_example_alone(name, batch_size):
    resident = ready(name)
    plan = EvaluatePlan(generate=False, batch_size=batch_size)
    got = measure(resident, HELD, None, plan, seed=1, client=0)
    full, response, hits = [], [], []
    for e, (nll, best) in zip(HELD, one_by_one(resident, HELD), strict=True):
        full += nll.tolist()
        response += nll[e.prompt_tokens - 1 :].tolist()
        true = torch.tensor(e.input_ids[e.prompt_tokens :], dtype=torch.int64)
        hits += (best[e.prompt_tokens - 1 :] == true).tolist()
    assert got == pytest.approx(
        {
            "examples": len(HELD),
            "tokens_full": sum(len(e.input_ids) - 1 for e in HELD),
            "tokens_response": sum(len(e.input_ids) - e.prompt_tokens for e in HELD),
            "loss_full": np.mean(full),
            "loss_response": np.mean(response),
            "perplexity": math.exp(np.mean(response)),
            "accuracy": np.mean(hits),
        },
        rel=1e-12,
    )


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary():
    resident = model()
    with torch.no_grad():
        resident.network.get_output_embeddings().weight.zero_()
    got = measure(resident, HELD, None, EvaluatePlan(generate=False), seed=1, client=0)
    assert got["perplexity"] == pytest.approx(VOCABULARY, rel=1e-12)
    assert got["loss_full"] == pytest.approx(math.log(VOCABULARY), rel=1e-12)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("batch_size", [2, 5, 20])
def test_batched_generation_equals_one_by_one(name, batch_size):
    """One by one: the whole sequence through the network for every token, no cache, no padding."""
    resident = ready(name, size=3.0)
    for path, p in resident.network.named_parameters():
        if path.endswith("bias"):  # GPT-2's would make one token the favourite everywhere
            p.data.zero_()
        elif "wte" in path or "wpe" in path:
            p.data.mul_(25)
    prompts = [e.input_ids[: e.prompt_tokens] for e in HELD]
    got = generate(resident, prompts, dataclasses.replace(PLAN, batch_size=batch_size))
    assert len(set(got)) > 3
    for prompt, text in zip(prompts, got, strict=True):
        ids = prompt.tolist()
        while len(ids) < len(prompt) + PLAN.max_new_tokens:
            with torch.no_grad():
                logits = resident.network(input_ids=torch.tensor([ids])).logits
            new = int(logits[0, -1].argmax())
            if new == EOS:
                break
            ids.append(new)
        assert text.split() == [f"w{i}" for i in ids[len(prompt) :]]


def test_gpt2_without_a_padding_token_generates_in_batches(tmp_path):
    """Its one special token begins a text, ends it, and pads: only its place says which."""
    torch.manual_seed(0)
    network = GPT2LMHeadModel(
        GPT2Config(vocab_size=300, n_positions=64, n_embd=16, n_layer=2, n_head=2)
    )
    for name, p in network.named_parameters():
        if name.endswith("weight") and p.ndim == 2:
            p.data.mul_(10)
    network.save_pretrained(tmp_path)
    save_gpt2_tokenizer(tmp_path, ["the river and the road"] * 9)
    resident = HuggingFace(path=str(tmp_path)).load(torch.device("cpu"))
    end = resident.tokenizer.eos_token_id
    assert resident.tokenizer.pad_token_id == resident.tokenizer.bos_token_id == end
    texts = ["the", "the river and", "a", "road to the river"]
    prompts = [np.array([end, *ids]) for ids in resident.tokenizer(texts)["input_ids"]]
    together = generate(resident, prompts, PLAN)
    assert together == [generate(resident, [p], PLAN)[0] for p in prompts]
    assert len(set(together)) > 1 and all(together)


def counting(resident):
    """Make the network count: the next token is the last plus one, EOS (0) after 9."""
    table = torch.full((VOCABULARY, VOCABULARY), -50.0, dtype=torch.float64)
    for i in range(VOCABULARY):
        table[i, 0 if i == 9 else (i + 1) % VOCABULARY] = 50.0
    network, seen = resident.network, {}
    network.transformer.wte.register_forward_hook(lambda m, args, out: seen.update(ids=args[0]))
    network.get_output_embeddings().register_forward_hook(lambda m, args, out: out * 0)

    def finish(module, args, kwargs, output):
        ids = seen["ids"]
        if output.logits.ndim == 2:  # positions were selected
            raise AssertionError("this network is for generation")
        output.logits = table[ids[:, -output.logits.shape[1] :]]
        return output

    network.register_forward_hook(finish, with_kwargs=True)
    return resident


def test_generation_scores_by_hand():
    resident = counting(model())
    held = [example([1, 5, 0], 2), example([1, 20, 7, 0], 2), example([1, 2, 8, 0], 3)]
    texts = ["w6 w7 w8 w9", "w21 w30 w40 w23", "w9"]
    plan = EvaluatePlan(batch_size=2, max_new_tokens=4)
    said = generate(resident, evaluate.prompts(resident, held, plan), plan)
    sizes = [len(e.input_ids) - 1 for e in held]
    unread = [(torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=int)) for n in sizes]
    outputs = evaluate.outputs_of(resident, Panel(held, texts), unread, said, plan)
    got = {n: m.scalar for n, m in evaluate.metrics_of(outputs, plan).items()}
    # 5 -> 6 7 8 9 EOS (cut at four); 20 -> 21 22 23 24; 8 -> 9 EOS
    assert {name: got[name] for name in TEXT_SCORES} == {
        "rouge_l": pytest.approx((1 + 2 / 4 + 1) / 3, rel=1e-12),
        "rouge_l_unicode": pytest.approx((1 + 2 / 4 + 1) / 3, rel=1e-12),
        "exact_match": pytest.approx(2 / 3, rel=1e-12),
        "truncated_prompts": 0.0,
    }


def test_a_prompt_may_end_in_the_token_that_ends_responses():
    prompts = [np.array([5, EOS]), np.array([2, 9, 3, EOS])]
    plan = dataclasses.replace(PLAN, max_new_tokens=4)
    assert generate(counting(model()), prompts, plan) == ["w1 w2 w3 w4"] * 2


def test_defaults_that_a_model_ships_do_not_reach_generation():
    resident = ready()
    prompts = [e.input_ids[: e.prompt_tokens] for e in HELD]
    wanted = generate(resident, prompts, PLAN)
    shipped = resident.network.generation_config
    shipped.do_sample, shipped.temperature, shipped.repetition_penalty = True, 3.0, 5.0
    assert generate(resident, prompts, PLAN) == wanted


def test_a_long_prompt_keeps_its_start_token_and_its_end():
    ids = np.arange(10)
    assert trim(ids, 10).tolist() == list(range(10))
    assert trim(ids, 4).tolist() == [0, 7, 8, 9]
    assert trim(ids, 1).tolist() == [0]


def test_prompts_longer_than_the_context_are_counted():
    resident = ready()
    room = resident.info.context - PLAN.max_new_tokens
    held = [
        example([1, *[3] * (room - 1), 5, 0], room),
        example([1, *[3] * room, 0], room + 1),
        example([1, *[3] * (resident.info.context - 1)], resident.info.context),
    ]
    got = measure(resident, held, ["w5", "", "w5"], PLAN, seed=1, client=0)
    assert got["truncated_prompts"] == 2
    assert got["tokens_response"] == 2 + 1 + 0


def test_without_a_response_there_is_no_number_for_it():
    plan = EvaluatePlan(generate=False)
    got = measure(ready(), [example([1, 2, 3], 3)], None, plan, seed=1, client=0)
    assert got["tokens_response"] == 0 and got["tokens_full"] == 2
    assert set(got) == {"examples", "tokens_full", "tokens_response", "loss_full"}


def test_teacher_forced_rouge_shifts_by_one_and_sees_no_padding():
    resident = ready()
    plan = EvaluatePlan(generate=False, metrics=(TeacherForcedRouge(),), batch_size=8)
    got = measure(resident, HELD, None, plan, seed=1, client=0)["rouge_l_teacher_forced"]
    scores = []
    for e, (_, best) in zip(HELD, one_by_one(resident, HELD), strict=True):
        true = [f"w{i}" for i in e.input_ids[1:].tolist() if i != EOS]
        guess = [f"w{i}" for i in best.tolist() if i != EOS]
        scores.append(rouge_l(" ".join(true), " ".join(guess)))
    assert got == pytest.approx(np.mean(scores), rel=1e-12)
    assert 0 < got < 1


def test_the_measured_part_of_a_client_is_the_same_in_every_round():
    plan = EvaluatePlan(generate=False, max_examples=3)
    resident = ready()
    one = measure(resident, HELD, None, plan, seed=1, client=0)
    assert one["examples"] == 3
    assert one == measure(resident, HELD, None, plan, seed=1, client=0)
    assert one["loss_full"] != measure(resident, HELD, None, plan, seed=2, client=0)["loss_full"]
    assert one["loss_full"] != measure(resident, HELD, None, plan, seed=1, client=1)["loss_full"]


def test_references_follow_the_drawn_examples():
    texts = [f"of example {i}" for i in range(len(HELD))]
    plan = dataclasses.replace(PLAN, max_examples=4)
    panel = evaluate.select_panel(HELD, texts, plan, seed=1, client=0)
    drawn = [i for i, e in enumerate(HELD) if any(e is chosen for chosen in panel.examples)]
    assert len(drawn) == 4
    assert drawn != list(range(4))
    assert panel.references == [texts[i] for i in drawn]


def test_generation_without_references_is_refused():
    with pytest.raises(ValueError, match=r"evaluate\.generate needs the reference texts"):
        measure(ready(), HELD, None, PLAN, seed=1, client=0)


def test_evaluation_leaves_no_gradient_and_no_randomness():
    resident = ready()
    before = torch.get_rng_state()
    measure(resident, HELD, ["w1"] * len(HELD), PLAN, seed=1, client=0)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in resident.network.parameters())


@pytest.mark.parametrize(
    "name", ["fast", "full", "test", "paper_code", "loss", "none", "classification"]
)
def test_configured_evaluations_are_valid(name):
    schedule = build(load([f"evaluate={name}"]).evaluate, EvaluationSchedule, "evaluate")
    assert schedule.due(1, 1) == (name != "none")
    usual = (Classification(),) if name == "classification" else DEFAULT
    teacher_forced = (TeacherForcedRouge(),) if name in ("test", "paper_code") else ()
    assert schedule.plan.metrics == usual + teacher_forced
    assert build(describe(schedule.plan), EvaluatePlan, "plan") == schedule.plan


def test_metrics_are_a_list_that_configuration_changes():
    target = "tests.fedlora.evaluation.toy_metric.ResponseLength"
    toy = f"+evaluate.plan.metrics.length={{_target_: {target}, unit: 2}}"
    words = ["evaluate.plan.metrics.rouge=null", toy]
    plan = build(load(words).evaluate, EvaluationSchedule, "evaluate").plan
    assert plan.metrics == (Likelihood(), ExactMatch(), Classification(), ResponseLength(2.0))
    assert measure(ready(), HELD, ["w1"] * len(HELD), plan, seed=1, client=0).keys() == {
        "examples", "tokens_full", "tokens_response", "truncated_prompts", "loss_full",
        "loss_response", "perplexity", "accuracy", "exact_match", "response_length",
    }  # fmt: skip
    bare = dataclasses.replace(plan, metrics=(), generate=False)
    got = measure(ready(), HELD, None, bare, seed=1, client=0)
    assert got.keys() == {"examples", "tokens_full", "tokens_response"}


def test_what_is_no_metric_is_refused():
    wrong = "+evaluate.plan.metrics.x._target_=fedlora.core.types.SelfPrune"
    with pytest.raises(ConfigError, match="SelfPrune"):
        build(load([wrong]).evaluate, EvaluationSchedule, "evaluate")
    with pytest.raises(ValueError, match="str is no metric; it must be a dataclass derived from"):
        EvaluatePlan(metrics=("rouge",))
    plan = EvaluatePlan(generate=False, metrics=(Likelihood(), Likelihood()))
    with pytest.raises(ValueError, match=r"Likelihood measures \['accuracy', .* another metric"):
        measure(ready(), HELD, None, plan, seed=1, client=0)
