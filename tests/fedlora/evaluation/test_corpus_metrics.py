"""Scores worked out by hand, what must not change them, and agreement with the libraries."""

import math
import random
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.evaluation import corpus_metrics as nlg
from fedlora.evaluation.corpus_metrics import (
    bleu,
    cider,
    evaluate,
    meteor,
    nist,
    rouge_l_e2e,
    words,
)

ALL = {"bleu": bleu, "nist": nist, "rouge_l_e2e": rouge_l_e2e, "cider": cider}
EXACT = {"rel": 1e-12, "abs": 1e-12}
VOCABULARY = ["the", "a", "pub", "near", "cheap", "Café", "n't", "'s", "kid-free", ",", ".", "£20"]

texts = st.lists(st.sampled_from(VOCABULARY), min_size=1, max_size=9).map(" ".join)
corpora = st.lists(
    st.tuples(texts, st.lists(texts, min_size=1, max_size=4)), min_size=1, max_size=5
)
every_metric = pytest.mark.parametrize("metric", ALL.values(), ids=ALL)

HYPOTHESES = ["the cat sat on the mat", "a dog ran"]
REFERENCES = [["the cat is on the mat", "there is a cat on the mat"], ["a dog ran home", "dogs"]]


# --- by hand --------------------------------------------------------------------------------------


def test_bleu_by_hand():
    """Hits and totals over both sentences; the closest lengths are 6 (of 6, 7) and 4 (of 4, 1).

    1-grams: the the cat on mat (5 of 6), a dog ran (3 of 3)            8/9
    2-grams: the-cat on-the the-mat (3 of 5), a-dog dog-ran (2 of 2)    5/7
    3-grams: on-the-mat (1 of 4), a-dog-ran (1 of 1)                    2/5
    4-grams: none of 3, and there are none of three words               0
    """
    assert bleu(HYPOTHESES, REFERENCES) == 0.0
    # With "there is a cat sat on the mat" in the first list, "cat sat on the", "sat on the mat"
    # hit, and 3-grams "cat sat on", "sat on the"; 1-gram sat; 2-grams cat-sat, sat-on.
    references = [[*REFERENCES[0], "there is a cat sat on the mat"], REFERENCES[1]]
    precisions = [9 / 9, 7 / 7, 4 / 5, 2 / 3]  # "the cat sat" is no 3-gram of a reference
    brevity = math.exp(1 - 10 / 9)  # 6 + 3 words for 6 + 4
    expected = 100 * brevity * math.prod(precisions) ** (1 / 4)
    assert bleu(HYPOTHESES, references) == pytest.approx(expected, rel=1e-9)


def test_of_two_equally_close_lengths_bleu_takes_the_shorter():
    # 5 words: 4 and 6 are as close. With 4 there is no penalty, whatever the references' order.
    assert bleu(["a b c d e"], [["a b c d", "a b c d e f"]]) == pytest.approx(100, rel=1e-9)


def test_nist_by_hand():
    """References "a b" and "a c" of "a b", reference "d" of "d d": five words, a twice.

    info(a) = log2(5/2), info(b) = info(c) = info(d) = log2(5/1), info(a b) = log2(2/1) = 1.
    1-grams: a, b and one d of four: (log2 2.5 + 2 log2 5) / 4. 2-grams: a b of two: 1/2.
    No 3-grams. Four words for a mean of 2 + 1 = 3: no penalty.
    """
    got = nist(["a b", "d d"], [["a b", "a c"], ["d"]])
    assert got == pytest.approx((math.log2(2.5) + 2 * math.log2(5)) / 4 + 1 / 2, **EXACT)


def test_a_text_of_two_thirds_the_length_has_half_the_nist():
    whole = [["a b c", "d e f"]]  # all six words are equally rare: info = log2 6, of "a b" 0
    assert nist(["a b"], whole) == pytest.approx(0.5 * math.log2(6), **EXACT)
    assert nist(["a b c"], whole) == pytest.approx(math.log2(6), **EXACT)


def test_nist_of_a_perfect_match_is_the_mean_information():
    said = ["the pub is near the river .", "a cheap pub"]
    tokens = [s.split() for s in said]
    total, flat = 0.0, [t for s in tokens for t in s]
    for n in range(1, 6):
        grams = [tuple(s[i : i + n]) for s in tokens for i in range(len(s) - n + 1)]
        heads = [tuple(s[i : i + n - 1]) for s in tokens for i in range(len(s) - n + 2)]
        infos = [
            math.log2((len(flat) if n == 1 else heads.count(g[:-1])) / grams.count(g))
            for g in grams
        ]
        total += math.fsum(infos) / len(grams)
    assert nist(said, [[s] for s in said]) == pytest.approx(total, **EXACT)


def f_score(precision, recall, beta=1.2):
    return (1 + beta**2) * precision * recall / (recall + beta**2 * precision)


