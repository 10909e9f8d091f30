"""What the server checks before it lets an update into the average. Nothing is repaired."""

import math
from collections.abc import Iterable, Mapping

import torch

from fedlora.core.errors import RejectedUpdate
from fedlora.core.types import (
    Adapter,
    Client,
    Factors,
    MaskedScale,
    Payload,
    Rebased,
    SparseDelta,
    Update,
    payload_tensors,
)
from fedlora.techniques.spp.scale import (
    factor,
    scale,
    spread,
)


def check_update(
    update: Update,
    expected: Client,
    start: Payload,
    max_norm: float,
    *,
    allow_shrink: bool = False,
    dense: bool = False,
    density: float = 1.0,
) -> None:
    """Refuse an update that is not what was asked for, is not finite or went too far.

    Args:
        update: what arrived.
        expected: the client as it was enlisted for the round.
        start: what it started the round from; the shapes come from here.
        max_norm: bound on the Frobenius norm of the change of the effective weights,
            ``||ΔW_update - ΔW_start||`` over all modules together; 0: no bound.
        allow_shrink: ranks may be smaller than expected (self-pruning was planned).
        dense: from a moved base a dense update is due, not factors (local exchanges were planned).
        density: of the server's pruned base, for the message to who has another.

    Raises:
        RejectedUpdate: naming the client, the first thing wrong, and what was expected.
    """
    reason = (
        _wrong_sender(update, expected)
        or _wrong_mask(update.payload, start, density)
        or _wrong_form(update, expected, start, allow_shrink, dense)
        or _wrong_dtype(update.payload)
        or not_finite(update.payload)
    )
    if not reason and max_norm:
        norm = change_norm(start, update.payload)
        if not norm <= max_norm:
            reason = f"the change of its weights has norm {norm:.6g}, above {max_norm:g}"
    if reason:
        raise RejectedUpdate(expected.id, reason)


def not_finite(payload: Payload) -> str:
    """The first tensor with NaN or infinite entries and how many it has; empty if there is none.

    A sum is finite only if every term is, so one sum usually settles a whole payload.
    """
    tensors = list(payload_tensors(payload))
    if tensors and math.isfinite(float(torch.cat([t.reshape(-1) for _, t in tensors]).sum())):
        return ""
    for name, t in tensors:
        bad = t.numel() - int(torch.isfinite(t).sum())
        if bad:
            return f"{name} has {bad} of {t.numel()} entries that are NaN or infinite"
    return ""


def change_norm(start: Payload, end: Payload) -> float:
    """``||ΔW_end - ΔW_start||_F`` over all modules, without building a dense ``ΔW``.

    With ``B = [s_1 B_1, -s_0 B_0]`` and ``A = [A_1; A_0]`` the squared norm of ``B A`` is the
    sum of ``(BᵀB) * (A Aᵀ)``: Gram matrices of the size of the ranks, in float64 as they cancel.
    Of scales it is the norm of the change of ``s F``: relative to the weights, which are not known.
    """
    if isinstance(start, MaskedScale) or isinstance(end, MaskedScale):
        if not (isinstance(start, MaskedScale) and isinstance(end, MaskedScale)):
            raise TypeError("a MaskedScale and another payload have no common change")
        return _scale_change(start, end)
    if isinstance(start, SparseDelta) or isinstance(end, SparseDelta):
        if not (isinstance(start, SparseDelta) and isinstance(end, SparseDelta)):
            raise TypeError("factors and a SparseDelta have no common change")
        squares = [
            float((end.values[p].double() - v.double()).square().sum())
            for p, v in start.values.items()
        ]
        return math.sqrt(math.fsum(squares))
    if isinstance(end, Rebased):
        return math.sqrt(math.fsum(_dense_squares(start, end)))
    start = start.factors if isinstance(start, Rebased) else start
    return math.sqrt(math.fsum(_squared_change(start[path], f) for path, f in end.items()))


