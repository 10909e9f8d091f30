"""States that are computed once per example give the results of whole forward passes."""

import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load

from fedlora.core.types import EvaluateJob, EvaluatePlan, Failure, LocalPlan, Update
from fedlora.data.batches import padded_states
from fedlora.engine import prefix as prefixes
from fedlora.engine.fused import Fused, batch
from fedlora.engine.fused.kernels import FusedDelta
from fedlora.engine.fused.model import FusedModel
from fedlora.engine.prefix import cache_key, why_not_prefix
from fedlora.engine.sequential import Sequential
from fedlora.models.head import head_parameters
from fedlora.models.headed import WithHead
from fedlora.models.prefix import Prefix
from fedlora.techniques.rebased.payload import Rebased
from fedlora.techniques.sparse.payload import SparseDelta
from tests.fedlora.engine.world import FakeStore, client, distance, exact, examples, job
from tests.fedlora.models import classifiers
from tests.fedlora.models.families import FAMILIES, family
from tests.fedlora.models.networks import adapter, gpt2, llama, wrap
from tests.planted import planted

PLAN = LocalPlan(epochs=2, batch_size=3, micro_batch_size=2, lr=1e-2, dropout=0.2)
MEASURED = EvaluatePlan(max_new_tokens=4)
ENGINES = {
    "sequential": Sequential(),
    "ragged": Fused(layout="auto", tokens=24),
    "padded": Fused(layout="padded", tokens=24),
}
NETWORKS = {"llama": llama, "gpt2": gpt2}
ENCODERS = ["bert", "roberta", "distilbert", "modernbert_mean", "gpt2", "llama"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path))
    return tmp_path


def world(name="llama", layers=(2, 3)):
    return wrap(exact(NETWORKS[name](layers=4)), layers=layers)


def store():
    return FakeStore(
        {k: examples(5, seed=k, longest=12 - 2 * k) for k in range(3)},
        {k: [f"w{i}" for i in range(5)] for k in range(3)},
    )


def results(spec, on, held=None, starts=None, plan=PLAN):
    """Updates of three clients by id, and the engine."""
    engine = spec.open(on, held or store())
    starts = starts or [adapter(on.info.modules, 2 + k, seed=k) for k in range(3)]
    done = list(engine.train([job(start, plan, id=k) for k, start in enumerate(starts)]))
    assert all(isinstance(u, Update) for u in done), done
    return {u.client.id: u for u in done}, engine


def assert_same(found, wanted, within=1e-12):
    for k, update in wanted.items():
        assert distance(found[k].payload, update.payload) <= within
        for name in ("loss", "loss_first", "loss_last", "grad_norm"):
            assert found[k].metrics[name] == pytest.approx(update.metrics[name], abs=within)


def files(cache):
    return sorted(cache.glob("prefix/*/*/*.safetensors"))


def counted(monkeypatch):
    """A list that grows by one with every forward pass that computes states."""
    calls, capture = [], Prefix.capture
    monkeypatch.setattr(Prefix, "capture", lambda p, f: calls.append(1) or capture(p, f))
    return calls


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_round_is_that_without_states(name, engine, cache):
    """Unequal ranks and lengths, micro-batches, dropout of adapters: to 1e-12 in float64."""
    spec = ENGINES[engine]
    wanted, _ = results(spec, world(name))
    found, opened = results(replace(spec, prefix="on"), world(name))
    assert_same(found, wanted)
    assert "the first 2 of 4 blocks computed once per example" in opened.notes()
    assert len(files(cache)) == 3


def test_recomputed_activations_are_those_behind_the_states():
    """With gradient checkpointing a block's forward pass runs again when the context is closed."""
    spec = replace(ENGINES["ragged"], checkpoint=True)
    wanted, _ = results(ENGINES["ragged"], world())
    assert_same(results(replace(spec, prefix="on"), world())[0], wanted)


@pytest.mark.parametrize("engine", ENGINES)
def test_autocast_computes_from_the_same_states(engine):
    plan = replace(PLAN, autocast="bf16")
    starts = [adapter(world().info.modules, 2, dtype=torch.float32)]

    def losses(spec):
        on = wrap(llama(layers=4), layers=(2, 3))
        return results(spec, on, starts=starts, plan=plan)[0][0].metrics["loss"]

    found = losses(replace(ENGINES[engine], prefix="on"))
    assert found == pytest.approx(losses(ENGINES[engine]), abs=2e-2)


