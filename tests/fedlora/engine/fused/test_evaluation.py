"""Fused evaluation gives every client the sequential engine's metrics, texts included."""

import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedlora.core.types import EvaluateJob, EvaluatePlan, Evaluation
from fedlora.engine.fused import Fused, evaluation
from fedlora.engine.sequential import Sequential
from fedlora.evaluation import metrics as evaluate
from fedlora.evaluation.scorers import DEFAULT, TeacherForcedRouge
from fedlora.techniques.lora.payload import LowRankPayload
from fedlora.techniques.sparse.payload import SparseDelta
from tests.fedlora.engine.world import EOS, NETWORKS, FakeStore, client, example, examples, model
from tests.fedlora.models.networks import VOCABULARY, adapter

PLAN = EvaluatePlan(max_new_tokens=5, batch_size=3)
TEACHER_FORCED = (*DEFAULT, TeacherForcedRouge())
FUSED = Fused(tokens=64)
CLIENTS = 6


@pytest.fixture(scope="module", params=NETWORKS)
def resident(request):
    return model(request.param)


@pytest.fixture(scope="module")
def store():
    """Clients with unequal numbers of examples of unequal lengths."""
    held = {k: examples(2 + k, seed=k, longest=8 + 4 * k) for k in range(CLIENTS)}
    texts = {k: [f"w{i % 5} w{k} w7" for i in range(len(held[k]))] for k in held}
    return FakeStore(held, texts)


def adapters(on, ranks=(1, 4, 2, 3, 4, 2)):
    """Strong ones, under which clients write different texts, with scales of their own."""
    return [adapter(on.info.modules, r, seed=k, alpha=8.0 + 5 * k) for k, r in enumerate(ranks)]


def jobs(payloads, plan=PLAN):
    plans = plan if isinstance(plan, list) else [plan] * len(payloads)
    return [
        EvaluateJob(3, 1, client(a, k), a, p)
        for k, (a, p) in enumerate(zip(payloads, plans, strict=True))
    ]


def by_client(results):
    found = {}
    for r in results:
        assert r.client.id not in found, "one result per job"
        found[r.client.id] = r.scalars if isinstance(r, Evaluation) else (r.kind, r.message)
    return found


def same(resident, store, todo, spec=FUSED):
    """Both engines' results, which must be equal."""
    wanted = by_client(Sequential().open(resident, store).evaluate(todo))
    engine = spec.open(resident, store)
    found = by_client(engine.evaluate(todo))
    assert found.keys() == wanted.keys() == {j.client.id for j in todo}
    for k, metrics in wanted.items():
        if isinstance(metrics, tuple):
            assert found[k][0] == metrics[0], "the same kind of failure"
        else:
            assert found[k] == pytest.approx(metrics, rel=1e-12, abs=1e-12)
    assert all(layer.update is None for layer in resident.layers.values())
    return found, engine.notes()


@pytest.mark.parametrize("layout", ["ragged", "padded"])
@pytest.mark.parametrize("tokens", [1, 64, 4096])
def test_adapters_of_many_ranks(resident, store, layout, tokens):
    spec = Fused(tokens=tokens, layout=layout)
    found, _ = same(resident, store, jobs(adapters(resident)), spec)
    assert len({m["loss_full"] for m in found.values()}) == CLIENTS


def test_one_adapter_for_all(resident, store):
    (shared,) = adapters(resident, (3,))
    same(resident, store, jobs([shared] * CLIENTS))


def test_the_bare_base_beside_adapters(resident, store):
    mixed = adapters(resident)
    mixed[1] = mixed[4] = None
    found, _ = same(resident, store, jobs(mixed))
    alone, _ = same(resident, store, jobs([None] * CLIENTS))
    assert found[4] == pytest.approx(alone[4], rel=1e-12)


def test_an_adapter_of_some_modules(resident, store):
    some = [
        LowRankPayload(dict(list(a.items())[k : k + 3])) for k, a in enumerate(adapters(resident))
    ]
    same(resident, store, jobs(some))


