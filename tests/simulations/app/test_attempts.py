"""A run goes on after deaths that can be mended, and ends in one line and a final status."""

import json
import os
import signal
import subprocess
import sys

import psutil
import pytest

from fedlora.core.errors import ClientsSuspected, RunError, WorkerDied
from fedlora.run.tracking import read_jsonl
from simulations.app.attempts import complete
from simulations.app.status import COMPLETED, FAILED, RUNNING, read_status, write_status
from tests.simulations.app.launched import PATIENCE_S, ROOT, SAME, hears_interrupts

DONE = None


@pytest.fixture
def play(tmp_path):
    """A run whose attempts end as listed; exit code, lines, and the overrides of each attempt."""

    def do(*endings, restarts):
        asked, lines = [], []

        def attempt(words, attempt, show):
            ending = endings[len(asked)]
            asked.append(list(words))
            attempt.folder = tmp_path
            if ending == "vanished":
                write_status(tmp_path, RUNNING, 1)
                attempt.reason = "it is gone"
            elif ending is DONE:
                write_status(tmp_path, COMPLETED, 3)
                show("RUN COMPLETED")
            else:
                write_status(tmp_path, FAILED, 1, ending)

        code = complete(attempt, ["rounds=3", "resume=auto"], restarts, lines.append)
        return code, lines, asked

    return do


DIED, SUSPECTED, BROKEN = WorkerDied("a"), ClientsSuspected("b"), RunError("c")


def test_a_dead_worker_is_a_reason_to_go_on_in_the_same_folder(play, tmp_path):
    code, _, asked = play(DIED, DIED, DONE, restarts=2)
    assert code == 0
    assert asked == [["rounds=3", "resume=auto"], *2 * [["rounds=3", f"resume='{tmp_path}'"]]]


def test_not_for_ever(play):
    code, lines, asked = play(DIED, DIED, DONE, restarts=1)
    assert (code, len(asked)) == (1, 2)
    assert lines[-1] == "RUN FAILED: a"


def test_what_taught_something_does_not_count(play):
    ends = [DIED, SUSPECTED, SUSPECTED, DIED, SUSPECTED, DONE]
    code, _, asked = play(*ends, restarts=1)
    assert (code, len(asked)) == (0, 6)
    assert play(SUSPECTED, DONE, restarts=0)[0] == 1, "unless nothing is to be restarted"


def test_other_failures_are_no_reason(play):
    code, lines, asked = play(BROKEN, DONE, restarts=3)
    assert (code, len(asked), lines[-1]) == (1, 1, "RUN FAILED: c")


def test_a_process_that_vanished_leaves_a_final_status_and_a_line(play, tmp_path):
    code, lines, _ = play("vanished", restarts=3)
    assert (code, lines[-1]) == (1, "RUN FAILED: it is gone")
    status = read_status(tmp_path)
    assert (status["status"], status["rounds_done"]) == (FAILED, 1)
    assert status["kind"] == "ProcessEnded"


def test_an_interrupted_attempt_leaves_a_final_status(tmp_path):
    def attempt(words, attempt, show):
        attempt.folder = tmp_path
        write_status(tmp_path, RUNNING, 2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        complete(attempt, [], 1, print)
    assert read_status(tmp_path)["status"] == FAILED
    assert read_status(tmp_path)["message"]


# ------------------------------------------------------------------------- whole runs, one process

FAULTY = [*SAME, "runtime=in_process", "engine=faulty", "rounds=2"]


class Alone:
    """``python -m simulations.run runtime=in_process ...``."""

    def __init__(self, folder, *words: str) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder / "out" / "it"
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "simulations.run", *FAULTY, "name=it", *words),
                f"output_dir={folder / 'out'}",
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            text=True,
            preexec_fn=hears_interrupts,
        )

    def end(self) -> tuple[int, list[str]]:
        said, _ = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode, said.splitlines()

    @property
    def clients(self) -> list[dict]:
        return read_jsonl(self.folder / "clients.jsonl")

    @property
    def status(self) -> dict:
        return json.loads((self.folder / "status.json").read_text())


@pytest.fixture(scope="module")
def first_client(once):
    """A client of round 1 that is no client of its own message."""
    return once("engine=faulty", "runtime.nodes=64", "rounds=1").clients[0]["client"]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["exit", "segfault", "kill", "abort"])
def test_a_client_that_ends_the_process_is_left_out(tmp_path, first_client, way):
    run = Alone(tmp_path, f"engine.deadly=[{first_client}]", f"engine.deadly_way={way}")
    code, said = run.end()
    assert (code, said[-1]) == (0, "RUN COMPLETED")
    failed = {(r["client"], r["failure"]) for r in run.clients if "failure" in r}
    assert failed == {(first_client, "LeftOut")}
    assert sum("starting again" in line for line in said) == 3


