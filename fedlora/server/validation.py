"""Checks of a reply before anything is made of it. Nothing is repaired.

What one client sends can cost that client its round and no more: each check names the first thing
wrong, and an error within a check is the fault of the reply. How far an update may move the model
compared with the others of its round is the subject of `fedlora.server.norm_bound`.
"""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fedlora.core.checks import is_real
from fedlora.core.confusion import Confusion
from fedlora.core.errors import RejectedUpdate
from fedlora.core.metric import DERIVED, TIER, TOTAL, TRAINED, UNTRAINED, Metric
from fedlora.core.payload import Payload, mismatch
from fedlora.core.rates import LR_SUM
from fedlora.core.types import Client, Evaluation, Expected, Update

LARGEST = 1e6
"""No entry of an update and no norm of a change may be larger: the weights of a pretrained model
are below 100, and all of them together have a norm of some thousands. Products, squares and sums of
such numbers are finite in float32."""
MOST_METRICS, LONGEST_NAME = 64, 64
LARGEST_METRIC = 1e15
"""Whole numbers up to here are exact, and sums over any population are finite."""
COUNTS = frozenset(
    (
        *(
            "examples",
            "tokens",
            "steps",
            LR_SUM,
            "seconds",
            "cpu_seconds",
            "grad_norm",
            "delta_norm",
        ),
        *("fused", "dropped_steps", "step_tokens", "client_flops", "client_memory"),
        *("exchanged_up", "exchanged_down", "exchanged_tokens"),
        *("probe_steps", "probe_tokens", "probe_seconds"),
    )
)
"""Training metrics that cannot be negative."""
TRAIN_FIELDS = frozenset(
    (
        *("kind", "round", "client", "tier", "rank", "bytes_down", "bytes_up", "change_norm"),
        *("failure", "message"),
    )
)
"""Fields of a client's record that the server writes: no metric may have such a name."""
EVALUATION_FIELDS = frozenset(
    ["kind", "round", "rounds", "group", "adapter", "failed", "clients", "round/evaluate_seconds"]
)
"""The same for the record of an evaluation."""
MOST_COUNTS = 100_000
"""Entries of all tables of counts of one evaluation: an example makes at most one in each."""


def check_update(update: Update, expected: Expected, max_norm: float) -> None:
    """Refuse an update that does not fit its job, is not finite or changes the weights too much.

    Args:
        update: the received update.
        expected: the job that it must fit.
        max_norm: bound on the Frobenius norm of the change of the effective weights,
            ``||ΔW_update - ΔW_start||`` over all modules together; 0: no bound but `LARGEST`. A
            payload that scales its weights (SPP) measures the change of the scale.

    Raises:
        RejectedUpdate: naming the client, the first thing wrong, and what was expected.
    """
    try:
        reason = _wrong_update(update, expected, max_norm)
    except Exception as error:  # a check met something that no check had thought of
        reason = f"it cannot be checked: {type(error).__name__}: {error}"
    if reason:
        raise RejectedUpdate(expected.client.id, reason)


def _wrong_update(update: Update, expected: Expected, max_norm: float) -> str:
    payload = update.payload
    reason = (
        _wrong_sender(update, expected.client)
        or _wrong_type(payload, expected)
        or payload.check(update.client, expected)
        or _wrong_ranks(update.client, expected.client)
        or _wrong_dtype(payload)
        or absurd(payload.tensors())
        or wrong_metrics(update.metrics)
    )
    if reason:
        return reason
    norm, bound = payload.change_norm(expected.start), max_norm or LARGEST
    if not norm <= bound:
        return f"the change of its weights has norm {norm:.6g}, above {bound:g}"
    return ""


def check_evaluation(evaluation: Evaluation) -> str:
    """What is wrong with the metrics of an evaluation; empty: nothing.

    A mean may be NaN or infinite, as for a model that has diverged, and is left out of summaries.
    Counts and weights are summed: they are finite and not negative.
    """
    wrong = _wrong_names(evaluation.metrics, EVALUATION_FIELDS)
    for name, metric in evaluation.metrics.items():
        wrong = wrong or _wrong_metric(name, metric)
    held = sum(len(m.counts.counts) for m in evaluation.metrics.values() if m.counts)
    if held > MOST_COUNTS:
        wrong = wrong or f"it has {held} counts of classes, at most {MOST_COUNTS} are recorded"
    return wrong


