"""What clients say of their own data, held against what the server knows of it.

Every weight of an average comes from here or is checked here: the examples that an update counts
for (`fedlora.server.validation.check_update`), the tokens that a training loss is a mean over, the
examples and tokens that an evaluation is of. The server of a simulation holds the token store, so
it counts them itself. Where it does not (`fedlora.server.plain_flower`), what a client said first
binds it.
"""

import math
from collections import Counter
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from fedlora.core.checks import one_line
from fedlora.core.metric import Held, Metric
from fedlora.core.rates import LR_SUM, lr_sum
from fedlora.core.types import EvaluateJob, Evaluation, Failure, LocalPlan, TrainJob, Update
from fedlora.data.batches import num_steps, subset
from fedlora.data.store import TokenStore
from fedlora.evaluation.scorers import scorers_of
from fedlora.population.workload import examples_seen

REJECTED = "RejectedEvaluation"
"""The kind of a failure whose metrics were refused."""
EXCHANGED = ("exchanged_up", "exchanged_down", "exchanged_tokens")
"""What the server counts in a split round. A reply to one message exchanges nothing more."""


def checked(
    job: TrainJob | EvaluateJob, result: Update | Evaluation | Failure, store: TokenStore | None
) -> Update | Evaluation | Failure:
    """A client's own reply, or a failure if it contradicts what the client holds.

    Args:
        job: what was asked for.
        result: the reply; one of another kind than was asked for is returned as it is.
        store: what clients hold; None: it is not known, and nothing is compared with it.
    """
    if isinstance(job, TrainJob) and isinstance(result, Update):
        wrong, kind = wrong_training(job, result.metrics, store), "RejectedUpdate"
    elif isinstance(job, EvaluateJob) and isinstance(result, Evaluation) and store is not None:
        wrong, kind = wrong_evaluation(job, result.metrics, held_by(job, store)), REJECTED
    else:
        return result
    return Failure(result.client, kind, one_line(wrong, 1000)) if wrong else result


def held_by(job: EvaluateJob, store: TokenStore) -> Held:
    """What the job's client is evaluated on: the examples that an engine draws
    (`fedlora.evaluation.metrics.select_panel`)."""
    plan, who = job.plan, job.client.id
    held = store.sizes(who, plan.split)
    tokens, prompts, labels = held[
        subset(len(held), plan.max_examples, job.seed, "evaluate", who)
    ].T
    full = tokens - 1
    response = np.maximum(0, tokens - np.maximum(1, prompts))
    if store.labels:
        full, response = np.ones_like(tokens), np.ones_like(tokens)
    return Held(
        len(tokens),
        int(full.sum()),
        int(response.sum()),
        len(store.labels),
        Counter(labels.tolist()) if store.labels else {},
    )


def wrong_evaluation(job: EvaluateJob, metrics: Mapping[str, Metric], held: Held) -> str:
    """What is wrong with the metrics of an evaluation by what its client holds; empty: nothing."""
    scorers = scorers_of(job.plan, bool(held.classes))
    counts = {"examples": held.examples}
    if not held.classes:
        counts |= {"tokens_full": held.tokens_full, "tokens_response": held.tokens_response}
    for name, due in counts.items():
        if name not in metrics or metrics[name].value != due:
            said = f"{metrics[name].value:g}" if name in metrics else "no"
            return f"it counts {said} {name}, it has {due}"
    known = {*counts, "truncated_prompts"} if job.plan.generate else {*counts}
    cut = metrics.get("truncated_prompts")
    if cut is not None and not cut.value <= held.examples:
        return f"it counts {cut.value:g} truncated_prompts, it has {held.examples} examples"
    for scorer in scorers:
        if wrong := scorer.contradiction(metrics, held):
            return wrong
        known |= scorer.dues.keys()
    most, free = max(held.examples, held.tokens_full), any(not s.dues for s in scorers)
    for name in metrics.keys() - known:
        if not free:
            return f"its metric {name:.64} was not asked for"
        if not metrics[name].weight <= most:
            return f"its metric {name} is over {metrics[name].weight:g}, it has {most} tokens"
    return ""


def wrong_training(job: TrainJob, metrics: Mapping[str, float], store: TokenStore | None) -> str:
    """What is wrong with the metrics of an update by what its client holds; empty: nothing."""
    for name in EXCHANGED:
        if metrics.get(name, 0):
            return f"its metric {name} is counted by the server alone"
    if store is None:
        return ""
    supervised = store.supervised(job.client.id, "train", job.plan.loss)
    most = most_training(job.plan, supervised)
    probe = None if job.plan.choice is None else job.plan.choice.probe(job.plan)
    if probe is not None:  # its tokens are part of the client's
        most["tokens"] += most_training(probe, supervised)["tokens"]
    for name, bound in most.items():
        if not metrics.get(name, 0) <= bound:
            return f"its metric {name} is {metrics[name]:g}, at most {bound} are possible"
    if job.plan.term is None:
        return ""
    due, said = lr_sum(num_steps(most["examples"], job.plan), job.plan), metrics.get(LR_SUM)
    if said is None or not math.isclose(said, due, rel_tol=1e-9):
        told = "no" if said is None else f"{said:g} as"
        return f"it states {told} sum of its learning rates, which is {due:g}"
    return ""


def most_training(plan: LocalPlan, supervised: NDArray[np.int64]) -> dict[str, int]:
    """The largest numbers of examples and of tokens with a loss in a round's steps.

    Args:
        plan: what the client does.
        supervised: tokens with a loss of each of its training examples, ``[n]``.
    """
    usable = np.sort(supervised[supervised > 0])[::-1]
    if plan.max_examples:
        usable = usable[: plan.max_examples]
    n = len(usable)
    passes, rest = divmod(examples_seen(n, plan), n) if n else (0, 0)
    tokens = passes * int(usable.sum()) + int(usable[:rest].sum())
    if plan.privacy is not None:  # any step may draw all examples
        tokens = num_steps(n, plan) * int(usable.sum()) if n else 0
    return {"examples": n, "tokens": tokens}


def not_numbers(metrics: Mapping[str, Metric], diverged: frozenset[str]) -> str:
    """The metric of an evaluation that is no finite number though it is one for most clients;
    empty: there is none.

    Args:
        metrics: of one client.
        diverged: names of those that are no number for most clients: the model's fault.
    """
    for name, metric in metrics.items():
        if name not in diverged and not math.isfinite(metric.value):
            return f"its metric {name} is {metric.value!r}, that of most clients is a finite number"
    return ""