def test_parts_of_a_split_projection_have_states(cache):
    def on():
        return wrap(exact(gpt2(layers=4)), ("q_attn", "v_attn"), split=True, layers="top:1")

    wanted, _ = results(ENGINES["ragged"], on())
    found, engine = results(replace(ENGINES["ragged"], prefix="on"), on())
    assert_same(found, wanted)
    assert "the first 3 of 4 blocks computed once per example" in engine.notes()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ENCODERS)
def test_a_round_of_a_classifier_is_that_without_states(name, engine, cache):
    held = FakeStore({k: classifiers.examples(6, seed=k) for k in range(3)})
    plan = replace(PLAN, loss="full")

    def on():
        return classifiers.wrap(classifiers.network(name), layers=[1])

    spec = ENGINES[engine]
    wanted, _ = results(spec, on(), held, plan=plan)
    found, opened = results(replace(spec, prefix="on"), on(), held, plan=plan)
    assert_same(found, wanted)
    assert "the first 1 of 2 blocks computed once per example" in opened.notes()
    assert len(files(cache)) == 3


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ENCODERS)
def test_heads_that_train_are_those_without_states(name, engine):
    """A client whose head is frozen, one with an averaged and one with a local head: training, then
    evaluation of what came out."""
    held = FakeStore({k: classifiers.examples(6, seed=k) for k in range(3)})
    plan, measured = replace(PLAN, loss="full"), replace(MEASURED, generate=False)

    def done(spec):
        on = classifiers.wrap(classifiers.network(name), layers=[1])
        starts = [adapter(on.info.modules, 2 + k, seed=k) for k in range(3)]
        starts[1:] = [headed(on, start, k, travels=k == 0) for k, start in enumerate(starts[1:])]
        updates, engine = results(spec, on, held, starts, plan)
        jobs = [
            EvaluateJob(1, 1, client(u.payload, k), u.payload, measured) for k, u in updates.items()
        ]
        found = {e.client.id: e for e in engine.evaluate(jobs)}
        assert not any(isinstance(e, Failure) for e in found.values()), found
        return starts, updates, {k: e.scalars for k, e in found.items()}, engine

    starts, wanted, scalars, _ = done(ENGINES[engine])
    _, found, again, opened = done(replace(ENGINES[engine], prefix="on"))
    assert "the first 1 of 2 blocks computed once per example" in opened.notes()
    assert_same(found, wanted)
    for k in range(3):
        assert again[k] == pytest.approx(scalars[k], abs=1e-12)
    for k in (1, 2):
        head = wanted[k].payload.head()
        assert all(not torch.equal(t, head[n]) for n, t in starts[k].head().items())


def headed(on, factors, seed, travels):
    """Factors with a head of a client's own."""
    g = torch.Generator().manual_seed(seed)
    own = head_parameters(on.network)
    noise = {n: torch.randn(p.shape, generator=g, dtype=p.dtype) for n, p in own.items()}
    return WithHead(factors, {n: p.detach() + 0.1 * noise[n] for n, p in own.items()}, travels)


PRODUCTS = "frozen products of the last block too"
NARROW = ("bert", "roberta", "distilbert")


def moved(modules):
    """Factors over a base that has moved: its frozen products are not the model's own."""
    g = torch.Generator().manual_seed(7)
    shift = {
        m.path: 0.1 * torch.randn(m.d_out, m.d_in, generator=g, dtype=torch.float64)
        for m in modules
    }
    return Rebased(shift, dict(adapter(modules, 2)))


def last_blocks(name, spec, layers=(1,)):
    """A round of a classifier whose last block alone has adapters: clients on its own base, and one
    on a base that has moved."""
    on = classifiers.wrap(classifiers.network(name), layers=list(layers))
    held = FakeStore({k: classifiers.examples(6, seed=k) for k in range(3)})
    starts = [adapter(on.info.modules, 2 + k, seed=k) for k in range(2)] + [moved(on.info.modules)]
    return results(spec, on, held, starts, replace(PLAN, loss="full"))


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("name", NARROW)
def test_frozen_products_stand_beside_the_states(name, checkpoint):
    """Where a last block is computed for pooled rows, keys and values of all tokens are what is
    left of it: their frozen part is of the example alone, unless the base has moved."""
    spec = replace(ENGINES["ragged"], checkpoint=checkpoint)
    wanted, _ = last_blocks(name, spec)
    found, engine = last_blocks(name, replace(spec, prefix="on"))
    assert_same(found, wanted)
    assert PRODUCTS in engine.notes()
    assert not any("failed" in note for note in engine.notes()), "done one by one"


@pytest.mark.parametrize(
    ("name", "engine"),
    [("bert", "sequential"), ("bert", "padded"), ("gpt2", "ragged"), ("modernbert_mean", "ragged")],
)
def test_no_products_where_a_block_is_computed_for_all_rows(name, engine):
    _, opened = last_blocks(name, replace(ENGINES[engine], prefix="on"))
    assert PRODUCTS not in opened.notes()


