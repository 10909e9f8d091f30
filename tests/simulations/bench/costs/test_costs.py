"""The benchmark of costs: formulas hold to the byte, and a byte too many is seen and named."""

import importlib
import json
from dataclasses import replace

import pytest

from fedlora.core.package import ROOT
from fedlora.population.ranks import RankDistribution
from fedlora.server.training_round import training_jobs
from simulations.bench.__main__ import BENCHMARKS
from simulations.bench.costs import __main__ as costs
from simulations.bench.costs import runs, server, steps
from simulations.bench.costs.formulas import FORMULAS, Past, Visit
from simulations.bench.costs.memory import memory
from simulations.bench.costs.presets import parts_of
from simulations.bench.costs.runs import FIRST, LATE, NEXT, RANKS, Trace, rows, trace, traffic
from simulations.bench.costs.shapes import ALPHA, answered, population, smollm2, tiny
from simulations.bench.methods import presets
from simulations.reporting.cost_tables import PARTS
from strategies.alternate import Alternate
from strategies.fedit import FedIT
from strategies.fedsa import FedSA
from tests.planted import planted

SMALL = smollm2(1)


def test_formulas_are_of_presets_that_exist():
    assert set(FORMULAS) <= set(presets())
    assert set(presets()) == {f.stem for f in (ROOT / "conf/strategy").glob("*.yaml")}


@pytest.fixture(scope="module")
def rolora() -> dict[str, Trace]:
    return {"equal": trace("rolora", RANKS["equal"]), "unequal": trace("rolora", RANKS["unequal"])}


def test_a_real_run_is_its_formula_to_the_byte(rolora):
    for one in rolora.values():
        found = rows(one)
        assert len(found) == 18
        assert {r.when for r in found} == {FIRST, NEXT, LATE}
        assert all(r.up == r.formula_up and r.down == r.formula_down for r in found)
        assert any(r.down for r in found)
    assert not costs.faults(traffic(rolora))


@pytest.mark.parametrize("way", ["up", "down"])
@pytest.mark.parametrize("by", [-1, 1])
def test_one_byte_is_seen(rolora, way, by):
    one = rolora["equal"]
    last = dict(one.clients[-1])
    last[f"bytes_{way}"] += by
    wrong = [r for r in rows(replace(one, clients=[*one.clients[:-1], last])) if r.wrong]
    assert [(r.round, r.client) for r in wrong] == [(6, last["client"])]
    assert f"bytes {way}," in wrong[0].wrong


FAULTS = [
    (FedIT.bytes_down, "payload_bytes(job.start, wire)", "payload_bytes(job.start, wire) + 1"),
    (FedIT.bytes_up, "plan, wire)", "plan, wire) + 1"),
]


@pytest.mark.parametrize(("function", "right", "wrong"), FAULTS, ids=["down", "up"])
def test_a_method_that_counts_a_byte_too_many_ends_in_an_error(
    function, right, wrong, tmp_path, capsys
):
    words = ["traffic", "--presets", "fedit", "--out", str(tmp_path)]
    costs._traces.cache_clear()
    with planted(function, right, wrong):
        assert costs.main(words) == 1
    assert "differs from its formula: fedit, equal: round 1" in capsys.readouterr().err
    costs._traces.cache_clear()


def test_a_preset_without_a_formula_is_shown_all_the_same(monkeypatch, rolora):
    monkeypatch.setattr(runs, "FORMULAS", {})
    record = {"found": {"rolora": traffic(rolora)}}
    assert not costs.faults(record["found"])
    table = PARTS["traffic"](record)
    assert "`rolora`" in table and "no formula" in table and "to 86,016 (2,560 to 3,072)" in table


@pytest.mark.parametrize("preset", sorted(FORMULAS))
def test_what_is_known_is_not_sent_again(preset):
    """Missing a round more never costs less; what a layer is sent has no more scalars than two
    copies of its weight, however many rounds a client has missed."""
    formula, sent = FORMULAS[preset], []
    for number in range(7):
        missed = tuple(Past(t, (3, 3), 4) for t in range(6 - number, 6))
        visit = Visit("w", 9, 7, 3, 2, 5, round=6, missed=missed, budget=0.5)
        sent.append(formula.count_down(formula.trained(visit)))
    assert sent == sorted(sent)
    if preset != "switchlora":  # its cap is the whole shared state
        assert sent[-1] <= 2 * 9 * 7


def test_gaps_are_those_of_the_run(rolora):
    found = runs.exactness(rolora)
    assert len(found["equal"]["gap"]) == 6
    assert max(found["equal"]["relative"]) < 1e-6
    series = (found["equal"][k] for k in ("gap", "norm", "relative"))
    for gap, norm, relative in zip(*series, strict=True):
        assert gap == pytest.approx(relative * norm)
    none = {ranks: {"gap": [], "relative": []} for ranks in RANKS}
    table = PARTS["exactness"]({"found": {"rolora": found, "local": none}})
    assert table.splitlines()[-1] == "| `local` | – | – | – | – |"


