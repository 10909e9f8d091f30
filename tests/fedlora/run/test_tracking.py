"""Laws of records: nothing is lost, nothing appears twice, nothing that fails stops a run."""

import json
import math
import os
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fedlora.core.config import build, describe
from fedlora.core.errors import ConfigError
from fedlora.run.tracking import (
    Findings,
    JsonlTracker,
    Silent,
    Tracking,
    Wandb,
    distributions,
    flat_metrics,
    missing_rounds,
    read_jsonl,
    track,
)

LAWS = settings(derandomize=True, deadline=None, max_examples=40)
NO_TRACKING = Silent()


def lines(folder: Path, name: str = "metrics") -> list[dict]:
    text = (folder / f"{name}.jsonl").read_text()
    assert not text or text.endswith("\n")
    return [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]


def play(tracker, rounds, loss=1.0) -> None:
    for n in rounds:
        tracker.clients([{"round": n, "client": c, "rank": "8", "loss": loss} for c in range(3)])
        tracker.round({"kind": "round", "round": n, "train/loss": loss})
        tracker.round({"kind": "evaluate", "round": n, "group": "seen", "loss_full": loss})


# --- JSON lines -----------------------------------------------------------------------------------


def test_every_record_is_on_the_disk_as_soon_as_it_was_given(tmp_path):
    tracker = JsonlTracker(tmp_path)
    for n in range(1, 4):
        play(tracker, [n])
        assert [r["round"] for r in lines(tmp_path)] == [r for r in range(1, n + 1) for _ in "ab"]
        assert len(lines(tmp_path, "clients")) == 3 * n


def test_values_that_json_does_not_know_become_ones_it_knows(tmp_path):
    record = {
        "round": np.int64(1), "nan": math.nan, "inf": np.float32("inf"), "low": -math.inf,
        "tensor": torch.tensor(0.5), "float32": np.float32(0.25), "flag": np.bool_(True),
        "text": "ü", "nested": {"a": (1, math.nan)}, "path": Path("x"),
    }  # fmt: skip
    JsonlTracker(tmp_path).round(record)
    assert lines(tmp_path) == [
        {
            "round": 1, "nan": None, "inf": None, "low": None, "tensor": 0.5, "float32": 0.25,
            "flag": True, "text": "ü", "nested": {"a": [1, None]}, "path": "x",
        }
    ]  # fmt: skip


@LAWS
@given(reached=st.integers(1, 6), resumed=st.integers(0, 6))
def test_a_resumed_run_has_every_round_once(tmp_path_factory, reached, resumed):
    folder = tmp_path_factory.mktemp("run")
    resumed = min(resumed, reached)
    JsonlTracker(folder).round({"kind": "evaluate", "round": 0, "group": "seen"})
    play(JsonlTracker(folder, 0), range(1, reached + 1), loss=1.0)
    play(JsonlTracker(folder, resumed), range(resumed + 1, 8), loss=2.0)
    rounds = [r for r in lines(folder) if r["kind"] == "round"]
    assert [r["round"] for r in rounds] == list(range(1, 8))
    assert [r["train/loss"] for r in rounds] == [1.0] * resumed + [2.0] * (7 - resumed)
    assert sum(r["kind"] == "evaluate" for r in lines(folder)) == 8
    assert [r["round"] for r in lines(folder, "clients")] == [n for n in range(1, 8) for _ in "abc"]


def test_a_new_run_begins_with_nothing(tmp_path):
    play(JsonlTracker(tmp_path), [1, 2])
    JsonlTracker(tmp_path)
    assert lines(tmp_path) == lines(tmp_path, "clients") == []


