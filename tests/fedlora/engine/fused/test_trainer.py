"""A row is a client: its optimizer is its own, and who does not run does not move."""

import copy
import dataclasses
import math

import pytest
import torch

from fedlora.core.types import Failure, LocalPlan, Update
from fedlora.engine.fused.bank import AdapterBank
from fedlora.engine.fused.model import FusedModel
from fedlora.engine.fused.schedule import policy
from fedlora.engine.fused.trainer import Chain, FusedTrainer, Limits, Planner, Resident
from tests.fedlora.engine.world import FakeStore, examples, job, model, start

PLAN = LocalPlan(lr=3e-3, steps=5, batch_size=3, dropout=0.0, weight_decay=0.1, max_grad_norm=0.5)
RANKS = (2, 1, 3)


@pytest.fixture(scope="module")
def fused() -> FusedModel:
    return FusedModel(model("llama"), is_ragged=True)


def planned(fused, plan=PLAN, clients=3, n=5) -> tuple[list[Chain], FakeStore]:
    store = FakeStore({k: examples(n, k) for k in range(clients)})
    jobs = [job(start(fused.model, RANKS[k % 3], k), plan, k) for k in range(clients)]
    chains = list(Planner(fused, store).chains(jobs))
    assert all(isinstance(c, Chain) for c in chains)
    return chains, store


def seated(fused, plan=PLAN) -> tuple[AdapterBank, list[Resident]]:
    """A bank with three residents."""
    chains, store = planned(fused, plan)
    bank = AdapterBank(3, max(c.layout.size for c in chains), torch.float64, fused.model.device)
    residents = [
        Resident(c, k, *bank.load(k, c.start), store.examples(k, "train"))
        for k, c in enumerate(chains)
    ]
    return bank, residents


