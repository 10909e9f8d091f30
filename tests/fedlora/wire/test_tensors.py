"""Compressed changes: the bound of each kind, the bytes that travel, and no nonsense."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedlora.core.seeding import torch_generator
from fedlora.core.types import Client, Factors, Failure, LocalPlan, Ranks, TrainJob, Update
from fedlora.server.byte_account import ByteAccount
from fedlora.server.client_state import STARTS, ClientStore
from fedlora.server.compressed import with_compressed_starts
from fedlora.techniques.lora.payload import LowRankPayload
from fedlora.wire import sparse, tensors
from fedlora.wire.codec import encode_reply
from fedlora.wire.messages import decode_jobs, decode_results, encode_jobs, encode_results
from fedlora.wire.sparse import Cursor
from fedlora.wire.tensors import Compression, Format
from strategies.fedit import FedIT
from tests.generators import factors, setting
from tests.planted import planted

EXACT = [Format(k, stochastic=False) for k in ("fp32", "fp16", "bf16", "int8", "int4", "sparse")]
RANDOM = [Format("int8", group=16), Format("int4", group=8)]
SHAPES = {"u/a": (3, 50), "u/b": (70, 3), "v": (41,), "w/a": (3, 7)}


def named(seed: int, zero: str = "w/a") -> dict[str, Tensor]:
    g = torch_generator(seed, "test-tensors")
    scales = {"u/a": 1e-3, "u/b": 7.0, "v": 1.0, "w/a": 1.0}
    found = {n: scales[n] * torch.randn(s, generator=g) for n, s in SHAPES.items()}
    return found | ({zero: torch.zeros(SHAPES[zero])} if zero else {})


def sizes(of: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {n: tuple(t.shape) for n, t in of.items()}


def there(f: Format, of: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    return f.decode(f.encode(of, torch_generator(seed, "r")), sizes(of))


# --- one tensor after another ------------------------------------------------------------------


@pytest.mark.parametrize("f", [*EXACT, *RANDOM], ids=lambda f: f"{f.kind}-{f.group}")
def test_sending_again_changes_nothing(f: Format) -> None:
    once = there(f, named(1))
    again = there(f, once, 1)
    assert all(torch.equal(again[n], t) for n, t in once.items())


@given(st.integers(0, 10**6))
def test_every_kind_keeps_its_bound(seed: int) -> None:
    x = named(seed)
    for f in (*EXACT[:5], *RANDOM):
        for name, got in there(f, x, seed).items():
            error, top = (got - x[name]).abs(), x[name].abs()
            bound = {
                "fp32": 0 * top,
                "fp16": 2.0**-11 * top + 2.0**-38 * top.max(),
                "bf16": 2.0**-8 * top,
                "int8": top.max() / 127 * (1.002 if f.stochastic else 0.502) + 0 * top,
                "int4": top.max() / 7 * (1.002 if f.stochastic else 0.502) + 0 * top,
            }[f.kind]
            assert (error <= bound).all(), (f.kind, name)


def test_a_scale_belongs_to_one_rank_direction() -> None:
    """A direction a thousand times smaller than the others loses no more of itself."""
    b = torch.randn(64, 3, generator=torch_generator(0, "t")) * torch.tensor([1.0, 1e-3, 1e3])
    got = there(Format("int8", group=0, stochastic=False), {"x/b": b})["x/b"]
    lost = ((got - b).norm(dim=0) / b.norm(dim=0)).tolist()
    assert max(lost) < 0.02


def test_random_rounding_is_unbiased() -> None:
    x = {"v": torch.rand(50, generator=torch_generator(0, "t"))}
    f = Format("int4", group=0)
    draws = torch.stack([there(f, x, seed)["v"] for seed in range(400)])
    step = float(x["v"].max()) / 7
    assert float((draws.mean(0) - x["v"]).abs().max()) < 5 * step / 2 / 400**0.5


def bytes_of(f: Format, rows: int, d: int) -> int:
    groups = math.ceil(d / min(f.group or d, d))
    return {
        "fp32": rows * d * 4,
        "fp16": rows * (2 * d + 1),
        "bf16": rows * d * 2,
        "int8": rows * (d + 4 * groups),
        "int4": rows * (math.ceil(d / 2) + 4 * groups),
    }[f.kind]


@pytest.mark.parametrize("f", [*EXACT[:5], *RANDOM], ids=lambda f: f"{f.kind}-{f.group}")
def test_bytes_are_those_of_the_formula_and_zeros_cost_a_bit(f: Format) -> None:
    data = f.encode(named(1), torch_generator(0, "r"))
    want = sum(bytes_of(f, r, d) for r, d in ((3, 50), (3, 70), (1, 41)))
    assert data.dtype == np.uint8 and data.nbytes == 1 + want


@pytest.mark.parametrize(
    ("density", "most"), [(0.01, 368), (0.05, 1840), (0.1, 2994), (0.25, 5760)]
)
def test_sparse_takes_no_more_than_indices_or_a_bitmap(density: float, most: int) -> None:
    """At D = 9,216: flag, exponent and kind of position are three bytes."""
    x = {"x": torch.randn(8, 1152, generator=torch_generator(0, "t"))}
    data = Format("sparse", density=density).encode(x, torch_generator(0, "r"))
    p = density
    entropy = 9216 * -(p * math.log2(p) + (1 - p) * math.log2(1 - p)) / 8 + 2 * int(9216 * p)
    assert 0.98 * entropy <= data.nbytes <= most + 3


@given(st.integers(1, 3000), st.floats(0, 1), st.integers(0, 10**6))
def test_positions_come_back_however_they_are_coded(size: int, density: float, seed: int) -> None:
    count = sparse.kept(size, density)
    x = torch.randn(size, generator=torch_generator(seed, "t"))
    x[: size // 2] *= 100.0  # gaps of unlike lengths
    data = np.concatenate(sparse.encode(x, count))
    got, cursor = sparse.decode(Cursor(data), size, count)
    assert cursor.at == len(data) and int((got != 0).sum()) <= count
    largest = x.abs().topk(count).indices
    assert torch.allclose(got[largest], x[largest], rtol=2**-10)


def test_every_way_of_positions_is_taken() -> None:
    def way(size: int, at: list[int]) -> int:
        x = torch.zeros(size)
        x[at] = 1.0
        return int(sparse.encode(x, len(at))[0][0])

    assert way(2**17, [0, 70_000]) in (sparse.U32, sparse.RICE)
    assert way(4096, [4095]) == sparse.U16
    assert way(16, list(range(0, 16, 2))) == sparse.BITMAP
    assert way(9216, list(range(0, 9216, 30))) == sparse.RICE


def test_all_of_sparse_is_dense() -> None:
    x = {"x": torch.randn(1, 60, generator=torch_generator(0, "t"))}
    dense = there(Format("fp16"), x)["x"]
    assert torch.equal(there(Format("sparse", density=1.0), x)["x"], dense)


DAMAGE = {
    "cut": lambda a: a[:-1],
    "longer": lambda a: np.append(a, np.uint8(0)),
    "of another type": lambda a: a.astype(np.int16),
    "empty": lambda a: a[:0],
}


@pytest.mark.parametrize("f", [*EXACT, *RANDOM], ids=lambda f: f"{f.kind}-{f.group}")
@pytest.mark.parametrize("how", DAMAGE)
def test_damage_is_refused(f: Format, how: str) -> None:
    data = DAMAGE[how](f.encode(named(1), torch_generator(0, "r")))
    with pytest.raises(ValueError, match="due"):
        f.decode(data, SHAPES)


@pytest.mark.parametrize("f", [*EXACT, *RANDOM], ids=lambda f: f"{f.kind}-{f.group}")
def test_random_bytes_are_an_array_or_a_refusal(f: Format) -> None:
    rng = np.random.default_rng(0)
    good = f.encode(named(1), torch_generator(0, "r"))
    for _ in range(50):
        bad = good.copy()
        bad[rng.integers(0, len(bad), 8)] = rng.integers(0, 256, 8)
        try:
            got = f.decode(bad, SHAPES)
        except ValueError:
            continue
        assert all(torch.isfinite(t).all() for t in got.values())


def test_what_is_not_finite_is_refused() -> None:
    for f in EXACT:
        with pytest.raises(ValueError, match="cannot be sent"):
            f.encode({"x": torch.tensor([[1.0, float("nan")]])}, torch_generator(0, "r"))


# --- through messages ------------------------------------------------------------------

ASKED = {
    i: Client(i, Ranks({"u": r, "v": r}), 9) for i, r in enumerate((1, 2, 3))
}  # three unequal ranks


def payload(rank: int, seed: int, size: float = 1.0) -> LowRankPayload:
    of = {"u": factors(6, 5, rank, seed), "v": factors(9, 7, rank, seed + 1)}
    return LowRankPayload(
        {p: Factors((size * f.a).float(), (size * f.b).float(), f.alpha) for p, f in of.items()}
    )


def added(one: LowRankPayload, other: LowRankPayload) -> LowRankPayload:
    return LowRankPayload(
        {p: Factors(f.a + other[p].a, f.b + other[p].b, f.alpha) for p, f in one.items()}
    )


def jobs_of(feedback: bool = False) -> list[TrainJob]:
    residual = {} if feedback else None
    return [
        TrainJob(0, 1, c, payload(c.ranks["u"], 10 + i), LocalPlan(), residual)
        for i, c in ASKED.items()
    ]


def sent_back(jobs: list[TrainJob], up: Format, size: float = 1e-2):
    """Results as the server reads them, and what clients trained from and to."""
    request = encode_jobs(jobs, worker="{}", source="s", wire="float32", nonce="n", up=up)
    envelope = decode_jobs(request)
    assert envelope.up == up
    done = []
    for j in envelope.jobs:
        assert isinstance(j, TrainJob) and isinstance(j.start, LowRankPayload)
        moved = payload(j.client.ranks["u"], 77 + j.client.id, size)
        done.append(Update(j.client, added(j.start, moved), 9, {}))
    content = encode_results(done, wire="float32", jobs=envelope.jobs, nonce="n", up=up)
    starts = {j.client.id: j.start for j in jobs}
    read = decode_results(content, ASKED, starts, wire="float32", nonce="n", up=up)
    return read, envelope.jobs, done, content


@pytest.mark.parametrize("f", [*EXACT, *RANDOM], ids=lambda f: f"{f.kind}-{f.group}")
def test_unequal_ranks_come_back_and_bytes_are_the_arrays(f: Format) -> None:
    jobs = jobs_of()
    read, _, _, content = sent_back(jobs, f)
    account = ByteAccount(
        FedIT(), {}, {j.client.id: j for j in jobs}, {0: 1, 1: 1, 2: 1}, "float32"
    )
    total = 0
    for u in read:
        assert isinstance(u, Update) and dict(u.client.ranks) == dict(ASKED[u.client.id].ranks)
        array = content.array_records["payloads"][str(u.client.id)].numpy()
        assert u.sent_bytes == array.nbytes == account.up(u)
        total += array.nbytes
    assert account.record({u.client.id: u for u in read})["wire/up_bytes"] == total


def test_a_change_is_rounded_not_the_value() -> None:
    """Of a change a hundred times smaller than the values, int8 loses under two per cent."""
    read, jobs, done, _ = sent_back(jobs_of(), Format("int8", stochastic=False), 1e-2)
    for u, j, d in zip(read, jobs, done, strict=True):
        for (_, got), (_, start), (_, end) in zip(
            u.payload.tensors(), j.start.tensors(), d.payload.tensors(), strict=True
        ):
            assert float((got - end).norm() / (end - start).norm()) < 0.02


def test_frozen_factors_come_back_bit_for_bit() -> None:
    jobs = jobs_of()
    start = jobs[2].start
    assert isinstance(start, LowRankPayload)
    end = LowRankPayload({p: Factors(f.a.clone(), f.b + 1, f.alpha) for p, f in start.items()})
    for f in (Format("int8"), Format("sparse")):
        content = encode_results(
            [Update(ASKED[2], end, 9, {})], wire="float32", jobs=jobs, nonce="n", up=f
        )
        (u,) = decode_results(content, {2: ASKED[2]}, {2: start}, wire="float32", nonce="n", up=f)
        assert isinstance(u, Update)
        assert all(torch.equal(g.a, start[p].a) for p, g in u.adapter.items())


def test_what_is_not_due_costs_its_client_alone() -> None:
    jobs, f = jobs_of(), Format("int8")
    _, envelope, done, content = sent_back(jobs, f)
    starts = {j.client.id: j.start for j in jobs}
    plain = encode_results(done, wire="float32", jobs=envelope, nonce="n")
    for wrong, message in ((plain, "compression.up.kind=int8 is due"), (content, "bytes")):
        if wrong is content:
            short = content.array_records["payloads"]["1"].numpy()[:-3]
            content.array_records["payloads"]["1"] = type(content.array_records["payloads"]["1"])(
                short
            )
        read = decode_results(wrong, ASKED, starts, wire="float32", nonce="n", up=f)
        assert isinstance(read[1], Failure) and message in read[1].message
    assert isinstance(read[0], Update) and isinstance(read[2], Update)


@pytest.mark.parametrize("f", [Format("int4"), Format("sparse", density=0.2)])
def test_error_feedback_loses_nothing_for_good(f: Format) -> None:
    """Σ c + e = Σ x in float64, over rounds."""
    start = LowRankPayload({"u": factors(6, 5, 3, 1)})
    left: dict[str, Tensor] | None = {}
    whole, arrived = ({n: torch.zeros_like(t) for n, t in start.tensors()} for _ in range(2))
    for round in range(5):
        moved = LowRankPayload({"u": factors(6, 5, 3, 50 + round)})
        end = added(start, moved)
        array, _, left = encode_reply(end, "float32", start, left, f, torch_generator(round, "r"))
        read = f.decode(array, sizes(dict(start.tensors())))
        for name, t in end.tensors():
            whole[name] += t - dict(start.tensors())[name]
            arrived[name] += read[name]
    assert left is not None
    for name, t in whole.items():
        assert float((arrived[name] + left[name] - t).norm()) < 1e-12 * float(t.norm()) * 10


# --- on the way down ------------------------------------------------------------------


def rounds_down(store: ClientStore, down: Format, count: int) -> list[float]:
    """Errors of starts relative to their change, over rounds in which they move a little."""
    errors = []
    start = payload(3, 5)
    for round in range(1, count + 1):
        job = TrainJob(0, round, ASKED[2], start, LocalPlan())
        (told,), found = with_compressed_starts([job], down, store)
        assert found is not None and told.sent is not None and told.start is start
        (received,) = decode_jobs(
            encode_jobs([told], worker="{}", source="s", wire="float32", nonce="n")
        ).jobs
        assert isinstance(received, TrainJob)
        held = dict(told.sent.tensors())
        assert all(torch.equal(t, held[n]) for n, t in received.start.tensors())
        store.stage(2, held, STARTS)
        store.commit(round)
        errors.append(math.hypot(*(float((t - held[n]).norm()) for n, t in start.tensors())))
        start = added(start, payload(3, 100 + round, 1e-3))
    return errors


def test_both_ends_hold_the_same_start(tmp_path) -> None:
    first, *later = rounds_down(ClientStore(tmp_path / "s"), Format("int8", stochastic=False), 4)
    assert max(later) < first / 50  # changes are rounded, values are not rounded again
    resumed = ClientStore(tmp_path / "s")
    assert resumed.get(2, STARTS) is None  # what it holds is in the checkpoint's index


def test_a_client_that_holds_nothing_shares_its_start(tmp_path) -> None:
    start = payload(3, 5)
    jobs = [TrainJob(0, 1, replace(ASKED[2], id=i), start, LocalPlan()) for i in (4, 5)]
    told, found = with_compressed_starts(jobs, Format("int8"), ClientStore(tmp_path / "s"))
    assert told[0].sent is told[1].sent and found is not None and found[4] == found[5] > 0
    same, nothing = with_compressed_starts(jobs, Format(), ClientStore(tmp_path / "s"))
    assert same == jobs and nothing is None


def test_a_frozen_factor_of_the_seed_is_not_sent(tmp_path) -> None:
    method = FedIT()
    state = method.init_state(setting())
    client = method.enlist(state, setting().clients[0])
    start = method.technique.payload(method.client_start(state, client))
    free = TrainJob(setting().seed, 1, client, start, LocalPlan())
    frozen = replace(free, plan=LocalPlan(train_a=False))
    store = ClientStore(tmp_path / "s")
    _, whole = with_compressed_starts([free], Format("int8"), store)
    (told,), none = with_compressed_starts([frozen], Format("int8"), store)
    assert whole is not None and none == {0: 1}  # six flags, and B is zero
    assert told.sent is not None
    assert all(torch.equal(t, dict(start.tensors())[n]) for n, t in told.sent.tensors())


def test_down_needs_changes_up() -> None:
    with pytest.raises(ValueError, match=r"compression\.down\.kind=int8 with compression\.up"):
        Compression(down=Format("int8"))
    with pytest.raises(ValueError, match="nothing is rounded off"):
        Compression(error_feedback=True)


# --- planted faults ------------------------------------------------------------------

FAULTS = {
    "one scale for all directions": (
        tensors._row_shape,
        "turned = shape[0] > shape[1]",
        "turned = False",
        test_a_scale_belongs_to_one_rank_direction,
    ),
    "values are rounded": (
        encode_reply,
        "change.change(_on_cpu(payload), _on_cpu(start))",
        "_on_cpu(payload)",
        test_frozen_factors_come_back_bit_for_bit,
    ),
    "a gap too short": (
        sparse._rice,
        "gaps >> p",
        "(gaps >> p) + 0 * gaps - (gaps > 40)",
        lambda: test_positions_come_back_however_they_are_coded.hypothesis.inner_test(
            3000, 0.02, 1
        ),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(fault: str) -> None:
    function, right, wrong, law = FAULTS[fault]
    law()
    with planted(function, right, wrong), pytest.raises((AssertionError, ValueError)):
        law()
