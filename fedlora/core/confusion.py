"""Counts of examples by true and predicted class, which can be added up over clients.

A score such as macro F1 is no mean over examples: that of many clients together follows from their
summed counts, not from the scores of each.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

Counts = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class ClassScore:
    """How one class is predicted."""

    label: int
    true: int
    """Examples of the class."""
    hits: int
    """Those of them that are predicted right."""
    predicted: int
    """Examples of any class that are predicted as this one."""
    mistaken_for: Mapping[int, int]
    """Other class -> examples of this one that are predicted as it; the most frequent first."""

    @property
    def recall(self) -> float:
        """``hits / true``; 0 without examples."""
        return self.hits / self.true if self.true else 0.0

    @property
    def precision(self) -> float:
        """``hits / predicted``; 0 where nothing is predicted as this class."""
        return self.hits / self.predicted if self.predicted else 0.0

    @property
    def f1(self) -> float:
        """The harmonic mean of both, ``2 hits / (true + predicted)``."""
        return 2 * self.hits / (self.true + self.predicted) if self.hits else 0.0


@dataclass(frozen=True)
class Confusion:
    """A sparse table of counts.

    Raises:
        ValueError: for counts that are no such table.
    """

    classes: int
    """How many there are; classes are numbered from 0."""
    counts: Counts
    """``(true class, predicted class, examples)``, ascending, without pairs that do not occur."""

    def __post_init__(self) -> None:
        for entry in (self.classes, *itertools.chain.from_iterable(self.counts)):
            if type(entry) is not int:
                raise ValueError(f"a table of classes holds {entry!r:.40}, which is no integer")
        for true, predicted, examples in self.counts:
            if not (0 <= true < self.classes and 0 <= predicted < self.classes):
                raise ValueError(f"class {max(true, predicted)} is none of {self.classes} classes")
            if examples < 1:
                raise ValueError(f"{examples} examples of class {true} predicted as {predicted}")
        pairs = [entry[:2] for entry in self.counts]
        if any(a >= b for a, b in itertools.pairwise(pairs)):
            raise ValueError("a table of classes must list each pair once, in ascending order")

    @property
    def examples(self) -> int:
        """How many are counted."""
        return sum(n for _, _, n in self.counts)

    @property
    def accuracy(self) -> float:
        """Fraction of all examples that are predicted right; 0 without examples."""
        return sum(n for t, p, n in self.counts if t == p) / max(1, self.examples)

    @property
    def macro_f1(self) -> float:
        """The mean F1 of the classes that have an example; 0 if none has.

        A class that is only predicted lowers the recall of others and has no score of its own:
        scikit-learn's ``f1_score(true, predicted, average="macro", labels=np.unique(true))``.
        """
        scores = [score.f1 for score in self.by_class]
        return sum(scores) / max(1, len(scores))

    @cached_property
    def by_class(self) -> list[ClassScore]:
        """The score of every class that has an example, by number."""
        predicted = Counter[int]()
        rows: dict[int, Counter[int]] = {}
        for true, guess, n in self.counts:
            predicted[guess] += n
            rows.setdefault(true, Counter())[guess] += n
        return [
            ClassScore(
                true,
                row.total(),
                row[true],
                predicted[true],
                {guess: n for guess, n in row.most_common() if guess != true},
            )
            for true, row in rows.items()
        ]


def confusion(true: Sequence[int], predicted: Sequence[int], classes: int) -> Confusion:
    """Count examples by their true and their predicted class."""
    found = Counter(zip(map(int, true), map(int, predicted), strict=True))
    return Confusion(classes, tuple((*pair, n) for pair, n in sorted(found.items())))


def added(tables: Iterable[Confusion]) -> Confusion:
    """The sum of tables, in any order; at least one, all of the same classes."""
    total, classes = Counter[tuple[int, int]](), set[int]()
    for table in tables:
        classes.add(table.classes)
        total.update({(t, p): n for t, p, n in table.counts})
    (size,) = classes
    return Confusion(size, tuple((*pair, n) for pair, n in sorted(total.items())))
