"""Payloads as their change from a start: what attacks on updates are made of."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fedlora.algebra.linalg import factors_of_rank, svd_of_product
from fedlora.core.payload import Payload, plain_factors
from fedlora.core.types import Adapter, Factors, LocalPlan, Update
from fedlora.wire.change import change, restored


def changes(start: Payload, sent: Payload) -> dict[str, Tensor]:
    """The change of every tensor, in at least float32; of a tensor that did not move exact zero."""
    return change(dict(sent.tensors()), dict(start.tensors()))


def with_changes(start: Payload, sent: Payload, moved: Mapping[str, Tensor]) -> Payload:
    """What is sent with other changes; its dtypes stay."""
    whole = restored(moved, dict(start.tensors()))
    tensors = {name: whole[name].to(t.dtype) for name, t in sent.tensors()}
    return type(sent).from_header(sent.header(), tensors)


def length(moved: Mapping[str, Tensor]) -> float:
    """The norm of all changes together."""
    return float(torch.cat([t.double().reshape(-1) for t in moved.values()]).norm())


def free_factors(payload: Payload, plan: LocalPlan) -> Adapter | None:
    """The factors of a payload that is nothing else, if both of each pair are trained; None: its
    client may not turn them."""
    if not (plan.train_a and plan.train_b) or payload.head() is not None or payload.indices:
        return None
    return plain_factors(payload)


def with_factors(sent: Payload, factors: Adapter) -> Payload:
    """What is sent with other factors of the same dtypes."""
    before = plain_factors(sent)
    assert before is not None
    cast = {
        path: Factors(f.a.to(before[path].a.dtype), f.b.to(before[path].b.dtype), f.alpha)
        for path, f in factors.items()
    }
    return sent.trained(cast)


def scaled_products(start: Adapter, sent: Adapter, strength: float) -> dict[str, Factors]:
    """The factors of a client's rank whose product has moved nearly ``strength`` times as far.

    ``T_r(B⁰A⁰ + λ (BA - B⁰A⁰))``: exact where ``B⁰`` is zero or the change has few directions.
    """
    found = {}
    for path, f in sent.items():
        before = start[path]
        b = torch.cat([strength * f.b.double(), (1 - strength) * before.b.double()], dim=1)
        a = torch.cat([f.a.double(), before.a.double()])  # [2r, n]
        whole = svd_of_product(f.scale * b, a)
        found[path] = factors_of_rank(whole, f.rank, f.alpha, "b", f.a)
    return found


def scaled_change(update: Update, start: Payload, strength: float) -> Update:
    """An update whose tensors have moved ``strength`` times as far."""
    moved = {name: strength * t for name, t in changes(start, update.payload).items()}
    return replace(update, payload=with_changes(start, update.payload, moved))