@pytest.mark.slow
@pytest.mark.parametrize("in_process", ["true", pytest.param("false", marks=pytest.mark.ray)])
@pytest.mark.parametrize("way", ["exit", "segfault"])
def test_a_client_that_ends_the_process_in_evaluation_is_left_out(tmp_path, in_process, way):
    """Training goes on with it, and its group is evaluated without it."""
    whole = ["evaluate=loss", "evaluate.groups=[seen]", "evaluate.clients=4"]
    plain = Alone(tmp_path / "plain", *whole, "rounds=1")
    assert plain.end()[0] == 0
    panel = sorted({r["client"] for r in read_jsonl(plain.folder / "evaluations.jsonl")})
    words = [*whole, f"engine.deadly=[{panel[1]}]", "engine.deadly_in=evaluate"]
    words += [f"engine.deadly_way={way}", f"runtime.in_process={in_process}"]
    run = Alone(tmp_path / "it", *words)
    code, said = run.end()
    assert (code, said[-1]) == (0, "RUN COMPLETED"), said
    rows = read_jsonl(run.folder / "evaluations.jsonl")
    failed = {(r["client"], r["failure"]) for r in rows if "failure" in r}
    assert failed == {(panel[1], "LeftOut")}
    assert sorted({r["client"] for r in rows}) == panel
    assert not any("failure" in r for r in run.clients)


SPLIT = ["strategy=splitlora", "strategy.transport=messages", "ranks=homogeneous"]


def hashes(run) -> list[str]:
    """Of the server's state after each round."""
    rows = read_jsonl(run.folder / "metrics.jsonl")
    return [r["state/hash"] for r in rows if r["kind"] == "round"]


def failures(run) -> set[tuple[int, int]]:
    """Rounds and clients."""
    return {(r["round"], r["client"]) for r in run.clients if "failure" in r}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "at", "rule"),
    [
        ("exit", "forward", "concat"),
        ("exit", "backward", "concat"),
        ("segfault", "backward", "per_client"),
    ],
)
def test_a_split_client_that_ends_the_process_has_failed_at_once(
    tmp_path, first_client, way, at, rule
):
    """Also between its forward pass and its gradient: the round begins anew without it, and leaves
    the server's stage, the adapters and the optimizer states of one in which it only raised."""
    words = [*SPLIT, f"strategy.rule.update={rule}", f"engine.deadly=[{first_client}]"]
    raised = Alone(tmp_path / "raised", *words, "engine.deadly_way=system_exit")
    assert raised.end()[0] == 0
    run = Alone(tmp_path / "it", *words, f"engine.deadly_way={way}", f"engine.deadly_at={at}")
    code, said = run.end()
    assert (code, said[-1]) == (0, "RUN COMPLETED"), said
    assert sum("starting again" in line for line in said) == 3
    assert first_client in {client for _, client in failures(run)}
    assert failures(run) == failures(raised)
    assert hashes(run) == hashes(raised)


@pytest.mark.slow
def test_a_split_client_that_never_answers_is_dropped(tmp_path, first_client):
    words = [*SPLIT, f"engine.deadly=[{first_client}]", "engine.deadly_way=hang"]
    run = Alone(tmp_path, *words, "engine.deadly_at=backward", "federation.timeout_s=20")
    code, said = run.end()
    assert (code, said[-1]) == (0, "RUN COMPLETED"), said
    assert (1, first_client) in failures(run)


def test_a_system_exit_is_a_clients_failure_and_nothing_else(tmp_path, first_client):
    words = [f"engine.deadly=[{first_client}]", "engine.deadly_way=system_exit"]
    code, said = Alone(tmp_path, *words).end()
    assert (code, said[-1]) == (0, "RUN COMPLETED")
    assert not any("starting again" in line for line in said)
    assert any(f"client {first_client}" in s and "SystemExit: 9" in s for s in said)


@pytest.mark.slow
def test_a_client_that_never_answers_is_dropped(tmp_path, first_client):
    words = [f"engine.deadly=[{first_client}]", "engine.deadly_way=hang"]
    run = Alone(tmp_path, *words, "federation.timeout_s=20")
    code, said = run.end()
    assert (code, said[-1]) == (0, "RUN COMPLETED"), said
    assert any(r.get("failure") == "LeftOut" for r in run.clients)


@pytest.mark.parametrize(
    ("what", "code"), [(signal.SIGTERM, 130), (signal.SIGINT, 130), (signal.SIGKILL, -9)]
)
def test_a_stopped_run_has_an_end_and_leaves_no_process(tmp_path, what, code):
    run = Alone(tmp_path, "rounds=500")
    for line in run.process.stdout:
        if line.startswith("round 1/500  done"):
            break
    started = psutil.Process(run.process.pid).children(recursive=True)
    assert started, "a process of its own does the run"
    run.process.send_signal(what)
    ended, said = run.end()
    assert ended == code
    _, left = psutil.wait_procs(started, timeout=PATIENCE_S)
    assert not left, "its process went with it"
    if what == signal.SIGKILL:  # nobody is left to say how it ended
        return
    assert said[-1].startswith("RUN FAILED: interrupted")
    assert run.status["status"] == FAILED