@pytest.mark.parametrize("torn", [b'{"kind": "round", "rou', b"\x00\x00\x00", b'{"a": "\xc3'])
def test_a_line_torn_by_a_kill_costs_only_itself(tmp_path, torn):
    play(JsonlTracker(tmp_path), [1, 2])
    with (tmp_path / "metrics.jsonl").open("ab") as f:
        f.write(torn)
    assert [r["round"] for r in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 1, 2, 2]
    play(JsonlTracker(tmp_path, 2), [3])
    assert [r["round"] for r in lines(tmp_path)] == [1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("forged", ["true", "-1", '"2"', "null", "[1]", "1.5", "{}"])
def test_a_record_whose_round_is_no_number_is_left_out(tmp_path, caplog, forged):
    """It would be sorted into no round, or end the next resume with a TypeError."""
    play(JsonlTracker(tmp_path), [1, 2])
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write(f'{{"kind": "round", "round": {forged}}}\n')
    assert [r["round"] for r in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 1, 2, 2]
    assert "line 5 is no record of a round" in caplog.text
    play(JsonlTracker(tmp_path, 2), [3])
    assert [r["round"] for r in lines(tmp_path)] == [1, 1, 2, 2, 3, 3]


def test_lost_rounds_are_found(tmp_path):
    play(JsonlTracker(tmp_path), [1, 2, 3, 4])
    file = tmp_path / "metrics.jsonl"
    assert missing_rounds(file, 4) == []
    file.write_text("".join(line for line in file.open() if '"round": 2' not in line))
    assert missing_rounds(file, 5) == [2, 5]
    assert missing_rounds(tmp_path / "absent.jsonl", 2) == [1, 2]


def test_a_missing_file_holds_no_records(tmp_path):
    assert read_jsonl(tmp_path / "absent.jsonl") == []


# --- several trackers -----------------------------------------------------------------------------


class Broken:
    def _fail(self, *_):
        raise RuntimeError("the disk is gone")

    config = round = clients = close = _fail


class BrokenTracking(Tracking):
    def open(self, folder, name):
        return [Broken()]


class Unopenable(Tracking):
    def open(self, folder, name):
        raise OSError("no room")


def test_a_tracker_that_raises_is_named_once_and_stops_nobody(tmp_path, caplog):
    tracker = track(BrokenTracking(), tmp_path, "run")
    tracker.config({"seed": 3})
    play(tracker, range(1, 5))
    tracker.close()
    assert [r["round"] for r in lines(tmp_path)] == [1, 1, 2, 2, 3, 3, 4, 4]
    errors = [r for r in caplog.records if r.levelname == "ERROR"]
    assert len(errors) == 1
    assert "Broken failed" in errors[0].getMessage()
    assert tracker.lost == "Broken: RuntimeError: the disk is gone"


def test_a_tracker_that_cannot_be_opened_stops_nobody(tmp_path, caplog):
    tracker = track(Unopenable(), tmp_path, "run")
    play(tracker, [1])
    assert len(lines(tmp_path)) == 2
    assert tracker.lost == "Unopenable: OSError: no room"
    assert track(Silent(), tmp_path / "other", "run").lost == ""
    assert "Unopenable" in caplog.text


def test_importing_the_module_does_not_import_wandb():
    code = "import sys, fedlora.run.tracking; sys.exit('wandb' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- configuration --------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", [Silent(), Wandb(tags=("a", "b"), group="g"), Wandb("online")])
def test_a_choice_is_its_own_schema(choice):
    assert build(describe(choice), Tracking) == choice


def test_an_unknown_mode_is_refused_with_what_is_allowed():
    with pytest.raises(ConfigError, match=r"tracking.mode='live'.*offline"):
        build({"_target_": "fedlora.run.tracking.Wandb", "mode": "live"}, Tracking)


def test_disabled_opens_nothing(tmp_path):
    assert Wandb("disabled").open(tmp_path, "run") == ()


