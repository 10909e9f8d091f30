"""A technique is one module: `toy` goes through everything, and nothing of fedlora names it."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from fedlora.core.errors import ConfigError, RejectedUpdate
from fedlora.core.payload import payload_class, target_of
from fedlora.core.types import Client, Expected, LocalPlan, Ranks, Update
from fedlora.models.export import load
from fedlora.models.spec import Tiny
from fedlora.server.validation import check_update
from fedlora.techniques.lora.payload import LowRankPayload
from fedlora.wire.codec import (
    decode_payload,
    encode_payload,
    payload_bytes,
    plan_from_json,
    plan_to_json,
)
from simulations.app.client_app import app
from simulations.app.compose import load as configured
from simulations.app.federate import run
from simulations.app.grid import InProcessGrid
from simulations.app.parts import build_parts
from simulations.tools.merge import main
from tests.fedlora.models.networks import NETWORKS, logits, wrap
from tests.fedlora.techniques.toy import MaskedOuter, Outer, OuterMean
from tests.simulations.conftest import SMALL, Run

STRATEGY = {"_target_": target_of(OuterMean), "scale": 2.0}
TECHNIQUE = {"_target_": target_of(Outer)}


def payload(model, seed: int = 1) -> MaskedOuter:
    g = torch.Generator().manual_seed(seed)
    a, b = (
        {m.path: torch.randn(getattr(m, d), generator=g) for m in model.info.modules}
        for d in ("d_out", "d_in")
    )
    return MaskedOuter(3, 0.5, a, b)


@pytest.mark.parametrize("wire", ["float32", "bfloat16", "float64"])
def test_it_travels(wire):
    sent = payload(wrap(NETWORKS["llama"]()))
    array, header = encode_payload(sent, wire)
    back = decode_payload(array, header)
    assert isinstance(back, MaskedOuter) and (back.seed, back.scale) == (3, 0.5)
    for (name, x), (other, y) in zip(sent.tensors(), back.tensors(), strict=True):
        assert name == other and torch.equal(x.to(getattr(torch, wire)).float(), y.float())
    assert payload_bytes(sent, wire) == array.nbytes
    plan = LocalPlan(technique=Outer(freeze_b=True))
    assert plan_from_json(plan_to_json(plan)) == plan


def test_its_update_is_validated():
    start = payload(wrap(NETWORKS["llama"]()))
    client = Client(5, Ranks({"none": 1}), 9)
    expected = Expected(client, start, LocalPlan(technique=Outer()))
    check_update(Update(client, start, 9), expected, max_norm=1e-6)
    path = next(iter(start.a))
    a = start.a[path]
    faults = {
        "where a MaskedOuter is required": LowRankPayload({}),
        "seed 4 and scale 0.5, not 3": replace(start, seed=4),
        f"{path}/a is": replace(start, a={**start.a, path: a[:-1]}),
        "entries that are NaN": replace(start, a={**start.a, path: a * torch.nan}),
        "above 0.001": replace(start, a={**start.a, path: a + 1}),
    }
    for said, bad in faults.items():
        with pytest.raises(RejectedUpdate, match=said):
            check_update(Update(client, bad, 9), expected, max_norm=1e-3)


@pytest.mark.parametrize("name", NETWORKS)
def test_it_is_mounted(name):
    model = wrap(NETWORKS[name]().double())
    before, update = logits(model.network), payload(model)
    parameters = model.mount(update)
    assert len(parameters) == 2 * len(model.info.modules)
    moved = logits(model.network)
    assert not torch.equal(moved, before)
    back = model.payload()
    assert isinstance(back, MaskedOuter) and torch.equal(
        next(iter(back.a.values())), next(iter(update.a.values())).double()
    )
    model.unmount()
    assert torch.equal(logits(model.network), before)


@pytest.fixture
def toy(tmp_path):
    """Runs the toy strategy and technique in a configuration that names them."""

    def go(*overrides: str, output: str = "out") -> Run:
        cfg = configured([*SMALL, f"output_dir={tmp_path / output}", *overrides])
        cfg.strategy, cfg.client.technique = STRATEGY, TECHNIQUE
        said: list[str] = []
        return Run(run(cfg, lambda p: InProcessGrid(app, p.runtime.nodes), said.append), said)

    return go


def test_a_run_trains_averages_evaluates_and_exports_it(toy, tmp_path):
    done = toy("engine=sequential", "evaluate=loss", "evaluate.clients=2")
    assert done.status["status"] == "completed"
    first, last = done.rounds[0], done.rounds[-1]
    assert (first["clients"], first["failed"], first["rejected"]) == (6, 0, 0)
    assert last["train/loss"] < first["train/loss"]
    numbers = 4 * sum(m.d_out + m.d_in for m in Tiny().describe().modules)
    assert {c["bytes_up"] for c in done.clients} == {c["bytes_down"] for c in done.clients}
    assert {c["bytes_up"] for c in done.clients} == {numbers}
    assert [r for r in done.records if r["kind"] == "evaluate" and r["round"] == 2]
    assert "a toy was exported" in done.said

    model = Tiny().load(torch.device("cpu"))
    update = load(done.folder, model.info, LowRankPayload)
    assert isinstance(update, MaskedOuter)
    assert any(bool(a.any()) for a in update.a.values())
    assert main([str(done.folder), str(tmp_path / "merged")]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    model.mount(update)
    torch.testing.assert_close(logits(merged), logits(model.network), rtol=1e-4, atol=1e-4)


def test_the_fused_engine_says_why_it_trains_it_one_by_one(toy):
    alone, fused = toy("engine=sequential"), toy("engine=fused", output="fused")
    assert fused.hash == alone.hash
    assert fused.said.count("engine: masked outer products one by one") == 1


def test_planted_faults_cost_their_own_clients(toy):
    faults = ["engine=faulty", "engine.nan_fraction=0.3", "engine.shape_fraction=0.3"]
    done = toy(*faults, "federation.min_success=0.1")
    assert sum(r["rejected"] for r in done.rounds) > 0
    assert done.status["status"] == "completed"


@pytest.mark.parametrize(
    ("strategy", "technique", "said"),
    [
        (STRATEGY, None, "OuterMean averages masked outer products: use .* client/technique=outer"),
        (None, TECHNIQUE, "trains masked outer products, and FlexLoRA averages LoRA's A and B"),
        (None, TECHNIQUE | {"depth": 2}, "client.technique: unknown key 'depth'=2"),
        (None, {"_target_": target_of(OuterMean)}, "OuterMean is not a Technique"),
    ],
)
def test_what_does_not_go_together_is_refused(strategy, technique, said):
    cfg = configured(SMALL)
    cfg.strategy, cfg.client.technique = (
        strategy or cfg.strategy,
        technique or cfg.client.technique,
    )
    with pytest.raises(ConfigError, match=said):
        build_parts(cfg)


@pytest.mark.parametrize(
    "target", ["fedlora.core.types.Factors", "os.path", "tests.nowhere.Thing", "", None]
)
def test_only_payload_classes_are_found(target):
    for trusted in (True, False):
        with pytest.raises(ValueError, match="names no payload class"):
            payload_class(target, load=trusted)


def test_what_a_client_sends_imports_nothing(monkeypatch):
    monkeypatch.setattr("importlib.import_module", pytest.fail)
    with pytest.raises(ValueError, match="names no payload class that is known here"):
        payload_class("antigravity.Payload", load=False)
