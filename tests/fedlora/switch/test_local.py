"""F5: a client that exchanges by itself is stand-alone training on PEFT's layers."""

import copy
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from fedlora.batches import micro_batches, num_steps, step_indices
from fedlora.client import LoRAClient
from fedlora.engine.forward import supervised_logits
from fedlora.engine.loop import clip_and_step, learning_rates
from fedlora.models.switch import switched
from fedlora.switch.optimizer import RowAdamW
from fedlora.types import Client, LocalPlan, Ranks, Setting, Switching, TrainJob
from strategies.switchlora import DENSE, SwitchLoRA
from tests.fedlora.engine.world import NETWORKS, SEED, FakeStore, examples
from tests.fedlora.models.networks import wrap
from tests.generators import dense

OFTEN = Switching(interval=4.0, ratio=10.0, freeze=2)
STEPS = 12
PLAN = LocalPlan(lr=5e-3, steps=STEPS, batch_size=3, dropout=0.0, switch=OFTEN, schedule="cosine")


def population(modules) -> Setting:
    ranks = Ranks({m.path: 4 for m in modules})
    return Setting(modules, 1000, 2.0, (Client(0, ranks, 7),), SEED)


def alone(network, plan: LocalPlan, seed: int, turn: int = 0, first: int = 0, total: int = STEPS):
    """Stand-alone training on a client's data; what the weights then differ by."""
    before = {n: p.detach().clone() for n, p in network.named_parameters()}
    peft, controller = switched(network, 4, switching=OFTEN, total=total, seed=seed, alpha=2.0)
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
        clip_and_step(optimizer, trained, rate, plan.clip)
    assert controller.exchanged > 20
    return {p: x.effective() - before[f"{p}.weight"] for p, x in controller.layers.items()}


def rounds(model, method: SwitchLoRA, count: int):
    setting = population(model.info.modules)
    client, state = setting.clients[0], method.init_state(setting)
    store = FakeStore({0: examples(7)})
    for t in range(count):
        start, plan = method.start_adapter(state, client), method.plan(state, client, PLAN)
        job = TrainJob(SEED, t + 1, client, start, plan)
        update = LoRAClient(model, store, client, SEED).train(job)
        state = method.aggregate(state, [update])
    return state, update


def test_one_client_and_one_round_is_stand_alone_training():
    model = wrap(NETWORKS["llama"]())
    method = SwitchLoRA(mode=DENSE, switching=OFTEN, steps=STEPS, horizon=1)
    state, update = rounds(model, method, 1)
    wanted = alone(NETWORKS["llama"](), PLAN, SEED)
    got = dense(method.global_adapter(state))
    assert got.keys() == wanted.keys()
    for path, w in wanted.items():
        torch.testing.assert_close(got[path], w, rtol=0, atol=1e-12)
    assert update.metrics["steps"] == STEPS
    assert update.metrics["delta_norm"] == pytest.approx(
        sum(float(w.square().sum()) for w in wanted.values()) ** 0.5, rel=1e-6
    )


def test_the_schedule_of_exchanges_goes_on_and_nothing_is_left_mounted():
    model = wrap(NETWORKS["llama"]())
    base = copy.deepcopy(model.network.state_dict())
    method = SwitchLoRA(mode=DENSE, switching=OFTEN, steps=STEPS, horizon=3)
    one, _ = rounds(model, method, 2)
    two, _ = rounds(model, method, 2)
    for name, t in one.items():
        assert torch.equal(t, two[name]), name
    assert model.factors() == []
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


def test_local_exchanges_need_a_base_that_may_move():
    model = wrap(NETWORKS["llama"]())
    setting = population(model.info.modules)
    start = SwitchLoRA(mode=DENSE, switching=OFTEN, steps=2, horizon=1)
    factors = start.start_adapter(start.init_state(setting), setting.clients[0]).factors
    job = TrainJob(SEED, 1, setting.clients[0], factors, PLAN)
    client = LoRAClient(model, FakeStore({0: examples(7)}), setting.clients[0], SEED)
    with pytest.raises(TypeError, match="dict is none; use strategy=switchlora"):
        client.train(job)
