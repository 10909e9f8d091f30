"""Energy beside its prediction, from records that follow it exactly."""

import json

import pytest

from simulations.bench import collapse

PI = {"1": 1.0, "2-4": 0.5, "5-8": 0.25}
"""Weight of the clients of each range: ranks 1, 4, 8, 8 with examples 2, 1, 0.5, 0.5."""
ROUNDS = 6


def energies(at, refilled):
    """Shares after a round in closed form, from equal amplitudes after the first."""
    series = {
        k: sum(pi**j for j in range(at)) if refilled else pi ** (at - 1) for k, pi in PI.items()
    }
    total = sum(x**2 for x in series.values())
    return {k: x**2 / total for k, x in series.items()}


@pytest.fixture
def study(tmp_path):
    """Writes a study whose measured energies are the prediction of either kind."""

    def write(refilled, rank="8"):
        runs = []
        for method in ("all", "covered"):
            name = f"{method}-s0"
            folder = tmp_path / "runs" / name
            folder.mkdir(parents=True, exist_ok=True)
            lines, clients = [], []
            for at in range(1, ROUNDS + 1):
                shares = energies(at, refilled) | {"rest": 0.0}
                energy = {f"spectrum/energy_{k}": v for k, v in shares.items()}
                lines.append({"kind": "round", "round": at} | energy)
                for r, examples in (("1", 2.0), ("4", 1.0), ("8", 0.5), (rank, 0.5)):
                    clients.append({"round": at, "rank": r, "examples": examples})
                clients.append({"round": at, "rank": "8", "error": "lost"})
            (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
            (folder / "clients.jsonl").write_text("".join(json.dumps(x) + "\n" for x in clients))
            (folder / "status.json").write_text(json.dumps({"status": "completed"}))
            runs.append({"name": name, "cell": {"method": method}, "seed": 0})
        (tmp_path / "plan.json").write_text(json.dumps({"runs": runs}))
        return tmp_path

    return write


@pytest.mark.parametrize("refilled", [False, True])
def test_records_that_follow_a_prediction_are_predicted(study, refilled, tmp_path, capsys):
    out = tmp_path / "collapse.json"
    folder = str(study(refilled))
    assert collapse.main([folder, "--rounds", "1", "3", "6", "--out", str(out)]) == 0
    found = json.loads(out.read_text())["found"]
    assert list(found) == ["all", "decay", "refilled", "covered"]
    for label in PI:
        wanted = [energies(at, refilled)[label] for at in (1, 3, 6)]
        assert found["refilled" if refilled else "decay"][label] == pytest.approx(wanted)
        assert found["all"][label] == pytest.approx(wanted)
    shown = capsys.readouterr().out
    assert shown.startswith("| rank index | all, 1 | decay, 1 | refilled, 1 | covered, 1 |")
    assert len(shown.splitlines()) == 2 + len(PI)


def test_what_cannot_be_predicted_is_one_sentence(study, tmp_path, capsys):
    assert collapse.main([str(tmp_path / "none")]) == 2
    assert "has no plan.json of a study" in capsys.readouterr().err
    folder = str(study(False))
    assert collapse.main([folder, "--rounds", "7"]) == 2
    assert "has no spectrum of round 7" in capsys.readouterr().err
    assert collapse.main([str(study(False, rank="8/4")), "--rounds", "2"]) == 2
    assert "ranks differ between modules of a client" in capsys.readouterr().err
