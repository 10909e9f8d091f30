"""ROUGE-L by hand, and in scripts that the usual tokenizer cannot see."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.evaluation.rouge import (
    UnicodeWords,
    exact_match,
    rouge_l,
)

LAWS = settings(derandomize=True, deadline=None, max_examples=50)


@pytest.mark.parametrize("unicode", [False, True])
@pytest.mark.parametrize(
    ("reference", "prediction", "score"),
    [
        ("the cat sat", "the cat sat", 1.0),
        ("The CAT sat!", "the, cat sat", 1.0),
        ("the cat sat", "the dog sat", 2 / 3),
        ("a b c d", "b d", 2 * 1 * 0.5 / 1.5),  # precision 1, recall 1/2
        ("a b c", "c b a", 1 / 3),
        ("a", "b", 0.0),
        ("", "", 1.0),
        (" \n", "\t", 1.0),
        ("a", "", 0.0),
        ("", "a", 0.0),
        ("...", "!!!", 0.0),
    ],
)
def test_by_hand(reference, prediction, score, unicode):
    assert rouge_l(reference, prediction, unicode=unicode) == pytest.approx(score, rel=1e-12)


@pytest.mark.parametrize("text", ["你好世界", "नमस्ते दुनिया", "Привет, мир", "مرحبا", "さようなら"])
def test_other_scripts_score_nothing_as_usual_and_everything_in_unicode(text):
    assert rouge_l(text, text) == 0.0
    assert rouge_l(text, text, unicode=True) == 1.0


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Don't stop", ["don", "t", "stop"]),
        ("你好 world2", ["你", "好", "world2"]),
        ("abc漢字def", ["abc", "漢", "字", "def"]),
        ("カタ ひら", ["カ", "タ", "ひ", "ら"]),
        ("नमस्ते, दुनिया", ["नमस्ते", "दुनिया"]),
        ("STRASSE straße", ["strasse", "strasse"]),
        ("cafe\u0301 caf\u00e9", ["café", "café"]),
        ("3.14", ["3", "14"]),
        ("--", []),
    ],
)
def test_unicode_words(text, tokens):
    assert UnicodeWords().tokenize(text) == tokens


def test_half_of_a_chinese_sentence():
    assert rouge_l("我爱北京", "我爱上海", unicode=True) == pytest.approx(0.5)


@LAWS
@given(a=st.text(max_size=20), b=st.text(max_size=20), unicode=st.booleans())
def test_symmetric_bounded_and_blind_to_case(a, b, unicode):
    score = rouge_l(a, b, unicode=unicode)
    assert 0 <= score <= 1
    assert score == pytest.approx(rouge_l(b, a, unicode=unicode), rel=1e-12)


@LAWS
@given(words=st.lists(st.sampled_from(["ab", "x", "42", "Zed"]), min_size=1, max_size=8))
def test_plain_english_scores_the_same_in_both(words):
    text, other = " ".join(words), " ".join(reversed(words))
    assert rouge_l(text, other) == pytest.approx(rouge_l(text, other, unicode=True), rel=1e-12)


def test_exact_match_ignores_outer_space_only():
    assert exact_match("a b", " a b\n") == 1.0
    assert exact_match("a b", "a  b") == 0.0
    assert exact_match("A", "a") == 0.0
    assert exact_match("", " ") == 1.0
