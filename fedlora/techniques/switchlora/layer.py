r"""One linear layer of SwitchLoRA: its vectors, its pools of candidates, and the exchange.

Slot ``i`` holds row ``a_i`` of A and column ``b_i`` of B. To put ``v`` in the place of ``a_i``:

    W ← W + s b_i (a_i - v)ᵀ     C_A[id] ← a_i     a_i ← v     b_i is frozen for N steps

and likewise for ``b_i``. What the layer computes does not change, and neither does the gradient of
the exchanged vector, ``s b_iᵀ ∂L/∂W_eff``; its partner's does, which is why the partner's optimizer
state is void.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fedlora.core.seeding import generator
from fedlora.techniques.switchlora.init import (
    SIDES,
    Side,
    draw_start,
)


def outer_sum(weight: Tensor, left: Tensor, right: Tensor) -> None:
    """``W ← W + left right``, one product and one sum per number in a fixed order.

    Every machine gets the same bits, which a matrix product does not promise.

    Args:
        weight: ``[m, n]``, changed in place.
        left: ``[m, k]``
        right: ``[k, n]``
    """
    for column, row in zip(left.t(), right, strict=True):
        weight.add_(column[:, None] * row[None, :])


def other(side: Side) -> Side:
    """The partner's factor."""
    return "b" if side == "a" else "a"


