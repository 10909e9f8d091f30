"""What cannot be sent as compressed changes, refused before anything is loaded."""

import dataclasses
from collections.abc import Iterator
from typing import Protocol

from fedlora.core.types import LocalPlan
from fedlora.server.method import Method, Setup
from fedlora.server.schedule import Rounds
from fedlora.wire.tensors import Compression
from simulations.app.refusals import refuse


class Asked(Protocol):
    """The groups that are looked at (`simulations.app.parts.Parts`)."""

    @property
    def strategy(self) -> Method: ...
    @property
    def client(self) -> LocalPlan: ...
    @property
    def federation(self) -> Rounds: ...
    @property
    def compression(self) -> Compression: ...


def check_compression(parts: Asked) -> None:
    """Refuse combinations whose bytes or values would not be what they say.

    Raises:
        ConfigError: one sentence that says why and what to use instead.
    """
    if parts.compression.acts:
        refuse(_refusals(parts), "compression")


def _refusals(parts: Asked) -> Iterator[tuple[bool, str]]:
    """Conditions with the sentences that refuse them."""
    method, compression, rounds = parts.strategy, parts.compression, parts.federation
    kind, label, down = type(method), method.label, compression.down.acts
    yield (
        rounds.wire != "float32" or rounds.error_feedback,
        f"federation.wire={rounds.wire}, federation.error_feedback={rounds.error_feedback}: one "
        "rounding is enough; use federation.wire=float32, federation.error_feedback=false and "
        "compression.error_feedback",
    )
    yield (
        kind.run_round is not Method.run_round,
        f"clients of {label} send activations too, which have formats of their own "
        "(strategy.activations, strategy.gradients); use compression=none",
    )
    yield (
        kind.bytes_up is not Method.bytes_up,
        f"clients of {label} keep a part of what they train, and the whole would be sent; use "
        "compression=none",
    )
    yield (
        down and kind.bytes_down is not Method.bytes_down,
        f"{label} sends clients what they missed in a form of its own; use "
        "compression.down.kind=none",
    )
    refusal = _rounding(parts)
    yield bool(refusal), f"what clients of {label} exchange must not be rounded ({refusal})"


def _rounding(parts: Asked) -> str:
    """Why the strategy refuses numbers that are rounded; empty: it does not."""
    plain = Setup(parts.client)
    feedback = parts.compression.error_feedback
    try:
        parts.strategy.check(plain)
        parts.strategy.check(dataclasses.replace(plain, wire="bfloat16", error_feedback=feedback))
    except ValueError as error:
        return str(error)
    return ""
