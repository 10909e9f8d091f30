"""Studies in trackers: runs are grouped, results do not depend on it, a summary has the tables."""

import shlex
from io import BytesIO

import pytest
from PIL import Image

from fedlora.run.tracking import Tracking
from simulations.app.compose import load
from simulations.study.__main__ import write_results
from simulations.study.plan import command, plan
from simulations.study.runner import progress_of
from simulations.study.spec import parse
from simulations.study.summary import tracking_of
from simulations.study.tables import csv_table
from simulations.study.tracked import labels_of
from tests.simulations.study.test_plan import TWO
from tests.simulations.study.test_results import analysed, folder

__all__ = ["folder"]

WANDB = ["experiment=smoke", "rounds=1", "tracking=wandb"]


def test_runs_have_group_kind_and_tags_and_no_other_identity():
    plain = plan(parse("two", TWO))
    runs = plan(parse("two", TWO | {"base": [*WANDB, "tracking.tags=[mine]"]}))
    assert not any(run.labels for run in plain)
    assert [run.identity for run in runs] == [run.identity for run in plain]
    for run in runs:
        tracking = load(shlex.split(command(run))[2:]).tracking
        assert (tracking.group, tracking.job_type) == ("two", "reported")
        assert list(tracking.tags) == [
            "mine", f"method:{dict(run.cell)['method']}", f"seed:{run.seed}",
        ]  # fmt: skip


def test_a_group_of_ones_own_stays_and_what_a_tracker_has_not_is_not_set():
    cell = (("method", "a, 'b'"), ("x" * 70, "level"))
    words = labels_of("s", {"group": "mine", "job_type": "", "tags": []}, cell, 3, "tuning")
    assert words[0] == "tracking.job_type=tuning" and len(words) == 2
    tags = load(["tracking=wandb", *words]).tracking.tags
    assert list(tags) == ["method:a, 'b'", "x" * 64, "seed:3"]
    assert labels_of("s", {"_target_": "fedlora.run.tracking.Silent"}, cell, 3) == ()


class Kept(Tracking):
    """Keeps what it is given."""

    def __init__(self, fails=False):
        self.found, self.fails = [], fails

    def open(self, folder, name):
        return ()

    def summarise(self, folder, name, found):
        if self.fails:
            raise RuntimeError("no room")
        self.found.append((folder, name, found))


def test_the_summary_has_every_number_of_the_tables_and_every_figure(folder):
    study, runs, place = folder
    tracking = Kept()
    write_results(study, progress_of(runs, place), place, (), tracking)
    ((where, name, found),) = tracking.found
    assert (where, name) == (place, "study-mine")
    columns, rows = csv_table(study, analysed(folder))
    assert list(found.tables) == list(study.metrics)
    assert all(list(names) == columns for names, _ in found.tables.values())
    together = [row for _, some in found.tables.values() for row in some]
    assert sorted(map(str, together)) == sorted(map(str, rows))
    assert {f.stem for f in (place / "figures").glob("*.pdf")} == set(found.figures)
    assert all(Image.open(BytesIO(png)).size[0] > 500 for png in found.figures.values())
    assert found.config["axes"] == {"method": ["fe_dit", "50%"], "ranks": ["uniform", "normal"]}


def test_a_tracker_that_fails_costs_the_study_nothing_else(folder, capsys, monkeypatch):
    study, runs, place = folder
    monkeypatch.setattr("simulations.study.__main__.all_figures", lambda *found: [])
    assert write_results(study, progress_of(runs, place), place, (), Kept(fails=True))
    said = capsys.readouterr().out
    assert said == "no summary of the study is tracked: RuntimeError: no room\n"
    assert (place / "report.html").is_file()


@pytest.mark.parametrize("group", ["", "mine"])
def test_the_summary_goes_into_the_group_of_the_runs_without_their_tags(group):
    base = [*WANDB, "tracking.tags=[t]", *([f"tracking.group={group}"] if group else [])]
    study = parse("two", TWO | {"base": base})
    tracking = tracking_of(study, plan(study))
    assert (tracking.group, tracking.job_type, tracking.tags) == (
        group or "two", "summary", ("t",),
    )  # fmt: skip
