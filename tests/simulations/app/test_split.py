"""Whole runs of SplitLoRA on the embedded model: both transports, resuming, what is left behind."""

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from fedlora.core.errors import ConfigError
from fedlora.models.spec import Tiny
from fedlora.run import checkpoint
from fedlora.techniques.lora.peft import load_peft

SPLIT = ["strategy=splitlora", "ranks=homogeneous", "client.dropout=0.1", "population.per_round=3"]


@pytest.mark.parametrize(
    "words",
    [
        ["strategy.average_every=1"],
        pytest.param(["strategy.tail=2"], marks=pytest.mark.slow),
        pytest.param(["strategy.rule.update=per_client"], marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_both_transports_and_a_resumed_run_leave_the_same_state(federate, words):
    here = federate(*SPLIT, *words)
    there = [*SPLIT, *words, "strategy.transport=messages", "strategy.keep_graphs=true"]
    federate(*there, "rounds=1", output="cut")
    told = federate(*there, "resume=auto", output="cut")
    assert told.status["status"] == here.status["status"] == "completed"
    assert told.hash == here.hash
    for ours, theirs in zip(here.rounds, told.rounds, strict=True):
        assert ours["train/loss"] == theirs["train/loss"]
        assert ours["wire/up_bytes"] == theirs["wire/up_bytes"] > 0
        assert ours["wire/down_bytes"] == theirs["wire/down_bytes"] > 0


def test_unequal_cuts_and_ranks_end_in_one_adapter_that_peft_loads(federate):
    """What it computes in PEFT is what the run's own model computes."""
    done = federate(
        *SPLIT,
        "ranks=uniform",
        "strategy@strategy.aggregator=flexlora",
        "+strategy.tier_cuts={T1: 2, T4: 4}",
        "evaluate=loss",
        "evaluate.clients=1",
        "evaluate.groups=[participants]",
        "evaluate.adapters=[own,full]",
    )
    assert done.status["status"] == "completed"
    adapter = load_peft(done.folder / "adapter")
    tiny = Tiny().resolved()
    model = tiny.load(torch.device("cpu"))
    assert adapter.keys() == model.layers.keys()
    ids = torch.arange(10, 40)[None]
    model.mount(adapter)
    with torch.no_grad():
        ours = model.network(input_ids=ids).logits
    model.unmount()
    plain = AutoModelForCausalLM.from_pretrained(tiny.folder())
    theirs = peft.PeftModel.from_pretrained(plain, done.folder / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(input_ids=ids).logits, ours, rtol=1e-4, atol=1e-4)
    state = checkpoint.latest(done.folder / "checkpoints").state
    assert state["cuts"].tolist() == [1, 2, 4]


def test_an_estimate_that_fails_costs_only_itself(federate, monkeypatch):
    def broken(*_):
        raise RuntimeError("no formula")

    words = ("strategy=splitlora", "rounds=1", "ranks=homogeneous", "ranks.rank=2")
    whole = federate(*words, output="whole")
    monkeypatch.setattr("fedlora.split.run_round.client_part", broken)
    bare = federate(*words, output="bare")
    assert bare.hash == whole.hash
    assert all("client_flops" in row for row in whole.clients)
    assert not any("client_flops" in row for row in bare.clients)


MESSAGES = [*SPLIT, "strategy.transport=messages", "engine=faulty", "population.per_round=6"]


@pytest.mark.parametrize("fault", ["raise", "nan", "shape"])
def test_planted_faults_cost_their_clients_alone(federate, finished, fault):
    """The same ones every time, whichever way they fail before they return anything."""
    done = federate(*MESSAGES, f"engine.{fault}_fraction=0.3", output=fault)
    assert done.status["status"] == "completed"
    failed = {(r["round"], r["client"]) for r in done.clients if "failure" in r}
    assert failed
    kinds = {r["failure"] for r in done.clients if "failure" in r}
    assert kinds == {"PlantedFault" if fault == "raise" else "RejectedUpdate"}
    again = finished(*MESSAGES, "engine.raise_fraction=0.3", output="again")
    assert {(r["round"], r["client"]) for r in again.clients if "failure" in r} == failed


def test_a_client_can_fail_between_its_forward_pass_and_its_gradient(federate):
    """It loses that gradient, and its activations have trained the server; one that fails at once
    is out."""
    plain = federate(*MESSAGES, "rounds=1", output="plain")
    chosen = plain.clients[0]["client"]
    words = [*MESSAGES, "rounds=1", f"engine.deadly=[{chosen}]", "engine.deadly_way=system_exit"]
    early, late = (
        federate(*words, f"engine.deadly_at={at}", output=at) for at in ("forward", "backward")
    )
    assert f"client {chosen} loses step 0: SystemExit: 9" in early.said
    assert [r["client"] for r in early.clients if "failure" in r] == [chosen]
    assert f"client {chosen} loses step 1" in late.said
    assert {r["client"]: r["dropped_steps"] for r in late.clients}[chosen] == 1
    assert len({plain.hash, late.hash, early.hash}) == 3


def test_faults_that_no_worker_could_have_are_refused(federate):
    with pytest.raises(ConfigError, match=r"strategy\.transport=local.*transport=messages"):
        federate(*SPLIT, "engine=faulty", "engine.raise_fraction=0.3")
