"""Clients in one fused forward pass, and which rows of a layer's input are whose."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.data.batches import TokenExample
from fedlora.engine.fused.bank import Layout


@dataclass(frozen=True, eq=False)
class Lane:
    """One client's part of a forward pass."""

    slot: int
    """Its row of the adapter bank."""
    layout: Layout
    examples: Sequence[TokenExample]
    """At least one, each with at least one supervised token."""
    loss: str
    """``full`` or ``response``."""
    tokens: int
    """Supervised tokens of the whole optimizer step; the loss is the mean over them."""
    train_a: bool = True
    train_b: bool = True
    dropped: int = 0
    """The dropout rate as `dropped_share` counts it, in units of 2^-16."""
    seed: int = 0
    """Seed of its dropout masks."""


@dataclass(frozen=True, eq=False)
class Group:
    """Lanes whose products are computed in one stack: one layout, the same flags, consecutive
    slots, equally many rows."""

    lanes: tuple[Lane, ...]
    rows: int
    """Rows of all its lanes together, counted in the copy if there is one (`Spread`)."""


@dataclass(frozen=True, eq=False)
class Spread:
    """A copy of the rows in which all lanes of a group have equally many."""

    out: Tensor
    """``[M]`` int64: the row that each row of the copy repeats; a pad repeats its lane's last."""
    back: Tensor
    """``[N]`` int64: the place of each row in the copy."""
    pads: Tensor | None
    """``[p]`` int64: rows of the copy that are pads; None: there are none."""

    def to(self, device: torch.device) -> "Spread":
        """The same on another device."""
        pads = None if self.pads is None else self.pads.to(device)
        return Spread(self.out.to(device), self.back.to(device), pads)


@dataclass(frozen=True, eq=False)
class Shares:
    """Which of a layer's ``N`` rows are whose, and their dropout; ``M`` rows of the copy."""

    groups: tuple[Group, ...]
    """Groups in the order of the rows."""
    spread: Spread | None
    """None: the products with the clients' factors use the rows themselves, ``M = N``."""
    source: Tensor | None
    """``[M]``: the number of each row's token, of all clients' tokens one after another; None: rows
    are the tokens in this order, or there is no dropout. Masks are drawn for tokens, exactly as for
    a client that is trained alone."""
    thresholds: Tensor | None
    """``[M, 1]`` int16: a scalar whose sixteen random bits lie below is dropped; None: no
    dropout."""

    def places(self, drawn: Sequence[int]) -> list[tuple[slice, Tensor | None]]:
        """The rows of every lane, and which of its tokens each is.

        Args:
            drawn: tokens of each lane.

        Returns:
            ``(slice of M, [m] int64)``; None instead of the tokens if they are the same.
        """
        found, at, before = [], 0, 0
        each = [g.rows // len(g.lanes) for g in self.groups for _ in g.lanes]
        for count, own in zip(each, drawn, strict=True):
            where = slice(at, at + count)
            # A pad of the padded layout names the first token of all, wherever its lane begins.
            own_rows = None if self.source is None else (self.source[where] - before).clamp_(min=0)
            found.append((where, own_rows))
            at, before = at + count, before + own
        return found

    def to(self, device: torch.device) -> "Shares":
        """The same on another device."""
        spread = None if self.spread is None else self.spread.to(device)
        both = (None if t is None else t.to(device) for t in (self.source, self.thresholds))
        return Shares(self.groups, spread, *both)
