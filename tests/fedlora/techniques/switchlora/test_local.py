"""F5: a client that exchanges by itself is stand-alone training on PEFT's layers."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.nn import functional

from fedlora.core.rates import learning_rates
from fedlora.core.types import Client, LocalPlan, Ranks, Setting, TrainJob
from fedlora.data.batches import (
    micro_batches,
    num_steps,
    step_indices,
)
from fedlora.engine.client import LoRAClient
from fedlora.models.forward import supervised_logits
from fedlora.techniques.lora.payload import LowRankPayload
from fedlora.techniques.switchlora.controller import SwitchController
from fedlora.techniques.switchlora.init import SIDES
from fedlora.techniques.switchlora.layer import begin
from fedlora.techniques.switchlora.optimizer import RowAdamW
from fedlora.techniques.switchlora.peft import adapt, wrap_network
from fedlora.techniques.switchlora.technique import SwitchTraining as Switching
from fedlora.training.loop import clip_and_step
from strategies.switchlora import DENSE, SwitchLoRA
from tests.fedlora.engine.world import NETWORKS, SEED, FakeStore, examples
from tests.fedlora.models.networks import wrap
from tests.generators import dense

OFTEN = Switching(interval=4.0, ratio=10.0, freeze=2)
STEPS = 12
PLAN = LocalPlan(
    lr=5e-3, steps=STEPS, batch_size=3, dropout=0.0, technique=OFTEN, schedule="cosine"
)


def population(modules) -> Setting:
    ranks = Ranks({m.path: 4 for m in modules})
    return Setting(modules, 1000, 2.0, (Client(0, ranks, 7),), SEED)


def alone(network, plan: LocalPlan, seed: int, turn: int = 0, first: int = 0, total: int = STEPS):
    """Stand-alone training on a client's data; what the weights then differ by."""
    before = {n: p.detach().clone() for n, p in network.named_parameters()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedlora.techniques.switchlora.peft.begin", partial(begin, turn=turn))
        peft, controller = wrap_network(
            network, 4, switching=OFTEN, total=total, seed=seed, alpha=2.0
        )
    base = peft.get_base_model()
    optimizer = RowAdamW(controller.groups(), plan.lr, plan.betas, plan.eps)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    data = examples(7)
    order = step_indices(len(data), plan, seed=seed, round=turn + 1, client=0)
    rates = learning_rates(num_steps(len(data), plan), plan)
    for t, (rate, indices) in enumerate(zip(rates, order, strict=True)):
        optimizer.zero_grad()
        batches = micro_batches(data, indices, plan)
        tokens = sum(b.tokens for b in batches)
        for batch in batches:
            logits = supervised_logits(base, batch)
            (functional.cross_entropy(logits, batch.targets, reduction="sum") / tokens).backward()
        controller.before_step(first + t, optimizer)
        clip_and_step(optimizer, trained, rate, plan.max_grad_norm)
    assert controller.exchanged > 20
    return {p: x.effective() - before[f"{p}.weight"] for p, x in controller.layers.items()}


def rounds(model, method: SwitchLoRA, count: int, base: LocalPlan = PLAN):
    setting = population(model.info.modules)
    client, state = setting.clients[0], method.init_state(setting)
    store = FakeStore({0: examples(7)})
    for t in range(count):
        start, plan = method.client_start(state, client), method.plan(state, client, base)
        job = TrainJob(SEED, t + 1, client, start, plan)
        update = LoRAClient(model, store, client, SEED).train(job)
        state = method.aggregate(state, [update])
    return state, update


def test_one_client_and_one_round_is_stand_alone_training():
    model = wrap(NETWORKS["llama"]())
    method = SwitchLoRA(mode=DENSE, switching=OFTEN, steps=STEPS, horizon=1)
    state, update = rounds(model, method, 1)
    wanted = alone(NETWORKS["llama"](), PLAN, SEED)
    got = dense(method.global_update(state))
    assert got.keys() == wanted.keys()
    for path, w in wanted.items():
        torch.testing.assert_close(got[path], w, rtol=0, atol=1e-12)
    assert update.metrics["steps"] == STEPS
    assert update.metrics["delta_norm"] == pytest.approx(
        sum(float(w.square().sum()) for w in wanted.values()) ** 0.5, rel=1e-6
    )


def test_two_rounds_are_stand_alone_training_twice_on_one_schedule():
    """Each round from candidate vectors of its own, the switches as frequent as the run's step
    says, on the weights that the round before has moved."""
    method = SwitchLoRA(mode=DENSE, switching=OFTEN, steps=STEPS, horizon=2)
    state, _ = rounds(wrap(NETWORKS["llama"]()), method, 2)
    got = dense(method.global_update(state))
    network = NETWORKS["llama"]()
    wanted = {path: torch.zeros_like(w) for path, w in got.items()}
    for turn in range(2):
        moved = copy.deepcopy(network)
        with torch.no_grad():
            for path, w in wanted.items():
                moved.get_submodule(path).weight += w
        for path, w in alone(moved, PLAN, SEED, turn, turn * STEPS, 2 * STEPS).items():
            wanted[path] += w
    for path, w in wanted.items():
        torch.testing.assert_close(got[path], w, rtol=0, atol=1e-12)


def test_training_leaves_its_start_to_the_other_clients():
    model = wrap(NETWORKS["llama"]())
    method = SwitchLoRA(mode=DENSE, switching=OFTEN, steps=STEPS, horizon=2)
    setting = population(model.info.modules)
    (client,), state = setting.clients, method.init_state(setting)
    start = method.client_start(state, client)
    job = TrainJob(SEED, 1, client, start, method.plan(state, client, PLAN))
    before = copy.deepcopy(start)
    trainer = LoRAClient(model, FakeStore({0: examples(7)}), client, SEED)
    one, again = trainer.train(job), trainer.train(job)
    for path, t in before.shift.items():
        assert torch.equal(start.shift[path], t), path
        assert torch.equal(one.payload.shift[path], again.payload.shift[path]), path
    for path, f in before.factors.items():
        assert torch.equal(start.factors[path].a, f.a) and torch.equal(start.factors[path].b, f.b)


def test_alternating_rounds_without_exchanges_are_alternating_lora():
    """F4: one client, one step a round, against PEFT's layers and PyTorch's AdamW."""
    model, network = wrap(NETWORKS["llama"]()), NETWORKS["llama"]()
    never = replace(OFTEN, interval=1e12)
    plan = replace(PLAN, steps=1, technique=never, schedule="constant")
    method = SwitchLoRA(switching=never, steps=1, horizon=6)
    setting = population(model.info.modules)
    state = method.init_state(setting)
    start = method.client_start(state, setting.clients[0])
    before = {
        m.path: network.get_submodule(m.path).weight.detach().clone() for m in setting.modules
    }
    peft = adapt(network, 4, "all-linear", 2.0)
    with torch.no_grad():
        for path, layer in peft.layers.items():
            layer.base_layer.weight += start.shift[path]
            layer.lora_A["default"].weight.copy_(start.factors[path].a)
            layer.lora_B["default"].weight.copy_(start.factors[path].b)
    data = examples(7)
    for t in range(6):
        for name, p in peft.network.named_parameters():
            p.requires_grad_(("lora_B" if t % 2 else "lora_A") in name)
        trained = [p for p in peft.network.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, plan.lr, weight_decay=0.0)
        (indices,) = step_indices(len(data), plan, seed=SEED, round=t + 1, client=0)
        (batch,) = micro_batches(data, indices, plan)
        logits = supervised_logits(peft.network.get_base_model(), batch)
        functional.cross_entropy(logits, batch.targets).backward()
        torch.nn.utils.clip_grad_norm_(trained, plan.max_grad_norm)
        optimizer.step()
        peft.network.zero_grad()
    state, _ = rounds(model, method, 6, plan)
    got = dense(method.global_update(state))
    for path, layer in peft.layers.items():
        wanted = layer.base_layer.weight + layer.get_delta_weight("default") - before[path]
        assert float(wanted.detach().abs().max()) > 1e-3
        torch.testing.assert_close(got[path], wanted.detach(), rtol=0, atol=1e-11)


def test_pools_are_drawn_anew_each_round(monkeypatch):
    """And a client's slots hold vectors of the pools that its start was drawn from."""
    seen = []

    class Watched(SwitchController):
        def __init__(self, *arguments) -> None:
            super().__init__(*arguments)
            for layer in self.layers.values():
                for side in SIDES:
                    pool = layer.candidates[side].clone()
                    assert torch.equal(layer.vectors(side), pool[layer.ids[side]])
                    seen.append(pool)

    monkeypatch.setattr("fedlora.techniques.switchlora.local.SwitchController", Watched)
    model = wrap(NETWORKS["llama"]())
    rounds(model, SwitchLoRA(mode=DENSE, switching=OFTEN, steps=STEPS, horizon=2), 2)
    half = len(seen) // 2
    assert half and not any(torch.equal(a, b) for a, b in zip(seen, seen[half:], strict=False))


def test_the_schedule_of_exchanges_goes_on_and_nothing_is_left_mounted():
    model = wrap(NETWORKS["llama"]())
    base = copy.deepcopy(model.network.state_dict())
    method = SwitchLoRA(mode=DENSE, switching=OFTEN, steps=STEPS, horizon=3)
    one, _ = rounds(model, method, 2)
    two, _ = rounds(model, method, 2)
    for name, t in one.items():
        assert torch.equal(t, two[name]), name
    assert model.parameters() == []
    for name, t in model.network.state_dict().items():
        assert torch.equal(t, base[name]), name


def test_its_update_has_more_than_lora_s_rank():
    model = wrap(NETWORKS["llama"]())
    found = []
    for switching in (OFTEN, replace(OFTEN, interval=1e12)):
        method = SwitchLoRA(mode=DENSE, switching=switching, steps=STEPS, horizon=1)
        _, update = rounds(model, method, 1)
        ranks = [torch.linalg.matrix_rank(d, rtol=1e-9) for d in update.payload.shift.values()]
        found.append([int(r) for r in ranks])
    assert max(found[1]) <= 8
    assert max(found[0]) > 8


def test_local_switches_need_a_base_that_may_move():
    model = wrap(NETWORKS["llama"]())
    setting = population(model.info.modules)
    start = SwitchLoRA(mode=DENSE, switching=OFTEN, steps=2, horizon=1)
    factors = start.client_start(start.init_state(setting), setting.clients[0]).factors
    job = TrainJob(SEED, 1, setting.clients[0], LowRankPayload(factors), PLAN)
    client = LoRAClient(model, FakeStore({0: examples(7)}), setting.clients[0], SEED)
    with pytest.raises(TypeError, match="LowRankPayload has no such base; use strategy=switchlora"):
        client.train(job)
