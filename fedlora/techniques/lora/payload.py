"""The low-rank factors of a client, as they travel: a mapping like any other, and a payload."""

import math
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from fedlora.core.checks import real, wrong_names
from fedlora.core.choice import Indices
from fedlora.core.payload import Payload, mismatch
from fedlora.core.types import Adapter, Client, Expected, Factors, LocalPlan
from fedlora.models.language_model import LanguageModel
from fedlora.models.layers import LinearUpdate
from fedlora.models.modules import ModelInfo, check_adapter
from fedlora.techniques.lora.layer import LowRank


class LowRankPayload(Payload, Mapping[str, Factors]):
    """Module path -> factors, in the order of the model's modules.

    Args:
        factors: of every module that is updated.
        indices: the rank indices of each that its client has trained and sends; None: it has made
            no choice.
    """

    noun = "factors"
    chooses = True

    def __init__(self, factors: Adapter, indices: Indices | None = None) -> None:
        self._factors = dict(factors)
        self._indices = None if indices is None else dict(indices)

    def __getitem__(self, path: str) -> Factors:
        return self._factors[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._factors)

    def __len__(self) -> int:
        return len(self._factors)

    def __repr__(self) -> str:
        return f"LowRankPayload({self._factors!r})"

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """``<path>/a`` and ``<path>/b`` of every module."""
        return factor_tensors(self._factors)

    def header(self) -> dict[str, Any]:
        """The scales, and the chosen indices if there are."""
        alphas = {"alpha": {path: f.alpha for path, f in self.items()}}
        if self._indices is None:
            return alphas
        return alphas | {"indices": {path: list(at) for path, at in self._indices.items()}}

    @classmethod
    def from_header(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """The inverse of `header` and `tensors`."""
        found = cls(factors_from(header["alpha"], tensors))
        if "indices" in header:
            found._indices = _whole_numbers(header["indices"])
        return found

    def sent_floats(self, plan: LocalPlan) -> int:
        """Scalars of the factors that are sent; a factor that the plan freezes is not sent, nor is
        a rank index that the client has not chosen."""
        # A rank index is a row of A, [d_in], and a column of B, [d_out].
        chosen = self._indices or {}
        return sum(
            len(chosen[path] if chosen else range(f.rank))
            * (f.a.shape[1] * plan.train_a + f.b.shape[0] * plan.train_b)
            for path, f in self.items()
        )

    def index_bytes(self) -> int:
        """2 for each chosen index, as its place among those of all modules; 4, if these are more
        than 65,536."""
        if self._indices is None:
            return 0
        places = sum(f.rank for f in self.values())
        return (2 if places <= 2**16 else 4) * sum(map(len, self._indices.values()))

    def check(self, sender: Client, expected: Expected) -> str:
        """Modules, shapes, scales and ranks are those of the start, unless ranks may shrink; the
        sender states the ranks that it sends; a factor that the plan freezes is the start's, bit
        for bit. If the plan has rank indices chosen, ranks say how much a client trains of its
        start, and all that it has not chosen is the start's too."""
        start, client = expected.start.low_rank(), expected.client
        if start is None:
            return mismatch(type(self), type(expected.start))
        wrong = wrong_names(self.keys(), start.keys())
        if wrong:
            return wrong
        shrinks, chooses = expected.plan.technique.shrinks, expected.plan.choice is not None
        for path, f in self.items():
            due = start[path].rank if chooses else client.ranks[path]
            wrong = _wrong_factors(f, start[path], due, shrinks)
            if wrong:
                return f"{path}: {wrong}"
        for path, f in self.items():
            stated, rank = sender.ranks.get(path), client.ranks[path] if chooses else f.rank
            if stated != rank:
                return f"{path}: it states rank {stated} and sends rank {rank}"
        return _wrong_frozen(self, start, expected.plan) or _wrong_indices(
            self, start, expected.plan
        )

    def aligned(self, start: Payload) -> Payload:
        """The leading block of the start at these ranks, whose scale follows the rank: a client
        that prunes its ranks is not taken for one that has moved."""
        before = start.low_rank()
        if before is None or all(f.rank >= before[p].rank for p, f in self.items()):
            return start
        cut = {
            p: Factors(before[p].a[: f.rank], before[p].b[:, : f.rank], before[p].alpha)
            for p, f in self.items()
        }
        return LowRankPayload(cut)

    def change_norm(self, start: Payload) -> float:
        """Norm of the change of ``(alpha / r) B A``, without a dense ``ΔW``, over the same base.

        With ``B = [s_1 B_1, -s_0 B_0]`` and ``A = [A_1; A_0]`` the squared norm of ``B A`` is the
        sum of ``(BᵀB) * (A Aᵀ)``: Gram matrices of the size of the ranks, in float64 as they
        cancel.
        """
        before = start.low_rank()
        if before is None:
            raise TypeError(f"factors and {start.noun} have no common change")
        return math.sqrt(math.fsum(_squared_change(before[p], f) for p, f in self.items()))

    def updates(self, model: LanguageModel, dropout: float = 0.0) -> dict[str, LinearUpdate]:
        """A `LowRank` on every module."""
        check_adapter(self, model.info)
        device, dtype = model.device, model.dtype
        return {
            path: LowRank(self[path], dropout, device, dtype)
            for path in model.layers
            if path in self
        }

    def read(self, updates: Mapping[str, LinearUpdate]) -> "LowRankPayload":
        """The present values of the factors."""
        return live_factors(updates)

    def low_rank(self) -> Adapter:
        """Itself."""
        return self

    def trained(self, factors: Adapter) -> "LowRankPayload":
        """These factors."""
        return LowRankPayload(factors)

    @property
    def indices(self) -> Indices | None:
        """What its client has chosen."""
        return self._indices

    def with_indices(self, indices: Indices) -> "LowRankPayload":
        """The same factors."""
        return LowRankPayload(self, indices)

    def export(
        self, folder: Path, info: ModelInfo, base_name: str = "", dropout: float = 0.0
    ) -> str:
        """Write PEFT's files."""
        from fedlora.techniques.lora.peft import write_peft  # importing PEFT takes seconds

        write_peft(self, info, folder, base_name, dropout)
        return ""

    def reader(self, folder: Path) -> str:
        """PEFT."""
        return f"PEFT {metadata.version('peft')}"

    def read_elsewhere(self, folder: Path, network: Any) -> Any:
        """A ``PeftModel``.

        Raises:
            ModelError: if PEFT does not find the factors of a module of its own list.
        """
        from fedlora.techniques.lora.peft import mount_by_peft

        return mount_by_peft(network, folder)

    @classmethod
    def load(cls, folder: Path, info: ModelInfo) -> "LowRankPayload":
        """Read PEFT's files, written by us or by another program."""
        from fedlora.techniques.lora.peft import load_peft

        return load_peft(folder, info)


def factor_tensors(factors: Adapter) -> Iterator[tuple[str, Tensor]]:
    """``<path>/a [r, d_in]`` and ``<path>/b [d_out, r]`` of every module."""
    for path, f in factors.items():
        yield f"{path}/a", f.a
        yield f"{path}/b", f.b


def factors_from(alphas: Mapping[str, float], tensors: Mapping[str, Tensor]) -> dict[str, Factors]:
    """The inverse of `factor_tensors`, with every module's ``alpha``."""
    return {
        p: Factors(tensors[f"{p}/a"], tensors[f"{p}/b"], real(f"alpha of {p:.80}", x))
        for p, x in alphas.items()
    }


def live_factors(updates: Mapping[str, LinearUpdate]) -> LowRankPayload:
    """Copies of the factors that train in these updates."""
    return LowRankPayload(
        {p: u.factors() for p, u in updates.items() if isinstance(u, LowRank) and u.parameters()}
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


def _wrong_frozen(sent: Adapter, start: Adapter, plan: LocalPlan) -> str:
    """Which factor has changed that the plan freezes; empty: none. Clients hold factors in float32,
    whatever they are sent in. One that has pruned its ranks has scaled both factors."""
    for side, trains in (("a", plan.train_a), ("b", plan.train_b)):
        for path, f in () if trains else sent.items():
            mine, due = getattr(f, side), getattr(start[path], side)
            if mine.shape == due.shape and not torch.equal(mine.float(), due.float()):
                return f"{path}: its {side.upper()} has changed, which this round does not train"
    return ""


def _wrong_indices(sent: LowRankPayload, start: Adapter, plan: LocalPlan) -> str:
    """What is wrong with the rank indices that a client has chosen; empty: nothing. As many as the
    plan says, and no other index has changed."""
    choice, indices = plan.choice, sent.indices
    if choice is None:
        return "" if indices is None else "it names rank indices, and was to train all"
    if indices is None:
        return "it does not name the rank indices that it has trained"
    wrong = wrong_names(indices, start)
    if wrong:
        return f"rank indices: {wrong}"
    for path, at in indices.items():
        last = start[path].rank - 1
        if list(at) != sorted({i for i in at if 0 <= i <= last}):
            return f"{path}: rank indices {list(at)!s:.80}, expected some of 0 to {last}, ascending"
    count, due = sum(map(len, indices.values())), choice.count(start)
    if count != due:
        return f"it has trained {count} rank indices, {due} were asked for"
    for path, f in sent.items():
        kept = [i for i in range(f.rank) if i not in indices[path]]
        for mine, was in ((f.a[kept], start[path].a[kept]), (f.b[:, kept], start[path].b[:, kept])):
            if not torch.equal(mine.float(), was.float()):
                return f"{path}: a rank index has changed that it has not chosen"
    return ""


def _whole_numbers(said: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Rank indices as they travel.

    Raises:
        ValueError: if one is no whole number.
    """
    for path, at in said.items():
        if not (isinstance(at, list) and all(type(i) is int for i in at)):
            raise ValueError(f"rank indices of {path:.80} are {at!r:.80}, expected whole numbers")
    return {path: tuple(at) for path, at in said.items()}


def _squared_change(start: Factors, end: Factors) -> float:
    b = torch.cat([end.b.double() * end.scale, start.b.double() * -start.scale], dim=1)
    a = torch.cat([end.a.double(), start.a.double()])
    squared = float(((b.T @ b) * (a @ a.T)).sum())
    return 0.0 if squared < 0 else squared  # rounding; NaN stays