def test_products_and_states_have_files_of_their_own(cache):
    """Sequential and fused runs of one model: neither reads what the other needs."""
    for engine in ("sequential", "ragged", "sequential"):
        last_blocks("bert", replace(ENGINES[engine], prefix="on"))
    assert len(list(cache.glob("prefix/*"))) == 2


@pytest.mark.parametrize("engine", ENGINES)
def test_evaluation_is_that_without_states(engine):
    """Likelihoods and generated texts, with an adapter and without one."""

    def measured(spec):
        on = world()
        jobs = [
            EvaluateJob(1, 1, client(a, k), a, MEASURED)
            for k, a in enumerate([None, adapter(on.info.modules, 2)])
        ]
        done = list(spec.open(on, store()).evaluate(jobs))
        assert not any(isinstance(e, Failure) for e in done), done
        return {e.client.id: e.scalars for e in done}

    wanted = measured(ENGINES[engine])
    found = measured(replace(ENGINES[engine], prefix="on"))
    for k, scalars in wanted.items():
        assert found[k] == pytest.approx(scalars, abs=1e-12)


@pytest.mark.parametrize("engine", ["sequential", "ragged"])
def test_states_are_right_under_every_payload(engine):
    """A moved base and sparse changes are of adapted modules, which lie behind the states."""

    def trained(spec):
        on = world()
        modules, g = on.info.modules, torch.Generator().manual_seed(0)
        values = {m.path: torch.randn(m.d_out * m.d_in, generator=g).double() for m in modules}
        starts = [
            moved(modules),
            adapter(modules, 3),
            SparseDelta(3, 1.0, values),
        ]
        return results(spec, on, starts=starts)[0]

    assert_same(trained(replace(ENGINES[engine], prefix="on")), trained(ENGINES[engine]))


def test_states_are_computed_once(cache, monkeypatch):
    calls = counted(monkeypatch)
    spec = Sequential(prefix="on")
    first, engine = results(spec, world())
    made = len(calls)
    again = {u.client.id: u for u in engine.train([job(adapter(world().info.modules, 2), PLAN)])}
    assert len(calls) == made
    other, _ = results(spec, world())  # as another process would
    checks = len(calls) - made
    assert 0 < checks < made, "only the self-check of the model runs again"
    assert_same(other, first, within=0.0)
    assert again[0].payload


def test_large_clients_have_several_files(cache, monkeypatch):
    monkeypatch.setattr(prefixes, "CHUNK", 20)
    wanted, _ = results(ENGINES["ragged"], world())
    found, _ = results(replace(ENGINES["ragged"], prefix="on"), world())
    assert_same(found, wanted)
    assert len(files(cache)) > 3
    files(cache)[1].write_bytes(b"")
    assert_same(results(Sequential(prefix="on"), world())[0], wanted)


@pytest.mark.parametrize("engine", ENGINES)
def test_frozen_blocks_do_not_run_again(engine):
    """In training and in likelihoods; generation runs them all."""
    on, ran = world(), []
    opened = replace(ENGINES[engine], prefix="on").open(on, store())
    start = adapter(on.info.modules, 2)
    jobs = [job(start, PLAN, id=k) for k in range(3)]
    plan = replace(MEASURED, generate=False)
    measured = [EvaluateJob(1, 1, client(start, k), start, plan) for k in range(3)]
    assert len([*opened.train(jobs), *opened.evaluate(measured)]) == 6  # computes the states
    for block, called in zip(on.network.model.layers, "0123", strict=True):
        block.mlp.register_forward_pre_hook(lambda *_, called=called: ran.append(called))
    assert len([*opened.train(jobs), *opened.evaluate(measured)]) == 6
    assert set(ran) == {"2", "3"}
    list(opened.evaluate([replace(measured[0], plan=MEASURED)]))
    assert set(ran) == set("0123")


