"""The client as Flower sees it: arrays and scalars in, arrays and scalars out."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.client import Client, ClientApp, NumPyClient
from flwr.supercore.task_identity import TaskIdentity

from fedlora.core.types import EvaluateJob, EvaluatePlan, LocalPlan
from fedlora.engine.client import LoRAClient
from fedlora.techniques.lora.self_pruning import SelfPrune
from fedlora.techniques.lora.technique import LoRA
from fedlora.wire.codec import decode_payload, encode_payload, plan_to_json
from tests.fedlora.engine.world import SEED, FakeStore, client, examples, job, model, start, vector

PLAN = LocalPlan(lr=3e-3, batch_size=3, epochs=2)
STORE = FakeStore({0: examples(7), 1: examples(5, seed=1)}, {0: ["w1"] * 7, 1: ["w2"] * 5})


def config(factors, plan, **more):
    flat, header = encode_payload(factors, "float64")
    return [flat], {"header": header, "plan": plan_to_json(plan), "round": 3, **more}


def test_fit_is_train():
    resident = model()
    factors = start(resident)
    member = LoRAClient(resident, STORE, client(factors), SEED)
    assert isinstance(member, NumPyClient)
    update = member.train(job(factors, PLAN))
    parameters, n, metrics = member.fit(*config(factors, PLAN))
    assert n == update.num_examples == 7
    back = decode_payload(parameters[0], metrics["header"])
    assert torch.equal(vector(back), vector(update.payload))
    timed = {"seconds", "cpu_seconds"}
    assert {k: v for k, v in metrics.items() if k not in timed | {"header"}} == {
        k: v for k, v in update.metrics.items() if k not in timed
    }


def test_the_seed_of_the_config_wins():
    resident = model()
    factors = start(resident)
    one = LoRAClient(resident, STORE, client(factors), SEED).fit(*config(factors, PLAN))
    two = LoRAClient(resident, STORE, client(factors), 99).fit(*config(factors, PLAN, seed=SEED))
    three = LoRAClient(resident, STORE, client(factors), 99).fit(*config(factors, PLAN))
    assert np.array_equal(one[0][0], two[0][0])
    assert not np.array_equal(one[0][0], three[0][0])


def test_a_pruned_update_carries_its_ranks():
    resident = model()
    factors = start(resident, 4)
    plan = dataclasses.replace(PLAN, lr=0.05, technique=LoRA(SelfPrune(5.0, 0.5, 1)))
    parameters, _, metrics = LoRAClient(resident, STORE, client(factors), SEED).fit(
        *config(factors, plan)
    )
    ranks = {f.rank for f in decode_payload(parameters[0], metrics["header"]).values()}
    assert ranks == {2}


def test_evaluate_is_evaluate_job():
    resident = model()
    factors = start(resident)
    member = LoRAClient(resident, STORE, client(factors), SEED)
    plan = EvaluatePlan(max_new_tokens=3)
    wanted = member.evaluate_job(EvaluateJob(SEED, 3, client(factors), factors, plan)).scalars
    loss, n, metrics = member.evaluate(*config(factors, plan))
    assert (loss, n, metrics) == (wanted["loss_response"], 7, dict(wanted))
    bare = member.evaluate([], {"plan": plan_to_json(plan), "round": 0})
    assert bare[0] != loss


def test_a_job_of_somebody_else_is_refused():
    resident = model()
    factors = start(resident)
    member = LoRAClient(resident, STORE, client(factors), SEED)
    with pytest.raises(ValueError, match="client 0 was given a job of client 1"):
        member.train(job(factors, PLAN, id=1))


def test_a_plan_of_the_wrong_kind_is_refused():
    resident = model()
    factors = start(resident)
    member = LoRAClient(resident, STORE, client(factors), SEED)
    with pytest.raises(TypeError, match="EvaluatePlan, not a LocalPlan"):
        member.fit(*config(factors, EvaluatePlan()))


def test_it_runs_in_a_plain_flower_client_app(monkeypatch):
    for name in ("_run_id", "_task_id", "_node_id"):  # a SuperNode sets these for its process
        monkeypatch.setattr(TaskIdentity, name, 1)
    resident = model()
    factors = start(resident)
    members = [client(factors, 0), client(factors, 1)]

    def client_fn(context: Context) -> Client:
        member = members[int(context.node_config["partition-id"])]
        return LoRAClient(resident, STORE, member, SEED).to_client()

    app = ClientApp(client_fn=client_fn)
    parameters, scalars = config(factors, PLAN)
    arrays = ArrayRecord({"0": Array(parameters[0])})
    message = Message(
        content=RecordDict({"fitins.parameters": arrays, "fitins.config": ConfigRecord(scalars)}),
        dst_node_id=1,
        message_type="train",
    )
    context = Context(
        run_id=1,
        node_id=1,
        node_config={"partition-id": 1, "num-partitions": 2},
        state=RecordDict(),
        run_config={},
    )
    reply = app(message, context)
    wanted = LoRAClient(resident, STORE, members[1], SEED).fit(parameters, scalars)
    (array,) = reply.content.array_records["fitres.parameters"].to_numpy_ndarrays()
    assert np.array_equal(array, wanted[0][0])
    assert reply.content.metric_records["fitres.num_examples"]["num_examples"] == 5
    header = json.loads(reply.content.config_records["fitres.metrics"]["header"])
    assert header["dtype"] == "float64"
