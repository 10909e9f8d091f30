"""Studies as plans: what a file says, which runs it makes, what is refused."""

import json
import re
import shlex

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from fedlora.core.errors import ConfigError
from fedlora.core.package import ROOT
from simulations.app.compose import load
from simulations.app.identity import digest
from simulations.study.__main__ import main
from simulations.study.plan import command, plan, tuning_plan, write_plan
from simulations.study.spec import Study, parse, read_study, study_names

TWO = {
    "base": ["experiment=smoke", "rounds=1"],
    "axes": {"method": {"a": "strategy=fedit", "b": ["strategy=fedavg", "client.lr=0.5"]}},
    "seeds": [0, 3],
}


def some_cells(found):
    """The first cell of every level."""
    first = {}
    for cell in found.cells():
        for pair in cell:
            first.setdefault(pair, cell)
    return set(first.values())


@pytest.mark.parametrize("name", study_names())
def test_every_recorded_study_says_what_it_claims_and_has_no_unknown_word(name, monkeypatch):
    """Each level once; all runs are planned in a slow test."""
    text = (ROOT / "conf/study" / f"{name}.yaml").read_text()
    assert text.startswith("# ") and re.search(r"minute|hour", text.partition("base:")[0])
    found = read_study(name)
    wanted = some_cells(found) if len(list(found.cells())) < 9 else set(list(found.cells())[:2])
    monkeypatch.setattr(Study, "cells", lambda self: iter(sorted(wanted)))
    assert {run.cell for run in plan(found)} == wanted