def _wrong_metric(name: str, metric: Metric) -> str:
    if name.endswith(DERIVED):
        return f"its metric {name} has an ending that summaries use ({', '.join(DERIVED)})"
    for start in (TIER, TRAINED, UNTRAINED):
        if name.startswith(start):
            return f"its metric {name} begins with {start}, as those of groups do in summaries"
    if metric.over_clients == TOTAL and not is_count(metric.value):
        return (
            f"its metric {name} counts {metric.value!r}, expected a whole number from 0 to "
            f"{LARGEST_METRIC:g}"
        )
    if not 0 <= metric.weight <= LARGEST_METRIC:
        return f"its metric {name} has weight {metric.weight!r}, expected 0 to {LARGEST_METRIC:g}"
    if math.isfinite(metric.value) and abs(metric.value) > LARGEST_METRIC:
        return f"its metric {name} is {metric.value!r}, expected at most {LARGEST_METRIC:g}"
    return _wrong_counts(name, metric, metric.counts) if metric.counts else ""


def _wrong_counts(name: str, metric: Metric, counts: Confusion) -> str:
    """What is wrong with a table that a metric was computed from."""
    if counts.examples != metric.weight:
        return f"its metric {name} has weight {metric.weight!r} and counts {counts.examples}"
    if counts.macro_f1 != metric.value:
        return f"its metric {name} is {metric.value!r}, its counts give {counts.macro_f1!r}"
    return ""


def is_count(value: float) -> bool:
    """Whether it is a whole number that can be summed over any population."""
    return 0 <= value <= LARGEST_METRIC and value == int(value)


def not_finite(payload: Payload) -> str:
    """The first tensor with NaN or infinite entries and how many it has; empty if there is none."""
    return absurd(payload.tensors(), largest=math.inf)


def absurd(tensors: Iterable[tuple[str, Tensor]], largest: float = LARGEST) -> str:
    """The first tensor with entries that are NaN, infinite or beyond any use; empty: there is none.

    Args:
        tensors: by name; integers are not looked at.
        largest: absolute value that an entry may have.
    """
    named = [(name, t) for name, t in tensors if t.is_floating_point() and t.numel()]
    if not named:
        return ""
    # The largest entry is NaN if any is: one maximum for all usually settles it.
    tops = torch.stack([t.detach().abs().amax().to("cpu", torch.float64) for _, t in named])
    if bool((tops <= largest).all()) and bool(torch.isfinite(tops).all()):
        return ""
    for name, t in named:
        bad = t.numel() - int(torch.isfinite(t).sum())
        if bad:
            return f"{name} has {bad} of {t.numel()} entries that are NaN or infinite"
        top = float(t.abs().amax())
        if top > largest:
            return f"{name} has an entry of size {top:.3g}, above {largest:g}"
    return ""


def wrong_metrics(metrics: Mapping[str, float], reserved: frozenset[str] = TRAIN_FIELDS) -> str:
    """What is wrong with a client's training metrics; empty: nothing. Records and byte counts sum
    metrics, and the server's own fields of a record are not theirs to write.

    Args:
        metrics: by name.
        reserved: names that no metric may have.
    """
    wrong = _wrong_names(metrics, reserved)
    if wrong:
        return wrong
    for name, value in metrics.items():
        if not is_real(value) or not math.isfinite(value):
            return f"its metric {name} is {value!r:.80}, expected a finite number"
        lowest = 0 if name in COUNTS else -LARGEST_METRIC
        if not lowest <= value <= LARGEST_METRIC:
            return f"its metric {name} is {value!r}, expected {lowest:g} to {LARGEST_METRIC:g}"
    return ""


def _wrong_names(metrics: Mapping[str, object], reserved: frozenset[str]) -> str:
    if len(metrics) > MOST_METRICS:
        return f"it has {len(metrics)} metrics, at most {MOST_METRICS} are recorded"
    for name in metrics:
        if not (isinstance(name, str) and 0 < len(name) <= LONGEST_NAME and name.isprintable()):
            return (
                f"its metric {name!r:.80} has a name that is not 1 to {LONGEST_NAME} printable "
                "characters"
            )
        if name in reserved:
            return f"its metric {name} has the name of a field that the server writes"
    return ""


def _wrong_sender(update: Update, expected: Client) -> str:
    n = update.num_examples
    if update.client.id != expected.id:
        return f"it says it comes from client {update.client.id}"
    if not isinstance(n, int) or isinstance(n, bool):
        return f"it claims {n!r:.80} examples, which is no whole number"
    if n != expected.num_examples:
        return f"it claims {n} examples, the client has {expected.num_examples}"
    return ""


def _wrong_ranks(sender: Client, expected: Client) -> str:
    """States hold ranks by position."""
    if list(sender.ranks) != list(expected.ranks):
        return "it states ranks of other modules, or in another order"
    return ""


def _wrong_type(payload: Payload, expected: Expected) -> str:
    """Compare the class of a payload with the class that the technique sends."""
    due = expected.plan.technique.sends(expected.start)
    return "" if type(payload) is due else mismatch(type(payload), due)


def _wrong_dtype(payload: Payload) -> str:
    for name, t in payload.tensors():
        if not t.dtype.is_floating_point:
            return f"{name} is {t.dtype}, expected a floating-point type"
    return ""
