"""Corpus scores of generated text against one or more references, as the E2E challenge has them.

    bleu      BLEU-4, 0 to 100 (Papineni et al., 2002)
    nist      NIST-5, unbounded (Doddington, 2002)
    meteor    METEOR 1.5, 0 to 1 (Denkowski & Lavie, 2014): only with Java and pycocoevalcap
    rouge_l_e2e  ROUGE-L with beta 1.2, 0 to 1 (Lin, 2004)
    cider     CIDEr-D, 0 to 10 (Vedantam et al., 2015)

Definitions and parameters are those of the challenge's scripts (``tuetschek/e2e-metrics``; Dušek et
al., 2020, arXiv:1901.07931). BLEU and NIST see the text through mteval-13a's tokens. The other two
see *Python tokens* (`words`) where the scripts run Stanford's tokeniser in Java: docs/nlg.md has
the difference. Every score is of the whole corpus and ignores case.
"""

import importlib.util
import math
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

Texts: TypeAlias = Sequence[str]
References: TypeAlias = Sequence[Sequence[str]]
"""The references of each hypothesis: one text or more."""
Gram: TypeAlias = tuple[str, ...]

NIST_ORDER, CIDER_ORDER = 5, 4
ROUGE_BETA = 1.2  # recall counts for more than precision
CIDER_SIGMA = 6.0  # of the penalty on a difference in length, in bigrams
_NIST_BETA = math.log(2) / math.log(1.5) ** 2  # two thirds of the length halve the score
_PROBE_S = 60.0


class MeteorUnavailable(RuntimeError):
    """METEOR cannot be computed here: a few words that say why."""


@dataclass(frozen=True)
class NlgScores:
    """The five scores of one corpus, each in its own unit (see the module)."""

    bleu: float
    nist: float
    meteor: float | None
    """None where it was not computed."""
    rouge_l_e2e: float
    cider: float
    meteor_note: str = ""
    """Why there is no METEOR."""


def evaluate(hypotheses: Texts, references: References) -> NlgScores:
    """All scores of a corpus; METEOR where Java and pycocoevalcap are there.

    Args:
        hypotheses: at least one text; it may be blank.
        references: of each hypothesis, in the same order, at least one.

    Raises:
        ValueError: if the corpus is empty, the lengths differ or a hypothesis has no reference.
    """
    _check(hypotheses, references)
    found, note = None, ""
    try:
        found = meteor(hypotheses, references)
    except MeteorUnavailable as error:
        note = str(error)
    return NlgScores(
        bleu=bleu(hypotheses, references),
        nist=nist(hypotheses, references),
        meteor=found,
        rouge_l_e2e=rouge_l_e2e(hypotheses, references),
        cider=cider(hypotheses, references),
        meteor_note=note,
    )


def _check(hypotheses: Texts, references: References) -> None:
    if len(hypotheses) != len(references):
        raise ValueError(
            f"{len(hypotheses)} hypotheses, but {len(references)} lists of references: there must "
            "be one list for each hypothesis"
        )
    if not hypotheses:
        raise ValueError("there are no hypotheses: an empty corpus has no score")
    for i, texts in enumerate(references):
        if isinstance(texts, str):
            raise ValueError(f"references[{i}]={texts!r} is one text; it must be a list of texts")
        if not texts:
            raise ValueError(f"references[{i}] is empty: hypothesis {hypotheses[i]!r} needs one")


# --- BLEU and NIST: tokens of mteval-13a ----------------------------------------------------------


def bleu(hypotheses: Texts, references: References) -> float:
    """BLEU-4 in ``[0, 100]`` of sacrebleu: clipped counts, closest length, no smoothing.

    Raises:
        ValueError: as `evaluate`.
    """
    _check(hypotheses, references)
    from sacrebleu.metrics.bleu import BLEU

    widest = max(map(len, references))
    streams = [[r[i] if i < len(r) else None for r in references] for i in range(widest)]
    # force: no warning that texts look tokenised; E2E's are
    metric: Any = BLEU(lowercase=True, tokenize="13a", smooth_method="none", force=True)
    return float(metric.corpus_score(list(hypotheses), streams).score)