def test_rouge_l_by_hand():
    """First: "the cat on the mat" of both lengths 6; "cat on the mat" of 6 and 7: P = R = 5/6.
    Second: "a dog ran" of 3 in 4 words: P = 1, R = 3/4; "dogs" has nothing of it."""
    expected = (f_score(5 / 6, 5 / 6) + f_score(1, 3 / 4)) / 2
    assert rouge_l_e2e(HYPOTHESES, REFERENCES) == pytest.approx(expected, **EXACT)


def test_rouge_l_takes_precision_and_recall_from_different_references():
    # "a b" is all of the hypothesis in the long one (P = 1); "a" is all of the short one (R = 1).
    assert rouge_l_e2e(["a b"], [["a x b y z", "a"]]) == pytest.approx(1.0, **EXACT)
    assert rouge_l_e2e(["a b"], [["a x b y z"]]) == pytest.approx(f_score(1, 2 / 5), **EXACT)


def test_cider_by_hand():
    """Two documents; "the" is in both (weight 0), every other n-gram in one (weight L = ln 2).

    "the cat" against "the cat" and "the dog": 1-grams cos 1 and 0, 2-grams 1 and 0, no longer
    ones; lengths equal. Mean over n: 2/4 and 0; over references 1/4; times ten 2.5.
    "the bird" against "the bird flew": 1-grams (0, L) and (0, L, L): cos = L²/(L · L√2) = 1/√2;
    2-grams likewise 1 of 2: 1/√2; one bigram fewer: e^(-1/72). Ten times 2/4 of that.
    """
    got = cider(["the cat", "the bird"], [["the cat", "the dog"], ["the bird flew"]])
    second = 10 * (2 / 4) / math.sqrt(2) * math.exp(-1 / 72)
    assert got == pytest.approx((2.5 + second) / 2, **EXACT)


def test_cider_clips_what_is_said_too_often():
    # "cat cat" has weight 2L where the reference has L: min(2L, L) · L / (2L · L) = 1/2 for n = 1;
    # its bigram is unknown, the reference has none.
    got = cider(["cat cat", "dog"], [["cat"], ["dog"]])
    first = 10 / 4 * (1 / 2) * math.exp(-1 / 72)
    assert got == pytest.approx((first + 10 / 4) / 2, **EXACT)


def test_a_perfect_match_reaches_the_top():
    said = ["the pub is near the river", "Loch Fyne serves cheap Indian food"]
    got = evaluate(said, [[s] for s in said])
    assert got.bleu == pytest.approx(100, rel=1e-9)
    assert got.rouge_l_e2e == pytest.approx(1, **EXACT)
    assert got.cider == pytest.approx(10, **EXACT)


def test_nothing_in_common_scores_nothing():
    got = evaluate(["a b c d e", "f g h i j"], [["k l m n o"], ["p q r s t", "u v"]])
    assert (got.bleu, got.nist, got.rouge_l_e2e, got.cider) == (0, 0, 0, 0)


@every_metric
def test_blank_texts_score_nothing(metric):
    assert metric([""], [["a b"]]) == 0
    assert metric(["a b", "c"], [["", "  "], [""]]) == 0
    assert metric(["", ""], [[""], [""]]) == 0


# --- what must not matter -------------------------------------------------------------------------


@every_metric
@given(corpora, st.integers(0, 99))
def test_order_of_references_and_case_do_not_matter(metric, corpus, seed):
    said, wanted = map(list, zip(*corpus, strict=True))
    shuffle = random.Random(seed).sample
    other = [[r.upper() for r in shuffle(group, len(group))] for group in wanted]
    expected = metric(said, wanted)
    assert metric([s.title() for s in said], other) == pytest.approx(expected, **EXACT)


@every_metric
@given(corpora)
def test_every_reference_twice_changes_nothing(metric, corpus):
    said, wanted = map(list, zip(*corpus, strict=True))
    assert metric(said, [2 * g for g in wanted]) == pytest.approx(metric(said, wanted), **EXACT)


@pytest.mark.parametrize("metric", [bleu, rouge_l_e2e])
@given(corpora)
def test_one_reference_twice_changes_nothing_where_the_best_counts(metric, corpus):
    said, wanted = map(list, zip(*corpus, strict=True))
    twice = [[*g, g[0]] if i == 0 else g for i, g in enumerate(wanted)]
    assert metric(said, twice) == metric(said, wanted)


@every_metric
@given(corpora, st.integers(0, 99))
def test_order_of_the_corpus_does_not_matter(metric, corpus, seed):
    said, wanted = zip(*corpus, strict=True)
    said2, wanted2 = zip(*random.Random(seed).sample(corpus, len(corpus)), strict=True)
    assert metric(said, wanted) == pytest.approx(metric(said2, wanted2), **EXACT)