def gradient(resident: Resident, step: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(100 * resident.slot + step)
    return torch.randn(resident.grad.shape, generator=g, dtype=torch.float64)


def run(resident: Resident, step: int) -> None:
    """A forward, whose gradient is made up."""
    resident.lane(step)
    resident.grad.copy_(gradient(resident, step))
    resident.learn(step, torch.tensor(1.0, dtype=torch.float64))


@pytest.mark.parametrize("frozen", ["none", "a", "b"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_row_is_stepped_as_by_an_optimizer_of_its_own(fused, optimizer, frozen):
    """Bit for bit, among others that have run more often or not at all."""
    plan = dataclasses.replace(
        PLAN, optimizer=optimizer, momentum=0.9, train_a=frozen != "a", train_b=frozen != "b"
    )
    _, residents = seated(fused, plan)
    middle = residents[1]
    size, a = middle.chain.layout.size, middle.chain.layout.a_size
    trained = {"none": slice(0, size), "a": slice(a, size), "b": slice(0, a)}[frozen]
    alone = torch.nn.Parameter(middle.chain.start[trained].clone())
    if optimizer == "adamw":
        own = torch.optim.AdamW([alone], plan.lr, weight_decay=plan.weight_decay, fused=True)
    else:
        own = torch.optim.SGD([alone], plan.lr, momentum=0.9, weight_decay=plan.weight_decay)
    for step in range(5):
        for other in residents[:1] * 2 if step == 1 else residents[:1]:
            if len(other.norms) < 5:
                run(other, len(other.norms))
        run(middle, step)
        alone.grad = gradient(middle, step)[trained]
        torch.nn.utils.clip_grad_norm_([alone], plan.max_grad_norm)
        own.param_groups[0]["lr"] = plan.lr * (1 - step / 5)
        own.step()
        assert torch.equal(middle.row[trained], alone.detach())
    untouched = torch.ones(size, dtype=torch.bool)
    untouched[trained] = False
    assert torch.equal(middle.row[untouched], middle.chain.start[untouched])


def test_who_does_not_run_keeps_every_bit(fused):
    """Parameters, gradients, moments and step count: no weight decay on idle steps."""
    bank, residents = seated(fused)
    for resident in residents:
        run(resident, 0)

    def state(resident):
        return bank.params[resident.slot].clone(), copy.deepcopy(
            resident._stepper.optimizer.state_dict()
        )

    before = [state(r) for r in residents]
    for step in (1, 2):
        run(residents[1], step)
    for k in (0, 2):
        row, moments = state(residents[k])
        assert torch.equal(row, before[k][0])
        assert str(moments) == str(before[k][1])
        (one,) = moments["state"].values()
        (two,) = before[k][1]["state"].values()
        assert all(torch.equal(one[name], two[name]) for name in two) and one["step"] == 1
    assert not torch.equal(state(residents[1])[0], before[1][0])
    assert not bank.grads.any()


def test_gradients_accumulate_over_the_forwards_of_a_step(fused):
    plan = dataclasses.replace(PLAN, micro_batch_size=1, steps=2)
    _, residents = seated(fused, plan)
    first = residents[0]
    begin = first.row.clone()
    tokens = []
    for index in range(3):
        lane = first.lane(index)
        tokens.append(lane.tokens)
        first.grad += gradient(first, index)
        first.learn(index, torch.tensor(float(index + 1), dtype=torch.float64))
        assert torch.equal(first.row, begin) == (index < 2)
    total = sum(gradient(first, i) for i in range(3))
    assert first.norms[0] == pytest.approx(float(total.norm()), rel=1e-12)
    assert len(set(tokens)) == 1 and len(first.tokens) == 1  # one step's, in every forward
    assert [float(x) for x in first.losses] == [6.0]


def test_a_plan_names_every_forward_once_and_its_real_size(fused):
    plan = dataclasses.replace(PLAN, steps=0, epochs=2, batch_size=4, micro_batch_size=3)
    chains, store = planned(fused, plan, n=7)
    for k, chain in enumerate(chains):
        held = store.examples(k, "train")
        used = [i for step in chain.steps for part in step for i in part]
        assert sorted(used) == sorted(list(range(7)) * 2)
        assert [len(step) for step in chain.steps] == [2, 1] * 2
        assert len(chain.forwards) == len(chain.work.forwards) == 6
        for (s, i), forward in zip(chain.forwards, chain.work.forwards, strict=True):
            lengths = [len(held[x].input_ids) - 1 for x in chain.steps[s][i]]
            assert (forward.rows, forward.width, forward.tokens) == (
                len(lengths),
                max(lengths),
                sum(lengths),
            )


def test_clients_that_share_a_start_share_its_row(fused):
    store = FakeStore({k: examples(4, k) for k in range(3)})
    shared, own = start(fused.model, 2), start(fused.model, 2, 5)
    jobs = [job(f, PLAN, k) for k, f in enumerate((shared, own, shared))]
    one, two, three = Planner(fused, store).chains(jobs)
    assert one.start is three.start and one.start is not two.start
    assert one.layout is two.layout


def test_a_client_pays_for_its_share_of_a_step(fused):
    chains, store = planned(fused)
    trainer = FusedTrainer(fused, store)
    results = list(trainer.train(chains, Limits(policy("refill"), 60, 3)))
    assert not trainer.rescue and len(results) == 3
    for update in results:
        assert isinstance(update, Update)
        assert update.metrics["seconds"] > 0 and math.isfinite(update.metrics["cpu_seconds"])


def test_a_measure_that_is_not_finite_fails_its_client_alone(fused, monkeypatch):
    chains, store = planned(fused)
    honest = Resident.update

    def update(self, num_examples):
        if self.slot == 1:
            raise FloatingPointError("the update is not finite")
        return honest(self, num_examples)

    monkeypatch.setattr(Resident, "update", update)
    results = FusedTrainer(fused, store).train(chains, Limits(policy("refill"), 60, 3))
    kinds = {r.client.id: type(r) for r in results}
    assert list(kinds.values()).count(Failure) == 1 and len(kinds) == 3
