"""Whole runs that stop early: the state, the words and the folder of the best round."""

import shutil

import pytest
from safetensors.torch import load_file

from fedlora.core.errors import ConfigError, RunError
from fedlora.run import checkpoint
from fedlora.server import evaluation_round
from fedlora.server.session import Session
from tests.planted import planted
from tests.simulations.conftest import Run, small_run

EVALUATED = [
    *("evaluate=loss", "evaluate.clients=1", "evaluate.plan.max_examples=1"),
    *("client.steps=1", "population.per_round=2", "runtime.nodes=1"),
]
WAITING = [*EVALUATED, "federation.patience=2", "rounds=6"]
METHODS = [
    ["strategy=flexlora"],
    ["strategy=splitlora", "ranks=homogeneous", "client.batch_size=4"],
]


WORSE = (5, 3, 4, 4, 4, 4, 4)


@pytest.fixture
def scripted(monkeypatch):
    """Evaluations whose loss is scripted by round; everything else is as it is."""
    return lambda *losses: script(monkeypatch, losses)


def script(patch, losses) -> None:
    real = evaluation_round.evaluation_record

    def record(tag, found, *, round, **rest):
        return real(tag, found, round=round, **rest) | {"loss_response_weighted": losses[round]}

    patch.setattr(evaluation_round, "evaluation_record", record)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The run that waits and stops after `WORSE`, done once: to be read only."""
    with pytest.MonkeyPatch.context() as patch:
        script(patch, WORSE)
        return small_run(tmp_path_factory.mktemp("straight"), *WAITING, "report=true")


@pytest.fixture
def stopped(straight, tmp_path):
    """The same in a folder that ``federate("resume=auto", ...)`` finds and may change."""
    folder = shutil.copytree(straight.folder, tmp_path / "out" / straight.folder.name)
    return Run(folder, straight.said.splitlines())


def states(run) -> list[str]:
    return [r["state/hash"] for r in run.rounds]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m[0])
def test_a_run_that_stops_is_the_beginning_of_one_that_does_not(federate, scripted, method):
    scripted(*WORSE)
    whole = federate(*method, *WAITING, "federation.patience=0", output="whole")
    early = federate(*method, *WAITING)
    assert len(whole.rounds) == 6
    assert states(early) == states(whole)[:3]
    sentence = (
        "stopped at round 3: no improvement of loss_response_weighted of unseen_random (full) in 2 "
        "evaluations; best 3 at round 1"
    )
    assert early.said.count(sentence) == 1
    assert early.status == {
        "status": "completed", "rounds_done": 3, "kind": "", "message": sentence
    }  # fmt: skip
    assert "stopped" not in whole.said
    assert whole.status["message"] == ""


@pytest.mark.parametrize("first", [1, 3])
def test_a_run_that_is_continued_stops_where_it_would_have(federate, scripted, straight, first):
    scripted(*WORSE)
    federate(*WAITING, f"rounds={first}")
    resumed = federate(*WAITING, "resume=auto")
    assert states(resumed) == states(straight)
    assert resumed.status == straight.status


def test_a_run_killed_before_its_evaluation_stops_where_it_would_have(federate, scripted, straight):
    scripted(*WORSE)
    killed = federate(*WAITING, "rounds=3")
    file = killed.folder / "metrics.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    resumed = federate(*WAITING, "resume=auto")
    assert states(resumed) == states(straight)
    assert resumed.status == straight.status


def test_a_stopped_run_stays_stopped_until_it_is_given_more_patience(federate, scripted, stopped):
    scripted(*WORSE)
    early = stopped
    again = federate(*WAITING, "resume=auto")
    assert again.folder == early.folder
    assert "starting rounds" not in again.said
    assert again.status == early.status
    more = federate(*WAITING, "federation.patience=4", "resume=auto")
    assert len(more.rounds) == 5


def test_an_evaluation_that_only_once_was_the_last_does_not_count(federate, scripted):
    """Every second round is evaluated, and the third only because the run was to end there."""
    scripted(5, 4, 3, 9, 2, 1, 0)
    words = [*WAITING, "evaluate.every=2", "federation.patience=1"]
    federate(*words, "rounds=3")
    assert len(federate(*words, "resume=auto").rounds) == 6


def test_the_best_round_is_exported_beside_the_last(federate, scripted):
    scripted(*WORSE)
    early = federate(*WAITING, "federation.keep=1")
    best = federate(*EVALUATED, "rounds=1", output="one")

    def weights(folder):
        return load_file(folder / "adapter_model.safetensors")

    found, due, last = (weights(f) for f in (early.folder / "best" / "adapter",
                        best.folder / "adapter", early.folder / "adapter"))  # fmt: skip
    assert all(found[name].equal(due[name]) for name in due)
    assert any(not found[name].equal(last[name]) for name in last)
    assert checkpoint.saved_rounds(early.folder / "checkpoints") == [1, 3]
    assert "After round 1" in (early.folder / "best" / "adapter" / "README.md").read_text()
    assert "After round 3" in (early.folder / "adapter" / "README.md").read_text()
    assert not (best.folder / "best").exists()


def test_the_report_says_that_and_why_a_run_stopped(straight):
    page = (straight.folder / "report.html").read_text()
    assert "stopped at round 3: no improvement" in page
    assert "stopped early" in page


def test_a_metric_of_ones_own_is_looked_for_in_the_first_evaluation(federate):
    with pytest.raises(RunError, match=r"watch='accuracy_worst_tenth': no evaluation of unseen"):
        federate(*WAITING, "federation.watch=accuracy_worst_tenth")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["evaluate=none", "federation.patience=1"], "asks for none"),
        ([*WAITING, "federation.watch=bleu"], "watch='bleu': no evaluation of this run reports it"),
        ([*WAITING, "federation.watch=rouge_l"], "watch='rouge_l': no evaluation"),  # loss only
    ],
)
def test_what_is_not_evaluated_is_refused_before_there_is_a_folder(federate, words, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        federate(*words)
    assert not (tmp_path / "out").exists()


FAULTS = [
    (Session.standing, ' and self.schedule.due(r["round"], self.rounds.rounds)', "",
     test_an_evaluation_that_only_once_was_the_last_does_not_count),
    (Session._checkpoint, "[self.standing(self.watch).best_round] if self.watch else ()", "()",
     test_the_best_round_is_exported_beside_the_last),
    (Session.best, "dict(saved.state)", "self.state",
     test_the_best_round_is_exported_beside_the_last),
]  # fmt: skip


@pytest.mark.parametrize("fault", range(len(FAULTS)))
def test_faults_are_noticed(federate, scripted, fault):
    function, right, wrong, notices = FAULTS[fault]
    with planted(function, right, wrong), pytest.raises((AssertionError, OSError)):
        notices(federate, scripted)