@dataclass
class SwitchLayer:
    """Changed in place, as optimizers are; tensors may be those of a network's parameters."""

    path: str
    weight: Tensor
    """``[d_out, d_in]``, float32 or float64: the frozen weight, or what was added to it so far."""
    a: Tensor
    """``[r, d_in]``"""
    b: Tensor
    """``[d_out, r]``"""
    scale: float
    candidates: dict[Side, Tensor]
    """``[c, d_in]`` and ``[c, d_out]``, on the CPU."""
    ids: dict[Side, list[int]]
    """Which vector of the pool is in each slot. Its place there is stale until it comes back."""
    pointers: dict[Side, int]
    """The slot whose turn is next."""
    frozen: dict[Side, list[int]] = field(default_factory=dict)
    """For how many more steps each vector must not move."""

    def __post_init__(self) -> None:
        check_type(self.path, self.weight.dtype)
        if not self.frozen:
            self.frozen = {side: [0] * self.rank for side in SIDES}

    @property
    def rank(self) -> int:
        """Slots."""
        return int(self.a.shape[0])

    @property
    def num_candidates(self) -> int:
        """``c``: vectors of each pool."""
        return int(self.candidates["a"].shape[0])

    def vectors(self, side: Side) -> Tensor:
        """A view of one factor with a row per slot: ``[r, d_in]`` or ``[r, d_out]``."""
        return self.a.detach() if side == "a" else self.b.detach().t()

    def effective(self) -> Tensor:
        """``W + s B A``."""
        return self.weight + self.scale * (self.b.detach() @ self.a.detach())

    def max_switches(self) -> int:
        """How many slots of each factor can be exchanged in one step.

        The pointers keep their distance, so the slots before A's pointer are those whose B is
        frozen, and the other way round; no frozen vector is exchanged, and none that would have to
        come from a slot.
        """
        # The ring of slots, from one pointer forward to the other: a - b and b - a slots. The last
        # ones before a pointer hold frozen vectors of the other factor, which a pointer must not
        # reach. A step exchanges equally many vectors of both factors, so both have as many frozen.
        r, a, b = self.rank, self.pointers["a"], self.pointers["b"]
        held = {side: sum(f > 0 for f in self.frozen[side]) for side in SIDES}
        gaps = ((a - b - held["a"]) % r, (b - a - held["b"]) % r)
        return max(0, min(*gaps, self.num_candidates - r))

    def next_slots(self, side: Side, count: int) -> list[int]:
        """The next ``count`` slots."""
        return [(self.pointers[side] + i) % self.rank for i in range(count)]

    def choose(self, side: Side, count: int, choice: str, seed: int, step: int) -> list[int]:
        """Which vectors of the pool come next, by `Switching.choice`."""
        if choice == "ring":
            return self.choose_in_order(side, count)
        return self.choose_at_random(side, count, seed, step)

    def choose_in_order(self, side: Side, count: int) -> list[int]:
        """The vectors that follow in the pool on the one that came in last."""
        # The slot before the pointer was filled last; index -1 is the last slot of the ring.
        ids = self.ids[side]
        last = ids[self.pointers[side] - 1]
        return [(last + 1 + i) % self.num_candidates for i in range(count)]

    def choose_at_random(self, side: Side, count: int, seed: int, step: int) -> list[int]:
        """Different vectors of the pool that are in no slot, all equally likely."""
        active = set(self.ids[side])
        free = [i for i in range(self.num_candidates) if i not in active]
        g = generator(seed, f"switch-{side}", zlib.crc32(self.path.encode()), step)
        return [int(i) for i in g.choice(free, count, replace=False)]

    def switch(
        self, side: Side, incoming: Sequence[int], freeze: int = 0, *, ordered: bool = False
    ) -> list[int]:
        """Put vectors of the pool into the next slots; what was there goes back, as trained.

        Args:
            side: the factor.
            incoming: ids of vectors that are in no slot.
            freeze: for how many steps their partners must not move.
            ordered: compensate slot after slot (`outer_sum`), so that every machine gets the same
                bits, and not by one matrix product, which is faster.

        Returns:
            The slots. Whatever an optimizer remembers of their partners is void.
        """
        slots, own, partner = self.next_slots(side, len(incoming)), self.vectors(side), other(side)
        pool, ids = self.candidates[side], self.ids[side]
        if set(incoming) & set(ids):
            raise ValueError(f"{self.path}: {sorted(set(incoming) & set(ids))} are in slots")
        if not slots:
            return []
        with torch.no_grad():
            # k vectors, one per row: [k, d_in] of A or [k, d_out] of B.
            fresh = pool[list(incoming)].to(own.device, own.dtype)
            gone = own[slots]

            # What the layer loses by the exchange is added to its frozen weight: for A
            # s B (old - new), [d_out, k] x [k, d_in]; for B s (old - new) A.
            scaled = self.scale * self.vectors(partner)[slots]
            left, right = (scaled, gone - fresh) if side == "a" else (gone - fresh, scaled)
            if ordered:
                outer_sum(self.weight, left.t(), right)
            else:
                self.weight.addmm_(left.t(), right)

            # Old vectors go back to their own places in the pool, as trained; new ones come in.
            pool[[ids[slot] for slot in slots]] = gone.to(pool.device, pool.dtype)
            own[slots] = fresh

        # Who is where now; partners of the new vectors stand still for a while.
        for slot, new in zip(slots, incoming, strict=True):
            ids[slot] = new
            self.frozen[partner][slot] = freeze
        self.pointers[side] = (self.pointers[side] + len(slots)) % self.rank
        return slots

    def frozen_slots(self, side: Side) -> list[int]:
        """Slots whose vector must not move in this step."""
        return [i for i, f in enumerate(self.frozen[side]) if f > 0]

    def thaw(self) -> None:
        """One step is over."""
        for side in SIDES:
            self.frozen[side] = [max(0, f - 1) for f in self.frozen[side]]

    def state(self) -> dict[str, Tensor]:
        """Everything but the scale, by name; tensors are those of the layer."""
        whole = {"weight": self.weight, "a": self.a.detach(), "b": self.b.detach()}
        for side in SIDES:
            whole[f"pool_{side}"] = self.candidates[side]
            whole[f"ids_{side}"] = torch.tensor(self.ids[side])
            whole[f"frozen_{side}"] = torch.tensor(self.frozen[side])
        return whole | {"pointers": torch.tensor([self.pointers[side] for side in SIDES])}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state`, into the tensors that are there."""
        with torch.no_grad():
            for name, mine in self.state().items():
                if mine.shape != state[name].shape:
                    raise ValueError(
                        f"{self.path}: {name} is {tuple(state[name].shape)} in the state and "
                        f"{tuple(mine.shape)} here"
                    )
                if mine.is_floating_point():
                    mine.copy_(state[name])
        # Integers of `state` are copies of these lists, not the lists themselves.
        for side, pointer in zip(SIDES, state["pointers"].tolist(), strict=True):
            self.ids[side] = state[f"ids_{side}"].tolist()
            self.frozen[side] = state[f"frozen_{side}"].tolist()
            self.pointers[side] = int(pointer)


def check_type(path: str, dtype: torch.dtype) -> None:
    """Refuse a base in which the compensation of exchanges would be lost.

    Raises:
        ValueError: naming the layer and its type.
    """
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{path}: the base is {dtype}; every exchange is compensated in it, and in half "
            "precision 500 of them move a layer by 14 % of its norm: load it in float32 "
            "(model.dtype=float32) and compute in bfloat16 by autocast (client.autocast=bf16)"
        )


def begin(
    path: str,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    alpha: float,
    seed: int,
    turn: int = 0,
    folder: Path | None = None,
) -> SwitchLayer:
    """Draw pools, fill ``a`` and ``b`` from them, and take their product off ``weight``.

    Args:
        path: of the layer; pools are drawn by it.
        weight: ``[d_out, d_in]``, changed in place: ``W ← W - s B A``.
        a: ``[r, d_in]``, overwritten.
        b: ``[d_out, r]``, overwritten.
        alpha: ``s = alpha / r``.
        seed: of the run.
        turn: of the pools, as in `draw_candidates`.
        folder: for pools in files.

    Raises:
        ValueError: for a rank that cannot switch, or a weight in half precision.
    """
    (d_out, d_in), rank = weight.shape, int(a.shape[0])
    check_type(path, weight.dtype)
    start = draw_start(
        seed, path, d_out, d_in, rank, alpha=alpha, turn=turn, folder=folder, dtype=weight.dtype
    )
    with torch.no_grad():
        a.copy_(start.a)
        b.copy_(start.b)
        outer_sum(weight, -alpha / rank * b, a)
    return SwitchLayer(
        path=path,
        weight=weight,
        a=a,
        b=b,
        scale=alpha / rank,
        candidates=start.candidates,
        ids=start.ids,
        pointers=start.pointers,
    )
