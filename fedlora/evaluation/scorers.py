"""The scores that an evaluation reports, each a class that a line of YAML names.

    Likelihood          loss_full, loss_response   negative log-likelihood per token: after BOS; of
                                                   the response
                        perplexity                 exp(loss_response)
                        accuracy                   fraction of response tokens that are the most
                                                   likely one
    Rouge               rouge_l, rouge_l_unicode   ROUGE-L F1 of greedy generation (`rouge`)
    ExactMatch          exact_match                fraction of generations that equal the reference
    TeacherForcedRouge  rouge_l_teacher_forced     ROUGE-L of the argmax of every next token, given
                                                   the true ones before
    Classification      loss, accuracy, macro_f1   of predicted labels (``model.task``)

The last is what the FlexLoRA code reports. Nine tenths of its tokens are prompt, so it tells how
predictable the instructions are; it is never called ROUGE-L here.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch

from fedlora.core.confusion import confusion
from fedlora.core.metric import (
    EXP_MEAN,
    HIGHEST,
    LOWEST,
    Due,
    Held,
    Metric,
    Outputs,
    Scorer,
    macro_f1,
)
from fedlora.core.types import EvaluatePlan
from fedlora.evaluation.rouge import exact_match, rouge_l


@dataclass(frozen=True)
class Likelihood(Scorer):
    """Losses, perplexity and accuracy from the true tokens. Weighted by the tokens they are over.

    A metric of response tokens is left out where no response is left after truncation.
    """

    dues: ClassVar[Mapping[str, Due]] = MappingProxyType(
        {
            "loss_full": Due("tokens_full", better=LOWEST),
            "loss_response": Due("tokens_response", better=LOWEST),
            "perplexity": Due("tokens_response", better=LOWEST),
            "accuracy": Due("tokens_response", highest=1, better=HIGHEST),
        }
    )

    def score(self, outputs: Outputs) -> Mapping[str, Metric]:
        full = response = 0.0
        hits = 0
        rows = zip(outputs.tokens, outputs.response_at, outputs.nll, outputs.best, strict=True)
        for tokens, at, nll, best in rows:
            true = torch.from_numpy(tokens.astype("int64"))
            full += float(nll.sum())
            response += float(nll[at:].sum())
            hits += int((best[at:] == true[at:]).sum())
        metrics: dict[str, Metric] = {}
        if (n := outputs.tokens_full) > 0:
            metrics["loss_full"] = Metric(full / n, n)
        if (n := outputs.tokens_response) > 0:
            metrics["loss_response"] = Metric(response / n, n)
            metrics["perplexity"] = Metric(response / n, n, EXP_MEAN)
            metrics["accuracy"] = Metric(hits / n, n)
        return metrics


@dataclass(frozen=True)
class Rouge(Scorer):
    """ROUGE-L F1 of the generated texts, in ``[0, 1]``; its Unicode variant beside it."""

    needs_texts: ClassVar[bool] = True
    dues: ClassVar[Mapping[str, Due]] = MappingProxyType(
        {name: Due(highest=1, better=HIGHEST) for name in ("rouge_l", "rouge_l_unicode")}
    )

    def score(self, outputs: Outputs) -> Mapping[str, Metric]:
        plain = texts_mean(outputs, rouge_l)
        folded = texts_mean(outputs, lambda r, t: rouge_l(r, t, unicode=True))
        return {
            "rouge_l": Metric(plain, outputs.examples, interval=True),
            "rouge_l_unicode": Metric(folded, outputs.examples),
        }


@dataclass(frozen=True)
class ExactMatch(Scorer):
    """Fraction of generated texts that equal the reference but for white space at their ends."""

    needs_texts: ClassVar[bool] = True
    dues: ClassVar[Mapping[str, Due]] = MappingProxyType(
        {"exact_match": Due(highest=1, better=HIGHEST)}
    )

    def score(self, outputs: Outputs) -> Mapping[str, Metric]:
        return {"exact_match": Metric(texts_mean(outputs, exact_match), outputs.examples)}


@dataclass(frozen=True)
class TeacherForcedRouge(Scorer):
    """ROUGE-L of argmax tokens over prompt and response, as the FlexLoRA code computes it.

    It measures how predictable the prompt is, not generation: see docs/fidelity.md.
    """

    dues: ClassVar[Mapping[str, Due]] = MappingProxyType(
        {"rouge_l_teacher_forced": Due(highest=1, better=HIGHEST)}
    )

    def score(self, outputs: Outputs) -> Mapping[str, Metric]:
        decode = outputs.decode
        scores = [
            rouge_l(decode(true), decode(best.numpy()))
            for true, best in zip(outputs.tokens, outputs.best, strict=True)
        ]
        mean = math.fsum(scores) / len(scores)
        return {"rouge_l_teacher_forced": Metric(mean, outputs.examples)}


@dataclass(frozen=True)
class Classification(Scorer):
    """Accuracy, macro F1 and mean negative log-likelihood of predicted labels.

    Macro F1 is the mean F1 of the labels that an evaluated example has
    (`fedlora.core.confusion.Confusion.macro_f1`).
    """

    reads_labels: ClassVar[bool] = True
    dues: ClassVar[Mapping[str, Due]] = MappingProxyType(
        {
            "loss": Due(better=LOWEST),
            "accuracy": Due(highest=1, better=HIGHEST),
            "macro_f1": Due(highest=1, better=HIGHEST),
        }
    )

    def score(self, outputs: Outputs) -> Mapping[str, Metric]:
        true = [int(label[0]) for label in outputs.tokens]
        table = confusion(true, [int(best[0]) for best in outputs.best], len(outputs.labels))
        n, loss = outputs.examples, math.fsum(float(nll) for nll in outputs.nll)
        return {
            "loss": Metric(loss / n, n, worst=HIGHEST),
            "accuracy": Metric(table.accuracy, n, interval=True, worst=LOWEST),
            "macro_f1": macro_f1(table),
        }

    def contradiction(self, metrics: Mapping[str, Metric], held: Held) -> str:
        """As every scorer's; the counts must also be of the client's labels, and give its accuracy
        and macro F1."""
        wrong = super().contradiction(metrics, held)
        table = None if wrong else metrics["macro_f1"].counts
        if table is None:
            return wrong or "its metric macro_f1 has no counts"
        if table.classes != held.classes:
            return f"its counts are of {table.classes} classes, the data has {held.classes}"
        counted = {row.label: row.true for row in table.by_class}
        for label in sorted(counted.keys() | held.labels.keys()):
            said, has = counted.get(label, 0), held.labels.get(label, 0)
            if said != has:
                return f"its counts have {said} examples of class {label}, it has {has}"
        accuracy = metrics["accuracy"].value
        if accuracy != table.accuracy:
            return f"its metric accuracy is {accuracy!r}, its counts give {table.accuracy!r}"
        return ""


DEFAULT: tuple[Scorer, ...] = (Likelihood(), Rouge(), ExactMatch(), Classification())
"""The scorers of conf/evaluate/metrics/default.yaml."""


def scorers_of(plan: EvaluatePlan, classifies: bool) -> list[Scorer]:
    """What a plan measures, without what it could not: scores of texts need generation, scores of
    labels a classifier."""
    named = DEFAULT if plan.metrics is None else plan.metrics
    fitting = [s for s in named if s.reads_labels == classifies]
    return [s for s in fitting if plan.generate or not s.needs_texts]


def texts_mean(outputs: Outputs, score: Callable[[str, str], float]) -> float:
    """The mean over examples of ``score(reference, generated text)``."""
    pairs = zip(outputs.references, outputs.generated, strict=True)
    return math.fsum(score(r, t) for r, t in pairs) / outputs.examples
