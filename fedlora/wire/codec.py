"""Payloads and plans as what travels: a flat array with a header, and JSON.

A payload of any class is one flat array and a JSON header, because 192 small arrays cost twenty
times more to pack than one of the same size. The header holds the dotted path of the class in
``_target_``, names and shapes of its tensors, and its own header. NumPy has no bfloat16, so it
travels as the bit pattern in uint16 and comes back as float32. A format that rounds is given the
change from the client's start rather than the reply itself (`fedlora.wire.change`). Payloads of one
message may hold the same tensors, as clients do that train factors of their own over one moved
base: `encode_together` has such a tensor once.
"""

import functools
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlora.core.checks import one_of
from fedlora.core.config import build, describe
from fedlora.core.payload import Payload, payload_class, target_of
from fedlora.core.types import EvaluatePlan, LocalPlan
from fedlora.wire import change
from fedlora.wire.change import Named
from fedlora.wire.tensors import NO_FORMAT, Format

WIRE_BYTES = {"float32": 4, "bfloat16": 2, "float64": 8}
"""Bytes per number on the wire, by wire dtype."""
_ARRAYS = {"float32": np.float32, "bfloat16": np.uint16, "float64": np.float64}
"""The NumPy type of an array of each wire dtype."""
ROUNDING = ("bfloat16",)
"""Wire dtypes that lose digits of what clients compute in."""
VALUE, CHANGE = "value", "change"
"""What the scalars of a payload on the wire are: its values, or changes of the start."""
_FLOATS = (torch.float32, torch.float64, torch.bfloat16)
"""The types that models and adapters are held in."""

Flat: TypeAlias = NDArray[Any]


def encode_payload(payload: Payload, dtype: str = "float32") -> tuple[Flat, str]:
    """A payload as one flat array and the JSON header that `decode_payload` needs.

    Raises:
        ValueError: for a wire dtype other than float32, bfloat16 or float64, or a tensor of a type
            that no payload has: they would be cast in silence.
    """
    return _encoded(payload, dict(payload.tensors()), dtype, VALUE)


def encode_together(
    payloads: Sequence[Payload], dtype: str = "float32"
) -> tuple[list[tuple[Flat, str]], tuple[Flat, str]]:
    """Payloads of one message, each without the tensors that another one of them holds too.

    Tensors are the same if they are the same memory, seen in the same shape.

    Returns:
        As `encode_payload`, one for each payload; array and header (JSON) of all that several hold,
        for `decode_shared`.
    """
    held = [dict(p.tensors()) for p in payloads]  # alive together: no memory is used twice
    holders = Counter(key for tensors in held for key in {_memory(t) for t in tensors.values()})
    numbers: dict[Any, int] = {}
    shared: dict[str, Tensor] = {}
    encoded = []
    for payload, tensors in zip(payloads, held, strict=True):
        found: dict[str, int] = {}
        for name, t in tensors.items():
            key = _memory(t)
            if holders[key] > 1:
                found[name] = numbers.setdefault(key, len(numbers))
                shared[str(found[name])] = t
        encoded.append(_encoded(payload, tensors, dtype, VALUE, found))
    _require_floats(shared)
    header = {"dtype": dtype, "tensors": shapes_of(shared)}
    return encoded, (flatten(shared, dtype), json.dumps(header))


def decode_shared(array: Flat, header: str) -> list[Tensor]:
    """The tensors that several payloads of a message hold, by number."""
    return list(unflatten(array, json.loads(header)).values())


def _memory(t: Tensor) -> tuple[Any, ...]:
    """What two tensors have in common that are the same elements of the same memory."""
    where = (t.device, t.untyped_storage().data_ptr(), t.storage_offset())
    return (*where, tuple(t.shape), t.stride(), t.dtype)


def encode_reply(
    payload: Payload,
    dtype: str,
    start: Payload,
    residual: Named | None = None,
    up: Format = NO_FORMAT,
    generator: torch.Generator | None = None,
) -> tuple[Flat, str, Named | None]:
    """A client's payload: as `encode_payload`, or its change from the start if ``dtype`` rounds.

    Args:
        payload: what it has trained.
        dtype: wire format.
        start: what it started from, as it received it.
        residual: what earlier replies have withheld; ``None``: no account is kept.
        up: format of its change in place of ``dtype``, if it acts.
        generator: of random rounding; None: of a seed of its own.

    Returns:
        Array, header, and what is withheld now (``None``: no account is kept).
    """
    if dtype not in ROUNDING and not up.acts:
        return *encode_payload(payload, dtype), residual
    draw = torch.Generator().manual_seed(0) if generator is None else generator

    def written(tensors: Named) -> tuple[Flat, str]:
        if not up.acts:
            return _encoded(payload, tensors, dtype, CHANGE)
        return up.encode(tensors, draw), json.dumps(_header(payload, tensors, up.kind, CHANGE))

    _require_floats(dict(payload.tensors()))
    moved = change.change(_on_cpu(payload), _on_cpu(start))
    if residual is None:
        return *written(moved), None
    # A tensor that did not move, as a frozen one, sends no correction: that waits until it moves.
    waits = {name: e for name, e in residual.items() if name in moved and not moved[name].any()}
    due = {name: e for name, e in residual.items() if name not in waits}
    array, header = written(change.corrected(moved, due))
    read = up.decode(array, _sizes(moved)) if up.acts else unflatten(array, json.loads(header))
    return array, header, change.residual(due, moved, read) | waits