def test_more_adapters_and_prompts_than_fit_at_once(resident, store, monkeypatch):
    todo = jobs(adapters(resident))
    whole, _ = same(resident, store, todo)
    monkeypatch.setattr(evaluation, "ADAPTERS", 4)
    monkeypatch.setattr(evaluation, "ROWS", 3)
    parts, _ = same(resident, store, todo)
    for k in whole:
        assert parts[k] == pytest.approx(whole[k], rel=1e-12)


def test_plans_may_differ_between_clients(resident, store):
    plans = [
        PLAN,
        replace(PLAN, max_new_tokens=1),
        replace(PLAN, generate=False),
        replace(PLAN, max_new_tokens=9, max_examples=2),
        replace(PLAN, metrics=TEACHER_FORCED),
        replace(PLAN, metrics=TEACHER_FORCED, generate=False, batch_size=1),
    ]
    found, _ = same(resident, store, jobs(adapters(resident), plans))
    assert "rouge_l" not in found[2]
    assert "rouge_l_teacher_forced" in found[5]
    assert found[3]["examples"] == 2


def written(spec, resident, store, todo, monkeypatch):
    """``(prompt, text)`` of everything that is generated, and in how many batches."""
    batches = []
    plain = evaluate.greedy

    def listen(model, prompts, longest):
        texts = plain(model, prompts, longest)
        batches.append([(tuple(p.tolist()), t) for p, t in zip(prompts, texts, strict=True)])
        return texts

    with monkeypatch.context() as patched:
        patched.setattr(evaluate, "greedy", listen)
        list(spec.open(resident, store).evaluate(todo))
    return [pair for batch in batches for pair in batch], len(batches)


def test_texts_are_those_of_each_client_alone(resident, store, monkeypatch):
    """Beside clients that write something else, and in rows that end where others go on."""
    todo = jobs(adapters(resident), replace(PLAN, max_new_tokens=12))
    endless, _ = written(FUSED, resident, store, todo, monkeypatch)
    texts = [text.split() for _, text in endless]
    words = sorted({word for text in texts for word in text})
    ends = {w: {t.index(w) if w in t else len(t) for t in texts} for w in words}
    before = resident.tokenizer.eos_token
    resident.tokenizer.eos_token = max(words, key=lambda w: len(ends[w]))
    try:
        together, batches = written(FUSED, resident, store, todo, monkeypatch)
        alone, _ = written(Sequential(), resident, store, todo, monkeypatch)
    finally:
        resident.tokenizer.eos_token = before
    assert Counter(together) == Counter(alone)
    assert batches == 1
    assert len({len(t.split()) for _, t in together}) > 2
    assert len({t for _, t in together}) > CLIENTS


def crowd(seed):
    """Examples whose prompts all but fill the context."""
    rng = np.random.default_rng(seed)
    lengths = (31, 32, 5, 30)
    return [example([1, *rng.integers(1, VOCABULARY, n - 1).tolist()], n - 1) for n in lengths]


@pytest.mark.parametrize("new", [4, 31, 32, 50])
def test_prompts_near_the_context(resident, new):
    held = {k: crowd(k) for k in range(3)}
    crowded = FakeStore(held, {k: ["w1"] * 4 for k in held})
    plan = replace(PLAN, max_new_tokens=new)
    found, _ = same(resident, crowded, jobs(adapters(resident, (2, 1, 3)), plan))
    assert found[0]["truncated_prompts"] >= 2


def test_examples_with_nothing_after_bos_or_no_response(resident):
    held = {
        0: [example([1]), example([1, 5, EOS])],
        1: [example([1]), example([1])],
        2: [example([1, 4, 9], prompt_tokens=3)],
        3: [example([1, EOS])],
    }
    odd = FakeStore(held, {k: ["w1"] * len(v) for k, v in held.items()})
    found, _ = same(resident, odd, jobs(adapters(resident, (2, 1, 3, 2))))
    assert "loss_full" not in found[1]
    assert "loss_response" not in found[2]