@pytest.mark.parametrize("harm", ["flip", "cut", "foreign", "empty", "of others"])
def test_a_damaged_file_is_found_and_made_anew(harm, cache):
    spec = Sequential(prefix="on")
    wanted, _ = results(spec, world())
    first, second, _ = files(cache)
    whole = first.read_bytes()
    broken = {
        "flip": whole[:-9] + bytes([whole[-9] ^ 4]) + whole[-8:],
        "cut": whole[: len(whole) // 2],
        "foreign": second.read_bytes(),
        "empty": b"",
        "of others": whole,
    }
    first.write_bytes(broken[harm])
    held = store()
    if harm == "of others":
        held.held[0] = [replace(e, input_ids=e.input_ids[::-1]) for e in held.held[0]]
        wanted, _ = results(Sequential(), world(), held)
    found, _ = results(spec, world(), held)
    assert_same(found, wanted)
    with safe_open(first, "pt") as file, torch.no_grad():
        made = file.get_tensor("states")
    assert torch.equal(made, load(whole)["states"]) == (harm != "of others")


def test_a_killed_process_leaves_nothing_that_counts(cache):
    spec = Sequential(prefix="on")
    wanted, _ = results(spec, world())
    first = files(cache)[0]
    half = first.read_bytes()[:100]
    first.with_name(f".unfinished_{first.name}_0000").write_bytes(half)
    first.unlink()
    found, _ = results(spec, world())
    assert_same(found, wanted)


FILL = """
import sys, time
from dataclasses import replace
from fedlora.engine.prefix import PrefixCache
from tests.fedlora.engine import test_prefix
write, slow = test_prefix.prefixes.write_file, float(sys.argv[1])
test_prefix.prefixes.write_file = lambda *args: (write(*args), time.sleep(slow))
test_prefix.results(test_prefix.Sequential(prefix="on"), test_prefix.world())
"""


@pytest.mark.slow
def test_processes_fill_together_and_one_is_killed(cache):
    """Two of three end; the third is killed between its files. What there is then is whole."""
    wanted, _ = results(Sequential(), world())
    env = {**os.environ, "FEDLORA_CACHE": str(cache)}
    start = [sys.executable, "-c", FILL]
    victim = subprocess.Popen([*start, "60"], env=env)
    while not files(cache):
        assert victim.poll() is None
        time.sleep(0.05)
    victim.kill()
    victim.wait()
    assert len(files(cache)) == 1
    others = [subprocess.Popen([*start, "0"], env=env) for _ in range(2)]
    assert [p.wait(timeout=120) for p in others] == [0, 0]
    assert len(files(cache)) == 3
    found, _ = results(Sequential(prefix="on"), world())
    assert_same(found, wanted)


def test_models_layers_and_data_share_no_states(cache):
    """Models with the same examples, one after the other, in one cache: none takes another's."""
    spec = Sequential(prefix="on")
    for name, layers, fingerprint in [
        ("llama", (2, 3), "a"),
        ("llama", (3,), "a"),
        ("gpt2", (2, 3), "a"),
        ("llama", (2, 3), "b"),
    ]:
        found, wanted = [
            results(s, reseeded(name, layers, fingerprint))[0] for s in (spec, Sequential())
        ]
        assert_same(found, wanted)
    assert len(list(cache.glob("prefix/*"))) == 4
    shutil.rmtree(cache / "prefix")


def reseeded(name, layers, fingerprint):
    """A network whose weights follow its fingerprint."""
    on = world(name, layers)
    on.info = replace(on.info, fingerprint=fingerprint)
    if fingerprint == "b":
        with torch.no_grad():
            for parameter in on.network.parameters():
                parameter.mul_(1.1)
    return on


def test_the_key_holds_all_that_states_depend_on():
    on = world()
    held = store()
    keys = {cache_key(on, held, d) for d in ("float32", "bfloat16")}
    keys |= {cache_key(on, replace(held, key="other"), "float32")}
    keys |= {cache_key(world(layers=(3,)), held, "float32")}
    keys |= {cache_key(world("gpt2"), held, "float32")}
    keys |= {cache_key(reseeded("llama", (2, 3), "b"), held, "float32")}
    on.info = replace(on.info, mask="pruned")
    keys |= {cache_key(on, held, "float32")}
    on.network.float()
    keys |= {cache_key(on, held, "float32")}
    assert len(keys) == 8


def test_what_does_not_fit_runs_through_all_blocks(cache):
    """The first client's states fit: of the others' there is a note, and the results are right."""
    wanted, _ = results(ENGINES["ragged"], world())
    one = sum(len(e.input_ids) - 1 for e in store().held[0]) * 16 * 8
    spec = replace(ENGINES["ragged"], prefix="on", prefix_gb=(one + 1000) / 1e9)
    found, engine = results(spec, world())
    assert_same(found, wanted)
    assert len(files(cache)) == 1
    assert any("has reached engine.prefix_gb=" in note for note in engine.notes())


def test_a_full_disk_costs_time_alone(cache, monkeypatch):
    def refuse(path, content):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(prefixes, "write_file", refuse)
    wanted, _ = results(Sequential(), world())
    found, engine = results(Sequential(prefix="on"), world())
    assert_same(found, wanted)
    assert any("cannot be written" in note and "No space" in note for note in engine.notes())


def test_rounding_to_bfloat16_is_reported(cache):
    on = world()
    wanted, _ = results(Sequential(), on)
    for _ in range(2):  # computed, then read
        found, engine = results(Sequential(prefix="on", prefix_dtype="bfloat16"), world())
        assert_same(found, wanted, within=0.3)
        assert "computed once per example, rounded to bfloat16 by 2e-03" in engine.notes()[1]
    sizes = [f.stat().st_size for f in files(cache)]
    results(Sequential(prefix="on"), world())
    assert sum(f.stat().st_size for f in files(cache)) > 3 * sum(sizes)


def test_a_base_in_bfloat16_loses_nothing():
    on = wrap(llama(layers=4).bfloat16(), layers="top:2")
    starts = [adapter(on.info.modules, 2, dtype=torch.float32)]
    wanted, _ = results(Sequential(), on, starts=starts)
    for dtype in ("float32", "bfloat16"):
        on = wrap(llama(layers=4).bfloat16(), layers="top:2")
        found, engine = results(Sequential(prefix="on", prefix_dtype=dtype), on, starts=starts)
        assert "rounded" not in str(engine.notes())
        assert found[0].metrics["loss"] == pytest.approx(wanted[0].metrics["loss"], abs=2e-2)


@pytest.mark.parametrize("spec", [Sequential(prefix="on"), Fused(prefix="on")])
def test_a_model_without_frozen_blocks_says_so(spec):
    on = world(layers="all")
    found, engine = results(spec, on)
    wanted, _ = results(replace(spec, prefix="off"), world(layers="all"))
    assert_same(found, wanted, within=0.0)
    assert "no prefix, for no block of random lies before the first adapter" in engine.notes()


@pytest.mark.parametrize("name", FAMILIES)
def test_every_architecture_begins_behind_its_first_block(name):
    on = wrap(family(name), layers=[1])
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in on.network.modules()]
    assert why_not_prefix(on) == ""
    after = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in on.network.modules()]
    assert hooks == after
    assert not any("forward" in vars(m) for m in on.network.modules())


