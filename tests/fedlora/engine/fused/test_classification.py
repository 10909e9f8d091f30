"""Classification in common forward passes: equal to independent runs, whatever the layout."""

import dataclasses
import functools
import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from fedlora.core.types import EvaluateJob, EvaluatePlan, Failure, LocalPlan
from fedlora.engine.fused import Auto, Fused, batch
from fedlora.engine.fused.bank import AdapterBank, Layout
from fedlora.engine.fused.check import why_not_fused, why_not_ragged
from fedlora.engine.fused.lanes import Lane
from fedlora.engine.fused.model import FusedModel
from fedlora.engine.sequential import Sequential
from fedlora.models import ragged, two_parts
from fedlora.models.classifier import Classifier
from fedlora.models.head import head_parameters, output_parameters
from fedlora.models.headed import WithHead
from fedlora.models.last_block import LastBlock
from fedlora.models.two_parts import RaggedClassifier
from fedlora.training.terms import FedProx
from tests.fedlora.engine.fused.harness import assert_equal, by_client, mixed
from tests.fedlora.engine.fused.test_architectures import state
from tests.fedlora.engine.labelled import factors_of, peft_loop, peft_model
from tests.fedlora.engine.world import SEED, FakeStore, client, distance, job
from tests.fedlora.models.classifiers import CONFIGS, PAD, classifier, examples, network
from tests.fedlora.models.networks import adapter, same
from tests.generators import as_payload
from tests.planted import planted

RAGGED = sorted(CONFIGS.keys() - {"deberta"})
RANKS = (2, mixed, 3, 3, 1)
PLAN = LocalPlan(steps=4, batch_size=3, lr=1e-3, dropout=0.0, weight_decay=0.1, eps=1e-4)
PLANS = (
    PLAN,
    dataclasses.replace(PLAN, dropout=0.3),
    dataclasses.replace(PLAN, dropout=0.1, micro_batch_size=2, schedule="cosine"),
    dataclasses.replace(PLAN, optimizer="sgd", lr=0.1, momentum=0.8, train_a=False, dropout=0.2),
    dataclasses.replace(PLAN, batch_size=1, steps=0, epochs=2, train_b=False),
)
NARROWED = ["bert", "roberta", "distilbert"]
WANTED = {"bert": "first", "modernbert_mean": "mean", "llama": "last", "gpt2": "last"}

resident = functools.cache(classifier)  # an engine leaves it as it found it


def held():
    return {k: examples(9 - k, seed=k, longest=24 - 4 * k) for k in range(len(RANKS))}


def jobs(on, plans=PLANS):
    modules = on.info.modules
    return [
        job(adapter(modules, r, seed=k), p, k)
        for k, (r, p) in enumerate(zip(RANKS, plans, strict=True))
    ]


def trained(family, spec, plans=PLANS):
    on = resident(family)
    engine = spec.open(on, FakeStore(held()))
    return by_client(engine.train(jobs(on, plans))), engine.notes()


@functools.cache
def alone(family):
    return trained(family, Sequential())[0]


def fused(**settings):
    return Fused(**({"tokens": 80, "slots": 3, "reuse_memory": False} | settings))


# --- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["ragged", "padded"])
@pytest.mark.parametrize("family", RAGGED)
def test_clients_are_those_of_the_sequential_engine(family, layout, products):
    """Unequal ranks, lengths, plans and dropout rates; clients wait, come and go."""
    before = state(resident(family).network)
    found, notes = trained(family, fused(layout=layout))
    assert notes[0] == f"fused, {layout}, 80 tokens per step"
    for k, update in alone(family).items():
        assert distance(update.payload, jobs(resident(family))[k].start) > 1e-3
        assert_equal(found[k], update)
    assert state(resident(family).network) == before