@pytest.mark.slow
@pytest.mark.parametrize("name", study_names())
def test_every_recorded_study_is_listed_whole(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FEDLORA_OUTPUT", str(tmp_path))
    found = read_study(name)
    assert main([name, "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    reported = sum(len(found.seeds_of(cell)) for cell in found.cells())
    tuning = len(tuning_plan(found))
    waiting = "waiting  fedlora run "
    assert sum(line.startswith(waiting) for line in lines) == (tuning or reported)
    assert sum(line.startswith("after tuning: ") for line in lines) == reported * bool(tuning)
    for run in [*tuning_plan(found), *plan(found)]:
        assert (run.stage == "tuning") == ("evaluate.plan.split=eval" in run.words)
    personal = [run for run in plan(found) if {"strategy=local", "strategy=fedsa"} & {*run.words}]
    assert all("evaluate.adapters=[own]" in run.words for run in personal)


def test_a_run_has_the_identity_of_its_whole_command():
    found = parse("two", TWO | {
        "axes": {"method": {"b": ["strategy=fedavg", "client.steps=3"]}}, "seeds": [0],
        "evaluation": {"group": "seen", "adapter": "own"},
        "tuning": {"grid": {"client.lr": [1e-3], "ranks": ["uniform", "normal"]}, "seeds": [9],
                   "metric": {"loss": "lower"}, "per": ["method"], "words": ["rounds=2"]},
    })  # fmt: skip
    for run in [*tuning_plan(found), *plan(found)]:
        assert run.identity == digest(OmegaConf.to_container(load(run.words), resolve=True))


def test_coupled_levels_seeds_and_names():
    runs = plan(parse("two", TWO))
    assert [(run.cell, run.seed) for run in runs] == [
        ((("method", level),), seed) for seed in (0, 3) for level in "ab"
    ]
    assert [run.rounds for run in runs] == [1] * 4
    assert runs[1].words[-3:] == ("strategy=fedavg", "client.lr=0.5", "seed=0")
    assert len({run.name for run in runs}) == len({run.identity for run in runs}) == 4


def test_a_command_is_the_run(tmp_path):
    study = parse("two", TWO)
    runs = plan(study)
    write_plan(tmp_path, study, runs)
    lines = (tmp_path / "commands.txt").read_text().splitlines()
    assert lines == [command(run) for run in runs]
    fedlora, verb, *words = shlex.split(lines[1])
    cfg = load(words)
    assert (fedlora, verb, cfg.seed, cfg.client.lr, cfg.rounds) == ("fedlora", "run", 0, 0.5, 1)
    recorded = json.loads((tmp_path / "plan.json").read_text())
    assert [run["cell"] for run in recorded["runs"]] == [dict(run.cell) for run in runs]


def test_an_identity_changes_with_what_results_depend_on_and_with_nothing_else():
    def identities(**change):
        return [run.identity for run in plan(parse("two", TWO | change))]

    same = ["experiment=smoke", "rounds=1", "runtime=laptop", "tracking=wandb"]
    other = ["experiment=smoke", "rounds=1", "client.steps=3"]
    longer = ["experiment=smoke", "rounds=2"]
    before = identities()
    assert identities(base=same) == before
    for base in (other, longer):
        assert not set(identities(base=base)) & set(before)
    assert identities(seeds=[3, 5])[:2] == before[2:]
    one_level = {"method": TWO["axes"]["method"] | {"b": ["strategy=flexlora"]}}
    assert [a == b for a, b in zip(identities(axes=one_level), before, strict=True)] == [
        True, False, True, False,
    ]  # fmt: skip


def test_words_of_the_command_line_win():
    study = parse("two", TWO, ["rounds=4"])
    assert {run.rounds for run in plan(study)} == {4}


def test_words_of_the_command_line_win_over_those_of_axes():
    runs = plan(parse("two", TWO, ["client.lr=0.25"]))
    assert {load(run.words).client.lr for run in runs} == {0.25}


def test_cells_have_seeds_of_their_own_and_only_those_asked_for_are_there():
    axes = {"x": ["a", "b", "c"], "y": ["u", "v"]}
    found = parse("s", {
        "axes": axes, "seeds": [0], "only": [{"x": ["a", "b"]}, {"x": "c", "y": "v"}],
        "seeds_for": [{"cells": {"y": "v"}, "seeds": [0, 1]}, {"cells": {"x": "c"}, "seeds": [7]}],
    })  # fmt: skip
    assert {tuple(dict(c).values()): found.seeds_of(c) for c in found.cells()} == {
        ("a", "u"): (0,), ("a", "v"): (0, 1), ("b", "u"): (0,), ("b", "v"): (0, 1),
        ("c", "v"): (7,),
    }  # fmt: skip
    assert found.all_seeds() == (0, 1, 7)


@pytest.mark.parametrize(
    ("change", "panels"),
    [
        ({}, {"a": (["unseen_random"], ["full"]), "b": (["unseen_random"], ["full"])}),
        ({"evaluation": {"group": "seen", "adapter": "auto"}},
         {"a": (["seen"], ["full"]), "b": (["seen"], ["own"])}),
        ({"evaluation": {"adapter": "own"}, "metrics": {"loss@seen/full": "lower"}},
         {level: (["unseen_random", "seen"], ["own", "full"]) for level in "ab"}),
        ({"metrics": {"loss@seen": "lower", "loss": "lower"}},
         {level: (["unseen_random", "seen"], ["full"]) for level in "ab"}),
    ],
)  # fmt: skip
def test_runs_are_evaluated_on_what_the_metrics_are_of(change, panels):
    axes = {"method": {"a": "strategy=fedit", "b": "strategy=local"}}
    found = {}
    for run in plan(parse("two", TWO | {"axes": axes, "seeds": [0]} | change)):
        asked = load(run.words).evaluate
        found[dict(run.cell)["method"]] = (list(asked.groups), list(asked.adapters))
    assert found == panels


@given(
    sizes=st.lists(st.integers(1, 3), min_size=1, max_size=4),
    seeds=st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True),
    data=st.data(),
)
def test_cells_are_all_combinations_without_those_left_out(sizes, seeds, data):
    axes = {f"x{i}": [f"v{n}" for n in range(size)] for i, size in enumerate(sizes)}
    whole = parse("s", {"axes": axes, "seeds": seeds})
    cells = list(whole.cells())
    assert len(cells) == len(set(cells))
    total = 1
    for size in sizes:
        total *= size
    assert len(cells) == total
    left_out = data.draw(st.sampled_from(cells))
    if total > 1:
        some = parse("s", {"axes": axes, "seeds": seeds, "skip": [dict(left_out)]})
        assert list(some.cells()) == [cell for cell in cells if cell != left_out]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"axis": {}}, "unknown key 'axis'; there are base, axes, seeds, seeds_for, only"),
        ({"axes": {}}, "axes names no axis"),
        ({"axes": ["strategy"]}, "must name axes"),
        ({"axes": {"strategy": "fedit"}}, "axes.strategy is 'fedit'; it must be a list of values"),
        ({"axes": {"strategy": []}}, "must be a list of values of the key strategy"),
        ({"axes": {"strategy": ["fedit", "fedit"]}}, "axes.strategy has a value twice"),
        ({"axes": {"m": {"a": "fedit"}}}, "axes.m.a has 'fedit'; a word is key=value"),
        ({"axes": {"m": {"a": "seed=1"}}}, "a study sets seed itself; list seeds under seeds"),
        ({"base": ["name=x"]}, "a study sets name itself"),
        ({"base": "strategy='x"}, "No closing quotation"),
        ({"base": {"rounds": 1}}, "must be a list of words"),
        ({"seeds": []}, "seeds is []"),
        ({"seeds": [1, 1]}, "list of different whole numbers"),
        ({"seeds": [True]}, "list of different whole numbers"),
        ({"seeds": ["1"]}, "list of different whole numbers"),
        ({"skip": [{"method": "c"}]}, "skip names method='c'; its levels are a, b"),
        ({"skip": [{"rank": "c"}]}, "skip names 'rank'; the axes are method"),
        ({"skip": {"method": "a"}}, "must be a list such as"),
        ({"skip": ["a"]}, "skip is 'a'; it must name levels such as"),
        ({"only": [{"method": "c"}]}, "only names method='c'; its levels are a, b"),
        ({"seeds_for": [{"cells": {"method": "a"}}]}, "seeds_for.seeds is None"),
        ({"seeds_for": [{"seeds": [1]}]}, "seeds_for.cells is None"),
        ({"evaluation": {"adapter": "best"}}, "it must be full, largest, own, auto"),
        ({"evaluation": ["own"]}, "it must have the keys group, adapter"),
        ({"skip": [{"method": "a"}, {"method": "b"}]}, "only and skip leave no cell"),
    ],
)
def test_mistakes_are_one_sentence(change, said):
    with pytest.raises(ConfigError) as error:
        parse("mine", TWO | change)
    assert said in str(error.value)
    assert str(error.value).startswith("study mine") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("axes", "said"),
    [
        ({"method": {"a": "strategy=fedot"}}, "study mine, method a: "),
        ({"method": {"a": "strategy=fedit", "b": "runtime=laptop strategy=fedit"}},
         "method a, seed 0 and method b, seed 0 are the same configuration"),
        ({"rounds": ["many"]}, "rounds='many' is no number"),
    ],
)  # fmt: skip
def test_what_no_run_can_be_made_of_is_named(axes, said):
    with pytest.raises(ConfigError, match=said):
        plan(parse("mine", {"axes": axes}))


@pytest.mark.parametrize("text", ["a: [", "just words", ""])
def test_a_file_that_holds_no_study(text, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match="study mine"):
        read_study(str(file))
    file.write_text(yaml.safe_dump(TWO))
    assert read_study(str(file)).seeds == (0, 3)
    with pytest.raises(ConfigError, match=r"'nothing' is neither .* banking77, .*smoke"):
        read_study("nothing")
