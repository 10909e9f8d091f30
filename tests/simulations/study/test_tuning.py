"""The tuning stage: chosen on validation, on seeds of its own, from records alone, whatever stops
it."""

import csv
import json
from itertools import count

import pytest
import yaml

from fedlora.core.errors import ConfigError
from simulations.study import __main__ as study
from simulations.study.plan import plan, tuning_plan
from simulations.study.spec import parse
from simulations.study.tuning import VALIDATION
from tests.simulations.study.test_runner import Stub, log_of

TUNED = {
    "base": ["experiment=smoke", "evaluate=loss", "rounds=4"],
    "axes": {"method": {"fedit": "strategy=fedit", "fedavg": "strategy=fedavg"}},
    "seeds": [0, 1],
    "metrics": {"accuracy": "higher"},
    "reference": {"method": "fedit"},
    "tuning": {
        "grid": {"client.lr": [0.001, 0.01, 0.1]},
        "grid_for": [{"cells": {"method": "fedavg"}, "grid": {"client.lr": [0.1, 1, 10, 100]}}],
        "metric": {"accuracy": "higher"},
        "seeds": [100, 101],
        "per": ["method"],
    },
}
BEST = {"fedit": {"0.001": 0.1, "0.01": 0.5, "0.1": 0.2}} | {
    "fedavg": {"0.1": 0.1, "1": 0.2, "10": 0.3, "100": 0.4}
}


def rate(run):
    return next(w for w in reversed(run.words) if w.startswith("client.lr=")).split("=")[1]


def quality(run, at):
    """The accuracy of a run after a round: rises, more with the better values."""
    return BEST[dict(run.cell)["method"]][rate(run)] * at / 4 + 0.002 * (run.seed % 2)


class Starter:
    """Starts runs that write what their rounds bring; remembers the rounds that were done. Like
    real ones they evaluate some rounds and the one at which they end, and keep what they have."""

    def __init__(self, quality=quality, fails=lambda run: False, dies_after=10**9, every=1):
        self.quality, self.fails, self.left, self.every = quality, fails, dies_after, every
        self.started, self.rounds = [], 0

    def __call__(self, run, folder):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        self.started.append(run)
        self.rounds += run.wanted
        log_of(folder / run.name).touch()
        if self.fails(run):
            log_of(folder / run.name).write_text("RUN FAILED: it diverged\n")
            return Stub(folder / run.name, 1, 1)
        place = folder / run.name
        place.mkdir(exist_ok=True)
        file, lines = place / "metrics.jsonl", []
        before = map(json.loads, file.read_text().splitlines() if file.exists() else [])
        kept = {line["round"] for line in before if line["kind"] == "evaluate"}
        for at in range(run.wanted + 1):
            lines += [{"kind": "round", "round": at}] if at else []
            if at % self.every and at != run.wanted and at not in kept:
                continue
            lines.append(
                {"kind": "evaluate", "round": at, "group": "g", "adapter": "full"}
                | {"accuracy": self.quality(run, at)}
            )
        return Ended(place, lines, run.wanted)


class Ended(Stub):
    def __init__(self, folder, lines, rounds):
        super().__init__(folder, 1, 0)
        self.lines, self.rounds = lines, rounds

    def poll(self):
        text = "".join(json.dumps(line) + "\n" for line in self.lines)
        (self.folder / "metrics.jsonl").write_text(text)
        status = {"status": "completed", "rounds_done": self.rounds, "message": ""}
        (self.folder / "status.json").write_text(json.dumps(status))
        return 0


DRAWN = study.all_figures


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No waiting and no figures."""
    monkeypatch.setattr("simulations.study.runner.POLL_S", 0.0)
    monkeypatch.setattr(study, "all_figures", lambda *found: [])


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Writes a study's file; its path and the folder of its results."""

    def write(change=None, name="tuned", **of_tuning):
        outputs = tmp_path / f"outputs-{next(numbers)}"
        monkeypatch.setenv("FEDLORA_OUTPUT", str(outputs))
        file = tmp_path / f"{name}.yaml"
        content = TUNED | (change or {})
        content["tuning"] = TUNED["tuning"] | of_tuning
        file.write_text(yaml.safe_dump(content, sort_keys=False))
        return str(file), outputs / f"study-{name}"

    numbers = count()
    return write


def recorded(folder):
    found = json.loads((folder / "plan.json").read_text())
    return {t["group"].get("method", ""): t for t in found["tuning"]}, found["runs"]


