"""A technique that fedlora has never heard of: ``ΔW = s a bᵀ ∘ mask``, all of it in this file."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from fedlora.algebra.linalg import shares
from fedlora.algebra.state import Kept, State
from fedlora.core.checks import wrong_names
from fedlora.core.payload import Payload
from fedlora.core.seeding import mask_noise
from fedlora.core.technique import Technique
from fedlora.core.types import Client, Expected, Ranks, Setting, TrainJob, Update
from fedlora.models.layers import LinearUpdate, dense_weight
from fedlora.training.local import train_mounted
from strategies.base import LoRAStrategy

FILE = "outer.safetensors"


class OuterLayer(LinearUpdate):
    """``y = (W + s a bᵀ ∘ mask) x``."""

    def __init__(self, a: Tensor, b: Tensor, mask: Tensor, scale: float) -> None:
        self.a, self.b = (nn.Parameter(t.detach().clone()) for t in (a, b))
        self.mask, self.scale = mask, scale

    def __call__(self, x: Tensor, base: nn.Module) -> Tensor:
        bias: Any = base.bias
        return functional.linear(x, self.weight(base).to(x.dtype), bias)

    def parameters(self) -> list[nn.Parameter]:
        return [self.a, self.b]

    def weight(self, base: nn.Module) -> Tensor:
        return dense_weight(base) + self.scale * torch.outer(self.a, self.b) * self.mask


@dataclass(frozen=True)
class MaskedOuter(Payload):
    """``a [d_out]`` and ``b [d_in]`` by module path; the mask follows from the seed."""

    noun = "a MaskedOuter"
    alone = "masked outer products one by one"

    seed: int
    scale: float
    a: Mapping[str, Tensor]
    b: Mapping[str, Tensor]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for path in self.a:
            yield f"{path}/a", self.a[path]
            yield f"{path}/b", self.b[path]

    def header(self) -> dict[str, Any]:
        return {"seed": self.seed, "scale": self.scale, "modules": list(self.a)}

    @classmethod
    def from_header(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        a, b = ({p: tensors[f"{p}/{name}"] for p in header["modules"]} for name in "ab")
        return cls(header["seed"], header["scale"], a, b)

    def check(self, sender: Client, expected: Expected) -> str:
        start = expected.start
        assert isinstance(start, MaskedOuter)
        if (self.seed, self.scale) != (start.seed, start.scale):
            return f"seed {self.seed} and scale {self.scale}, not {start.seed} and {start.scale}"
        if wrong := wrong_names(self.a, start.a):
            return wrong
        due = dict(start.tensors())
        for name, t in self.tensors():
            if t.shape != due[name].shape:
                return f"{name} is {tuple(t.shape)}, expected {tuple(due[name].shape)}"
        return ""

    def change_norm(self, start: Payload) -> float:
        assert isinstance(start, MaskedOuter)
        return math.sqrt(
            sum(float((self._dense(p) - start._dense(p)).square().sum()) for p in self.a)
        )

    def _mask(self, path: str) -> Tensor:
        return mask_noise(self.seed, path, len(self.a[path]), len(self.b[path])) < 0.5

    def _dense(self, path: str) -> Tensor:
        return self.scale * torch.outer(self.a[path], self.b[path]) * self._mask(path)

    def updates(self, model: Any, dropout: float = 0.0) -> dict[str, LinearUpdate]:
        return {
            p: OuterLayer(a.to(model.dtype), self.b[p].to(model.dtype), self._mask(p), self.scale)
            for p, a in self.a.items()
        }

    def read(self, updates: Mapping[str, Any]) -> "MaskedOuter":
        a, b = ({p: getattr(u, name).detach().clone() for p, u in updates.items()} for name in "ab")
        return replace(self, a=a, b=b)

    def export(self, folder: Path, info: Any, base_name: str = "", dropout: float = 0.0) -> str:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({n: t.contiguous() for n, t in self.tensors()}, folder / FILE)
        (folder / "toy.txt").write_text(f"{self.seed} {self.scale}")
        return "a toy was exported"

    @classmethod
    def load(cls, folder: Path, info: Any) -> "MaskedOuter":
        seed, scale = (folder / "toy.txt").read_text().split()
        header = {
            "seed": int(seed),
            "scale": float(scale),
            "modules": [m.path for m in info.modules],
        }
        return cls.from_header(header, load_file(folder / FILE))


@dataclass(frozen=True)
class Outer(Technique):
    """Trains both vectors, if the second is not frozen."""

    freeze_b: bool = False

    key = "client/technique=outer"
    does = "trains masked outer products"
    averaged = "masked outer products"
    client = "client/technique=outer"
    strategy = "strategy=outer"

    def train(self, model: Any, job: TrainJob, examples: Sequence[Any]) -> tuple[Payload, Any]:
        payload, trace = train_mounted(model, job, examples)
        assert isinstance(payload, MaskedOuter) and isinstance(job.start, MaskedOuter)
        return (replace(payload, b=job.start.b) if self.freeze_b else payload), trace


@dataclass(frozen=True, eq=False, kw_only=True)
class OuterMean(LoRAStrategy):
    """Averages a and b, each by itself."""

    technique = Outer

    scale: float = 0.5

    def init_state(self, setting: Setting) -> State:
        state: dict[str, Tensor] = {"seed": torch.tensor(setting.seed)}
        for m in setting.modules:
            state[f"{m.path}/a"] = torch.zeros(m.d_out)
            state[f"{m.path}/b"] = torch.linspace(-0.2, 0.3, m.d_in)
        return state

    def client_start(self, state: State, client: Client, kept: Kept | None = None) -> MaskedOuter:
        return self.global_update(state)

    def aggregate(self, state: State, updates: Sequence[Update]) -> State:
        p = shares([u.num_examples for u in updates])
        sent = [dict(u.payload.tensors()) for u in updates]
        mean = {n: sum(w * s[n] for w, s in zip(p, sent, strict=True)) for n in sent[0]}
        return dict(state) | mean

    def global_update(self, state: State, ranks: Ranks | None = None) -> MaskedOuter:
        a, b = ({k[:-2]: t for k, t in state.items() if k.endswith(f"/{name}")} for name in "ab")
        return MaskedOuter(int(state["seed"]), self.scale, a, b)