def nist(hypotheses: Texts, references: References) -> float:
    """NIST-5: hits weighted by how much each n-gram says after its beginning.

    ``sum_n sum_hits info / |hypothesis n-grams|``, times
    ``exp(-b ln²(min(1, |hypotheses| / mean |references|)))`` with ``b = ln 2 / ln² 1.5``, where
    ``info(w1..wn) = log2(count(w1..wn-1) / count(w1..wn))`` over all references of the corpus.

    Raises:
        ValueError: as `evaluate`.
    """
    _check(hypotheses, references)
    split = _mteval()
    said = [split(h) for h in hypotheses]
    wanted = [[split(r) for r in texts] for texts in references]
    seen: Counter[Gram] = Counter()
    for reference in (r for group in wanted for r in group):
        seen[()] += len(reference)
        for n in range(1, NIST_ORDER + 1):
            seen.update(_grams(reference, n))
    gained = 0.0
    for n in range(1, NIST_ORDER + 1):
        total = sum(max(0, len(h) - n + 1) for h in said)
        weights = (
            hits * math.log2(seen[gram[:-1]] / seen[gram])
            for h, group in zip(said, wanted, strict=True)
            for gram, hits in _clipped(h, group, n).items()
        )
        gained += math.fsum(weights) / total if total else 0.0
    length = math.fsum(sum(map(len, group)) / len(group) for group in wanted)
    return gained * _nist_brevity(sum(map(len, said)), length)


def _nist_brevity(said: int, wanted: float) -> float:
    if not said:
        return 0.0
    return math.exp(-_NIST_BETA * math.log(min(1.0, said / wanted)) ** 2) if wanted else 1.0


def _mteval() -> Callable[[str], list[str]]:
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    untyped: Any = Tokenizer13a
    tokenizer = untyped()
    return lambda text: str(tokenizer(text.lower().rstrip())).split()


def _grams(tokens: Sequence[str], n: int) -> Counter[Gram]:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def _clipped(hypothesis: Sequence[str], group: Iterable[Sequence[str]], n: int) -> Counter[Gram]:
    """N-grams of a hypothesis, each as often as one of its references has it."""
    most: Counter[Gram] = Counter()
    for reference in group:
        most |= _grams(reference, n)
    return _grams(hypothesis, n) & most


# --- ROUGE-L and CIDEr: Python tokens -------------------------------------------------------------

_PLAIN = str.maketrans({"’": "'", "‘": "`", "“": '"', "”": '"', "–": "--", "—": "--", "…": "..."})
_CLITIC = r"n't(?!\w)|'(?:s|m|d|re|ve|ll)(?!\w)"
_ATTACHED = re.compile(rf"(?<=\w)({_CLITIC})")
_TOKEN = re.compile(rf"{_CLITIC}|\d+(?:[.,:]\d+)+|\w+(?:[-'/]\w+)*|--+|\.\.+|\S")
# Brackets stay, as in the scripts: these ask for -LRB- after the text was made lower-case.
_DROPPED = frozenset("?!,:;.\"'`-") | {"''", "``", "--", "..", "..."}


def words(text: str) -> list[str]:
    """A text as lower-case Python tokens, punctuation dropped.

    Clitics (``'s``, ``n't``) are tokens of their own; hyphenated words and numbers are one.
    """
    spaced = _ATTACHED.sub(r" \1", text.lower().translate(_PLAIN))
    return [token for token in _TOKEN.findall(spaced) if token not in _DROPPED]


def rouge_l_e2e(hypotheses: Texts, references: References) -> float:
    """Mean over hypotheses of the F-score (beta 1.2) of the longest common subsequence.

    Precision and recall are each the best over the references, so they may stem from two of them.

    Raises:
        ValueError: as `evaluate`.
    """
    _check(hypotheses, references)
    scores = [
        _rouge_l(words(h), [words(r) for r in texts])
        for h, texts in zip(hypotheses, references, strict=True)
    ]
    return math.fsum(scores) / len(scores)


def _rouge_l(hypothesis: Sequence[str], group: Iterable[Sequence[str]]) -> float:
    common = [(_lcs(hypothesis, r), len(r)) for r in group]
    precision = max(n for n, _ in common) / max(1, len(hypothesis))
    recall = max(n / max(1, length) for n, length in common)
    if not precision:
        return 0.0
    return (1 + ROUGE_BETA**2) * precision * recall / (recall + ROUGE_BETA**2 * precision)


