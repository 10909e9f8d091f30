"""The fused engine on every architecture: how it runs, that it is exact, and what it leaves."""

from dataclasses import replace

import peft
import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fedlora.core.errors import ConfigError
from fedlora.core.types import EvaluateJob, EvaluatePlan, LocalPlan, Update
from fedlora.engine.fused import Auto, Fused
from fedlora.engine.fused.check import why_not_ragged
from fedlora.engine.fused.head import is_plain
from fedlora.engine.sequential import Sequential
from fedlora.models.modules import find_modules
from fedlora.techniques.sparse.payload import SparseDelta
from tests.fedlora.engine.world import FakeStore, client, examples, job
from tests.fedlora.models.families import FAMILIES, family
from tests.fedlora.models.networks import adapter, wrap

PADDED = {
    "gemma2": "Gemma2Attention attends with softcap",
    "gpt_oss": "GptOssAttention attends with s_aux",
    "phimoe": "gives other logits when ragged",  # its window is in its mask alone
    "llama4_text": "limits its attention to 6 tokens by a mask only",
    "gptj": "has built-in attention",
    "gpt_neo": "has built-in attention",
    "bloom": "has built-in attention",
    "falcon": "has built-in attention",
    "mpt": "has built-in attention",
    "qwen3_next": "gives other logits when ragged",  # recurrent
    "lfm2": "gives other logits when ragged",  # convolutional
}
RAGGED = sorted(FAMILIES.keys() - PADDED)
SCALED_HEADS = {"gemma2", "granite", "cohere", "cohere2"}
EXPERTS = {"mixtral", "qwen3_moe", "qwen3_next", "olmoe"}
"""PEFT adapts the experts too, which are no linear layers."""
NO_FLOAT64 = EXPERTS | {"gpt_oss", "phimoe", "qwen2_moe"}
"""Their grouped products want single precision."""
ROUND_TO_FLOAT32 = {"gemma2", "gptj", "gpt_neo", "bloom", "mpt"}
"""Their attention computes in single precision, which padding rounds otherwise."""
EXACT = sorted(FAMILIES.keys() - NO_FLOAT64 - ROUND_TO_FLOAT32)

RANKS = (2, 3, 3)
PLAN = LocalPlan(steps=2, batch_size=2, lr=1e-3, weight_decay=0.1, dropout=0.1)
MEASURED = EvaluatePlan(max_new_tokens=4, max_examples=2)


def store():
    """Clients of unequal lengths, all with sequences longer than `families.WINDOW`."""
    held = {k: examples(4, seed=k, longest=20 - 4 * k) for k in range(len(RANKS))}
    texts = {k: [f"w{i}" for i in range(4)] for k in held}
    return FakeStore(held, texts)


def starts(on):
    return [adapter(on.info.modules, r, seed=k, dtype=on.dtype) for k, r in enumerate(RANKS)]


def trained(spec, on):
    """``(updates by client, notes)``."""
    engine = spec.open(on, store())
    done = list(engine.train([job(start, PLAN, id=k) for k, start in enumerate(starts(on))]))
    assert all(isinstance(u, Update) for u in done), done
    return {u.client.id: u for u in done}, engine.notes()


def measured(spec, on):
    jobs = [EvaluateJob(1, 1, client(a, k), a, MEASURED) for k, a in enumerate(starts(on))]
    found = spec.open(on, store()).evaluate(jobs)
    return {e.client.id: e.scalars for e in found}


def losses(updates):
    names = ("loss", "loss_first", "loss_last")
    return {(k, name): u.metrics[name] for k, u in updates.items() for name in names}


def state(network):
    """Everything of a network that a run could leave changed."""
    modules = list(network.modules())
    configs = {id(m.config): m.config for m in modules if hasattr(m, "config")}
    return {
        "attention": [c._attn_implementation for c in configs.values()],
        "known": sorted(ALL_ATTENTION_FUNCTIONS.valid_keys()),
        "training": [m.training for m in modules],
        "own": [sorted(vars(m)) for m in modules],
        "hooks": [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in modules],
        "updates": [m.update for m in modules if hasattr(m, "update")],
        "grads": [(p.requires_grad, p.grad) for p in network.parameters()],
        "generation": getattr(network, "generation_config", None),  # a classifier has none
        "sums": [p.double().sum().item() for p in network.parameters()],
    }


def test_every_family_is_in_the_table():
    assert set(RAGGED) >= {"llama", "qwen2", "qwen3", "mistral", "phi3", "gemma", "gemma3_text"}
    assert set(RAGGED) >= {"olmo2", "smollm3", "granite", "stablelm", "cohere", "gpt2", "gpt_neox"}
    assert set(RAGGED) >= {"opt", "phi", "gpt_bigcode"}
    assert PADDED.keys() <= FAMILIES.keys()


@pytest.mark.parametrize("name", RAGGED)
def test_runs_ragged(name):
    model = wrap(family(name))
    before = state(model.network)
    assert why_not_ragged(model) == ""
    assert state(model.network) == before


@pytest.mark.parametrize("name", PADDED)
def test_runs_padded_and_says_why(name):
    model = wrap(family(name))
    before = state(model.network)
    reason = why_not_ragged(model)
    assert reason.startswith(type(model.network).__name__)
    assert PADDED[name] in reason
    assert state(model.network) == before
    with pytest.raises(ValueError, match=r"engine.layout=ragged: .*use auto or padded") as caught:
        Fused(layout="ragged").open(model, store())
    assert reason in str(caught.value)
    assert "padded, for " + reason in Fused().open(model, store()).notes()


