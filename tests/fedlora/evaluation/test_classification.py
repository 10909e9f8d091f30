"""Scores of predicted labels against hand computations from the logits of each example alone."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.core.metric import HIGHEST, LOWEST, Outputs
from fedlora.core.types import EvaluatePlan
from fedlora.evaluation.metrics import measure
from fedlora.evaluation.scorers import DEFAULT, Classification, scorers_of
from tests.fedlora.models.classifiers import CLASSES, LABELS, classifier, examples, one_by_one

LAWS = settings(derandomize=True, deadline=None, max_examples=40)


def by_hand(true: list[int], chances: torch.Tensor) -> dict[str, float]:
    """As sklearn.metrics.accuracy_score, f1_score(average="macro", labels=np.unique(true)) and
    log_loss."""
    guess = chances.argmax(-1).tolist()
    f1 = []
    for c in np.unique(true):
        tp = sum(t == p == c for t, p in zip(true, guess, strict=True))
        precision, recall = tp / max(1, guess.count(c)), tp / true.count(c)
        f1.append(2 * precision * recall / (precision + recall) if tp else 0.0)
    losses = [-math.log(row[t]) for t, row in zip(true, chances, strict=True)]
    hits = [t == p for t, p in zip(true, guess, strict=True)]
    return {
        "examples": len(true),
        "loss": math.fsum(losses) / len(true),
        "accuracy": sum(hits) / len(true),
        "macro_f1": sum(f1) / len(f1),
    }


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize("batch_size", [1, 4, 30])
def test_scores_equal_those_of_each_example_alone(family, batch_size):
    on, held = classifier(family), examples(24)
    plan = EvaluatePlan(generate=False, batch_size=batch_size)
    found = measure(on, held, None, plan, seed=1, client=0)
    wanted = by_hand([e.label for e in held], one_by_one(on, held).softmax(-1))
    assert {name: m.scalar for name, m in found.items()} == pytest.approx(wanted, rel=1e-12)
    assert found["macro_f1"].counts is not None
    assert found["macro_f1"].counts.classes == CLASSES


def outputs(true: list[int], predicted: list[int]) -> Outputs:
    return Outputs(
        tokens=[np.array([t]) for t in true],
        response_at=[0] * len(true),
        nll=[torch.tensor([0.25 * (t != p)]) for t, p in zip(true, predicted, strict=True)],
        best=[torch.tensor([p]) for p in predicted],
        decode=lambda ids: LABELS[int(ids[0])],
        labels=LABELS,
    )


answers = st.lists(
    st.tuples(st.integers(0, CLASSES - 1), st.integers(0, CLASSES - 1)), min_size=1, max_size=20
)


@LAWS
@given(pairs=answers, renamed=st.permutations(range(CLASSES)))
def test_no_score_depends_on_the_numbers_of_labels(pairs, renamed):
    true, predicted = zip(*pairs, strict=True)
    found = Classification().score(outputs(true, predicted))
    other = Classification().score(
        outputs([renamed[t] for t in true], [renamed[p] for p in predicted])
    )
    for name, metric in found.items():
        assert other[name].value == pytest.approx(metric.value, abs=1e-12)
        assert metric.weight == len(pairs)
        assert metric.worst == (HIGHEST if name == "loss" else LOWEST)


def test_a_client_of_one_label_has_scores():
    right = Classification().score(outputs([3, 3], [3, 3]))
    wrong = Classification().score(outputs([3, 3], [0, 1]))
    assert [m.value for m in right.values()] == [0.0, 1.0, 1.0]
    assert [m.value for m in wrong.values()] == [0.25, 0.0, 0.0]


def test_the_default_scores_follow_the_task():
    plan = EvaluatePlan()
    assert scorers_of(plan, classifies=True) == [Classification()]
    assert scorers_of(plan, classifies=False) == [s for s in DEFAULT if s != Classification()]


def test_a_text_asked_of_a_classifier_is_refused_in_one_sentence():
    with pytest.raises(ValueError, match=r"generate=true: a classifier writes no text; use false"):
        measure(classifier("bert"), examples(2), None, EvaluatePlan(), seed=1, client=0)