def files(folder):
    names = ["plan.json", "commands.txt", "tuning.csv", "table.md", "table.csv", "table.tex"]
    return {name: (folder / name).read_bytes() for name in names}


def test_values_are_chosen_on_validation_and_own_seeds_then_reported(place, capsys):
    file, folder = place()
    starter = Starter()
    assert study.main([file, "--list"], starter) == 0
    said = capsys.readouterr().out
    assert said.count("waiting  fedlora run") == 2 * (3 + 4)
    assert said.count("after tuning: ") == 4 and not starter.started
    assert study.main([file], starter) == 0
    tuning = [run for run in starter.started if run.stage]
    others = [run for run in starter.started if not run.stage]
    assert starter.started == [*tuning, *others] and len(tuning) == 14 and len(others) == 4
    assert {run.seed for run in tuning} == {100, 101} and {run.seed for run in others} == {0, 1}
    assert all(run.words[-2] == VALIDATION for run in tuning)
    assert not any(VALIDATION in run.words for run in others)
    assert {(dict(r.cell)["method"], rate(r)) for r in others} == {("fedit", "0.01")} | {
        ("fedavg", "100")
    }
    tuned, runs = recorded(folder)
    assert tuned["fedit"]["chosen"] == {"client.lr": "0.01"} and tuned["fedit"]["edges"] == []
    assert [len(t["candidates"]) for t in tuned.values()] == [3, 4]
    assert [run["identity"] for run in runs] == [run.identity for run in starter.started]
    assert len((folder / "commands.txt").read_text().splitlines()) == 18
    capsys.readouterr()
    assert study.main([file, "--list"], starter) == 0
    said = capsys.readouterr().out
    assert said.count("done     fedlora run") == 18
    assert "chosen for method fedit: client.lr=0.01" in said


def test_tables_say_what_was_chosen_among_what_and_warn_at_the_edge(place, capsys, monkeypatch):
    monkeypatch.setattr(study, "all_figures", DRAWN)
    file, folder = place()
    assert study.main([file], Starter()) == 0
    assert "fedavg: the chosen client.lr=100 is at the edge" in capsys.readouterr().out
    text = (folder / "table.md").read_text()
    assert "| fedit | client.lr=0.01 | 0.501 ± 0.001 (2) | client.lr: 0.001, 0.01, 0.1 |" in text
    assert "client.lr=100 (edge of the grid)" in text
    assert "- method fedavg: the chosen client.lr=100 is at the edge of the grid" in text
    assert "| method | 0.001 | 0.01 | 0.1 | 1 | 10 | 100 |" in text
    assert "| fedit | 0.101 ± 0.001 (2) | **0.501 ± 0.001 (2)** | 0.201 ± 0.001 (2) | – |" in text
    rows = list(csv.DictReader((folder / "tuning.csv").read_text().splitlines()))
    assert len(rows) == 14 and sum(int(row["chosen"]) for row in rows) == 4
    table = list(csv.DictReader((folder / "table.csv").read_text().splitlines()))
    assert {(row["method"], row["client.lr"]) for row in table} == {
        ("fedit", "0.01"), ("fedavg", "100"),
    }  # fmt: skip
    assert "client.lr" in (folder / "table.tex").read_text()
    assert (folder / "figures" / "sensitivity-client.lr-0.pdf").is_file()
    assert "at the edge" in (folder / "report.html").read_text()


def test_a_failed_value_is_left_out_and_a_group_without_any_is_missing(place, capsys):
    file, folder = place()

    def fails(run):
        method = dict(run.cell)["method"]
        return run.stage and (method == "fedavg" or (rate(run) == "0.01" and run.seed == 101))

    assert study.main([file], Starter(fails=fails)) == 1
    said = capsys.readouterr().out
    assert "client.lr=0.01 left out: method fedit, client.lr 0.01, seed 101: it diverged" in said
    assert "method fedavg: no value has a whole set of runs, so nothing is reported" in said
    tuned, _ = recorded(folder)
    assert tuned["fedit"]["chosen"] == {"client.lr": "0.1"} and tuned["fedavg"]["chosen"] is None
    text = (folder / "table.md").read_text()
    assert "- method fedavg: no complete run of seed 0, 1" in text and "| failed |" in text
    assert study.main([file], again := Starter()) == 0
    assert [run.stage for run in again.started].count("tuning") == 9
    assert recorded(folder)[0]["fedit"]["chosen"] == {"client.lr": "0.01"}