@pytest.mark.parametrize("name", ["lfm2", "llama", "mixtral", "bloom"])
def test_half_precision_does_not_hide_what_sequences_see(name):
    assert bool(why_not_ragged(wrap(family(name).bfloat16()))) == (name in PADDED)


def test_a_window_that_only_the_mask_knows_is_found_where_it_is_too_long_to_try():
    network = family("phimoe")
    network.config.sliding_window = 4000
    model = wrap(network)
    assert why_not_ragged(model) == "", "no sequence is longer than the context"
    model.info = replace(model.info, context=8000)
    assert "limits its attention to 4000 tokens by a mask only" in why_not_ragged(model)


@pytest.mark.parametrize("name", FAMILIES)
def test_targets_are_those_of_peft(name):
    ours = {m.path for m in find_modules(family(name), "all-linear")}
    theirs = peft.get_peft_model(
        family(name), peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    paths = {
        path.removeprefix("base_model.model.")
        for path, layer in theirs.named_modules()
        if isinstance(layer, peft.tuners.lora.LoraLayer)
    }
    paths = {p for p in paths if not p.endswith(".router")}  # which PEFT would break
    if name in EXPERTS:
        ours, paths = ({p for p in found if ".mlp." not in p} for found in (ours, paths))
    assert ours == paths
    assert ours


@pytest.mark.parametrize("name", FAMILIES)
def test_a_head_is_plain_if_nothing_happens_to_its_logits(name):
    assert is_plain(wrap(family(name))) == (name not in SCALED_HEADS)


@pytest.mark.parametrize("name", ["llama", "gemma2", "granite", "cohere"])
def test_heads_are_judged_in_half_precision_too(name):
    assert is_plain(wrap(family(name).bfloat16())) == (name not in SCALED_HEADS)


@pytest.mark.parametrize("name", FAMILIES)
def test_fused_training_is_sequential_training(name):
    model = wrap(family(name))
    before = state(model.network)
    wanted, _ = trained(Sequential(), model)
    found, notes = trained(Fused(tokens=100, slots=2), model)
    assert losses(found) == pytest.approx(losses(wanted), rel=1e-5)
    assert any(n.startswith("fused, padded" if name in PADDED else "fused, ragged") for n in notes)
    assert all(u.metrics["fused"] == 1.0 for u in found.values()), notes
    assert state(model.network) == before


@pytest.mark.parametrize("name", EXACT)
def test_in_float64_nothing_is_lost(name):
    model = wrap(family(name).double())
    wanted, _ = trained(Sequential(), model)
    for spec in (Fused(tokens=100, slots=3), Fused(tokens=100, slots=3, layout="padded")):
        found, _ = trained(spec, model)
        assert losses(found) == pytest.approx(losses(wanted), rel=1e-9)


@pytest.mark.parametrize(
    "name", sorted({"llama", "opt", "gpt2", "gpt2_split", "mixtral"} | PADDED.keys())
)
def test_recomputed_is_the_same(name):
    model = wrap(family(name))
    before = state(model.network)
    calls = []  # while training
    handle = next(iter(model.layers.values())).register_forward_pre_hook(
        lambda *_: calls.append(1) if torch.is_grad_enabled() else None
    )
    wanted, _ = trained(Fused(tokens=100, slots=3), model)
    once = len(calls)
    found, _ = trained(Fused(tokens=100, slots=3, checkpoint=True), model)
    handle.remove()
    assert len(calls) == 3 * once, "the first block runs again in each backward pass"
    assert losses(found) == pytest.approx(losses(wanted), rel=1e-6)
    assert state(model.network) == before


@pytest.mark.parametrize("name", FAMILIES)
def test_fused_evaluation_is_sequential_evaluation(name):
    network = family(name)
    model = wrap(network if name in NO_FLOAT64 else network.double())
    before = state(model.network)
    wanted = measured(Sequential(), model)
    found = measured(Fused(tokens=60), model)
    assert found.keys() == wanted.keys()
    for k in wanted:
        assert found[k] == pytest.approx(wanted[k], rel=1e-5 if name not in EXACT else 1e-9)
    assert state(model.network) == before


@pytest.mark.parametrize("name", ["falcon", "lfm2"])
def test_auto_gives_the_same_wherever_it_runs(name, monkeypatch, tmp_path):
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path))
    model = wrap(family(name))
    wanted, _ = trained(Sequential(), model)
    found, _ = trained(Auto(tokens=100, slots=2), model)
    assert losses(found) == pytest.approx(losses(wanted), rel=1e-5)


@pytest.mark.parametrize("target", ["lm_head", "input_layernorm", "embed_tokens", "model"])
def test_what_is_no_linear_layer_is_no_target(target):
    with pytest.raises(ConfigError, match=f"model.targets: '{target}' is the end of no adaptable"):
        find_modules(family("llama"), [target])


def test_notes_are_of_the_training_that_was_last():
    """A round records them: what an earlier round had to do otherwise is not its affair."""
    model = wrap(family("lfm2"))
    engine = Fused(tokens=100, slots=2).open(model, store())
    values = {m.path: torch.full((m.d_out * m.d_in,), 0.01) for m in model.info.modules}
    (reason,) = engine.notes()
    list(engine.train([job(SparseDelta(1, 1.0, values), PLAN)]))
    assert engine.notes() == (reason, "sparse updates one by one")
    list(engine.train([job(starts(model)[0], PLAN)]))
    assert engine.notes() == (reason, "fused, padded, 100 tokens per step")
