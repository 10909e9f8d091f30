"""ROUGE-L F1 of one prediction against one reference.

The usual score (``rouge-score``, Lin 2004) lower-cases and splits on everything outside
``[a-z0-9]``. A text in another script then has no tokens and always scores zero, so a Unicode
variant stands beside it. Scores are averaged plainly, never by bootstrap.
"""

import functools
import re
import unicodedata
from typing import Any

_IDEOGRAPHS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
_WORD = re.compile(rf"[{_IDEOGRAPHS}]|[^{_IDEOGRAPHS}]+")


class UnicodeWords:
    """Tokenizer for `RougeScorer`: maximal runs of letters, marks and digits, case-folded.

    Scripts written without spaces (Han, Hiragana, Katakana) give one token per character. A
    combining mark belongs to its word, without which Devanagari would fall apart into consonants.
    """

    def tokenize(self, text: str) -> list[str]:
        """The tokens of a text, in order."""
        folded = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())
        spaced = "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in folded)
        return [token for run in spaced.split() for token in _WORD.findall(run)]


@functools.cache
def _scorer(unicode: bool) -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # half a second, most of it NLTK

    return RougeScorer(["rougeL"], tokenizer=UnicodeWords() if unicode else None)


def rouge_l(reference: str, prediction: str, *, unicode: bool = False) -> float:
    """F1 of the longest common subsequence of tokens, in ``[0, 1]``.

    Two blank texts agree (1), a blank and a non-blank one do not (0). A text that is not blank
    but has no tokens scores 0, as in ``rouge-score``.
    """
    if not reference.strip() and not prediction.strip():
        return 1.0
    return float(_scorer(unicode).score(reference, prediction)["rougeL"].fmeasure)


def exact_match(reference: str, prediction: str) -> float:
    """1 if the texts agree but for white space at their ends, else 0."""
    return float(reference.strip() == prediction.strip())