def test_numbers_that_are_not_finite_are_never_chosen(place):
    file, folder = place()

    def diverged(run, at):
        return float("inf") if rate(run) == "0.1" and run.stage else quality(run, at)

    assert study.main([file], Starter(quality=diverged)) == 0
    tuned, _ = recorded(folder)
    assert tuned["fedit"]["candidates"][2]["mean"] is None
    assert "no finite accuracy" in tuned["fedit"]["candidates"][2]["left_out"][0]


@pytest.mark.parametrize("better", ["higher", "lower"])
def test_of_equal_values_the_first_of_the_grid_is_chosen(place, better):
    file, folder = place(metric={"accuracy": better})
    assert study.main([file], Starter(quality=lambda run, at: 0.5)) == 0
    tuned, _ = recorded(folder)
    assert tuned["fedit"]["chosen"] == {"client.lr": "0.001"}
    assert tuned["fedit"]["edges"] == ["client.lr=0.001"]


@pytest.mark.parametrize("prune", [None, {"rounds": [1, 2], "keep": 0.5}])
def test_a_study_that_is_stopped_anywhere_ends_with_the_same_files(place, prune):
    file, folder = place(prune=prune)
    assert study.main([file, "--jobs", "2"], whole := Starter()) == 0
    wanted = files(folder)
    file, folder = place(prune=prune)
    for dies_after in (1, 4, 2, 6, 3):
        study.main([file, "--jobs", "3"], Starter(dies_after=dies_after))
    assert study.main([file, "--jobs", "1"], Starter()) == 0
    assert files(folder) == wanted
    assert study.main([file], last := Starter()) == 0
    assert last.started == [] and whole.started


def test_pruning_ends_the_worse_values_of_each_group_and_says_so(place):
    file, folder = place()
    assert study.main([file], without := Starter()) == 0
    kept = recorded(folder)[0]
    file, folder = place(prune={"rounds": [1, 2], "keep": 0.5})
    pruned = Starter()
    assert study.main([file], pruned) == 0
    # values do 1 round, then 2 of 3 and 2 of 4 do 2, then one of each does all 4
    done = {}
    for run in pruned.started:
        if run.stage:
            at = (dict(run.cell)["method"], rate(run), run.seed)
            done[at] = max(done.get(at, 0), run.wanted)
    assert sorted(done.values()) == sorted(2 * [1, 2, 4, 1, 1, 2, 4])
    assert sum(done.values()) < 4 * sum(run.stage == "tuning" for run in without.started)
    tuned, _ = recorded(folder)
    for group, found in tuned.items():
        assert found["chosen"] == kept[group]["chosen"]
    assert [c.get("pruned", 0) for c in tuned["fedit"]["candidates"]] == [1, 0, 2]
    text = (folder / "table.md").read_text()
    assert "(2, ended after round 1)" in text and "(2, ended after round 2)" in text


def test_parts_compare_where_the_whole_study_does_and_the_choice_is_the_same(place):
    prune = {"rounds": [1, 2], "keep": 0.5}  # a whole run evaluates round 3 first
    file, folder = place(prune=prune)
    assert study.main([file], whole := Starter(every=3)) == 0
    wanted = files(folder)
    file, folder = place(prune=prune)
    some, rest = Starter(every=3), Starter(every=3)
    assert study.main([file, "--only", "method=fedit", "client.lr=0.1"], some) == 0
    assert {run.wanted for run in some.started} == {1, 2, 4}  # part of a group: nothing ends
    assert study.main([file, "--only", "method=fedit"], some) == 0
    assert study.main([file, "--only", "method=fedavg"], rest) == 0
    assert {run.stage for run in rest.started} == {"tuning", ""}  # it goes on once it is known how
    assert all(dict(run.cell)["method"] == "fedavg" for run in rest.started)
    assert rest.rounds == sum(r.wanted for r in whole.started if dict(r.cell)["method"] == "fedavg")
    assert study.main([file], Starter(every=3)) == 0
    assert files(folder) == wanted


def test_whole_runs_that_lack_a_comparison_say_so_and_are_compared_at_the_end(place, capsys):
    file, folder = place()
    study.main([file], Starter(every=3))
    wanted = recorded(folder)[0]
    assert study.main([file, "prune=[2]"], Starter(every=3)) == 1
    said = "seed 101: not evaluated after round 2, where values are compared; it was after rounds "
    assert said + "0, 3, 4 (prune=false" in capsys.readouterr().out
    assert study.main([file, "prune=false"], last := Starter(every=3)) == 0
    assert recorded(folder)[0] == wanted and last.started == []


