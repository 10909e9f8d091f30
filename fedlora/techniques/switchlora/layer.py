r"""One linear layer of SwitchLoRA: its vectors, its candidate vectors, and the switch.

Slot ``i`` holds row ``a_i`` of A and column ``b_i`` of B. A switch replaces ``a_i`` by a candidate
vector ``v``:

    W ← W + s b_i (a_i - v)ᵀ     C_A[id] ← a_i     a_i ← v     b_i is frozen for N steps

and likewise for ``b_i``. The output of the layer does not change. The gradient of the switched
vector, ``s b_iᵀ ∂L/∂W_eff``, does not change either. The gradient of its partner does, so the
partner's optimizer state is reset.
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
    """``W ← W + left right``, one product and one sum per entry in a fixed order.

    The result is bitwise identical on every machine; a matrix product does not guarantee that.

    Args:
        weight: ``[m, n]``, changed in place.
        left: ``[m, k]``
        right: ``[k, n]``
    """
    # One outer product after another: [m, 1] * [1, n].
    for column, row in zip(left.t(), right, strict=True):
        weight.add_(column[:, None] * row[None, :])


def other(side: Side) -> Side:
    """The partner's factor."""
    return "b" if side == "a" else "a"


@dataclass
class SwitchLayer:
    """One layer and its candidate vectors. It is changed in place, as optimizers are; its tensors
    may be those of a network's parameters."""

    path: str
    weight: Tensor
    """``[d_out, d_in]``, float32 or float64: the frozen weight, or the sum of what was added to it
    so far."""
    a: Tensor
    """``[r, d_in]``"""
    b: Tensor
    """``[d_out, r]``"""
    scale: float
    candidates: dict[Side, Tensor]
    """Candidate vectors of each factor, ``[c, d_in]`` and ``[c, d_out]``, on the CPU."""
    ids: dict[Side, list[int]]
    """The id of the candidate vector in each slot. Its row in `candidates` is stale while it is in
    the slot."""
    pointers: dict[Side, int]
    """The slot that is switched next, for each factor."""
    frozen: dict[Side, list[int]] = field(default_factory=dict)
    """The number of steps for which each vector stays frozen."""

    def __post_init__(self) -> None:
        check_type(self.path, self.weight.dtype)
        if not self.frozen:
            self.frozen = {side: [0] * self.rank for side in SIDES}

    @property
    def rank(self) -> int:
        """``r``: the number of slots."""
        return int(self.a.shape[0])

    @property
    def num_candidates(self) -> int:
        """``c``: the number of candidate vectors of each factor."""
        return int(self.candidates["a"].shape[0])

    def vectors(self, side: Side) -> Tensor:
        """A view of one factor with a row per slot: ``[r, d_in]`` or ``[r, d_out]``."""
        return self.a.detach() if side == "a" else self.b.detach().t()

    def effective(self) -> Tensor:
        """``W + s B A``."""
        return self.weight + self.scale * (self.b.detach() @ self.a.detach())

    def max_switches(self) -> int:
        """The largest number of slots of each factor that can be switched in one step.

        The pointers keep their distance, so the slots before A's pointer are those whose B is
        frozen, and the other way round. A frozen vector is not switched, and a candidate vector
        that is in a slot is not chosen.
        """
        # The slots are a ring. From one pointer forward to the other there are a - b and b - a
        # slots. The last ones before a pointer hold frozen vectors of the other factor, and a
        # pointer must not reach them. A step switches equally many vectors of both factors, so
        # both have equally many frozen ones.
        r, a, b = self.rank, self.pointers["a"], self.pointers["b"]
        held = {side: sum(f > 0 for f in self.frozen[side]) for side in SIDES}
        gaps = ((a - b - held["a"]) % r, (b - a - held["b"]) % r)
        return max(0, min(*gaps, self.num_candidates - r))

    def next_slots(self, side: Side, count: int) -> list[int]:
        """The next ``count`` slots from the pointer on."""
        return [(self.pointers[side] + i) % self.rank for i in range(count)]

    def choose(self, side: Side, count: int, choice: str, seed: int, step: int) -> list[int]:
        """Choose the ids of the next candidate vectors, by `Switching.choice`."""
        if choice == "ring":
            return self.choose_in_order(side, count)
        return self.choose_at_random(side, count, seed, step)

    def choose_in_order(self, side: Side, count: int) -> list[int]:
        """Choose the candidate vectors that follow on the one that was switched in last."""
        # The slot before the pointer was filled last; index -1 is the last slot of the ring.
        ids = self.ids[side]
        last = ids[self.pointers[side] - 1]
        return [(last + 1 + i) % self.num_candidates for i in range(count)]

    def choose_at_random(self, side: Side, count: int, seed: int, step: int) -> list[int]:
        """Draw different candidate vectors that are in no slot, all equally likely."""
        active = set(self.ids[side])
        free = [i for i in range(self.num_candidates) if i not in active]
        g = generator(seed, f"switch-{side}", zlib.crc32(self.path.encode()), step)
        return [int(i) for i in g.choice(free, count, replace=False)]

    def switch(
        self, side: Side, incoming: Sequence[int], freeze: int = 0, *, ordered: bool = False
    ) -> list[int]:
        """Put candidate vectors into the next slots; the trained vectors of these slots become
        candidates again.

        Args:
            side: the factor.
            incoming: ids of candidate vectors that are in no slot.
            freeze: the number of steps for which their partners are frozen.
            ordered: compensate slot after slot (`outer_sum`), so that the result is bitwise
                identical on every machine; else by one matrix product, which is faster.

        Returns:
            The slots. The caller resets the optimizer state of their partners.

        Raises:
            ValueError: naming the layer and the candidate vectors that are in slots already.
        """
        slots, own, partner = self.next_slots(side, len(incoming)), self.vectors(side), other(side)
        pool, ids = self.candidates[side], self.ids[side]
        if set(incoming) & set(ids):
            raise ValueError(f"{self.path}: {sorted(set(incoming) & set(ids))} are in slots")
        if not slots:
            return []
        with torch.no_grad():
            # The k new and the k old vectors, one per row: [k, d_in] of A or [k, d_out] of B.
            fresh = pool[list(incoming)].to(own.device, own.dtype)
            gone = own[slots]

            # Compensation: the frozen weight takes over what the switch removes from the product.
            # For A that is s B (old - new), [d_out, k] x [k, d_in]; for B it is s (old - new) A.
            # scaled, the partners of the switched vectors: [k, d_out] or [k, d_in].
            scaled = self.scale * self.vectors(partner)[slots]
            left, right = (scaled, gone - fresh) if side == "a" else (gone - fresh, scaled)
            if ordered:
                outer_sum(self.weight, left.t(), right)
            else:
                self.weight.addmm_(left.t(), right)

            # Old vectors, as trained, go back to their own rows of [c, d]; new ones fill the slots.
            pool[[ids[slot] for slot in slots]] = gone.to(pool.device, pool.dtype)
            own[slots] = fresh

        # Which vector is in which slot now. The partners of the new vectors are frozen.
        for slot, new in zip(slots, incoming, strict=True):
            ids[slot] = new
            self.frozen[partner][slot] = freeze
        self.pointers[side] = (self.pointers[side] + len(slots)) % self.rank
        return slots

    def frozen_slots(self, side: Side) -> list[int]:
        """Slots whose vector is frozen in this step."""
        return [i for i, f in enumerate(self.frozen[side]) if f > 0]

    def thaw(self) -> None:
        """Count down the frozen steps: one step is over."""
        for side in SIDES:
            self.frozen[side] = [max(0, f - 1) for f in self.frozen[side]]

    def state(self) -> dict[str, Tensor]:
        """Everything except the scale, by name; tensors are those of the layer, not copies."""
        whole = {"weight": self.weight, "a": self.a.detach(), "b": self.b.detach()}
        for side in SIDES:
            whole[f"pool_{side}"] = self.candidates[side]
            whole[f"ids_{side}"] = torch.tensor(self.ids[side])
            whole[f"frozen_{side}"] = torch.tensor(self.frozen[side])
        return whole | {"pointers": torch.tensor([self.pointers[side] for side in SIDES])}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state`; it writes into the layer's own tensors.

        Raises:
            ValueError: naming the layer and the first tensor of another shape.
        """
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
    """Refuse a base type in which the compensation of switches would be rounded away.

    Raises:
        ValueError: naming the layer and its type.
    """
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{path}: the base is {dtype}; every switch is compensated in it, and in half "
            "precision 500 switches move a layer by 14 % of its norm: load it in float32 "
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
    """Draw candidate vectors, fill ``a`` and ``b`` with them, and subtract their product from
    ``weight``.

    Args:
        path: of the layer; the draw depends on it.
        weight: ``[d_out, d_in]``, changed in place: ``W ← W - s B A``.
        a: ``[r, d_in]``, overwritten.
        b: ``[d_out, r]``, overwritten.
        alpha: ``s = alpha / r``.
        seed: of the run.
        turn: as in `draw_candidates`.
        folder: for candidate vectors in files.

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
