"""When a run ends early, by its evaluations: laws of the counter, and what is refused."""

from dataclasses import replace

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from fedlora.evaluation.scorers import DEFAULT, TeacherForcedRouge
from fedlora.server import early_stop
from fedlora.server.early_stop import Watch, standing, stopped, watch_of, watched_values
from fedlora.server.schedule import EvaluationSchedule, Rounds
from tests.fedlora.evaluation.toy_metric import ResponseLength
from tests.planted import planted

laws = settings(derandomize=True, deadline=None, max_examples=60)
WATCH = Watch("loss", "seen", "full", lower=True, patience=2)
VALUES = st.lists(st.none() | st.integers(-6, 6).map(float), max_size=12)
DELTAS = st.integers(0, 3).map(float)


def numbered(values):
    return list(enumerate(values))


@laws
@given(VALUES, DELTAS)
@example([5.0, 4.0, 3.0], 1.0)  # each step is too small, both together are not
def test_an_evaluation_improves_if_it_beats_all_that_improved_before(values, delta):
    """The definition, written out: compared with every earlier improvement, not with the last."""
    marks = []
    for i, value in enumerate(values):
        if value is not None and all(values[m] - value > delta for m in marks):
            marks.append(i)
    found = standing(numbered(values), replace(WATCH, min_delta=delta))
    assert found.without == len(values) - (marks[-1] + 1 if marks else 0)
    measured = [v for v in values if v is not None]
    assert found.best == min(measured, default=None)
    if measured:
        assert found.best_round == values.index(min(measured))


@laws
@given(VALUES, DELTAS)
def test_higher_is_lower_with_the_other_sign(values, delta):
    watch = replace(WATCH, min_delta=delta)
    turned = [None if v is None else -v for v in values]
    low, high = (
        standing(numbered(values), watch),
        standing(numbered(turned), replace(watch, lower=False)),
    )
    assert (low.without, low.best_round) == (high.without, high.best_round)
    assert high.best == (None if low.best is None else -low.best)


@laws
@given(VALUES, st.integers(1, 4), st.integers(1, 4))
def test_more_patience_never_stops_sooner(values, few, more):
    def end(patience):
        watch = replace(WATCH, patience=patience)
        said = [
            stopped(standing(numbered(values[: n + 1]), watch), watch) for n in range(len(values))
        ]
        return next((n for n, line in enumerate(said) if line), len(values))

    assume(few <= more)
    assert end(few) <= end(more)
    assert end(few) >= min(few - 1, len(values))


def test_what_keeps_improving_never_stops():
    watch = replace(WATCH, patience=1, min_delta=0.5)
    assert not stopped(standing(numbered([4.0 - n for n in range(9)]), watch), watch)
    assert stopped(standing(numbered([4.0, 3.5]), watch), watch)


def test_the_sentence_names_round_metric_delta_and_best():
    watch = replace(WATCH, min_delta=0.1)
    said = stopped(standing(numbered([5.0, 4.0, 3.95, 4.5]), watch), watch)
    assert said == (
        "stopped at round 3: no improvement of loss of seen (full) by more than 0.1 in 2 "
        "evaluations; best 3.95 at round 2"
    )
    assert stopped(standing(numbered([None, None]), watch), watch).endswith("none was measured")


FAULTS = [
    (Watch.improves, "value - on > by", "on - value > by",
     test_higher_is_lower_with_the_other_sign),
    (Watch.improves, "return on - value > by if", "return on - value >= by if",
     test_an_evaluation_improves_if_it_beats_all_that_improved_before),
    (early_stop.standing, "mark, without = value, 0", "without = 0",
     test_an_evaluation_improves_if_it_beats_all_that_improved_before),
    (early_stop.standing, "mark, watch.min_delta", "best, watch.min_delta",
     test_an_evaluation_improves_if_it_beats_all_that_improved_before),
    (early_stop.stopped, "< watch.patience", "<= watch.patience",
     test_the_sentence_names_round_metric_delta_and_best),
]  # fmt: skip


@pytest.mark.parametrize("fault", range(len(FAULTS)))
def test_faults_are_noticed(fault):
    function, right, wrong, notices = FAULTS[fault]
    with planted(function, right, wrong), pytest.raises((AssertionError, ExceptionGroup)):
        notices()


RECORDS = [
    {"kind": "evaluate", "round": r, "group": g, "adapter": "full", "clients": 2.0, "loss": v}
    for r, v in ((0, 3.0), (1, None))
    for g in ("seen", "unseen_random")
]


def test_values_are_those_of_one_group_and_adapter():
    other = {"kind": "round", "round": 1, "loss": 9.0}
    assert watched_values([*RECORDS, other], WATCH) == [(0, 3.0), (1, None)]
    failed = [{k: v for k, v in r.items() if k != "loss"} | {"clients": 0.0} for r in RECORDS]
    assert watched_values(failed, WATCH) == [(0, None), (1, None)]


def test_a_metric_that_is_not_reported_is_refused_when_the_first_records_show_it():
    with pytest.raises(
        ValueError, match=r"federation\.watch='wit': no evaluation of seen .*report"
    ):
        watched_values(RECORDS, replace(WATCH, metric="wit"))


EVERY = EvaluationSchedule(groups=("seen", "participants"), adapters=("own", "full"))


def watched(schedule=EVERY, scorers=DEFAULT, **given):
    return watch_of(Rounds(**{"patience": 3} | given), schedule, scorers, "loss_response_weighted")


def test_what_is_watched_follows_from_the_configuration():
    assert watched() == Watch("loss_response_weighted", "seen", "own", True, 3, 0.0)
    found = watched(watch="rouge_l_low", watch_group="participants", watch_adapter="full")
    assert found == Watch("rouge_l_low", "participants", "full", False, 3, 0.0)
    assert watched(watch="tier/T1/accuracy").lower is False
    assert watched(watch="rouge_l", better="lowest").lower is True
    assert watched(patience=0) is None
    assert watched(patience=0, watch="nonsense") is None
    own = (ResponseLength(),)  # a scorer that says nothing of its metrics
    assert watched(scorers=own, watch="wit", better="highest").metric == "wit"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"watch": "rouge_2"}, r"federation\.watch='rouge_2': no evaluation of this run"),
        ({"watch_group": "unseen_task"}, r"watch_group='unseen_task' is not evaluated: .*seen"),
        ({"watch_adapter": "largest"}, r"watch_adapter='largest' is not evaluated: .*own"),
        ({"schedule": replace(EVERY, every=0)}, r"patience=3 counts evaluations, and evaluate"),
        ({"watch": "accuracy_std"}, r"federation\.better=auto: accuracy_std does not say"),
        ({"scorers": (ResponseLength(),), "watch": "wit"}, r"better=auto: wit does not say"),
        ({"scorers": (TeacherForcedRouge(),)}, r"watch='loss_response_weighted': no evaluation"),
    ],
)  # fmt: skip
def test_what_no_evaluation_can_answer_is_refused_at_the_start(given, said):
    with pytest.raises(ValueError, match=said):
        watched(**given)


@pytest.mark.parametrize(
    ("given", "said"),
    [({"patience": -1}, "patience=-1 must be >= 0"), ({"min_delta": -0.5}, "min_delta=-0.5 must"),
     ({"min_delta": float("nan")}, "min_delta=nan must"), ({"better": "up"}, "better='up' is not")],
)  # fmt: skip
def test_values_that_mean_nothing_are_refused(given, said):
    with pytest.raises(ValueError, match=said):
        Rounds(**given)