def test_pruning_from_the_command_line_is_that_of_the_file(place):
    file, folder = place(prune={"rounds": [1, 2], "keep": 0.5})
    assert study.main([file], Starter()) == 0
    wanted = files(folder)
    assert study.main([file, "prune=false"], rest := Starter()) == 0
    assert rest.started and files(folder) != wanted
    file, folder = place()
    assert study.main([file, "prune={rounds:[1,2],keep:0.5}"], Starter()) == 0
    assert files(folder) == wanted
    assert parse("s", TUNED, ["prune=[1,2]"]) == parse("s", TUNED, ["prune={rounds:[1,2]}"])


@pytest.mark.parametrize(
    ("change", "word", "said"),
    [
        ({}, "prune=true", "study mine: prune is True; it must have the keys rounds, keep"),
        ({}, "prune=2,4", "study mine: prune is '2,4'; it must have the keys"),
        ({}, "prune=[4,2]", "study mine: prune.rounds is [4, 2]; it must be rising"),
        ({"tuning": None}, "prune=[2]", "'prune=[2]' ends values of a tuning stage early, and"),
    ],
)
def test_mistakes_of_pruning_from_the_command_line(change, word, said):
    with pytest.raises(ConfigError) as error:
        parse("mine", TUNED | change, [word])
    assert said in str(error.value) and "\n" not in str(error.value)


def test_tuning_happens_at_some_levels_and_counts_for_all():
    axes = TUNED["axes"] | {"client.steps": [1, 2]}
    found = parse("s", TUNED | {"axes": axes, "tuning": TUNED["tuning"] | {"at": {
        "client.steps": 2}, "words": ["rounds=1"]}})  # fmt: skip
    tuning = tuning_plan(found)
    assert {dict(run.cell)["client.steps"] for run in tuning} == {"2"}
    assert {run.rounds for run in tuning} == {1}
    chosen = dict.fromkeys(found.groups(), (("client.lr", "0.5"),))
    runs = plan(found, (), chosen)
    assert len(runs) == 8 and {rate(run) for run in runs} == {"0.5"}
    del chosen[(("method", "fedit"),)]
    assert {dict(run.cell)["method"] for run in plan(found, (), chosen)} == {"fedavg"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seeds": [1, 100]}, "tuning.seeds has 1, which is a reported seed"),
        ({"words": ["evaluate.plan.split=test"]}, "values are chosen on the validation split"),
        ({"grid": {}}, "tuning.grid is {}"),
        ({"grid": {"client.lr": [1, 1]}}, "it must be a list of different values"),
        ({"grid": {"rounds": [1, 2]}}, "has 'rounds', which is an axis or fixed"),
        ({"grid": {"evaluate.every": [1, 2]}}, "which is an axis or fixed"),
        ({"grid": {"seed": [1, 2]}}, "which is an axis or fixed"),
        ({"metric": {"a": "higher", "b": "lower"}}, "it must be one metric"),
        ({"metric": {"a": "max"}}, "metric.a is 'max'; it must be higher or lower"),
        ({"per": ["ranks"]}, "tuning.per is ['ranks']; it must be a list of axes: method"),
        ({"at": {"method": "fedit"}}, "tuning.at names 'method', whose levels are tuned"),
        ({"per": [], "at": {"method": "x"}}, "tuning.at names method='x'; its levels are"),
        ({"grid_for": [{"cells": {"method": "fedit"}, "grid": {"client.steps": [1]}}]},
         "grid has the keys client.steps; it must have those of grid: client.lr"),
        ({"prune": {"rounds": [2, 1]}}, "must be rising whole numbers"),
        ({"prune": {"rounds": [1], "keep": 1}}, "keep is 1; it must be above 0 and below 1"),
        ({"prunes": {}}, "tuning: unknown key 'prunes'"),
    ],
)  # fmt: skip
def test_mistakes_of_a_tuning_stage_are_one_sentence(change, said):
    with pytest.raises(ConfigError) as error:
        parse("mine", TUNED | {"tuning": TUNED["tuning"] | change})
    assert said in str(error.value)
    assert str(error.value).startswith("study mine: tuning") and "\n" not in str(error.value)


def test_a_tuned_key_that_the_command_line_sets_is_refused(place, capsys):
    file, _ = place()
    assert study.main([file, "client.lr=0.5"], Starter()) == 2
    assert "are the same configuration" in capsys.readouterr().err