@given(st.lists(st.sampled_from("abc")), st.lists(st.sampled_from("abc")))
def test_common_subsequence_equals_its_recursion(a, b):
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = (
                table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
            )
    assert nlg._lcs(a, b) == table[-1][-1]


# --- tokens and libraries -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Vaults isn't cheap, it's £20-25!", "the vaults is n't cheap it 's £ 20-25"),
        ("the vaults is n't cheap , it 's £ 20-25 !", "the vaults is n't cheap it 's £ 20-25"),
        ("A family-friendly pub; rated 3.5 (5/5).", "a family-friendly pub rated 3.5 ( 5/5 )"),
        ("\"Café Rouge\" -- they're the owners' ...", "café rouge they 're the owners"),
        ("it’s nice – really … “ok”", "it 's nice really ok"),
        ("  \n", ""),
    ],
)
def test_python_tokens(text, expected):
    assert words(text) == expected.split()


@given(corpora)
def test_bleu_is_that_of_sacrebleu_with_transposed_references(corpus):
    import sacrebleu

    said, wanted = map(list, zip(*corpus, strict=True))
    widest = max(map(len, wanted))
    streams = [[(g + [None] * widest)[i] for g in wanted] for i in range(widest)]
    direct = sacrebleu.corpus_bleu(
        said, streams, lowercase=True, tokenize="13a", smooth_method="none", force=True
    )
    assert bleu(said, wanted) == direct.score


# --- METEOR ---------------------------------------------------------------------------------------


def test_meteor_says_why_it_is_not_computed(monkeypatch):
    monkeypatch.setattr(nlg.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(nlg.MeteorUnavailable, match="pycocoevalcap is not installed"):
        meteor(["a"], [["a"]])
    got = evaluate(["a"], [["a"]])
    assert got.meteor is None and got.meteor_note == "pycocoevalcap is not installed"
    monkeypatch.setattr(nlg.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert evaluate(["a"], [["a"]]).meteor_note == "there is no java"


def test_a_java_that_fails_is_no_java(monkeypatch, tmp_path):
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\nexit 3\n")
    java.chmod(0o755)
    monkeypatch.setattr(nlg.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(shutil, "which", lambda name: str(java))
    assert evaluate(["a"], [["a"]]).meteor_note == "java -version ends with 3"
    java.write_text("no program")
    assert "java does not start" in evaluate(["a"], [["a"]]).meteor_note


@pytest.mark.slow
def test_agreement_with_the_java_path():
    """On sentences like E2E's, both sides see the same words (of another spelling: # for £)."""
    pytest.importorskip("pycocoevalcap")
    if nlg.meteor_missing():
        pytest.skip(nlg.meteor_missing())
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    said = [
        "The Vaults pub near Café Adriatic has a 5 star rating , and it 's £20-25 .",
        "Aromi isn't a family-friendly coffee shop; it's in the city centre.",
        "Cotto serves cheap Thai food.",
        "",
    ]
    wanted = [
        ["The Vaults is a 5-star pub near Café Adriatic. Prices start at £30.", "A pub, 5 stars."],
        ["Aromi is not family friendly.", "In the city centre, there's Aromi: no kids!"],
        ["Cotto serves cheap Thai food.", "Cheap Thai food is served at the Cotto, riverside."],
        ["Wildwood."],
    ]

    def ptb(groups):
        tokens = PTBTokenizer().tokenize(
            {i: [{"caption": t} for t in g] for i, g in enumerate(groups)}
        )
        return {i: tokens[i] for i in range(len(groups))}

    theirs, mine = ptb(wanted), ptb([[h] for h in said])
    for group, tokens in zip(wanted, theirs.values(), strict=True):
        assert [" ".join(words(t)).replace("£", "#") for t in group] == tokens
    assert rouge_l_e2e(said, wanted) == pytest.approx(
        Rouge().compute_score(theirs, mine)[0], rel=1e-9
    )
    assert cider(said, wanted) == pytest.approx(Cider().compute_score(theirs, mine)[0], rel=1e-9)
    whole = [g[0] for g in wanted]
    assert 0 < meteor(said, wanted) < meteor(whole, wanted) <= 1


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", [*ALL.values(), meteor, evaluate])
def test_impossible_corpora_are_refused(metric):
    with pytest.raises(ValueError, match="2 hypotheses, but 1 lists of references"):
        metric(["a", "b"], [["a"]])
    with pytest.raises(ValueError, match="an empty corpus has no score"):
        metric([], [])
    with pytest.raises(ValueError, match=r"references\[1\] is empty: hypothesis 'b' needs one"):
        metric(["a", "b"], [["a"], []])
    with pytest.raises(ValueError, match=r"references\[0\]='a' is one text"):
        metric(["a"], ["a"])
