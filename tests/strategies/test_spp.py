"""SPP's federated laws S-F1 to S-F8, in float64 on random pruned layers."""

import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fedlora.algebra.init import initial_a
from fedlora.core.errors import RejectedUpdate
from fedlora.core.seeding import torch_seed
from fedlora.core.types import Client, Expected, LocalPlan, Module, Ranks, Setting, Update
from fedlora.models.masks import identity
from fedlora.server.method import Setup
from fedlora.server.validation import check_update
from fedlora.techniques.lora.payload import LowRankPayload
from fedlora.techniques.lora.self_pruning import SelfPrune
from fedlora.techniques.lora.technique import LoRA
from fedlora.techniques.spp.payload import MaskedScale, select_sent
from fedlora.techniques.spp.scale import factor, mean_factor
from fedlora.techniques.spp.technique import Scaling
from fedlora.training.loop import optimise
from fedlora.wire.codec import decode_payload, encode_payload, payload_bytes, update_bytes
from strategies.spp import SPP
from tests.fedlora.prune.models import pruned
from tests.generators import ALPHA, MASK, factors, gain, setting, trained

M, N, RANKS = 13, 9, (8, 4, 2, 8, 1)
"""Ragged: 8 divides neither; ranks that divide 8."""


def population(ranks: tuple[int, ...] = RANKS) -> Setting:
    clients = tuple(Client(i, Ranks({"w": r}), 10 * (i + 1)) for i, r in enumerate(ranks))
    return Setting((Module("w", "mlp", M, N),), 700, ALPHA, clients, 3, mask=MASK)


def weight() -> Tensor:
    g = torch.Generator().manual_seed(0)
    w = torch.randn(M, N, generator=g, dtype=torch.float64)
    return w * (torch.rand(M, N, generator=g) < 0.5)


def round_of(
    method: SPP, state: dict[str, Tensor], seed: int, ranks: tuple[int, ...] = RANKS
) -> list[Update]:
    updates = []
    for client in population(ranks).clients:
        c = method.enlist(state, client)
        start = method.client_start(state, c)
        payload = trained(start, 100 * seed + c.id, size=0.2)
        updates.append(Update(c, payload, c.num_examples))
    return updates


def merged(payload: MaskedScale) -> Tensor:
    if payload.seed >= 0:  # clients draw alpha themselves
        module = population().modules[0]
        payload = replace(
            payload, alpha={"w": initial_a(payload.seed, module, payload.blocks["w"])}
        )
    return weight() * gain(payload, "w")


MODES = {
    "alternate": SPP(),
    "merged": SPP(merge_every=2),
    "beta_only": SPP(mode="beta_only", merge_every=3),
    "stack": SPP(mode="stack"),
}


@pytest.mark.parametrize("method", MODES.values(), ids=MODES)
def test_the_server_holds_the_mean_of_what_clients_hold(method):
    """S-F1, S-F2 and S-F4, over six rounds of ranks 8, 4, 2 and 1."""
    state = method.init_state(population())
    zeros = weight() == 0
    for t in range(6):
        updates = round_of(method, state, t)
        total = sum(u.num_examples for u in updates)
        mean = sum(u.num_examples / total * merged(u.payload) for u in updates)
        # What a client sends is enough: the rest of its payload is not looked at.
        state = method.aggregate(
            state, [replace(u, payload=select_sent(u.payload)) for u in updates]
        )
        server = merged(method.global_update(state))
        torch.testing.assert_close(server, mean, rtol=1e-6, atol=1e-9)
        assert torch.equal(server == 0, zeros)
        assert not torch.equal(server, weight())


def test_alternation_is_exact_to_the_last_digits():
    method, state = SPP(), SPP().init_state(population())
    for t in range(3):
        state = {k: v.double() if v.is_floating_point() else v for k, v in state.items()}
        updates = round_of(method, state, t)
        total = sum(u.num_examples for u in updates)
        mean = sum(u.num_examples / total * merged(u.payload) for u in updates)
        state = method.aggregate(state, updates)
        torch.testing.assert_close(
            merged(method.global_update(state)), mean, rtol=1e-13, atol=1e-14
        )