@pytest.mark.parametrize("family", RAGGED)
def test_clients_are_those_of_independent_peft_runs(family):
    on, data = resident(family), held()
    starts = [adapter(on.info.modules, 2 + k, seed=k) for k in range(4)]
    tasks = [job(start, PLAN, k) for k, start in enumerate(starts)]
    found = by_client(fused(layout="ragged").open(on, FakeStore(data)).train(tasks))
    for k, start in enumerate(starts):
        theirs = peft_model(network(family), start, on.info.head_modules)
        losses = peft_loop(theirs, data[k], PLAN, round=3, client=k, heads=False)
        wanted = factors_of(theirs, start)
        assert distance(found[k].payload, wanted) <= 1e-12 * distance(wanted, start)
        assert found[k].metrics["loss_last"] == pytest.approx(losses[-1], rel=1e-12)


@pytest.mark.parametrize("family", ["bert", "modernbert_mean", "gpt2"])
def test_recomputed_activations_change_nothing(family):
    found, _ = trained(family, fused(checkpoint=True))
    for k, update in alone(family).items():
        assert_equal(found[k], update)


def test_more_tokens_than_positions_lie_in_one_row():
    found, _ = trained("roberta", fused(tokens=4000, slots=9))
    for k, update in alone("roberta").items():
        assert_equal(found[k], update)


UNCLIPPED = [dataclasses.replace(p, max_grad_norm=0.0) for p in PLANS]
AT_ONCE = fused(tokens=500, slots=9)


@functools.cache
def unclipped(family, products):
    """Of honest clients, by either way to compute their products."""
    on = resident(family)
    return by_client(AT_ONCE.open(on, FakeStore(held())).train(jobs(on, UNCLIPPED)))


@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e6])
@pytest.mark.parametrize("family", ["bert", "modernbert", "modernbert_mean", "gpt2"])
def test_nothing_of_a_client_reaches_another_not_even_a_nan(family, poison, products):
    on, wanted = resident(family), unclipped(family, products)
    tasks = jobs(on, UNCLIPPED)
    start = dict(tasks[1].start)
    path = next(iter(start))
    bad = dataclasses.replace(start[path], a=torch.full_like(start[path].a, poison))
    tasks[1] = job(start | {path: bad}, UNCLIPPED[1], 1)
    results = {r.client.id: r for r in AT_ONCE.open(on, FakeStore(held())).train(tasks)}
    assert isinstance(results[1], Failure) or poison == 1e6
    for k in (0, 2, 3, 4):
        assert same(results[k].adapter, wanted[k].adapter)


def test_a_base_in_half_precision_trains_and_keeps_its_head_exact():
    on = resident("bert")
    half = Classifier(network("bert").bfloat16(), on.tokenizer, on.info)
    assert why_not_ragged(half) == ""
    tasks = [
        job(adapter(on.info.modules, 2, seed=k, dtype=torch.float32), PLAN, k) for k in range(3)
    ]
    wanted = by_client(Sequential().open(half, FakeStore(held())).train(tasks))
    found = by_client(fused().open(half, FakeStore(held())).train(tasks))
    for k, update in wanted.items():
        assert found[k].metrics["loss_first"] == pytest.approx(
            update.metrics["loss_first"], rel=0.05
        )


# --- heads that train ----------------------------------------------------------------------------


def headed(on, k, factors):
    """Clients 1 and 4 train no head; the others have heads of their own."""
    if k in (1, 4):
        return factors
    g = torch.Generator().manual_seed(k)
    head = {n: p.detach() for n, p in head_parameters(on.network).items()}
    noise = {n: torch.randn(t.shape, generator=g, dtype=t.dtype) for n, t in head.items()}
    return WithHead(as_payload(factors), {n: t + 0.1 * noise[n] for n, t in head.items()})


def headed_jobs(on, plans=PLANS):
    return [job(headed(on, j.client.id, j.start), j.plan, j.client.id) for j in jobs(on, plans)]


@functools.cache
def headed_alone(family):
    tasks = headed_jobs(resident(family))
    return by_client(Sequential().open(resident(family), FakeStore(held())).train(tasks))