def decode_payload(
    array: Flat,
    header: str,
    *,
    trusted: bool = True,
    start: Payload | None = None,
    wire: str = "",
    shared: Sequence[Tensor] = (),
    up: Format = NO_FORMAT,
) -> Payload:
    """The inverse of `encode_payload` and `encode_reply`. Tensors are fresh (float32, or float64 if
    sent so), but for those that it shares with others of its message.

    Args:
        array: flat.
        header: JSON.
        trusted: whether the header may have modules imported for it; what clients send may not.
        start: what a change is added to, as this end holds it.
        wire: the wire dtype that is due; empty: any.
        shared: what `decode_shared` gave for its message.
        up: the format of changes that is due in place of ``wire``, if it acts.

    Raises:
        ValueError: if the array is not what the header promises, its class is none that may travel,
            it is a change and there is no start, it is in another wire dtype than is due, or it
            refers to tensors that its message does not share.
    """
    h = json.loads(header)
    if up.acts and (h["dtype"] != up.kind or h["of"] != CHANGE):
        raise ValueError(f"it is sent as {h['dtype']!r}, compression.up.kind={up.kind} is due")
    if wire and not up.acts and h["dtype"] != wire:
        raise ValueError(f"it is sent as {h['dtype']!r}, federation.wire={wire} is due")
    kind = _kind_of(h, trusted)
    named = (
        up.decode(array, _shapes_within(h, start)) if up.acts else _own_and_shared(array, h, shared)
    )
    one_of("of", h["of"], (VALUE, CHANGE))
    if h["of"] == CHANGE:
        if start is None:
            raise ValueError("it is a change from a start that is not known here")
        named = change.restored(named, _on_cpu(start))
    payload = kind.from_header(h["header"], named)
    if unread := sorted(named.keys() - {name for name, _ in payload.tensors()}):
        raise ValueError(f"it holds {unread[0]}, which is no tensor of {payload.noun}")
    return payload


def described(payload: Payload, kind: str) -> str:
    """A payload without its elements, as the JSON header of its change in some format."""
    return json.dumps(_header(payload, _on_cpu(payload), kind, CHANGE))


def opened(header: Mapping[str, Any], named: Named) -> Payload:
    """The payload of a header that `described` wrote, with these tensors."""
    return _kind_of(header, True).from_header(header["header"], named)


def _kind_of(header: Mapping[str, Any], trusted: bool) -> type[Payload]:
    """The class of a header's payload, and that of a payload within it, imported if need be."""
    kind = payload_class(header["_target_"], load=trusted)
    for part in header["header"].values():
        if trusted and isinstance(part, dict) and "_target_" in part:
            payload_class(part["_target_"], load=True)
    return kind


def _own_and_shared(
    array: Flat, header: Mapping[str, Any], shared: Sequence[Tensor]
) -> dict[str, Tensor]:
    """A payload's tensors in the header's order: those of its array, and those that it shares."""
    numbers = header.get("shared", {})
    for name, number in numbers.items():
        if type(number) is not int or not 0 <= number < len(shared):
            raise ValueError(f"{name:.80} is shared tensor {number!r}, of {len(shared)}")
    own = [entry for entry in header["tensors"] if entry[0] not in numbers]
    found = unflatten(array, {**header, "tensors": own})
    names = [entry[0] for entry in header["tensors"]]
    return {n: shared[numbers[n]] if n in numbers else found[n] for n in names}


def _encoded(
    payload: Payload,
    tensors: Named,
    dtype: str,
    of: str,
    shared: Mapping[str, int] = MappingProxyType({}),
) -> tuple[Flat, str]:
    """Tensors in the place of a payload's own: the value of each, or its change; of those that are
    shared, their number."""
    if dtype not in WIRE_BYTES:
        raise ValueError(f"wire dtype {dtype!r} is not one of {sorted(WIRE_BYTES)}")
    _require_floats(tensors)
    header = _header(payload, tensors, dtype, of)
    if shared:
        header["shared"] = dict(shared)
    own = {name: t for name, t in tensors.items() if name not in shared}
    return flatten(own, dtype), json.dumps(header)


