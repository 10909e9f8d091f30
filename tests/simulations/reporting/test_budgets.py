"""Reports by virtual time: step functions of what was evaluated, and nothing between."""

from pathlib import Path

import pytest

from fedlora.run.tracking import JsonlTracker
from simulations.reporting.budgets import BYTES, JOULES, SECONDS, curve, main, robustness
from simulations.reporting.report import write_comparison, write_report
from simulations.reporting.run_folder import Run, read_run

LOSSES = {0: 4.0, 2: 3.0, 4: 2.0, 6: 2.5}
"""Round -> loss; the best is not the last."""


def folder(where: Path, devices: bool = True, losses=LOSSES, shift: float = 0.0) -> Path:
    """A run of six rounds of ten seconds, 300 bytes and 5 joules."""
    tracker = JsonlTracker(where)
    for n in range(7):
        if n:
            record = {"kind": "round", "round": n, "clients": 3, "failed": 0, "rejected": 0,
                      "wire/up_bytes": 100, "wire/down_bytes": 200, "train/loss": 3.0}  # fmt: skip
            timing = {"time/virtual": 10.0 * n, "device/energy": 5.0, "device/late": n % 2,
                      "device/away": 1, "staleness/mean": 0.5, "staleness/max": 2}  # fmt: skip
            tracker.round(record | (timing if devices else {}))
            row = {"round": n, "client": n, "rank": "4", "tier": "", "loss": 3.0}
            tracker.clients([row | ({"device_seconds": 2.0 + n} if devices else {})])
        if n in losses:
            place = {"group": "seen", "adapter": "full", "round": n}
            tracker.round({"kind": "evaluate", "loss_response": losses[n] + shift} | place)
            tracker.evaluated(
                {"client": i, "metrics": {"loss_response": losses[n] + shift * (1 + i)}} | place
                for i in range(4)
            )
    tracker.close()
    return where


@pytest.fixture
def run(tmp_path) -> Run:
    return read_run(folder(tmp_path / "run"))


def check_budgets(run: Run) -> None:
    """Law: the best evaluation that cost no more, and nothing between two evaluations."""
    found = curve(run)
    assert [found.best(SECONDS, x).quality for x in (0, 19.9, 20, 39.9, 40, 60)] == [
        4.0, 4.0, 3.0, 3.0, 2.0, 2.0,
    ]  # fmt: skip
    assert found.best(BYTES, 1199).quality == 3.0
    assert found.best(BYTES, 1200).quality == 2.0
    assert found.best(JOULES, 19.0).quality == 3.0
    assert found.spent(BYTES) == 1800


def check_targets(run: Run) -> None:
    """Law: the first evaluation that reaches a target."""
    found = curve(run)
    assert found.reaches(4.0).round == 0
    assert found.reaches(3.5).spent == {SECONDS: 20.0, BYTES: 600.0, JOULES: 10.0}
    assert found.reaches(2.0).round == 4
    assert found.reaches(1.9) is None


def test_quality_under_a_budget_is_a_step_function(run):
    check_budgets(run)


def test_cost_to_a_target_is_that_of_the_first_evaluation_that_reaches_it(run):
    check_targets(run)


def test_robustness_is_paired_client_by_client(tmp_path, run):
    same = read_run(folder(tmp_path / "same", devices=False))
    none = robustness(run, same)
    assert (none.mean, none.low, none.high, none.clients) == (0.0, 0.0, 0.0, 4)
    worse = read_run(folder(tmp_path / "worse", shift=0.1))
    found = robustness(worse, same)
    assert found.mean == pytest.approx(0.25)
    assert 0.1 <= found.low < found.mean < found.high <= 0.4


def test_the_command_prints_what_is_asked(run, tmp_path):
    said: list[str] = []
    words = ["--seconds", "45", "--target", "3.2", "1.0", "--against", str(run.folder)]
    assert main([str(run.folder), *words], said.append) == 0
    text = "\n".join(said)
    assert "| virtual time | 0:45 | 2.000 | 4 |" in text
    assert "| 3.200 | 0:20 | 600 B | 10 J |" in text
    assert "| 1.000 | not reached | not reached | not reached |" in text
    assert "+0.0000 (95 %: +0.0000 to +0.0000)" in text
    assert main([str(tmp_path / "nothing")], said.append) == 2


def test_pages_show_time_where_there_is_any(tmp_path):
    timed, plain = folder(tmp_path / "timed"), folder(tmp_path / "plain", devices=False)
    page = write_report(timed).read_text()
    for words in ("Quality by virtual time", "Clients that a round asked", "Cost to a target"):
        assert words in page
    assert "virtual" not in write_report(plain).read_text().lower().partition("config.yaml")[0]
    both = write_comparison([timed, plain], tmp_path / "both.html").read_text()
    assert "Quality under a budget" in both
    assert "Against the run without devices" in both
