"""How much work a client will have, in tokens: predicted from what it holds and what it shall do.

Messages are dealt by these figures, so they are cheap and only nearly right: every example of a
client counts as long as its mean. Results never depend on them.
"""

import math

from fedlora.core.types import EvaluatePlan, LocalPlan
from fedlora.data.batches import num_steps
from fedlora.population.sampling import Shard


def examples_seen(n: int, plan: LocalPlan) -> int:
    """Examples that all optimizer steps of a round process, of ``n`` usable ones.

    The sum of the batches of `fedlora.data.batches.step_indices`.
    """
    if not n:
        return 0
    epochs, steps = divmod(num_steps(n, plan), math.ceil(n / plan.batch_size))
    return epochs * n + steps * plan.batch_size


def training_tokens(shard: Shard, plan: LocalPlan) -> float:
    """Tokens that a client trains on in a round, repetitions counted."""
    examples, tokens = shard.holds("train")
    return examples_seen(_count_used(examples, plan), plan) * _mean(examples, tokens)


def evaluation_tokens(shard: Shard, plan: EvaluatePlan) -> float:
    """Tokens that a client reads and, if it generates, may write."""
    examples, tokens = shard.holds(plan.split)
    written = plan.max_new_tokens if plan.generate else 0
    return _count_used(examples, plan) * (_mean(examples, tokens) + written)


def _count_used(examples: int, plan: LocalPlan | EvaluatePlan) -> int:
    return min(examples, plan.max_examples) if plan.max_examples else examples


def _mean(examples: int, tokens: int) -> float:
    return tokens / examples if examples else 0.0