def test_averaging_alpha_and_beta_apart_loses_the_covariance(caplog):
    """S-F1's other half: the error is ``Σ p (beta_k - beta)(alpha_k - alpha)``, and is recorded."""
    with caplog.at_level(logging.WARNING):
        method = SPP(mode="separate")
    assert "mode=alternate is exact" in caplog.text
    state = method.init_state(population())
    state = method.aggregate(state, round_of(method, state, 0))
    before = {k: v.clone() for k, v in state.items()}
    updates = round_of(method, state, 1)
    p = [u.num_examples / sum(x.num_examples for x in updates) for u in updates]
    after = method.aggregate(state, updates)
    old_alpha, alpha = (s["global/w/alpha"] for s in (before, after))
    old_beta, beta = (s["global/w/beta"] for s in (before, after))
    grown = [_alpha(u.payload) for u in updates]
    betas = [u.payload.beta["w"] for u in updates]
    mean = mean_factor(grown, betas, p)
    covariance = sum(
        w * factor(a - alpha, b - beta) for w, a, b in zip(p, grown, betas, strict=True)
    )
    torch.testing.assert_close(mean - factor(alpha, beta), covariance, rtol=1e-9, atol=1e-12)
    expected = covariance.norm() / (mean - factor(old_alpha, old_beta)).norm()
    found = method.report(after)
    assert found["spp/residual"] == pytest.approx(float(expected), rel=1e-9)
    assert 0.01 < found["spp/residual"] < 1
    assert method.report(method.aggregate(state, updates[:1]))["spp/residual"] < 1e-12


def _alpha(payload: MaskedScale) -> Tensor:
    from fedlora.techniques.spp.payload import alpha_of

    return alpha_of(payload, "w").double()


