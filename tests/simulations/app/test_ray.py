"""The launcher on Ray: workers, deaths of all kinds, GPUs that are only counted, a cluster."""

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.simulations.app.launched import (
    PATIENCE_S,
    SAME,
    Launched,
    Tagged,
    until,
)

pytestmark = [pytest.mark.ray, pytest.mark.slow]
ALONE = "engine=sequential"
WHERE = [ALONE, "engine._target_=tests.simulations.app.where.Where"]


@pytest.fixture
def start(tmp_path):
    """Start a run; whatever is left of it in the end is killed."""
    started: list[Launched] = []

    def do(*overrides: str) -> Launched:
        started.append(Launched(tmp_path, *SAME, *overrides))
        return started[-1]

    yield do
    for run in started:
        run.kill()


@pytest.mark.parametrize("workers", [1, 2])
def test_the_number_of_workers_does_not_change_a_bit(start, federate, workers):
    run = start(f"runtime.num_cpus={workers}", *WHERE)
    here = federate(ALONE)
    assert run.wait() == 0, run.said()
    assert [r["state/hash"] for r in run.rounds] == [r["state/hash"] for r in here.rounds]
    assert len({row["pid"] for row in run.clients}) == workers
    assert run.left(20) == []


def test_a_failed_run_has_an_exit_code_and_one_clear_line(start):
    run = start("runtime.num_cpus=2", "engine=faulty", "engine.raise_fraction=1.0")
    assert run.wait() == 1, run.said()
    assert "RUN FAILED: RunError: round 1: only 0 of 6 clients succeeded" in run.said()
    assert "PlantedFault" in run.said()
    assert "Traceback" not in run.said()
    assert "RUN COMPLETED" not in run.said()
    assert json.loads((run.folder / "status.json").read_text())["status"] == "failed"
    assert run.left(20) == []


@pytest.mark.parametrize(
    ("what", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGKILL, -signal.SIGKILL)],
)
def test_nothing_outlives_the_launcher(start, what, code):
    """Stopped in the middle of a round."""
    run = start("runtime.num_cpus=2", "rounds=500")
    run.wait_for("round 1/500  done")
    run.send(what)
    assert run.wait() == code
    assert run.left(30) == []
    assert "Traceback" not in run.said()


@pytest.mark.parametrize("engine", [ALONE, "engine=fused"])
def test_a_run_that_was_killed_whole_goes_on_to_the_same_state(start, federate, tmp_path, engine):
    words = ["runtime.num_cpus=2", "rounds=3", engine, f"output_dir={tmp_path / 'same'}"]
    run = start(*words)
    run.wait_for("round 1/3  done")
    run.kill()
    assert 1 <= len(run.rounds) < 3
    again = start(*words, "resume=auto")
    assert again.wait() == 0, again.said()
    assert again.folder == run.folder
    assert "resuming after round" in again.said()
    assert [r["round"] for r in again.rounds] == [1, 2, 3]
    if engine == ALONE:
        assert again.hash == federate("rounds=3", engine).hash
    else:  # the same bits only from the same cohorts, which depend on the number of workers
        whole = start(*words[:-1], f"output_dir={tmp_path / 'whole'}")
        assert whole.wait() == 0, whole.said()
        assert again.hash == whole.hash


@pytest.mark.parametrize("workers", [1, 2])
def test_a_dead_worker_costs_a_restart_and_no_bit(start, federate, tmp_path, workers):
    faulty = ["engine=faulty", "rounds=3"]
    kill = ["engine.kill_round=2", f"engine.kill_marker={tmp_path / 'killed'}"]
    run = start(f"runtime.num_cpus={workers}", *faulty, *kill)
    assert run.wait() == 0, run.said()
    assert (tmp_path / "killed").exists()
    assert "starting again from the last checkpoint (1 of 1)" in run.said()
    assert "resuming after round 1 of 3" in run.said()
    assert [r["round"] for r in run.rounds] == [1, 2, 3]
    assert run.hash == federate(*faulty).hash
    assert run.left(20) == []


def test_gpus_are_shared_as_configured(start):
    """Two counted GPUs, half a GPU per worker: four workers, two on each; no hardware needed."""
    gpus = ["runtime.num_gpus=2", "runtime.gpus_per_worker=0.5", "runtime.num_cpus=4"]
    many = ["population.per_round=16", "rounds=1"]
    run = start(*gpus, "runtime.device=cpu", *many, *WHERE)
    assert run.wait() == 0, run.said()
    assert all(row["gpu_visible"] == row["gpu_assigned"] for row in run.clients)
    on = {row["pid"]: row["gpu_visible"] for row in run.clients}
    assert sorted(on.values()) == [0, 0, 1, 1]


@pytest.fixture
def cluster():
    """Two Ray nodes on this machine, one CPU each; the address, and what runs."""
    tagged, port = Tagged(), _free_port()
    common = ["--num-cpus=1", "--object-store-memory=200000000", "--disable-usage-stats"]
    nodes = [
        [
            "--head",
            f"--port={port}",
            "--include-dashboard=false",
            f"--ray-client-server-port={_free_port()}",
        ],
        [f"--address=127.0.0.1:{port}"],
    ]
    try:
        for words in nodes:
            ray(tagged, "start", *words, *common)
        yield tagged, f"127.0.0.1:{port}"
    finally:
        tagged.kill()  # by process, for `ray stop` would stop every cluster of this machine


def ray(tagged: Tagged, *words: str) -> str:
    done = subprocess.run(
        [str(Path(sys.executable).parent / "ray"), *words],
        env=tagged.environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_running_cluster_is_used_on_all_nodes_and_left_alone(start, federate, cluster):
    tagged, address = cluster
    words = ["runtime=ray_cluster", f"runtime.ray_address={address}", "runtime.workers=2"]
    run = start(*words, *WHERE)
    assert run.wait() == 0, run.said()
    assert run.hash == federate(ALONE).hash
    assert len({row["node"] for row in run.clients}) == 2
    assert run.left(20) == []
    # Both nodes live, and what the run held of them is free again.
    until(lambda: "0.0/2.0 CPU" in ray(tagged, "status", f"--address={address}"), 60)
    assert "0.0/2.0 CPU" in ray(tagged, "status", f"--address={address}")


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