@pytest.mark.parametrize("layout", ["ragged", "padded"])
@pytest.mark.parametrize("family", RAGGED)
def test_heads_train_as_in_the_sequential_engine(family, layout):
    """Each client's own, beside clients whose head is frozen; factors frozen or not."""
    on, tasks = resident(family), headed_jobs(resident(family))
    before, wanted = state(on.network), headed_alone(family)
    engine = fused(layout=layout).open(on, FakeStore(held()))
    found = by_client(engine.train(tasks))
    assert engine.notes() == (f"fused, {layout}, 80 tokens per step",)
    for k, update in wanted.items():
        assert type(found[k].payload) is type(tasks[k].start)
        assert_equal(found[k], update)
        assert distance(found[k].payload, update.payload) <= 1e-12
        if isinstance(update.payload, WithHead):
            assert distance(update.payload, tasks[k].start) > distance(
                update.payload.update, tasks[k].start.update
            )
    assert state(on.network) == before


@pytest.mark.parametrize("layout", ["ragged", "padded"])
@pytest.mark.parametrize("metric", ["factor", "product"])
@pytest.mark.parametrize("travels", [True, False])
def test_a_proximal_term_with_a_head_is_that_of_the_sequential_engine(travels, metric, layout):
    plans = [dataclasses.replace(p, term=FedProx(2.0, metric)) for p in PLANS]
    tasks = [
        dataclasses.replace(j, start=dataclasses.replace(j.start, travels=travels))
        if j.start.head()
        else j
        for j in headed_jobs(resident("bert"), plans)
    ]
    wanted = by_client(Sequential().open(resident("bert"), FakeStore(held())).train(tasks))
    found = by_client(fused(layout=layout).open(resident("bert"), FakeStore(held())).train(tasks))
    for k, update in wanted.items():
        assert_equal(found[k], update)
        assert distance(found[k].payload, update.payload) <= 1e-12


@pytest.mark.parametrize("spec", [Sequential(), fused()], ids=["sequential", "fused"])
@pytest.mark.parametrize("family", ["bert", "modernbert_mean", "gpt2"])
def test_permuted_labels_train_the_same_factors_and_permuted_heads(family, spec):
    """With the head permuted alike; of clients that lack a class too."""
    order = torch.tensor([3, 0, 4, 1, 2])  # class j of the permuted run is class order[j]
    on, place = resident(family), {int(label): j for j, label in enumerate(order)}
    last = set(output_parameters(on.network))
    examples_of = held() | {0: [e for e in held()[0] if e.label != 2]}

    def run(permute):
        tasks, store = headed_jobs(on), examples_of
        if permute:
            store = {
                k: [dataclasses.replace(e, label=place[e.label]) for e in rows]
                for k, rows in examples_of.items()
            }
            tasks = [
                dataclasses.replace(j, start=j.start.with_head(moved(j.start.head())))
                for j in tasks
                if j.start.head()
            ]
        done = by_client(spec.open(on, FakeStore(store)).train(tasks))
        return {k: u for k, u in done.items() if u.payload.head()}

    def moved(head):
        return {n: t[order] if n in last else t for n, t in head.items()}

    wanted, found = run(permute=False), run(permute=True)
    assert found.keys() == wanted.keys()
    for k, update in wanted.items():
        assert distance(found[k].payload.update, update.payload.update) < 1e-12
        for n, t in moved(update.payload.head()).items():
            torch.testing.assert_close(found[k].payload.head()[n], t, rtol=0, atol=1e-12)
        assert found[k].metrics["loss"] == pytest.approx(update.metrics["loss"], rel=1e-12)


@pytest.mark.parametrize("layout", ["ragged", "padded"])
@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert_mean", "llama"])
def test_heads_are_evaluated_as_in_the_sequential_engine(family, layout):
    on, plan = resident(family), EvaluatePlan(generate=False, batch_size=4)
    tasks = [EvaluateJob(SEED, 1, j.client, j.start, plan) for j in headed_jobs(resident(family))]
    engine = fused(layout=layout).open(on, FakeStore(held()))
    found = {e.client.id: e for e in engine.evaluate(tasks)}
    for one in Sequential().open(on, FakeStore(held())).evaluate(tasks):
        assert found[one.client.id].scalars == pytest.approx(one.scalars, rel=1e-12)