@pytest.mark.parametrize("name", classifiers.CONFIGS)
def test_every_classifier_begins_behind_its_first_block(name):
    assert why_not_prefix(classifiers.wrap(classifiers.network(name), layers=[1])) == ""


def test_a_network_that_gives_other_logits_is_found(monkeypatch):
    monkeypatch.setattr(Prefix, "_hand_on", lambda p, *a, **k: a[0])
    replaced = Prefix.replaced
    monkeypatch.setattr(Prefix, "replaced", lambda p, states: replaced(p, states + 0.1))
    assert "gives other logits behind its first blocks (by" in why_not_prefix(world())


def test_examples_without_inputs_have_empty_states():
    held = store()
    held.held[0].append(replace(held.held[0][0], input_ids=np.array([3], np.int32)))
    wanted, _ = results(Sequential(), world(), held)
    found, _ = results(Sequential(prefix="on"), world(), held)
    assert_same(found, wanted)


FAULTS = {
    "keyed without the layer": (cache_key, "info.frozen_blocks", "0"),
    "keyed without the model": (cache_key, "info.fingerprint", "0"),
    "keyed without the network's class": (cache_key, "type(network).__name__", "0"),
    "of another example": (prefixes._states, "states[row,", "states[0,"),
    "of another token": (prefixes._states, ": lengths[i]]", ": lengths[i]].flip(0)"),
    "of the block before": (Prefix.__init__, "found[blocks]", "found[blocks - 1]"),
    "a row too far": (padded_states, "row[: len(states)]", "row[-len(states) :]"),
    "rows of pads": (batch._states, "rows.of_token", "np.arange(len(tokens))"),
    "products of something else": (Prefix.capture, "base(reached.states)", "base(-reached.states)"),
    "products of a base that has moved": (FusedModel._product, " or index in self._moved", ""),
    "products without adapters": (
        FusedDelta.forward,
        "hidden = add",
        "rows = rows * 0; hidden = add",
    ),
    "products computed again": (FusedModel._product, " or self.checkpoint", ""),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_noticed(fault, cache):
    """Wrong states change results, which the laws above compare."""

    def laws():
        test_models_layers_and_data_share_no_states(cache)
        test_a_round_is_that_without_states("llama", "padded", cache)
        for checkpoint in (False, True):
            test_frozen_products_stand_beside_the_states("bert", checkpoint)

    with planted(*FAULTS[fault]), pytest.raises((AssertionError, RuntimeError)):
        laws()
