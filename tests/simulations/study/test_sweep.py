"""A part of a study's runs, and the sweep of W&B that does the whole of it."""

from itertools import product

import pytest
import yaml

from fedlora.core.errors import ConfigError
from simulations.app.compose import load
from simulations.study import __main__ as study
from simulations.study.plan import plan, tuning_plan
from simulations.study.spec import parse
from simulations.study.sweep import selected, sweep_yaml
from tests.simulations.study.test_plan import TWO
from tests.simulations.study.test_runner import TINY, Starter
from tests.simulations.study.test_tuning import TUNED

KEYS = {"name", "project", "entity", "method", "parameters", "command"}
"""Of the schema of a sweep that W&B publishes, which allows no others than its own."""


def expanded(text):
    """The arguments of every run that an agent starts, macros filled in as W&B's agent does."""
    sweep = yaml.safe_load(text)
    assert set(sweep) <= KEYS and sweep["method"] == "grid"
    names = list(sweep["parameters"])
    for values in product(*(sweep["parameters"][name]["values"] for name in names)):
        args = [f"{name}={value}" for name, value in zip(names, values, strict=True)]
        env, *words = sweep["command"]
        assert env == "${env}" and words[:2] == ["fedlora", "study"]
        at = words.index("${args_no_hyphens}")
        yield [*words[2:at], *args, *words[at + 1 :]]


@pytest.mark.parametrize(
    ("change", "parameters"),
    [
        ({}, {"method", "seed"}),
        ({"axes": TWO["axes"] | {"client.steps": [1, 2]}}, {"method", "client.steps", "seed"}),
        ({"axes": TWO["axes"] | {"client.steps": [1, 2]},
          "skip": [{"method": "a", "client.steps": 1}]}, {"run"}),
        ({"seeds_for": [{"cells": {"method": "b"}, "seeds": [5]}]}, {"run"}),
        ({"axes": {"strategy/server_optimizer": ["none", "fedadam"]}}, {"run"}),
    ],
)  # fmt: skip
def test_a_sweep_has_every_run_once(change, parameters):
    found = parse("two", TWO | change)
    runs = plan(found)
    text = sweep_yaml(found, runs, "two", ["rounds=3"])
    assert set(yaml.safe_load(text)["parameters"]) == parameters
    started = []
    for words in expanded(text):
        assert words[:4] == ["two", "rounds=3", "tracking=wandb_online", "--only"]
        started += selected(found, runs, words[4:])
    assert sorted(run.name for run in started) == sorted(run.name for run in runs)


def test_a_sweep_of_runs_that_are_tracked_keeps_their_project():
    base = [*TWO["base"], "tracking=wandb", "tracking.project=mine", "tracking.entity=us"]
    found = parse("two", TWO | {"base": base})
    sweep = yaml.safe_load(sweep_yaml(found, plan(found), "two", []))
    assert (sweep["project"], sweep["entity"]) == ("mine", "us")
    assert sweep["command"][3:5] == ["two", "--only"]
    assert load(["tracking=wandb_online"]).tracking.project == "fedlora"


def test_tuning_runs_are_a_sweep_too():
    found = parse("s", TUNED)
    runs = tuning_plan(found)
    words = list(expanded(sweep_yaml(found, runs, "s", [])))
    assert len(words) == len(runs) == 14
    some = selected(found, runs, ["client.lr=0.1", "seed=100"])
    assert [dict(run.cell)["method"] for run in some] == ["fedit", "fedavg"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["rank=8"], "study two: --only names 'rank'; method, seed, run"),
        (["method=c"], "study two: --only method=c: no run has all of these"),
        (["method=a", "seed=9"], "study two: --only method=a seed=9: no run has all of these"),
    ],
)
def test_what_no_run_has_is_refused(words, said):
    found = parse("two", TWO)
    with pytest.raises(ConfigError) as error:
        selected(found, plan(found), words)
    assert str(error.value).startswith(said)


def test_a_part_is_done_without_results_and_the_whole_study_does_the_rest(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("FEDLORA_OUTPUT", str(tmp_path / "outputs"))
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(TINY))
    assert study.main([str(file), "--sweep-yaml", str(tmp_path / "sweep.yaml")]) == 0
    first, *_ = expanded((tmp_path / "sweep.yaml").read_text())
    assert first[0] == str(file)
    one, two, rest = Starter(), Starter(), Starter()
    assert study.main(first, one) == 0
    assert len(one.started) == 1
    assert study.main([str(file), "--only", "seed=0", "seed=1", "method=fedit"], two) == 0
    assert study.main([str(file), "--only", "seed=0", "method=fedit"], Starter()) == 0
    place = tmp_path / "outputs" / "study-tiny"
    assert sorted(f.name for f in place.iterdir()) == ["runs"]
    assert study.main([str(file)], rest) == 0
    started = [*one.started, *two.started, *rest.started]
    assert len(started) == len(set(started)) == 4 and len(rest.started) == 2
    assert study.main([str(file), "--sweep-yaml"]) == 0
    assert capsys.readouterr().out.count("\nmethod: grid\n") == 1
