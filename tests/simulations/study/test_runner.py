"""Running a study: several at a time, kept and continued work, failures, deaths of the process."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from itertools import count

import pyarrow.parquet as pq
import pytest
import yaml
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st

from fedlora.core.package import ROOT
from simulations.study import __main__ as study
from simulations.study import runner
from simulations.study.board import Board, failures, missing, summary, table
from simulations.study.plan import Planned
from simulations.study.runner import PACKED, State, do_all, is_held, log_of, progress_of

TINY = {
    "base": "experiment=smoke evaluate=loss evaluate.clients=1 rounds=1 client.steps=1",
    "axes": {"method": {"fedit": "strategy=fedit", "fedsvd": "strategy=fedsvd"}},
    "seeds": [0, 1],
    "metrics": {"loss_response": "lower"},
    "reference": {"method": "fedit"},
}


def planned(cells=2, seeds=2, rounds=3):
    return [
        Planned((("method", f"m{c}"),), s, (f"x={c}",), rounds, f"{c}{s}" * 8)
        for s in range(seeds)
        for c in range(cells)
    ]


class Stub:
    """A run that takes some polls, then leaves what a run leaves."""

    def __init__(self, folder, polls, code):
        self.folder, self.polls, self.code, self.ended = folder, polls, code, False

    def poll(self):
        self.polls -= 1
        if self.polls > 0:
            return None
        self.folder.mkdir(exist_ok=True)
        status = "failed" if self.code else "completed"
        (self.folder / "metrics.jsonl").touch()
        (self.folder / "status.json").write_text(json.dumps({"status": status, "message": ""}))
        return self.code

    def end(self):
        self.ended = True


class Starter:
    """Starts stubs and remembers which, and how many were at work together."""

    def __init__(self, polls=lambda n: 1, codes=lambda run: 0):
        self.polls, self.codes, self.started, self.stubs = polls, codes, [], []

    def __call__(self, run, folder):
        self.started.append(run.name)
        stub = Stub(folder / run.name, self.polls(len(self.started)), self.codes(run))
        self.stubs.append(stub)
        if stub.code:
            log_of(folder / run.name).write_text("starting\nRUN FAILED: no such thing\n")
        return stub


def do(runs, folder, starter, jobs=2, show=lambda runs: None):
    standing = progress_of(runs, folder)
    do_all(standing, jobs, starter, show, sleep=lambda s: None)
    return standing


@given(jobs=st.integers(1, 5), polls=st.lists(st.integers(1, 6), min_size=12, max_size=12))
def test_every_run_is_done_once_and_never_more_than_jobs_at_a_time(
    jobs, polls, tmp_path_factory
):  # fmt: skip
    runs = planned(3, 4)
    starter = Starter(polls=lambda n: polls[n - 1])
    most = []

    def show(standing):
        most.append(sum(one.process is not None for one in standing))

    folder = tmp_path_factory.mktemp("study")
    standing = do(runs, folder, starter, jobs, show)
    assert sorted(starter.started) == sorted(run.name for run in runs)
    assert starter.started == [run.name for run in runs]
    assert max(most) == min(jobs, len(runs))
    assert all(one.state is State.DONE for one in standing)
    again = Starter()
    do(runs, folder, again)
    assert again.started == []


def test_a_failed_run_is_named_the_others_are_done_and_it_is_tried_again(tmp_path):
    runs = planned()
    bad = Starter(codes=lambda run: int(run.name.startswith("m0-s1")))
    standing = do(runs, tmp_path, bad)
    assert [one.state for one in standing].count(State.DONE) == 3
    assert failures(standing) == ["FAILED method m0, seed 1: no such thing"]
    assert missing(standing) == ["missing method m0: seed 1"]
    again = Starter()
    do(runs, tmp_path, again)
    assert again.started == [runs[2].name]


def test_a_half_run_is_started_again(tmp_path):
    runs = planned()
    half = tmp_path / "runs" / runs[0].name
    half.mkdir(parents=True)
    (half / "status.json").write_text('{"status": "running"}')
    starter = Starter()
    do(runs, tmp_path, starter)
    assert starter.started == [run.name for run in runs]


def test_a_packed_run_is_removed_by_one_process_and_never_what_another_has_begun(
    tmp_path, monkeypatch
):
    """Two processes that share a folder both see that the run is packed."""
    (run, *_) = planned()
    folder = tmp_path / "runs" / run.name
    folder.mkdir(parents=True)
    (folder / PACKED).write_text("{}")
    read = runner.rounds_done

    def the_other_is_first(place):
        done = read(place)
        (folder / PACKED).unlink(missing_ok=True)
        (folder / "begun").touch()
        return done

    monkeypatch.setattr(runner, "rounds_done", the_other_is_first)
    starter = Starter()
    do([run], tmp_path, starter)
    assert starter.started == [run.name]
    assert (folder / "begun").exists()


def test_a_run_that_ends_well_but_is_not_complete_has_failed(tmp_path):
    class Empty(Stub):
        def poll(self):
            return 0

    (one,) = do(planned(1, 1), tmp_path, lambda run, folder: Empty(folder / run.name, 1, 0))
    assert one.state is State.FAILED and "exit code 0" in one.why


def test_only_what_changed_is_done_again(tmp_path):
    runs = planned()
    do(runs, tmp_path, Starter())
    changed = Planned(runs[1].cell, runs[1].seed, ("x=9",), 3, "new" * 8)
    starter = Starter()
    do([runs[0], changed, *runs[2:]], tmp_path, starter)
    assert starter.started == [changed.name]


def test_a_run_that_a_dying_process_holds_waits_and_the_others_begin(tmp_path):
    runs = planned(2, 1)
    held = tmp_path / "runs" / runs[0].name
    held.mkdir(parents=True)
    lock = FileLock(held / "run.lock")
    lock.acquire()
    assert is_held(held)
    rounds = count()

    def show(standing):
        if next(rounds) == 3:
            lock.release()

    starter = Starter()
    standing = do(runs, tmp_path, starter, show=show)
    assert starter.started == [runs[1].name, runs[0].name]
    assert all(one.state is State.DONE for one in standing)


def test_an_interrupted_study_ends_its_runs(tmp_path):
    starter = Starter(polls=lambda n: 99)

    def show(standing):
        if starter.started:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        do(planned(), tmp_path, starter, show=show)
    assert [stub.ended for stub in starter.stubs] == [True, True]


# -------------------------------------------------------------------------------- the live table


def test_the_table_says_rounds_and_time_left(tmp_path):
    runs = progress_of(planned(), tmp_path)
    runs[0].state = State.RUNNING
    runs[0].folder.mkdir(parents=True)
    lines = "".join(json.dumps({"kind": "round", "round": n}) + "\n" for n in (1, 2))
    (runs[0].folder / "metrics.jsonl").write_text(lines + '{"kind": "rou')
    runs[1].state = State.DONE
    assert table(runs)[0].split() == ["method", "seed", "0", "seed", "1"]
    assert "running, 2/3" in table(runs)[1] and "done" in table(runs)[2]
    # 5 of 12 rounds in 50 s: 70 s for the other 7
    assert summary(runs, 50.0) == "1 of 4 runs done, 1 running   elapsed 0:50   ETA 1:10"
    runs[1].before = 3  # done by an earlier attempt: 2 rounds in 50 s
    assert summary(runs, 50.0).endswith("ETA 2:55")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_has_one_table_and_a_log_has_a_line_for_each_change(tmp_path):
    screen, log = Terminal(), io.StringIO()
    clock = count()
    boards = Board(screen, lambda: float(next(clock))), Board(log, lambda: float(next(clock)))
    runs = progress_of(planned(), tmp_path)
    for board in boards:
        for state in (State.WAITING, State.RUNNING, State.RUNNING, State.FAILED):
            runs[3].state = state
            board.show(runs)
        board.finish(runs)
    assert screen.getvalue().count("\x1b[4F\x1b[J") == 4
    assert "\x1b" not in log.getvalue()
    said = log.getvalue().splitlines()
    assert said[0].startswith("running method m1, seed 1 ")
    assert said[1].startswith("FAILED method m1, seed 1")
    assert said[-2:] == ["missing method m0: seed 0, 1", "missing method m1: seed 0, 1"]


# ------------------------------------------------------------------------------------ the command


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A study's file and the folder of its results."""
    monkeypatch.setenv("FEDLORA_OUTPUT", str(tmp_path / "outputs"))
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(TINY))
    return file, tmp_path / "outputs" / "study-tiny"