def test_a_local_term_sees_the_head_too():
    on = resident("bert")
    plans = [dataclasses.replace(p, term=FedProx(mu=0.5)) for p in PLANS]
    tasks = headed_jobs(on, plans)
    wanted = by_client(Sequential().open(on, FakeStore(held())).train(tasks))
    found = by_client(fused().open(on, FakeStore(held())).train(tasks))
    for k, update in wanted.items():
        assert distance(found[k].payload, update.payload) <= 1e-12


def test_a_head_that_does_not_fit_fails_its_own_client_alone():
    on, tasks = resident("bert"), headed_jobs(resident("bert"))
    wrong = {n: t[:2] for n, t in tasks[0].start.values.items()}
    tasks[0] = job(tasks[0].start.with_head(wrong), PLAN, 0)
    results = {r.client.id: r for r in fused().open(on, FakeStore(held())).train(tasks)}
    assert isinstance(results[0], Failure) and "the head does not fit" in results[0].message
    assert not any(isinstance(results[k], Failure) for k in (1, 2, 3, 4))


def test_a_head_of_another_client_is_noticed():
    on, tasks = resident("bert"), headed_jobs(resident("bert"))
    wanted = headed_alone("bert")
    with planted(FusedModel._heads, "self._bank.head(x.slot,", "self._bank.head(0,"):
        results = fused(tokens=500).open(on, FakeStore(held())).train(tasks[2:4])
        found = {u.client.id: u for u in results}
    assert distance(found[3].payload, wanted[3].payload) > 1e-6


# --- the last block, for pooled rows alone -------------------------------------------------------


@pytest.mark.parametrize("family", RAGGED)
def test_the_last_block_is_narrowed_where_it_norms_sums(family):
    """Keys and values of all tokens; the rest of the block for the rows that the head reads."""
    on = resident(family)
    last = RaggedClassifier(on).last
    assert (last is not None) == (family in NARROWED)
    if last is not None:
        all_tokens = ("key", "value", "k_lin", "v_lin")
        block = [p for p in on.layers if "layer.1." in p]
        assert last.pooled == {p for p in block if p.split(".")[-1] not in all_tokens}
        assert len(last.pooled) == len(block) - 2