REFUSED = {
    "project with a slash": ({"project": "team/llm"}, "tracking.project='team/llm' contains /"),
    "project with others": ({"project": "a#b?c"}, "contains # ?"),
    "project too long": ({"project": "p" * 129}, "has 129 characters; W&B allows 128"),
    "no project": ({"project": ""}, "tracking.project='' must be"),
    "entity with a slash": ({"entity": "org/team"}, "tracking.entity='org/team' contains /"),
    "long tag": ({"tags": ("fine", "t" * 65)}, "between 1 and 64 characters"),
    "empty tag": ({"tags": ("",)}, "between 1 and 64 characters"),
    "long group": ({"group": "g" * 129}, "tracking.group="),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_wandb_would_refuse_is_refused_first(case):
    fields, message = REFUSED[case]
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        Wandb(**fields).check("run")
    assert message in str(caught.value)
    Wandb("disabled", **fields).check("run")
    Silent().check("run")


def test_a_name_that_wandb_would_refuse():
    Wandb(project="p" * 128, tags=("t" * 64,), entity="team-a", group="g").check("n" * 128)
    with pytest.raises(ValueError, match=r"name=.*129 characters"):
        Wandb().check("n" * 129)


@pytest.mark.parametrize(
    "fields", [{"project": "a/b"}, {"project": "p" * 129}, {"run_tags": ("t" * 65,)}]
)
def test_the_rules_are_those_of_wandb(fields):
    """What `Wandb.check` refuses, W&B refuses too."""
    wandb = pytest.importorskip("wandb")
    with pytest.raises((ValueError, wandb.errors.UsageError)):
        wandb.Settings(**fields)


# --- Weights & Biases -----------------------------------------------------------------------------


@pytest.fixture
def no_account(tmp_path, monkeypatch):
    """No key, no home with one, and nothing that waits for a service."""
    for name in [n for n in os.environ if n.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "home" / "wandb"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")


def wandb_records(folder: Path) -> list[list[dict]]:
    """What `wandb leet` reads back of every process that recorded, oldest first."""
    files = sorted((folder / "wandb").glob("offline-run-*/run-*.wandb"), key=os.path.getmtime)
    wandb = str(Path(sys.executable).with_name("wandb"))
    found = []
    for file in files:
        answer = subprocess.run(
            [wandb, "leet", "inspect", "--json", str(file)], check=True, capture_output=True
        )
        found.append([json.loads(line) for line in answer.stdout.splitlines()])
    return found


def history(records: list[dict]) -> list[dict]:
    return [r["history"]["item"] for r in records if r["type"] == "history"]


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_a_run_without_an_account_can_be_read_back(tmp_path, no_account, mode):
    """Online without a key records offline instead of failing."""
    pytest.importorskip("wandb")
    folder = tmp_path / "run"
    tracking = Wandb(mode, project="laws", group="tests", tags=("fast",))
    tracker = track(tracking, folder, "flexlora-uniform-s3")
    tracker.config({"seed": 3, "strategy": {"_target_": "x.Y", "rate": math.nan}})
    rows = [
        {"round": 1, "client": c, "tier": "t", "rank": label, "loss": 2.0 + c, "seconds": 0.1}
        for c, label in enumerate(["8", "8", "4/16"])
    ]
    tracker.clients([*rows, {"round": 1, "client": 9, "rank": "8", "failure": "ValueError"}])
    tracker.round({"kind": "round", "round": 1, "train/loss": 2.5, "aggregate/update_norm": 0.7})
    tracker.round({"kind": "evaluate", "round": 1, "group": "seen", "rouge_l": 0.25})
    tracker.round({"kind": "round", "round": 2, "train/loss": math.nan})
    tracker.close()
    assert "WANDB_DATA_DIR" not in os.environ

    (records,) = wandb_records(folder)
    (run,) = [r["run"] for r in records if r["type"] == "run"]
    assert (run["display_name"], run["project"]) == ("flexlora-uniform-s3", "laws")
    assert run["run_id"] == (folder / "wandb_run_id").read_text()
    config = {}
    for r in records:
        config |= (
            r.get(r["type"], {}).get("config", {}).get("update", {}) if r["type"] == "run" else {}
        )
        config |= r["config"].get("update", {}) if r["type"] == "config" else {}
    assert config["seed"] == 3
    first, second = history(records)
    assert first["_step"] == 1
    assert first["train/loss"] == 2.5
    assert first["aggregate/update_norm"] == 0.7
    assert first["evaluate/seen/rouge_l"] == 0.25
    assert first["clients/rank._type"] == "histogram"
    assert sum(first["clients/rank.values"]) == 4
    assert (first["clients/rank.bins"][0], first["clients/rank.bins"][-1]) == (8, 16)
    assert sum(first["clients/loss.values"]) == 3
    assert second["_step"] == 2
    table = json.loads(next(folder.glob("wandb/*/files/media/table/**/*.table.json")).read_text())
    assert table["columns"][:4] == ["round", "client", "tier", "rank"]
    assert [row[1] for row in table["data"]] == [0, 1, 2, 9]
    assert len(lines(folder)) == 3


@pytest.mark.slow
def test_a_resumed_run_is_the_same_run(tmp_path, no_account):
    pytest.importorskip("wandb")
    for start in (1, 3):
        tracker = track(Wandb(client_table=False), tmp_path, "run", start - 1)
        play(tracker, [start, start + 1])
        tracker.close()
    before, after = wandb_records(tmp_path)
    ids = {r["run"]["run_id"] for records in (before, after) for r in records if r["type"] == "run"}
    assert len(ids) == 1
    assert [h["_step"] for h in history(before) + history(after)] == [1, 2, 3, 4]


@pytest.mark.slow
def test_what_many_runs_have_found_can_be_read_back(tmp_path, no_account):
    pytest.importorskip("wandb")
    picture = BytesIO()
    Image.new("RGB", (3, 2)).save(picture, "png")
    rows = [["a", 0.5], ["b", None]]
    found = Findings(
        {"seeds": [0, 1]}, {"loss": (["method", "mean"], rows)}, {"curve": picture.getvalue()}
    )
    Wandb(group="s", job_type="summary").summarise(tmp_path, "study-s", found)
    Wandb("disabled").summarise(tmp_path / "none", "study-s", found)
    Silent().summarise(tmp_path / "none", "study-s", found)
    assert not (tmp_path / "none").exists()
    (records,) = wandb_records(tmp_path)
    (run,) = [r["run"] for r in records if r["type"] == "run"]
    assert (run["run_group"], run["job_type"], run["display_name"]) == ("s", "summary", "study-s")
    (logged,) = history(records)
    assert {key.split(".")[0] for key in logged if "/" in key} == {"table/loss", "figure/curve"}
    table = json.loads(next(tmp_path.glob("wandb/*/files/media/table/**/*.table.json")).read_text())
    assert (table["columns"], table["data"]) == (["method", "mean"], rows)
    assert Image.open(next(tmp_path.glob("wandb/*/files/media/**/*.png"))).size == (3, 2)


def test_evaluations_of_different_groups_do_not_collide():
    record = {"kind": "evaluate", "round": 3, "rouge_l": 0.5, "clients": 20}
    names = [
        set(flat_metrics(record | extra))
        for extra in (
            {"group": "seen"},
            {"group": "seen", "adapter": "own"},
            {"group": "unseen_task"},
        )
    ]
    assert names[1] == {"evaluate/seen/own/rouge_l", "evaluate/seen/own/clients"}
    assert not names[0] & names[1]
    assert not names[0] & names[2]
    assert flat_metrics({"kind": "round", "round": 3, "train/loss": 1.0}) == {"train/loss": 1.0}


def test_distributions_are_of_numbers_and_leave_out_what_failed():
    rows = [
        {"round": 1, "client": 0, "tier": "a", "rank": "8", "loss": 1.5, "seconds": 2},
        {"round": 1, "client": 1, "tier": "b", "rank": "30/200", "loss": math.nan},
        {"round": 1, "client": 2, "rank": "8", "failure": "ValueError", "message": "m"},
    ]
    assert distributions(rows) == {"rank": [8.0, 200.0, 8.0], "loss": [1.5], "seconds": [2.0]}


def test_a_record_that_cannot_be_written_stops_the_run(tmp_path):
    """Unlike any other tracker: a round without a record could not be cited."""
    trackers = track(Silent(), tmp_path, "x")
    (tmp_path / "metrics.jsonl").mkdir()  # as good as a full disk
    with pytest.raises(OSError, match=r"metrics\.jsonl"):
        trackers.round({"kind": "round", "round": 1})