def _header(payload: Payload, tensors: Named, dtype: str, of: str) -> dict[str, Any]:
    return {
        "_target_": target_of(type(payload)),
        "dtype": dtype,
        "of": of,
        "tensors": shapes_of(tensors),
        "header": payload.header(),
    }


def _sizes(tensors: Named) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in tensors.items()}


def _shapes_within(header: Mapping[str, Any], start: Payload | None) -> dict[str, tuple[int, ...]]:
    """The shapes that a header states, which together must not be larger than twice the start: a
    few bytes can stand for many zeros."""
    shapes = {str(name): tuple(shape) for name, *shape in header["tensors"]}
    if any(type(n) is not int or n < 0 for shape in shapes.values() for n in shape):
        raise ValueError("its header states shapes that are none")
    most = 2 * sum(t.numel() for _, t in start.tensors()) if start is not None else 0
    promised = sum(math.prod(shape) for shape in shapes.values())
    if promised > most:
        raise ValueError(f"its header promises {promised} scalars, at most {most} can be due")
    return shapes


def _require_floats(tensors: Named) -> None:
    """Raise a ValueError that names a tensor of a type that no payload has."""
    for name, t in tensors.items():
        if t.dtype not in _FLOATS:
            raise ValueError(f"{name} is {t.dtype}, expected one of {_FLOATS}")


def shapes_of(tensors: Named) -> list[list[Any]]:
    """Names and shapes as `unflatten` wants them: ``[name, size, size, ...]`` of each tensor."""
    return [[name, *t.shape] for name, t in tensors.items()]


def flatten(tensors: Named, dtype: str) -> Flat:
    """All elements in one flat array; bfloat16 as bit patterns."""
    target = getattr(torch, dtype)
    parts = [t.detach().to("cpu", target).reshape(-1) for t in tensors.values()]
    flat = torch.cat(parts) if parts else torch.zeros(0, dtype=target)
    array: Flat = flat.view(torch.uint16).numpy() if dtype == "bfloat16" else flat.numpy()
    return array


def unflatten(array: Flat, header: Mapping[str, Any]) -> dict[str, Tensor]:
    """The inverse of `flatten`: fresh tensors of the header's ``dtype``, names and shapes.

    Raises:
        ValueError: if the array's type or length is not what the header promises.
    """
    one_of("dtype", header["dtype"], WIRE_BYTES)
    due = np.dtype(_ARRAYS[header["dtype"]])
    if array.dtype != due or array.ndim != 1:
        raise ValueError(
            f"payload is an array of {array.dtype} and shape {array.shape}, {header['dtype']} "
            f"travels as one flat array of {due}"
        )
    dtype = torch.float64 if header["dtype"] == "float64" else torch.float32
    flat = torch.from_numpy(np.array(array))  # a writable copy: messages own their memory
    flat = (flat.view(torch.bfloat16) if header["dtype"] == "bfloat16" else flat).to(dtype)
    shapes = {name: tuple(shape) for name, *shape in header["tensors"]}
    sizes = [math.prod(shape) for shape in shapes.values()]
    if flat.numel() != sum(sizes):
        raise ValueError(f"payload holds {flat.numel()} scalars, its header promises {sum(sizes)}")
    named = zip(shapes.items(), flat.split(sizes), strict=True)
    return {n: part.view(shape).clone() for (n, shape), part in named}


def _on_cpu(payload: Payload) -> dict[str, Tensor]:
    return {name: t.detach().cpu() for name, t in payload.tensors()}


def payload_bytes(payload: Payload, dtype: str = "float32") -> int:
    """Bytes that a real client would receive for this payload."""
    return payload.floats() * WIRE_BYTES[dtype]


def update_bytes(payload: Payload, plan: LocalPlan, dtype: str = "float32") -> int:
    """Bytes that a real client would send: a factor that the plan froze stays where it is, and so
    do rank indices that the client has not chosen."""
    return payload.sent_floats(plan) * WIRE_BYTES[dtype] + payload.index_bytes()


def plan_to_json(plan: LocalPlan | EvaluatePlan) -> str:
    """A plan as JSON with the class in ``_target_``."""
    return json.dumps(describe(plan))


@functools.lru_cache(maxsize=64)
def plan_from_json(text: str) -> LocalPlan | EvaluatePlan:
    """The inverse of `plan_to_json`. Messages repeat their few plans, which take long to build."""
    plan = build(json.loads(text), object, "plan")
    return cast(LocalPlan | EvaluatePlan, plan)