@pytest.mark.parametrize("family", NARROWED)
def test_layers_of_the_last_block_compute_one_row_a_sequence(family):
    on, seen = resident(family), dict[str, int]()
    model = FusedModel(on, is_ragged=True)
    layout = Layout.of({}, on.info.modules)
    lanes = [Lane(k, layout, held()[k], "full", 1) for k in range(3)]
    handles = [
        layer.register_forward_hook(
            lambda _, x, __, p=p: seen.update({p: x[0].numel() // x[0].shape[-1]})
        )
        for p, layer in on.layers.items()
    ]
    with torch.no_grad(), model.mounted(AdapterBank(3, layout.size, torch.float64, on.device)):
        made = model.batch(lanes)
        model.logits(made)
    for handle in handles:
        handle.remove()
    pooled = RaggedClassifier(on).last.pooled
    assert seen == {p: len(made.owners) if p in pooled else made.tokens for p in on.layers}


def lengths_of(kind):
    if kind == "unequal":
        return held()
    of = {"equal": 5, "one token": 1}[kind]
    return {
        k: [
            dataclasses.replace(e, input_ids=np.resize(e.input_ids, of), prompt_tokens=of)
            for e in some
        ]
        for k, some in held().items()
    }


@pytest.mark.parametrize("slots", [3, 9])
@pytest.mark.parametrize("kind", ["unequal", "equal", "one token"])
@pytest.mark.parametrize("family", NARROWED)
def test_pooled_rows_have_the_masks_of_the_sequential_engine(family, kind, slots):
    """Clients of one rank in stacks, which have unequal numbers of pooled rows; other ranks too."""
    on, data = resident(family), lengths_of(kind)
    plan = dataclasses.replace(PLAN, dropout=0.3, batch_size=4)
    ranks = (2, 2, 2, 2, mixed)
    tasks = [job(adapter(on.info.modules, r, seed=k), plan, k) for k, r in enumerate(ranks)]
    wanted = by_client(Sequential().open(on, FakeStore(data)).train(tasks))
    found = by_client(fused(tokens=500, slots=slots).open(on, FakeStore(data)).train(tasks))
    for k, update in wanted.items():
        assert_equal(found[k], update)


@pytest.mark.parametrize("family", NARROWED)
def test_a_whole_last_block_gives_the_same(family, monkeypatch):
    monkeypatch.setattr(two_parts, "find_last_block", lambda *_: None)
    assert RaggedClassifier(resident(family)).last is None
    found, _ = trained(family, fused(layout="ragged"))
    for k, update in alone(family).items():
        assert_equal(found[k], update)


# --- which layout, and what is said --------------------------------------------------------------


@pytest.mark.parametrize("family", RAGGED)
def test_every_family_but_deberta_runs_ragged(family):
    before = state(resident(family).network)
    assert why_not_fused(resident(family)) == why_not_ragged(resident(family)) == ""
    assert state(resident(family).network) == before


@pytest.mark.parametrize("family", WANTED)
def test_the_pooling_is_found_by_trial(family):
    assert RaggedClassifier(resident(family)).pooling == WANTED[family]


@pytest.mark.parametrize("spec", [Fused(), Auto()])
def test_deberta_trains_one_by_one_and_says_why(spec):
    """Its layers of queries and keys are given relative positions too, which are no client's."""
    found, notes = trained("deberta", spec)
    (note,) = notes
    assert note.startswith("one by one, for DebertaV2ForSequenceClassification gives deberta.enc")
    assert note.endswith("more than the tokens")
    for k, update in alone("deberta").items():
        assert distance(found[k].payload, update.payload) == 0
    with pytest.raises(ValueError, match=r"engine.layout=ragged: DebertaV2.*engine=sequential"):
        Fused(layout="ragged").open(resident("deberta"), FakeStore(held()))


def test_deberta_trains_padded_where_no_adapter_sees_positions():
    on = resident("deberta")
    values = tuple(m for m in on.info.modules if m.path.endswith(("value_proj", "dense")))
    info = dataclasses.replace(on.info, modules=values)
    own = Classifier(network("deberta"), on.tokenizer, info)
    tasks = [job(adapter(values, 2, seed=k), PLANS[k], k) for k in range(4)]
    wanted = by_client(Sequential().open(own, FakeStore(held())).train(tasks))
    engine = fused().open(own, FakeStore(held()))
    found = by_client(engine.train(tasks))
    assert engine.notes() == (
        "padded, for DebertaV2ForSequenceClassification has built-in attention",
        "fused, padded, 80 tokens per step",
    )
    for k, update in wanted.items():
        assert_equal(found[k], update, tolerance=1e-9)  # its softmax fills masks in float32


def test_a_head_that_hides_its_pooling_is_trained_padded():
    on = classifier("bert")
    with torch.no_grad():
        on.network.classifier.weight.zero_()
    assert "its head gives the same for the" in why_not_ragged(on)
    engine = fused().open(on, FakeStore(held()))
    by_client(engine.train(jobs(on)))
    assert engine.notes()[1] == "fused, padded, 80 tokens per step"


# --- evaluation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["ragged", "padded"])
@pytest.mark.parametrize("family", RAGGED)
def test_evaluation_is_that_of_the_sequential_engine(family, layout):
    on, plan = resident(family), EvaluatePlan(generate=False, batch_size=4)
    starts = [adapter(on.info.modules, r, seed=k) for k, r in enumerate(RANKS[:4])]
    asked = [EvaluateJob(SEED, 1, client(a, k), a, plan) for k, a in enumerate([*starts, None])]
    wanted = list(Sequential().open(on, FakeStore(held())).evaluate(asked))
    engine = fused(layout=layout).open(on, FakeStore(held()))
    found = {e.client.id: e for e in engine.evaluate(asked)}
    assert not any("one by one" in note for note in engine.notes())
    for one in wanted:
        assert found[one.client.id].scalars == pytest.approx(one.scalars, rel=1e-12)


# --- texts that hold padding tokens --------------------------------------------------------------


@pytest.mark.parametrize("family", ["roberta", "gpt2", "llama", "bert"])
@pytest.mark.parametrize("at", [0, 2, -1])
def test_a_padding_token_within_a_text_is_read_as_the_network_reads_it(family, at):
    on, data = resident(family), held()
    for e in data[0]:
        e.input_ids[at] = PAD
    data[1][0] = dataclasses.replace(data[1][0], input_ids=np.array([PAD, PAD]), prompt_tokens=2)
    tasks = jobs(on)[:2]
    wanted = by_client(Sequential().open(on, FakeStore(data)).train(tasks))
    found = by_client(fused().open(on, FakeStore(data)).train(tasks))
    for k, update in wanted.items():
        assert_equal(found[k], update)


# --- planted faults ------------------------------------------------------------------------------


def off(family, fault, layout="ragged"):
    """How far results are from the right ones, relative to what is tolerated, if the engine was
    opened before the fault: its check would refuse the layout."""
    on = resident(family)
    engine = fused(layout=layout).open(on, FakeStore(held()))
    with fault:
        found = by_client(engine.train(jobs(on)))
    return max(distance(found[k].payload, u.payload) for k, u in alone(family).items()) / 1e-12


FAULTS = {
    "a mean that takes in the next sequence": (
        "modernbert_mean",
        RaggedClassifier._pool,
        "each.repeat_interleave(lengths, output_size=total)",
        "each.repeat_interleave(lengths, output_size=total).roll(1)",
    ),
    "the first token of another sequence": (
        "modernbert",
        RaggedClassifier._pool,
        "hidden[0].index_select(0, rows)",
        "hidden[0].index_select(0, rows.roll(1))",
    ),
    "a pad that attends": (
        "bert",
        ragged._visible,
        "return None if causal or real is None else real[:, None, None]",
        "return None",
    ),
    "a pad within the window that attends": (
        "modernbert_mean",
        ragged._visible,
        "near if real is None else near & (real[:, None, None] | (away == 0))",
        "near",
    ),
    "a window on one side": (
        "modernbert",
        ragged._visible,
        "away.abs() < window",
        "(away < window) & (away >= 0)",
    ),
    "positions that run on": (
        "roberta",
        RaggedClassifier.batch,
        "places[mask][None]",
        "torch.arange(int(mask.sum()))[None] % 30",
    ),
    "token types of the first text alone": (
        "bert",
        RaggedClassifier.batch,
        "padded.segments",
        "0 * padded.segments",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_seen_in_the_results_and_by_the_check(fault):
    family, function, right, wrong = FAULTS[fault]
    assert off(family, nullcontext()) < 100
    assert off(family, planted(function, right, wrong)) > 1e6
    with planted(function, right, wrong):
        assert why_not_ragged(resident(family)) != ""


def test_a_mean_over_pads_is_seen_in_the_padded_layout():
    fault = planted(Classifier.logits, "batch.mask.to(torch.int64)", "torch.ones_like(batch.mask)")
    assert off("modernbert_mean", fault, "padded") > 1e6


FAULTS_OF_POOLED_ROWS = {
    "the pooled row of another sequence": (
        LastBlock._forward,
        "states.index_select(1, self.rows)",
        "states.index_select(1, self.rows.roll(1))",
    ),
    "keys of another sequence": (
        ragged.RaggedAttention._one_each,
        "geometry.order.argsort()",
        "geometry.order",
    ),
    "values for keys": (LastBlock._forward, '("key", "value")', '("value", "key")'),
}


@pytest.mark.parametrize("fault", FAULTS_OF_POOLED_ROWS)
def test_a_fault_of_pooled_rows_is_seen_in_the_results_and_by_the_trial(fault):
    """Found by the trial, the whole block is computed, and results are right."""
    assert off("bert", planted(*FAULTS_OF_POOLED_ROWS[fault])) > 1e6
    with planted(*FAULTS_OF_POOLED_ROWS[fault]):
        assert RaggedClassifier(resident("bert")).last is None
        assert why_not_ragged(resident("bert")) == ""


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("own.index_select(0, batch.positions)", "own.index_select(0, batch.positions + 1)"),
        ("own.index_select(0, batch.positions)", "torch.zeros_like(batch.positions)"),
    ],
)
def test_masks_of_other_rows_are_seen_in_the_results(right, wrong):
    assert off("bert", planted(batch._assemble, right, wrong)) > 1e6
