"""Evaluation, configuration, notes and choices of the fused engine."""

import pytest
import torch

from fedlora.core.seeding import mask_noise
from fedlora.core.types import (
    EvaluateJob,
    EvaluatePlan,
    Evaluation,
    Factors,
)
from fedlora.engine.fused import Auto, Fused
from fedlora.engine.fused.cost import CostModel
from fedlora.evaluation import metrics as evaluate
from fedlora.techniques.lora.payload import LowRankPayload
from fedlora.techniques.sparse.payload import SparseDelta
from tests.fedlora.engine.fused.harness import (
    PLAN,
    alone,
    assert_equal,
    by_client,
    engine,
    resident,
)
from tests.fedlora.engine.world import (
    SEED,
    FakeStore,
    client,
    distance,
    examples,
    job,
    model,
    start,
    vector,
)

# --- evaluation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("on", ["llama", "gpt2"])
def test_texts_do_not_depend_on_how_activations_are_kept(on, monkeypatch):
    """Blocks that are computed again drop the cache of generated keys: evaluation is none."""
    texts, honest = [], evaluate.greedy
    monkeypatch.setattr(evaluate, "greedy", lambda *a: texts.append(honest(*a)) or texts[-1])
    mine = model(on)
    for name, p in mine.network.named_parameters():
        if name.endswith("bias"):  # GPT-2's would make one token the favourite everywhere
            p.data.zero_()
        elif "wte" in name or "wpe" in name:
            p.data.mul_(25)
    store = FakeStore({0: examples(6, 3, 20)}, {0: ["w1 w2 w3"] * 6})
    factors = LowRankPayload(
        {p: Factors(3 * f.a, 3 * f.b, f.alpha) for p, f in start(mine, 2, 9).items()}
    )
    plan = EvaluatePlan(max_new_tokens=6)
    jobs = [EvaluateJob(SEED, 1, client(factors), factors, plan)]
    for checkpoint in (False, True):
        spec = Fused(tokens=99, checkpoint=checkpoint, reuse_memory=False)
        assert isinstance(next(spec.open(mine, store).evaluate(jobs)), Evaluation)
    assert len(set(texts[0])) > 1
    assert texts[0] == texts[1]


# --- configuration, notes, choices ---------------------------------------------------------------


def test_a_budget_below_one_sequence_runs_it_alone_and_says_so():
    store = FakeStore({k: examples(4, k) for k in range(3)})
    jobs = [job(start(resident("llama"), 2, k), PLAN, k) for k in range(3)]
    fused, wanted = engine(store=store, tokens=1), alone(jobs, store)
    updates = by_client(fused.train(jobs))
    assert fused.notes() == (
        "fused, ragged, 1 tokens per step",
        "forward passes larger than a step run alone",
    )
    for k in range(3):
        assert_equal(updates[k], wanted[k])


def test_sparse_updates_are_trained_by_the_sequential_engine_which_is_said():
    on = resident("llama")
    masks = {m.path: mask_noise(5, m.path, m.d_out, m.d_in) < 0.2 for m in on.info.modules}
    delta = SparseDelta(
        5, 0.2, {p: torch.zeros(int(m.sum()), dtype=torch.float64) for p, m in masks.items()}
    )
    store = FakeStore({k: examples(4, k) for k in range(3)})
    jobs = [job(delta, PLAN, 0), job(start(on), PLAN, 1), job(delta, PLAN, 2)]
    fused, wanted = engine(store=store), alone(jobs, store)
    updates = by_client(fused.train(jobs))
    assert "sparse updates one by one" in fused.notes()
    for k in (0, 2):
        assert torch.equal(vector(updates[k].payload), vector(wanted[k].payload))
        assert "fused" not in updates[k].metrics
    assert_equal(updates[1], wanted[1])
    (measured,) = fused.evaluate(
        [EvaluateJob(SEED, 1, client(delta), delta, EvaluatePlan(generate=False))]
    )
    assert isinstance(measured, Evaluation)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("threads", -1),
        ("tokens", -1),
        ("slots", -2),
        ("policy", "fastest"),
        ("layout", "packed"),
        ("memory", 0.0),
        ("memory", 1.5),
    ],
)
def test_impossible_settings_are_refused_by_name(key, value):
    for kind in (Fused, Auto):
        with pytest.raises(ValueError, match=rf"engine\.{key}"):
            kind(**{key: value})


@pytest.mark.parametrize("kind", [Fused, Auto])
def test_a_model_that_cannot_run_ragged_is_padded_with_a_note_or_refused(kind, monkeypatch):
    name = "fedlora.engine.fused.engine.why_not_ragged"
    monkeypatch.setattr(name, lambda model: "Odd has built-in attention")
    with pytest.raises(ValueError, match=r"engine\.layout=ragged: Odd has built-in attention"):
        engine(kind=kind, layout="ragged")
    assert engine(kind=kind).notes() == ("padded, for Odd has built-in attention",)
    assert engine(kind=kind, layout="padded").notes() == ()


def test_checkpointing_that_the_model_cannot_do_is_refused_at_once():
    on = model("llama")
    on.network.supports_gradient_checkpointing = False
    with pytest.raises(ValueError, match=r"engine\.checkpoint=true: LlamaForCausalLM"):
        Fused(tokens=60, checkpoint=True, reuse_memory=False).open(on, FakeStore({}))


@pytest.mark.parametrize(
    ("predicted", "layout", "fuses"),
    [
        (CostModel(1.0, 1e-9, 0.0), "padded", True),  # steps cost, tokens do not
        (CostModel(1e-9, 1.0, 0.0), "padded", False),  # padding costs, steps do not
        (CostModel(1e-9, 1.0, 0.0), "ragged", True),
    ],
)
def test_auto_fuses_where_that_is_predicted_to_be_faster(monkeypatch, predicted, layout, fuses):
    monkeypatch.setattr(CostModel, "of", lambda info, dtype: predicted)
    store = FakeStore({k: examples(4, k, longest=5 + 6 * k) for k in range(4)})
    jobs = [job(start(resident("llama"), 2, k), PLAN, k) for k in range(4)]
    fused = engine(store=store, kind=Auto, layout=layout, tokens=256, slots=0)
    updates, wanted = by_client(fused.train(jobs)), alone(jobs, store)
    assert all(("fused" in u.metrics) == fuses for u in updates.values())
    assert fused.notes() == (
        (f"fused, {layout}, 256 tokens per step",) if fuses else ("sequential",)
    )
    for k in range(4):
        assert distance(updates[k].adapter, wanted[k].adapter) <= 1e-11


def test_what_is_not_configured_is_decided_before_anything_runs(monkeypatch):
    """A server that decides, a worker that opens the answer, and one that decides for itself do
    the same; clocks and free memory do not enter."""
    monkeypatch.setattr("time.perf_counter", None)
    monkeypatch.setattr("time.process_time", None)
    on = resident("llama")
    opened = [Fused(reuse_memory=False).open(on, FakeStore({})) for _ in range(2)]
    told = Fused(reuse_memory=False).settled(on.info, on.network.dtype, on.device)
    opened.append(told.open(on, FakeStore({})))
    assert {e.spec for e in opened} == {told} and told.tokens > 0
    assert told.settled(on.info, on.network.dtype, on.device) == told
    assert Fused(tokens=7).settled(on.info, on.network.dtype, on.device).tokens == 7