def test_the_command_plans_runs_and_says_where_results_are(mine, capsys):
    file, folder = mine
    starter = Starter(codes=lambda run: int(run.seed == 1 and "fedit" in run.name))
    assert study.main([str(file), "--list"], starter) == 0
    assert capsys.readouterr().out.count("waiting  fedlora run") == 4 and not starter.started
    assert study.main([str(file), "--jobs", "3"], starter) == 1
    said = capsys.readouterr().out
    assert "FAILED method fedit, seed 1: no such thing" in said
    assert "missing method fedit: seed 1" in said and f"study folder: {folder}" in said
    assert len((folder / "commands.txt").read_text().splitlines()) == 4
    assert study.main([str(file)], Starter()) == 0
    assert study.main([str(file), "client.lr=1e-4"], again := Starter()) == 0
    assert len(again.started) == 4


def test_mistakes_of_the_command_are_one_sentence(mine, capsys):
    file, folder = mine
    assert study.main(["nothing"]) == 2
    assert capsys.readouterr().err.startswith("fedlora study: study 'nothing' is neither")
    assert study.main([str(file), "client.lrr=1"]) == 2
    assert "client.lrr" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        study.main([str(file), "--jobs", "0"])
    assert "'0' is no whole number from 1 up" in capsys.readouterr().err
    folder.mkdir(parents=True)
    with FileLock(folder / "run.lock"):
        assert study.main([str(file)], Starter()) == 2
    assert "belongs to the run of" in capsys.readouterr().err


