r"""A client's reply as the change of what it was sent, so that rounding costs little of the change.

A number format rounds what it is given: of ``A`` near 0.04 and a change near 0.001 it loses forty
times more of the change if ``A`` is sent than if the change is. Both ends have the start, so

    client    x = A - A⁰ + e       c = C(x)       e ← x - c        A⁰: as it received it
    server    A = A⁰ + c                                           A⁰: its own, never rounded

``e`` is what earlier rounding lost (error feedback, Seide et al., Interspeech 2014; Karimireddy et
al., arXiv:1901.09847): with it ``Σ c + e = Σ (A - A⁰)``, and no direction is lost for good. The
server adds to its own start: the rounding on the way down is no part of what the client learnt.

Tensors go by name, whatever payload they belong to. Where a start has no tensor of a name there is
nothing to subtract. A client that pruned its ranks sends the leading block of what it was sent.
"""

from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor

Named: TypeAlias = Mapping[str, Tensor]


def change(sent: Named, start: Named) -> dict[str, Tensor]:
    """``x - x⁰`` of every tensor that the start has too, at least float32; others as they are."""
    return {
        name: t if (s := _reference(t, start.get(name))) is None else _wide(t) - s
        for name, t in sent.items()
    }


def restored(changed: Named, start: Named) -> dict[str, Tensor]:
    """The inverse of `change`, up to rounding."""
    return {
        name: t if (s := _reference(t, start.get(name))) is None else _wide(t) + s
        for name, t in changed.items()
    }


def corrected(changes: Named, before: Named) -> dict[str, Tensor]:
    """``x + e``: changes with what earlier rounding lost of them."""
    return {
        name: t if (e := _reference(t, before.get(name))) is None else _wide(t) + e
        for name, t in changes.items()
    }


def residual(before: Named, changes: Named, sent: Named) -> dict[str, Tensor]:
    """``e ← e + x - c``: what rounding has lost so far, for the next round.

    Args:
        before: ``e``; what is not in ``changes`` is kept for a round in which it is.
        changes: ``x``, without ``e``.
        sent: ``c``, as the receiver reads it.
    """
    wanted = corrected(changes, before)
    kept = {name: e for name, e in before.items() if name not in changes}
    return kept | {name: _wide(x) - _wide(sent[name]) for name, x in wanted.items()}


def _reference(t: Tensor, start: Tensor | None) -> Tensor | None:
    """The leading block of a start that has the shape of ``t``; ``None``: it has none."""
    if start is None or start.dim() != t.dim():
        return None
    if any(n > most for n, most in zip(t.shape, start.shape, strict=True)):
        return None
    return _wide(start[tuple(slice(n) for n in t.shape)])


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))
