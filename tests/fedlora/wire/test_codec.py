"""Round trips over the wire are exact, and a damaged message is refused."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.core.confusion import confusion
from fedlora.core.metric import LOWEST, Metric, count, macro_f1
from fedlora.core.types import (
    Client,
    EvaluateJob,
    EvaluatePlan,
    Evaluation,
    Factors,
    Failure,
    LocalPlan,
    Ranks,
    TrainJob,
    Update,
)
from fedlora.techniques.lora.payload import LowRankPayload
from fedlora.techniques.lora.self_pruning import SelfPrune
from fedlora.techniques.lora.technique import LoRA
from fedlora.techniques.rebased.payload import Rebased
from fedlora.techniques.sparse.payload import SparseDelta
from fedlora.wire.codec import decode_payload, encode_payload, payload_bytes, update_bytes
from fedlora.wire.messages import decode_jobs, decode_results, encode_jobs, encode_results, glance


def adapter(seed: int, ranks: dict[str, int], dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    factors = {
        p: Factors(
            torch.randn(r, 5, generator=g).to(dtype), torch.randn(7, r, generator=g).to(dtype), 12.0
        )
        for p, r in ranks.items()
    }
    return LowRankPayload(factors)


def same(x, y):
    if isinstance(x, SparseDelta):
        assert (x.seed, x.density) == (y.seed, y.density)
        assert all(torch.equal(x.values[p], y.values[p]) for p in x.values)
        return
    assert list(x) == list(y)
    for p in x:
        assert torch.equal(x[p].a.float(), y[p].a.float())
        assert torch.equal(x[p].b.float(), y[p].b.float())
        assert x[p].alpha == y[p].alpha


@settings(derandomize=True, deadline=None, max_examples=30)
@given(
    ranks=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    seed=st.integers(0, 99),
    dtype=st.sampled_from(["float32", "bfloat16", "float64"]),
)
def test_payload_round_trip_is_exact(ranks, seed, dtype):
    x = adapter(seed, {f"layer.{i}": r for i, r in enumerate(ranks)}, getattr(torch, dtype))
    array, header = encode_payload(x, dtype)
    same(x, decode_payload(array, header))
    assert payload_bytes(x, dtype) == array.nbytes


def test_sparse_round_trip():
    x = SparseDelta(3, 0.25, {"a": torch.randn(4), "b": torch.zeros(0)})
    same(x, decode_payload(*encode_payload(x)))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_factors_over_a_moved_base_round_trip(dtype):
    factors = adapter(0, {"q": 2, "k": 3}, getattr(torch, dtype))
    shift = {p: torch.randn(7, 5, dtype=getattr(torch, dtype)) for p in ("q", "k", "v")}
    for x in (Rebased(shift, factors), Rebased(shift), Rebased({})):
        array, header = encode_payload(x, dtype)
        back = decode_payload(array, header)
        assert isinstance(back, Rebased)
        assert list(back.shift) == list(x.shift)
        assert all(torch.equal(t, x.shift[p]) for p, t in back.shift.items())
        same(x.factors, back.factors)
        assert payload_bytes(x, dtype) == update_bytes(x, LocalPlan(train_a=False), dtype)
        assert payload_bytes(x, dtype) == array.nbytes


def test_a_cut_payload_is_refused():
    array, header = encode_payload(adapter(0, {"q": 2}))
    with pytest.raises(ValueError, match="holds 23 scalars, its header promises 24"):
        decode_payload(array[:-1], header)


def test_jobs_round_trip_and_send_shared_starts_once():
    small, large = Ranks({"q": 1}), Ranks({"q": 3})
    start = {small: adapter(0, dict(small)), large: adapter(1, dict(large))}
    plan = LocalPlan(lr=0.5, technique=LoRA(SelfPrune(0.1, 0.9, 2)))
    clients = [Client(i, small if i % 3 else large, 10 + i, f"t{i % 3}") for i in range(6)]
    jobs = [TrainJob(7, 2, c, start[c.ranks], plan) for c in clients]
    jobs.append(EvaluateJob(7, 2, clients[0], None, EvaluatePlan(split="eval")))
    content = encode_jobs(jobs, worker="{}", source="abc", wire="float32")
    assert len(content.array_records["starts"]) == 2
    back = decode_jobs(content)
    assert (back.worker, back.source, back.wire) == ("{}", "abc", "float32")
    for job, got in zip(jobs, back.jobs, strict=True):
        assert (job.seed, job.round, job.client, job.plan) == (
            got.seed,
            got.round,
            got.client,
            got.plan,
        )
        if isinstance(job, TrainJob):
            same(job.start, got.start)
    assert back.jobs[-1].adapter is None


def test_results_round_trip():
    ranks = Ranks({"q": 3})
    a, b, c = (Client(i, ranks, 4) for i in range(3))
    shrunk = Client(0, Ranks({"q": 2}), 4)
    results = [
        Update(shrunk, adapter(0, {"q": 2}), 4, {"loss": 1.5}),
        Evaluation(
            b,
            {
                "rouge_l": Metric(0.25, 7, interval=True),
                "tokens": count(9),
                "accuracy": Metric(0.5, 2, worst=LOWEST),
                "macro_f1": macro_f1(confusion([0, 3, 1], [0, 3, 3], 4)),
            },
        ),
        Failure(c, "ValueError", "no data", "trace"),
    ]
    back = decode_results(encode_results(results, wire="float32"), {x.id: x for x in (a, b, c)})
    assert back[0].client == shrunk
    same(back[0].payload, results[0].payload)
    assert back[1] == results[1]
    assert back[2] == results[2]


def test_an_engines_notes_travel_with_its_results():
    done = [Evaluation(ASKED[0], {"accuracy": Metric(1.0, 3)})]
    content = encode_results(done, wire="float32", notes=("fused, ragged", "padded: why"))
    assert glance(content).notes == ("fused, ragged", "padded: why")
    assert decode_results(content, {0: ASKED[0]}) == done
    assert glance(encode_results(done, wire="float32")).notes == ()
    del content.config_records["results"]["notes"]
    assert glance(content).notes == ()


ASKED = {i: Client(i, Ranks({"q": 3}), 4) for i in range(2)}


def replied(change):
    """A reply of two clients with the first row changed by ``change``."""
    updates = [Update(c, adapter(i, {"q": 3}), 4, {"loss": 1.0}) for i, c in ASKED.items()]
    content = encode_results(updates, wire="float32")
    record = content.config_records["results"]
    rows = json.loads(record["rows"])
    change(rows[0])
    record["rows"] = json.dumps(rows)
    return content


@pytest.mark.parametrize(
    "change",
    [
        lambda row: row.pop("payload"),
        lambda row: row.pop("metrics"),
        lambda row: row.pop("ranks"),
        lambda row: row.update(ranks={"q": 0}),
        lambda row: row["metrics"].update(loss=None),
        lambda row: row["metrics"].update(loss="low"),
        lambda row: row.update(payload="{}"),
        lambda row: row.update(payload=row["payload"].replace('"q/a", 3', '"q/a", 4')),
        lambda row: row.update(failure=[]),
        lambda row: row.update(client=99),
    ],
)
def test_a_row_that_cannot_be_read_costs_its_own_client_alone(change):
    content = replied(change)
    glance(content)
    first, second = decode_results(content, ASKED)
    assert isinstance(first, Failure)
    assert isinstance(second, Update)
    same(second.payload, adapter(1, {"q": 3}))


@pytest.mark.parametrize(
    "forged",
    [
        None,
        [],
        [4],
        [4, None],
        [4, [[0, 0]]],
        [4, [[0, 0, 1, 1]]],
        [4, [[0, 0, "1"]]],
        [4, [[0, 0, 1.0]]],
        [4, [[0, 4, 1]]],
        [4, [[0, 0, -1]]],
        [4, [[1, 0, 1], [0, 0, 1]]],
        ["4", []],
        {"classes": 4},
    ],
)
def test_a_table_that_is_none_costs_its_client_alone(forged):
    metrics = {"macro_f1": macro_f1(confusion([0, 1], [0, 0], 4))}
    content = encode_results([Evaluation(c, metrics) for c in ASKED.values()], wire="float32")
    record = content.config_records["results"]
    rows = json.loads(record["rows"])
    rows[0]["evaluation"]["macro_f1"][-1] = forged
    record["rows"] = json.dumps(rows)
    bad, good = decode_results(content, ASKED)
    assert isinstance(bad, Failure)
    assert bad.kind == "RejectedUpdate"
    assert good == Evaluation(ASKED[1], metrics)


def test_a_client_that_a_reply_is_silent_about_has_failed():
    content = encode_results([Evaluation(ASKED[0], {"accuracy": Metric(1.0, 3)})], wire="float32")
    good, silent = decode_results(content, ASKED)
    assert good == Evaluation(ASKED[0], {"accuracy": Metric(1.0, 3)})
    assert silent == Failure(ASKED[1], "NoReply", "the reply says nothing of it")


def test_frozen_factors_cost_no_bytes():
    x = adapter(0, {"q": 3})
    assert update_bytes(x, LocalPlan()) == payload_bytes(x) == 4 * 3 * (5 + 7)
    assert update_bytes(x, LocalPlan(train_a=False)) == 4 * 3 * 7
    assert update_bytes(x, LocalPlan(train_b=False)) == 4 * 3 * 5