def _dense_squares(start: Payload, end: Rebased) -> list[float]:
    if not isinstance(start, Rebased):
        raise TypeError("a dense update and factors over the base itself have no common change")
    squares = []
    for path, shift in end.shift.items():
        moved = shift.double() - start.shift[path].double()
        if path in start.factors:
            moved -= start.factors[path].delta().double()
        squares.append(float(moved.square().sum()))
    return squares


def _squared_change(start: Factors, end: Factors) -> float:
    b = torch.cat([end.b.double() * end.scale, start.b.double() * -start.scale], dim=1)
    a = torch.cat([end.a.double(), start.a.double()])
    return max(0.0, float(((b.T @ b) * (a @ a.T)).sum()))


def _scale_change(start: MaskedScale, end: MaskedScale) -> float:
    squares = []
    for path, beta in start.beta.items():
        alpha, change = start.alpha.get(path), end.change.get(path)
        if alpha is None:  # drawn by clients and left alone; its rows are no longer than 1
            alpha = torch.ones(start.blocks[path], 1)
        new = end.alpha.get(path, alpha).double()
        if change is not None:
            new = new + spread(change.double(), len(new))
        moved = factor(new, end.beta.get(path, beta).double()) - factor(
            alpha.double(), beta.double()
        )
        squares.append((scale(start, path) * float(moved.norm())) ** 2)
    return math.sqrt(math.fsum(squares))


def _wrong_sender(update: Update, expected: Client) -> str:
    n = update.num_examples
    if update.client.id != expected.id:
        return f"it says it comes from client {update.client.id}"
    if not isinstance(n, int) or isinstance(n, bool):
        return f"it claims {n!r} examples, which is no whole number"
    if not 0 < n <= expected.num_examples:
        return f"it claims {n} examples, the client has {expected.num_examples}"
    return ""


def _wrong_form(update: Update, expected: Client, start: Payload, shrink: bool, dense: bool) -> str:
    payload = update.payload
    if isinstance(start, Rebased) and dense:
        return _wrong_shift(payload, start)
    if isinstance(start, Rebased):
        start = start.factors
    if isinstance(payload, Rebased):
        return "it holds a dense update where factors or a SparseDelta were due"
    if isinstance(start, SparseDelta) and isinstance(payload, SparseDelta):
        return _wrong_delta(payload, start)
    if isinstance(start, MaskedScale) and isinstance(payload, MaskedScale):
        return _wrong_scale(payload, start)
    if not (isinstance(start, Mapping) and isinstance(payload, Mapping)):
        return f"it holds {_kind(payload)} where {_kind(start)} {_were(start)} due"
    wrong = _wrong_names(payload.keys(), start.keys())
    if wrong:
        return wrong
    for path, factors in payload.items():
        wrong = _wrong_factors(factors, start[path], expected.ranks[path], shrink)
        if wrong:
            return f"{path}: {wrong}"
    return _wrong_ranks(update, payload)


def _kind(payload: Payload) -> str:
    return "factors" if isinstance(payload, Mapping) else f"a {type(payload).__name__}"


def _were(payload: Payload) -> str:
    return "were" if isinstance(payload, Mapping) else "was"


def _wrong_names(found: Iterable[str], due: Iterable[str]) -> str:
    names, wanted = set(found), set(due)
    if names == wanted:
        return ""
    missing, extra = sorted(wanted - names), sorted(names - wanted)
    parts = [f"lacks {missing[0]}"] if missing else []
    parts += [f"has the unknown {extra[0]}"] if extra else []
    return (
        f"it {' and '.join(parts)} ({len(names)} modules, {len(missing)} missing, "
        f"{len(extra)} unknown)"
    )