def wait_for(condition, seconds=120.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it has not happened"
        time.sleep(0.1)


@pytest.mark.slow
def test_a_killed_study_leaves_no_process_and_continues_with_paired_runs(mine):
    """A real study of four runs, killed when the first of them is complete."""
    file, folder = mine
    command = [sys.executable, "-m", "simulations.study", str(file), "--jobs", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    complete = lambda: {f.parent.name for f in folder.glob("runs/*/status.json")
                        if json.loads(f.read_text())["status"] == "completed"}  # fmt: skip
    wait_for(complete)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = complete()
    kept = {n: (folder / "runs" / n / "metrics.jsonl").stat().st_mtime_ns for n in before}
    assert 1 <= len(before) < 4
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 of 4 runs done" in done.stdout and len(complete()) == 4
    for name, moment in kept.items():
        assert (folder / "runs" / name / "metrics.jsonl").stat().st_mtime_ns == moment
    cohorts = {}
    for one in json.loads((folder / "plan.json").read_text())["runs"]:
        lines = (folder / "runs" / one["name"] / "clients.jsonl").read_text().splitlines()
        drawn = tuple(sorted(json.loads(line)["client"] for line in lines))
        cohorts.setdefault(one["seed"], set()).add(drawn)
    assert [len(found) for found in cohorts.values()] == [1, 1]
    assert cohorts[0] != cohorts[1]
    table = pq.read_table(folder / "results.parquet").to_pylist()
    assert {(row["method"], row["seed"]) for row in table} == {
        (method, seed) for method in ("fedit", "fedsvd") for seed in (0, 1)
    }
    assert "| fedsvd | 2 of 2 |" in (folder / "table.md").read_text()