# --- memory ---------------------------------------------------------------------------------------


def test_what_clients_keep_is_found_and_is_the_formula():
    found = memory(presets(), [SMALL], clients=3)["SmolLM2-135M"]
    assert {p for p, f in FORMULAS.items() if f.count_kept} <= set(found)
    assert "fedit" not in found
    assert not costs.faults(found)
    for row in found.values():
        each = row["tensor_bytes_per_client"] + row["header_bytes_per_client"]
        assert row["files_bytes"] == 3 * each
        assert row["population_bytes"] == 1600 * each
    assert "1,600 clients" in PARTS["memory"]({"found": {"SmolLM2-135M": found}})


def test_a_client_that_keeps_too_much_is_named():
    with planted(FedSA.kept, "f.b for path", "f.a for path"):
        found = memory(["fedsa"], [SMALL], clients=2)
    (wrong,) = costs.faults(found)
    assert wrong.startswith("SmolLM2-135M, fedsa: a client keeps")


# --- times ----------------------------------------------------------------------------------------


def test_shapes_are_those_of_the_model():
    whole = smollm2()
    assert len(whole.modules) == 210 and whole.scale == 1
    assert sum(m.d_out for m in whole.modules) == 155_520
    assert sum(m.d_in for m in whole.modules) == 149_760
    setting = population(whole, RankDistribution("uniform", alpha=ALPHA), 80)
    part = population(smollm2(4), RankDistribution("uniform", alpha=ALPHA), 80)
    assert [c.ranks.label for c in setting.clients] == [c.ranks.label for c in part.clients]
    assert len({c.tier for c in part.clients}) == 4
    assert smollm2(4).scale == 7.5


@pytest.mark.parametrize("preset", presets())
def test_every_server_does_a_round_of_random_changes(preset):
    found = server.measure([preset], SMALL, repeats=1, clients=4)["presets"][preset]
    assert all(found[part][clock][0] >= 0 for part in found for clock in ("cpu_ms", "wall_ms"))


def test_what_a_plan_freezes_is_not_changed():
    setting = population(tiny(), RankDistribution("uniform", alpha=ALPHA), 4)
    method = Alternate(schedule="b")
    plan = parts_of("ffa").client
    jobs = training_jobs(method, method.init_state(setting), setting.clients, plan, seed=1, round=1)
    for job in jobs:
        start, end = job.start.low_rank(), answered(job).adapter
        assert all((f.a == start[p].a).all() and (f.b != start[p].b).any() for p, f in end.items())


def test_times_are_shown_beside_fedit():
    def clocks(ms: float) -> dict[str, list[float]]:
        return {"cpu_ms": [ms, ms, 9 * ms], "wall_ms": [2 * ms] * 3}

    def row(ms: float) -> dict[str, dict[str, list[float]]]:
        return {"aggregate": clocks(ms), "starts": clocks(ms)}

    table = PARTS["server"]({"found": {"tiny": {"presets": {"fedit": row(1), "ffa": row(2.5)}}}})
    assert "| `ffa` | 5 | 10 | 2.50x |" in table
    found = {"presets": {"fedit": {"fused": clocks(1)}, "ffa": {"fused": clocks(0.5)}}}
    found["left_out"] = {"splitlora": "it has none"}
    table = PARTS["steps"]({"found": {"tiny": found}})
    assert "| `ffa` | 0.5 | 0.50x |" in table and "- `splitlora`: it has none" in table


def test_a_model_that_is_not_installed_is_left_out_with_a_sentence(monkeypatch):
    monkeypatch.setattr(steps, "find_spec", lambda name: None)
    assert "left out" in steps.SMOLLM2.missing()
    assert not steps.TINY.missing()


def test_clients_of_a_split_have_no_step_of_their_own():
    assert "bench.split" in steps.refusal(parts_of("splitlora").strategy)
    assert not steps.refusal(parts_of("fedit").strategy)


def test_steps_are_measured_in_both_engines(tmp_path, capsys):
    work = replace(steps.TINY, clients=2, steps=1, batch=1, length=32)
    found = steps.measure(["fedit", "flora"], work, 1, print)
    for row in found["presets"].values():
        assert row["fused"]["notes"][0].startswith("fused")
        assert row["sequential"]["notes"] == ["sequential"]
        assert all(row[e][clock][0] > 0 for e in row for clock in ("cpu_ms", "wall_ms"))
    json.dumps(found)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_with_a_command_has_one(name):
    assert callable(importlib.import_module(f"simulations.bench.{name}").main)
