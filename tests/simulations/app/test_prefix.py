"""Runs whose first blocks carry no adapter: what ``engine.prefix`` decides, says and changes."""

import json
from dataclasses import replace

import pytest

from fedlora.core.errors import ConfigError
from fedlora.engine.fused import Fused
from fedlora.engine.sequential import Sequential
from fedlora.models.modules import CLASSIFICATION
from fedlora.models.spec import Tiny
from fedlora.population.sampling import Roster
from fedlora.server.schedule import Rounds
from simulations.app.compose import load
from simulations.app.parts import build_parts
from simulations.app.prefix import settled_prefix

TOP = ["experiment=smoke", "model.layers=top:1", "evaluate=loss", "evaluate.clients=2"]


class Shard:
    """Ten training examples of twenty tokens."""

    id = 0

    def holds(self, split):
        return 10, 200


def decided(*words, layers="top:1", rounds=10, per_round=5, engine=None):
    """The engine of a run of ten clients, and what was said."""
    parts = build_parts(load([*words, "evaluate=none"]))
    parts = replace(parts, federation=replace(Rounds(), rounds=rounds))
    ids = tuple(range(10))
    roster = Roster((), ids, {}, per_round, tuple(Shard() for _ in ids), 0)
    said = []
    info = Tiny(layers=layers).describe()
    return settled_prefix(parts, engine or parts.engine, info, roster, said.append), said


def test_examples_that_are_visited_often_are_computed_once():
    engine, said = decided()
    assert engine.prefix == "on"
    assert "first 3 of 4 blocks carry no adapter, and an example is visited 5.0 times" in said[0]


def test_examples_that_are_visited_seldom_are_not():
    engine, said = decided(rounds=1)
    assert engine.prefix == "off"
    assert "visited 1.0 times, which is too seldom" in said[0]
    assert decided("client.epochs=3", rounds=1)[0].prefix == "on"


def test_clients_that_are_never_drawn_cost_nothing():
    """Two of ten clients in one round of four epochs: four visits of what is computed."""
    _, said = decided("client.epochs=4", rounds=1, per_round=2)
    assert "visited 4.0 times" in said[0]
    size = 2 * 200 * 128 * 4 / 1e9
    assert f"take about {size:.2g} GB" in said[0]


def test_states_that_do_not_fit_are_refused_or_left_out():
    engine, said = decided("engine.prefix_gb=1e-6")
    assert engine.prefix == "off"
    assert "more than engine.prefix_gb=1e-06 or the disk has room for" in said[0]
    with pytest.raises(ConfigError, match=r"prefix=on: .* more than engine\.prefix_gb=1e-06: give"):
        decided("engine.prefix=on", "engine.prefix_gb=1e-6")


def test_nothing_is_said_where_every_block_has_adapters():
    engine, said = decided(layers="all")
    assert (engine.prefix, said) == ("off", [])
    with pytest.raises(ConfigError, match=r"prefix=on: no block of tiny lies before the first"):
        decided("engine.prefix=on", layers="all")


@pytest.mark.parametrize("transport", ["local", "messages"])
def test_a_split_has_the_losses_and_bytes_of_one_without_states(federate, transport):
    words = ["strategy=splitlora", "strategy.cut=2", f"strategy.transport={transport}"]
    words += ["model.layers=top:3", "ranks=homogeneous", "population.per_round=2"]
    with_states, without = (federate(*words, f"engine.prefix={p}", output=p) for p in ("on", "off"))
    note = "split: the first 1 of 4 blocks computed once per example"
    assert note in with_states.said and note not in without.said
    for ours, theirs in zip(with_states.rounds, without.rounds, strict=True):
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], abs=1e-5)
        for way in ("up", "down"):
            assert ours[f"wire/{way}_bytes"] == theirs[f"wire/{way}_bytes"] > 0


def test_what_was_said_is_done():
    assert decided(engine=Sequential(prefix="off")) == (Sequential(prefix="off"), [])
    engine, said = decided(engine=Sequential(prefix="on"))
    assert (engine, said) == (Sequential(prefix="on"), [])


@pytest.mark.parametrize("engine", ["sequential", "auto"])
def test_a_run_has_the_losses_of_one_without_states(federate, engine):
    runs = [federate(*TOP, f"engine={engine}", f"engine.prefix={p}") for p in ("on", "off")]
    losses = [[r["train/loss"] for r in run.rounds] for run in runs]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    note = "the first 3 of 4 blocks computed once per example"
    assert all(note in r["engine"] for r in runs[0].rounds)
    assert not any(note in r["engine"] for r in runs[1].rounds)
    worker = json.loads((runs[0].folder / "worker.json").read_text())
    assert worker["engine"]["prefix"] == "on"


def test_products_are_left_out_before_states_are():
    """A last block's keys and values take twice the states' room: if that is not there, the states
    alone are kept."""
    info = replace(Tiny(layers="top:1").describe(), task=CLASSIFICATION)
    assert info.classifies
    fused = Fused()

    def chosen(gb, engine=fused, **words):
        parts = build_parts(load([f"engine.prefix_gb={gb}", "evaluate=none"]))
        parts = replace(parts, federation=replace(Rounds(), rounds=10))
        roster = Roster((), tuple(range(10)), {}, 5, tuple(Shard() for _ in range(10)), 0)
        given = replace(engine, prefix_gb=gb, **words)
        return settled_prefix(parts, given, info, roster, lambda _: None).prefix

    states = 10 * 200 * 128 * 4 / 1e9
    assert chosen(3 * states) == "on"
    assert chosen(2.9 * states) == "states"
    assert chosen(0.9 * states) == "off"
    assert chosen(1.1 * states, prefix="states") == "states"
    assert chosen(1.1 * states, Fused(layout="padded")) == "on"
    assert chosen(1.1 * states, Sequential()) == "on"
    with pytest.raises(ConfigError, match=r"prefix=on: .* more than engine\.prefix_gb"):
        chosen(1.1 * states, prefix="on")
