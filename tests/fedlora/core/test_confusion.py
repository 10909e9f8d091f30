"""Scores of classes against the definitions, with dense loops; sums of tables against tables of
sums."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.core.confusion import Confusion, added, confusion

LAWS = settings(derandomize=True, deadline=None, max_examples=60)
CLASSES = 5

pairs = st.lists(
    st.tuples(st.integers(0, CLASSES - 1), st.integers(0, CLASSES - 1)), min_size=1, max_size=40
)


def table(examples) -> Confusion:
    true, predicted = zip(*examples, strict=True)
    return confusion(true, predicted, CLASSES)


def by_hand(examples) -> dict[str, float]:
    """Accuracy and F1 from true and false positives and negatives, class by class."""
    f1 = []
    for c in sorted({true for true, _ in examples}):
        tp = sum(t == c and p == c for t, p in examples)
        fp = sum(t != c and p == c for t, p in examples)
        fn = sum(t == c and p != c for t, p in examples)
        f1.append(2 * tp / (2 * tp + fp + fn))
    hits = sum(t == p for t, p in examples)
    return {"accuracy": hits / len(examples), "macro_f1": sum(f1) / len(f1)}


@LAWS
@given(examples=pairs)
def test_scores_are_those_of_the_definitions(examples):
    found, wanted = table(examples), by_hand(examples)
    assert found.macro_f1 == pytest.approx(wanted["macro_f1"], abs=1e-12)
    assert found.examples == len(examples)
    for score in found.by_class:
        guesses = [p for t, p in examples if t == score.label]
        assert score.true == len(guesses)
        assert score.recall == guesses.count(score.label) / len(guesses)
        right = [t == score.label for t, p in examples if p == score.label]
        assert score.precision == (sum(right) / len(right) if right else 0.0)
        wrong = {p: guesses.count(p) for p in guesses if p != score.label}
        assert score.mistaken_for == wrong
        assert list(score.mistaken_for.values()) == sorted(wrong.values(), reverse=True)


def test_a_class_without_examples_has_no_score_and_divides_nothing():
    """scikit-learn 1.5: f1_score([0, 0, 1], [0, 2, 2], labels=[0, 1], average="macro") = 1/3."""
    found = confusion([0, 0, 1], [0, 2, 2], 4)
    assert [score.label for score in found.by_class] == [0, 1]
    assert found.macro_f1 == pytest.approx((2 / 3 + 0) / 2)
    assert Confusion(4, ()).macro_f1 == 0.0


@LAWS
@given(parts=st.lists(pairs, min_size=1, max_size=5), shuffle=st.randoms(use_true_random=False))
def test_a_sum_of_tables_is_the_table_of_all_examples(parts, shuffle):
    whole = table([example for part in parts for example in part])
    tables = [table(part) for part in parts]
    shuffle.shuffle(tables)
    assert added(tables) == whole
    assert added(tables).macro_f1 == whole.macro_f1


@pytest.mark.parametrize(
    ("classes", "counts", "why"),
    [
        (2, ((0, 2, 1),), "class 2 is none of 2 classes"),
        (2, ((-1, 0, 1),), "is none of 2 classes"),
        (2, ((0, 1, 0),), "0 examples of class 0"),
        (2, ((0, 1, -3),), "-3 examples of class 0"),
        (2, ((0, 1, 1.5),), "1.5, which is no integer"),
        (2, ((0, True, 1),), "True, which is no integer"),
        (2.0, (), "2.0, which is no integer"),
        (2, ((0, 1, 1), (0, 1, 1)), "each pair once, in ascending order"),
        (2, ((1, 1, 1), (0, 1, 1)), "each pair once, in ascending order"),
    ],
)
def test_what_is_no_table_of_counts_is_refused(classes, counts, why):
    with pytest.raises(ValueError, match=why):
        Confusion(classes, counts)
