"""The comparison with other programs: the same clients, tokens and losses."""

from dataclasses import replace
from importlib.util import find_spec

import pytest

from simulations.bench import compare
from simulations.bench.engine.cases import Case, World
from simulations.bench.engine.measure import TOLERANCE, differences
from simulations.bench.engine.sides import open_side
from tests.simulations.conftest import TEXT

CASE = Case(
    "test",
    "tiny",
    2,
    compare.LocalPlan(dropout=0.0),
    overrides=(*compare.RANK, *TEXT, "client.steps=2"),
)


def outcomes(side):
    world = World(CASE)
    return world.jobs, list(open_side(side, world).train(world.jobs))


def test_it_takes_the_products_own_clients_and_seeds():
    world, other = World(CASE), World(replace(CASE, overrides=(*CASE.overrides, "seed=1")))
    assert len(world.jobs) == 2 and all(j.plan.steps == 2 for j in world.jobs)
    assert {r for j in world.jobs for r in j.client.ranks.values()} == {8}
    assert [j.seed for j in other.jobs] == [1, 1]
    assert all(world.store.count(j.client.id, "train") > 0 for j in world.jobs)


@pytest.mark.parametrize(
    "side",
    [
        "ragged",
        pytest.param("pfl", marks=pytest.mark.skipif(not find_spec("pfl"), reason="no pfl here")),
    ],
)
def test_sides_train_what_the_peft_loop_trains(side):
    jobs, wanted = outcomes("peft loop")
    loss, adapter = differences(jobs, outcomes(side)[1], wanted)
    assert loss <= TOLERANCE["float32"][0] and adapter <= TOLERANCE["float32"][1]


def test_a_side_that_is_not_installed_is_skipped_with_a_reason(monkeypatch):
    monkeypatch.setattr(compare, "find_spec", lambda name: None)
    taken = {}
    monkeypatch.setattr(
        compare, "measure", lambda case, entries, effort: taken.update(e=entries) or {"entries": {}}
    )
    record = compare.compare(CASE, 1)
    assert [e.side for e in taken["e"]] == ["peft loop", "sequential", "ragged"]
    assert "pip install" in record["skipped"]["pfl"]
    assert "skipped: not installed" in compare.table(
        record
        | {
            "entries": {
                "peft loop 1x1": {
                    "side": "peft loop",
                    "repeats": [{"cpu_s": 2.0}],
                    "loss_difference": 0.0,
                    "error": "",
                },
                "ragged 1x1": {
                    "side": "ragged",
                    "repeats": [{"cpu_s": 1.0}],
                    "loss_difference": 1e-6,
                    "error": "",
                },
            }
        }
    )
