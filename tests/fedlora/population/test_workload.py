"""Predicted work: exact where examples are alike, and what messages are dealt by."""

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.core.types import EvaluatePlan, LocalPlan
from fedlora.data.batches import step_indices
from fedlora.population.workload import (
    evaluation_tokens,
    examples_seen,
    training_tokens,
)

laws = settings(derandomize=True, deadline=None, max_examples=60)
PLANS = st.builds(
    LocalPlan,
    epochs=st.integers(1, 4),
    steps=st.integers(0, 30),
    batch_size=st.integers(1, 9),
    max_examples=st.integers(0, 30),
)


@dataclass(frozen=True)
class Held:
    examples: int
    tokens: int
    id: int = 0
    category: str = ""

    @property
    def num_train(self) -> int:
        return self.examples

    def holds(self, split: str) -> tuple[int, int]:
        return self.examples, self.tokens

    def trains(self, loss: str) -> int:
        return self.examples


@laws
@given(st.integers(1, 40), PLANS)
def test_the_examples_seen_are_those_of_all_batches(n, plan):
    batches = step_indices(n, plan, seed=0, round=0, client=0)
    assert examples_seen(n, plan) == sum(len(batch) for batch in batches)


@laws
@given(st.integers(0, 40), st.integers(1, 99), PLANS)
def test_examples_of_one_length_are_predicted_exactly(n, length, plan):
    drawn = min(n, plan.max_examples) if plan.max_examples else n
    assert training_tokens(Held(n, n * length), plan) == examples_seen(drawn, plan) * length


@laws
@given(st.integers(0, 40), st.integers(1, 99), st.integers(0, 30), st.booleans())
def test_an_evaluation_reads_what_is_there_and_writes_what_it_may(n, length, limit, generate):
    plan = EvaluatePlan(max_examples=limit, generate=generate, max_new_tokens=5)
    drawn = min(n, limit) if limit else n
    wanted = drawn * (length + 5 * generate)
    assert evaluation_tokens(Held(n, n * length), plan) == wanted


@laws
@given(st.integers(1, 40), st.integers(1, 99), PLANS)
def test_longer_examples_are_more_work(n, length, plan):
    short, long = (training_tokens(Held(n, n * t), plan) for t in (length, length + 1))
    assert short < long


def test_whoever_holds_nothing_has_no_work():
    assert training_tokens(Held(0, 0), LocalPlan(steps=5)) == 0
    assert evaluation_tokens(Held(0, 0), EvaluatePlan()) == 0