def _wrong_factors(f: Factors, start: Factors, rank: int, shrink: bool) -> str:
    d_in, d_out = start.a.shape[1], start.b.shape[0]
    if f.a.shape[1] != d_in or f.b.shape[0] != d_out:
        return (
            f"A {tuple(f.a.shape)} and B {tuple(f.b.shape)} do not fit a layer "
            f"of {d_in} inputs and {d_out} outputs"
        )
    if f.rank != rank and not (shrink and 1 <= f.rank < rank):
        return f"rank {f.rank}, expected {'at most ' if shrink else ''}{rank}"
    if not math.isclose(f.alpha, start.alpha, rel_tol=1e-6):
        return f"alpha {f.alpha:g}, expected {start.alpha:g}"
    return ""


def _wrong_ranks(update: Update, adapter: Adapter) -> str:
    ranks = update.client.ranks
    for path, factors in adapter.items():
        if ranks.get(path) != factors.rank:
            return f"{path}: it states rank {ranks.get(path)} and sends rank {factors.rank}"
    return ""


def _wrong_delta(delta: SparseDelta, start: SparseDelta) -> str:
    if (delta.seed, delta.density) != (start.seed, start.density):
        return (
            f"its mask has seed {delta.seed} and density {delta.density:g}, "
            f"expected {start.seed} and {start.density:g}"
        )
    wrong = _wrong_names(delta.values.keys(), start.values.keys())
    if wrong:
        return wrong
    for path, values in delta.values.items():
        if values.shape != start.values[path].shape:
            return (
                f"{path}: values {tuple(values.shape)}, "
                f"the mask has {tuple(start.values[path].shape)}"
            )
    return ""


def _wrong_mask(payload: Payload, start: Payload, density: float) -> str:
    if not (isinstance(payload, MaskedScale) and isinstance(start, MaskedScale)):
        return ""
    if payload.mask == start.mask:
        return ""
    return (
        f"it was trained on a base pruned with the mask {payload.mask}, the server's is "
        f"{start.mask}: one mask for all, since weights averaged under two independent masks of "
        f"density {density:.4g} would have density {1 - (1 - density) ** 2:.4g}"
    )


def _wrong_scale(update: MaskedScale, start: MaskedScale) -> str:
    if update.merges:
        return (
            f"it holds {len(update.merges)} merges, which the server has and a client never sends"
        )
    for name in ("lora_alpha", "blocks", "tied", "trains", "seed"):
        got, due = getattr(update, name), getattr(start, name)
        if got != due:
            return f"{name} {got!r}, expected {due!r}"
    rows = start.alpha if start.trains != "beta" else {}
    shapes: dict[str, dict[str, tuple[int, ...]]] = {
        "alpha": {p: tuple(t.shape) for p, t in rows.items() if p not in start.tied},
        "beta": {p: tuple(t.shape) for p, t in start.beta.items() if start.trains != "alpha"},
        "change": {p: (k, rows[p].shape[1]) for p, k in start.tied.items() if p in rows},
    }
    for name, wanted in shapes.items():
        found = getattr(update, name)
        wrong = _wrong_names(found.keys(), wanted.keys())
        if wrong:
            return f"{name}: {wrong}"
        for path, shape in wanted.items():
            if tuple(found[path].shape) != shape:
                return f"{path}: {name} {tuple(found[path].shape)}, expected {shape}"
    return ""


def _wrong_shift(payload: Payload, start: Rebased) -> str:
    if not isinstance(payload, Rebased) or payload.factors:
        return "it holds factors where a dense update was due"
    wrong = _wrong_names(payload.shift.keys(), start.shift.keys())
    if wrong:
        return wrong
    for path, shift in payload.shift.items():
        if shift.shape != start.shift[path].shape:
            due = tuple(start.shift[path].shape)
            return f"{path}: an update {tuple(shift.shape)}, the layer is {due}"
    return ""


def _wrong_dtype(payload: Payload) -> str:
    for name, t in payload_tensors(payload):
        if not t.dtype.is_floating_point:
            return f"{name} is {t.dtype}, expected a floating-point type"
    return ""