def test_a_client_without_examples_fails_alone(resident, store):
    empty = FakeStore({**store.held, 2: []}, {**store.texts, 2: []})
    found, _ = same(resident, empty, jobs(adapters(resident)))
    assert found[2] == ("ValueError", "client 2 has no examples in split 'test'")
    assert sum(isinstance(m, tuple) for m in found.values()) == 1


def test_adapters_that_do_not_fit_fail_alone(resident, store):
    payloads = adapters(resident)
    path, factors = next(iter(payloads[3].items()))
    payloads[3] = LowRankPayload({"nowhere": factors})
    payloads[5] = LowRankPayload({path: replace(factors, a=factors.a[:, :-1])})
    found, _ = same(resident, store, jobs(payloads))
    assert "nowhere" in found[3][1]
    assert path in found[5][1]


def test_sparse_updates_go_to_the_sequential_engine(resident, store):
    payloads = adapters(resident)
    values = {m.path: torch.full((m.d_out * m.d_in,), 0.02) for m in resident.info.modules}
    payloads[1] = SparseDelta(3, 1.0, values)
    found, _ = same(resident, store, jobs(payloads))
    assert found[1]["loss_full"] > 0


def test_a_token_that_the_model_lacks_is_one_clients_failure(resident, store):
    spoiled = FakeStore(
        {**store.held, 4: [example([1, VOCABULARY + 7, 3])]}, {**store.texts, 4: ["w1"]}
    )
    found, notes = same(resident, spoiled, jobs(adapters(resident)))
    kind, message = found[4]
    assert kind == "IndexError" and f"client 4 holds token {VOCABULARY + 7}" in message
    assert sum(isinstance(m, tuple) for m in found.values()) == 1
    assert not any("one by one" in n for n in notes), "nobody else is held up"


def test_a_failure_in_the_middle_is_made_good_one_by_one(resident, store, monkeypatch):
    engine = FUSED.open(resident, store)
    calls = itertools.count()
    plain = engine.fused.logits

    def fail_later(batch):
        if next(calls) == 2:
            raise MemoryError("the third forward pass")
        return plain(batch)

    monkeypatch.setattr(engine.fused, "logits", fail_later)
    todo = jobs(adapters(resident))
    found = by_client(engine.evaluate(todo))
    wanted = by_client(Sequential().open(resident, store).evaluate(todo))
    assert found.keys() == wanted.keys()
    for k in wanted:
        assert found[k] == pytest.approx(wanted[k], rel=1e-12)
    assert all(layer.update is None for layer in resident.layers.values())


def test_references_are_read_for_generation_alone(resident, store):
    mute = FakeStore(store.held)
    plan = replace(PLAN, generate=False)
    same(resident, mute, jobs(adapters(resident), plan))
    found, _ = same(resident, mute, jobs(adapters(resident), [PLAN] + [plan] * (CLIENTS - 1)))
    assert found[0][0] == "KeyError"


def test_with_recomputation_texts_are_the_same(resident, store):
    same(resident, store, jobs(adapters(resident)), Fused(tokens=64, checkpoint=True))


def test_no_jobs_no_results(resident, store):
    assert list(FUSED.open(resident, store).evaluate([])) == []


def test_not_a_number_is_one_clients_own(resident, store):
    payloads = adapters(resident)
    path, factors = next(iter(payloads[2].items()))
    payloads[2] = LowRankPayload({**payloads[2], path: replace(factors, b=factors.b * torch.nan)})
    plan = replace(PLAN, generate=False)
    wanted = by_client(Sequential().open(resident, store).evaluate(jobs(payloads, plan)))
    found = by_client(FUSED.open(resident, store).evaluate(jobs(payloads, plan)))
    for k in wanted:
        assert found[k] == pytest.approx(wanted[k], rel=1e-12, nan_ok=True)
    assert np.isnan(found[2]["loss_full"])
    assert not np.isnan(found[1]["loss_full"])
