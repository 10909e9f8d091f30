"""Checks of an update before it is averaged. Nothing is repaired."""

import math

import torch

from fedlora.core.errors import RejectedUpdate
from fedlora.core.payload import Payload, mismatch
from fedlora.core.types import Client, Expected, Update


def check_update(update: Update, expected: Expected, max_norm: float) -> None:
    """Refuse an update that does not fit its job, is not finite or changes the weights too much.

    Args:
        update: the received update.
        expected: the job that it must fit.
        max_norm: bound on the Frobenius norm of the change of the effective weights,
            ``||ΔW_update - ΔW_start||`` over all modules together; 0: no bound. A payload that
            scales its weights (SPP) measures the change of the scale.

    Raises:
        RejectedUpdate: naming the client, the first thing wrong, and what was expected.
    """
    payload = update.payload
    reason = (
        _wrong_sender(update, expected.client)
        or _wrong_type(payload, expected)
        or payload.check(update.client, expected)
        or _wrong_dtype(payload)
        or not_finite(payload)
        or _wrong_metrics(update)
    )
    if not reason and max_norm:
        norm = payload.change_norm(expected.start)
        if not norm <= max_norm:
            reason = f"the change of its weights has norm {norm:.6g}, above {max_norm:g}"
    if reason:
        raise RejectedUpdate(expected.client.id, reason)


def not_finite(payload: Payload) -> str:
    """The first tensor with NaN or infinite entries and how many it has; empty if there is none.

    A sum is finite only if every term is, so one sum usually settles a whole payload.
    """
    tensors = list(payload.tensors())
    if tensors and math.isfinite(float(torch.cat([t.reshape(-1) for _, t in tensors]).sum())):
        return ""
    for name, t in tensors:
        bad = t.numel() - int(torch.isfinite(t).sum())
        if bad:
            return f"{name} has {bad} of {t.numel()} entries that are NaN or infinite"
    return ""


def _wrong_sender(update: Update, expected: Client) -> str:
    n = update.num_examples
    if update.client.id != expected.id:
        return f"it says it comes from client {update.client.id}"
    if not isinstance(n, int) or isinstance(n, bool):
        return f"it claims {n!r} examples, which is no whole number"
    if not 0 < n <= expected.num_examples:
        return f"it claims {n} examples, the client has {expected.num_examples}"
    return ""


def _wrong_type(payload: Payload, expected: Expected) -> str:
    """Compare the class of a payload with the class that the technique sends."""
    due = expected.plan.technique.sends(expected.start)
    return "" if type(payload) is due else mismatch(type(payload), due)


def _wrong_metrics(update: Update) -> str:
    """Find the first metric that is not a finite number: records and byte counts sum metrics."""
    for name, value in update.metrics.items():
        if not isinstance(value, int | float) or not math.isfinite(value):
            return f"its metric {name} is {value!r}, expected a finite number"
    return ""


def _wrong_dtype(payload: Payload) -> str:
    for name, t in payload.tensors():
        if not t.dtype.is_floating_point:
            return f"{name} is {t.dtype}, expected a floating-point type"
    return ""