def test_rounds_follow_the_schedule_and_merges_begin_anew():
    method = SPP(schedule=("beta", "beta", "alpha"), merge_every=3)
    state = method.init_state(population())
    seen = []
    for t in range(7):
        start = method.client_start(state, method.enlist(state, population().clients[1]))
        seen.append((start.trains, dict(start.tied), len(start.merges)))
        if t in (0, 3, 6):
            assert not start.beta["w"].any()
        state = method.aggregate(state, round_of(method, state, t))
        assert method.report(state)["spp/trained"] == start.trains
    phases = [("beta", {}), ("beta", {}), ("alpha", {"w": 4})]
    assert seen == [(*phases[t % 3], t // 3) for t in range(7)]
    drawn = {tuple(state[f"merged/{i:06d}/w/alpha"].flatten().tolist()) for i in (0, 1)}
    assert len(drawn) == 2
    assert method.report(state)["spp/merges"] == 2


def test_merged_every_round_and_not_at_all_start_alike_and_end_with_the_same_weights():
    """S-F8: the weights right after a merge are those right before it."""
    plain, often = SPP(), SPP(merge_every=2)
    states = [m.init_state(population()) for m in (plain, often)]
    for t in range(2):
        states = [
            m.aggregate(s, round_of(m, s, t)) for m, s in zip((plain, often), states, strict=True)
        ]
    one, other = (m.global_update(s) for m, s in zip((plain, often), states, strict=True))
    assert (len(one.merges), len(other.merges)) == (0, 1)
    torch.testing.assert_close(merged(one), merged(other), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("method", MODES.values(), ids=MODES)
@pytest.mark.parametrize("wire", ["float32", "bfloat16", "float64"])
def test_bytes_are_those_of_what_is_sent(method, wire):
    """S-F7, down and up; and a message is what went into it."""
    state = method.init_state(population())
    for t in range(3):
        for u in round_of(method, state, t):
            start = method.client_start(state, u.client)
            up = select_sent(u.payload)
            assert payload_bytes(start, wire) == encode_payload(start, wire)[0].nbytes
            assert update_bytes(up, LocalPlan(), wire) == encode_payload(up, wire)[0].nbytes
            r = u.client.ranks["w"]
            floats = {"beta": M, "alpha": r * N, "both": r * N + M}[start.trains]
            assert up.floats() == floats
            for payload in (start, up):
                back = decode_payload(*encode_payload(payload, "float64"))
                assert isinstance(back, MaskedScale)
                assert replace(back, alpha={}, beta={}, change={}, merges=()) == replace(
                    payload, alpha={}, beta={}, change={}, merges=()
                )
                for (a, x), (b, y) in zip(payload.tensors(), back.tensors(), strict=True):
                    assert a == b
                    assert torch.equal(x.double(), y)
        state = method.aggregate(state, round_of(method, state, t))
    if method.mode == "beta_only":
        assert not method.client_start(state, population().clients[0]).alpha


def test_what_is_not_what_was_asked_for_is_refused():
    """S-F6, and shapes, names and phases."""
    method = SPP()
    state = method.init_state(population())
    state = method.aggregate(state, round_of(method, state, 0))
    for client in population().clients[:2]:
        c = method.enlist(state, client)
        start = method.client_start(state, c)
        good = select_sent(trained(start, 1))
        expected = Expected(c, start, LocalPlan(Scaling()), density=0.3)
        check_update(Update(c, good, c.num_examples), expected, max_norm=0.0)
        norm = good.change_norm(start)
        assert norm > 0
        with pytest.raises(RejectedUpdate, match="has norm"):
            check_update(Update(c, good, c.num_examples), expected, max_norm=norm / 2)
        name = "change" if c.ranks["w"] < 8 else "alpha"
        rows = getattr(good, name)["w"]
        nan = torch.full_like(rows, torch.nan)
        for bad, said in (
            (replace(good, mask="other"), "pruned with the mask other, the server's is 0123"),
            (replace(good, mask="other"), "two independent masks of density 0.3 .* density 0.51"),
            (replace(good, merges=({"w": (rows[None], rows[None, 0])},)), "it holds 1 merges"),
            (replace(good, trains="beta"), "trains 'beta', expected 'alpha'"),
            (replace(good, **{name: {"w": rows[:, :-1]}}), f"w: {name} .* expected"),
            (replace(good, **{name: {}}), f"{name}: it lacks w"),
            (replace(good, beta=start.beta), "beta: it has the unknown w"),
            (replace(good, **{name: {"w": nan}}), "NaN or infinite"),
            (
                LowRankPayload({"w": factors(M, N, 2, 1)}),
                "it holds factors where a MaskedScale is required",
            ),
        ):
            with pytest.raises(RejectedUpdate, match=said):
                check_update(Update(c, bad, c.num_examples), expected, max_norm=0.0)


def test_a_lone_client_is_stand_alone_training_bit_by_bit():
    """S-F5: four alternating rounds by hand and through the server, in float32."""
    model = pruned(dtype=torch.float32)
    g = torch.Generator().manual_seed(4)
    texts = torch.randint(0, 40, (6, 9), generator=g).numpy()
    examples = [
        SimpleNamespace(input_ids=row, prompt_tokens=1, responses=None, label=-1, states=None)
        for row in texts
    ]
    ranks = Ranks({m.path: 4 for m in model.info.modules})
    client = Client(0, ranks, len(examples))
    whole = Setting(model.info.modules, 100, 8.0, (client,), 5, mask=model.info.mask)
    plan = LocalPlan(Scaling(), lr=0.05, batch_size=2, dropout=0.1)
    method = SPP()
    state = method.init_state(whole)

    def train(payload: MaskedScale, t: int) -> MaskedScale:
        parameters = model.mount(payload, dropout=plan.dropout)
        optimise(model, parameters, examples, plan, seed=5, round=t, client=0)
        found = model.payload()
        assert isinstance(found, MaskedScale)
        return found

    alone = method.global_update(state)
    for t in range(4):
        start = method.client_start(state, method.enlist(state, client))
        state = method.aggregate(
            state, [Update(client, select_sent(train(start, t)), len(examples))]
        )
        alone = train(replace(alone, trains=("beta", "alpha")[t % 2]), t)
    server = method.global_update(state)
    for path in ranks:
        assert torch.equal(server.alpha[path], alone.alpha[path])
        assert torch.equal(server.beta[path], alone.beta[path])
        assert server.beta[path].any()
    zeros = {p: model.effective_weight(p) != 0 for p in ranks}
    model.mount(server)
    assert identity(zeros) == identity({p: model.effective_weight(p) != 0 for p in ranks})
    assert identity(zeros) == model.info.mask


def test_ranks_that_do_not_divide_are_nested_or_refused():
    odd = population((6, 4, 3))
    method = SPP()
    state = method.init_state(odd)
    assert [method.enlist(state, c).ranks["w"] for c in odd.clients] == [6, 3, 3]
    with pytest.raises(ValueError, match=r"w: rank 4 does not divide 6, .* do \(1, 2, 3, 6\)"):
        SPP(heterogeneous="refuse").init_state(odd)
    SPP(heterogeneous="refuse").init_state(population())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mode": "both"}, "strategy.mode='both' is not one of"),
        ({"schedule": ("alpha", "beta")}, "must begin with beta: alpha has no gradient"),
        ({"schedule": ()}, "must begin with beta"),
        ({"schedule": ("beta", "gamma")}, "strategy.schedule='gamma' is not one of"),
        ({"merge_every": 3}, "must be a multiple of the 2 rounds"),
        ({"mode": "stack", "merge_every": 2}, "which merges every round"),
        ({"heterogeneous": "pad"}, "strategy.heterogeneous='pad'"),
    ],
)
def test_impossible_options_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        SPP(**options)


def test_a_dense_base_is_refused():
    with pytest.raises(ValueError, match=r"this one is dense: use model=pruned"):
        SPP().init_state(replace(setting(), mask=""))


@pytest.mark.parametrize(
    ("options", "setup", "said"),
    [
        ({}, {"client": LocalPlan(technique=LoRA(SelfPrune(0.1, 0.9, 1)))}, "or client=spp"),
        ({}, {"quantization": "int8"}, "model.quantization=int8 with strategy=spp"),
        ({"mode": "stack"}, {"wire": "bfloat16"}, "wire=bfloat16 with strategy.mode=stack"),
        ({"merge_every": 2}, {"wire": "bfloat16"}, "wire=bfloat16 with strategy.merge_every"),
    ],
)
def test_what_would_not_be_exact_or_would_mean_nothing_is_refused(options, setup, said):
    with pytest.raises(ValueError, match=said):
        SPP(**options).check(Setup(**{"client": LocalPlan(Scaling()), **setup}))


def test_what_is_exact_is_not_refused():
    plan = LocalPlan(Scaling())
    SPP().check(Setup(plan, wire="bfloat16"))
    for wire in ("float32", "float64"):
        SPP(mode="stack").check(Setup(plan, wire=wire))
        SPP(merge_every=2).check(Setup(plan, wire=wire))


@pytest.mark.parametrize("method", MODES.values(), ids=MODES)
def test_uniform_weights_do_not_see_how_much_data_a_client_has(method):
    method = replace(method, weights="uniform")
    state = method.init_state(population())
    for t in range(2):
        updates = round_of(method, state, t)
        mean = sum(merged(u.payload) for u in updates) / len(updates)
        state = method.aggregate(state, updates)
        torch.testing.assert_close(merged(method.global_update(state)), mean, rtol=1e-6, atol=1e-9)


def test_alpha_after_a_merge_is_drawn_like_any_start_and_never_twice():
    """Whatever the module's kind, by the seed of the merge."""
    method = SPP(merge_every=2)
    state, drawn = method.init_state(population()), []
    for t in range(4):
        state = method.aggregate(state, round_of(method, state, t))
        if t % 2:
            drawn.append(state["global/w/alpha"])
    seeds = [torch_seed(3, "spp", i) for i in (1, 2)]
    for module in (Module("w", kind, M, N) for kind in ("mlp", "attention")):
        assert all(
            torch.equal(a, initial_a(s, module, 8)) for a, s in zip(drawn, seeds, strict=True)
        )


def test_merges_that_outgrow_the_weights_are_said_once(caplog):
    """Each merge of five clients is 5 (8 9 + 13) numbers; the layer has 58 of 117 weights."""
    method = SPP(mode="stack")
    sparse = replace(population(), density=58 / 117)
    large = replace(population(), density=10.0)
    for start, at in ((sparse, 1), (large, 3)):
        caplog.clear()
        state = method.init_state(start)
        for t in range(4):
            state = method.aggregate(state, round_of(method, state, t))
            assert len(caplog.records) == (t + 1 >= at)
        assert f"of {at} merges have {425 * at} parameters" in caplog.text


def test_factors_of_another_kind_are_refused():
    method = SPP()
    state = method.init_state(population())
    client = population().clients[0]
    with pytest.raises(TypeError, match="client 0 sent a dict where a MaskedScale is required"):
        method.aggregate(state, [Update(client, {"w": factors(M, N, 8, 1)}, 3)])