def _lcs(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, a row of the table in one integer (Hyyrö, 2004)."""
    where: dict[str, int] = {}
    for i, token in enumerate(a):
        where[token] = where.get(token, 0) | 1 << i
    full = (1 << len(a)) - 1
    row = full  # a zero at i: the length grows at a[i]
    for token in b:
        kept = row & where.get(token, 0)
        row = (row + kept | row - kept) & full
    return len(a) - row.bit_count()


Vector: TypeAlias = dict[Gram, float]


def cider(hypotheses: Texts, references: References) -> float:
    """CIDEr-D: ten times the mean similarity of TF-IDF vectors of n-grams, n from 1 to 4.

    A document is the set of references of one hypothesis. In the similarity, a hypothesis's weights
    are clipped to the reference's, and ``exp(-d² / 2σ²)`` with the difference ``d`` in the number
    of bigrams and ``σ = 6`` is a factor. A corpus of one hypothesis scores 0: every n-gram of its
    references is in every document.

    Raises:
        ValueError: as `evaluate`.
    """
    _check(hypotheses, references)
    said = [_all_grams(words(h)) for h in hypotheses]
    wanted = [[_all_grams(words(r)) for r in texts] for texts in references]
    documents = Counter(
        gram for group in wanted for gram in {g for grams in group for n in grams for g in n}
    )
    scores = []
    for h, group in zip(said, wanted, strict=True):
        alike = [_similarity(h, r, documents, len(said)) for r in group]
        scores.append(10 * math.fsum(alike) / len(alike))
    return math.fsum(scores) / len(scores)


def _all_grams(tokens: Sequence[str]) -> list[Counter[Gram]]:
    return [_grams(tokens, n) for n in range(1, CIDER_ORDER + 1)]


def _similarity(
    hypothesis: Sequence[Counter[Gram]],
    reference: Sequence[Counter[Gram]],
    documents: Counter[Gram],
    corpus: int,
) -> float:
    """Mean over n of the clipped cosine, with the penalty on the length."""
    apart = hypothesis[1].total() - reference[1].total()
    cosines = []
    for said, wanted in zip(hypothesis, reference, strict=True):
        h, r = (_weighted(grams, documents, corpus) for grams in (said, wanted))
        dot = math.fsum(min(w, r[gram]) * r[gram] for gram, w in h.items() if gram in r)
        norms = math.hypot(*h.values()) * math.hypot(*r.values())
        cosines.append(dot / norms if norms else 0.0)
    return math.fsum(cosines) / len(cosines) * math.exp(-(apart**2) / (2 * CIDER_SIGMA**2))


def _weighted(grams: Counter[Gram], documents: Counter[Gram], corpus: int) -> Vector:
    return {g: n * math.log(corpus / max(1, documents[g])) for g, n in grams.items()}


# --- METEOR: the original, in Java ----------------------------------------------------------------


def meteor(hypotheses: Texts, references: References) -> float:
    """METEOR 1.5 (``-l en -norm``) on Stanford's tokens, both in Java through pycocoevalcap.

    Raises:
        MeteorUnavailable: without Java or pycocoevalcap, or if the program fails.
        ValueError: as `evaluate`.
    """
    _check(hypotheses, references)
    reason = meteor_missing()
    if reason:
        raise MeteorUnavailable(reason)
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    try:
        split = PTBTokenizer()
        said = split.tokenize({i: [{"caption": h}] for i, h in enumerate(hypotheses)})
        wanted = split.tokenize(
            {i: [{"caption": r} for r in texts] for i, texts in enumerate(references)}
        )
        score, _ = Meteor().compute_score(wanted, said)
    except Exception as error:  # its pipe to Java breaks in many ways
        raise MeteorUnavailable(f"its Java program failed: {error}") from error
    return float(score)


def meteor_missing() -> str:
    """What METEOR needs and this machine lacks, or an empty text."""
    if importlib.util.find_spec("pycocoevalcap") is None:
        return "pycocoevalcap is not installed"
    java = shutil.which("java")
    if java is None:
        return "there is no java"
    try:
        done = subprocess.run([java, "-version"], capture_output=True, timeout=_PROBE_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"java does not start: {error}"
    return "" if done.returncode == 0 else f"java -version ends with {done.returncode}"
