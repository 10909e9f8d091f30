"""An independent implementation of a client's round on cores, in plain PyTorch."""

import itertools
import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from fedlora.core.rates import learning_rates
from fedlora.core.seeding import dropout_seeds
from fedlora.core.types import LocalPlan
from fedlora.data.batches import step_indices
from fedlora.techniques.cores.payload import CorePayload, fixed
from tests.fedlora.engine import labelled
from tests.fedlora.engine.peft_loop import (
    Masks,
    SameDropout,
    backward,
    epochs,
    optimizer_of,
    schedule_of,
)
from tests.fedlora.engine.world import SEED, FakeExample


class Beside(nn.Module):
    """``base(x) + s U diag(g_i R_i) V dropout(x)`` in as many words."""

    def __init__(self, base: nn.Module, start: CorePayload, path: str, p: float) -> None:
        super().__init__()
        core = start.cores[path]
        self.base_layer = base  # as PEFT calls it, so that `peft_loop.Masks` knows the layer
        self.lora_dropout = {"default": SameDropout(p) if p else nn.Identity()}
        u, v = fixed(start.seed, path, core, torch.float64, torch.device("cpu"))
        self.register_buffer("u", u.clone())
        self.register_buffer("v", v.clone())
        self.scale = start.alpha / core.rank
        self.blocks = nn.ParameterList(b.clone().double() for b in core.blocks)
        self.g = nn.Parameter(torch.ones(len(core.blocks), dtype=torch.float64))
        self.g.requires_grad_(start.gains)

    def core(self) -> Tensor:
        rank = len(self.v)
        r, at = torch.zeros(rank, rank, dtype=torch.float64), 0
        for g, block in zip(self.g, self.blocks, strict=True):
            whole = torch.zeros_like(r)
            whole[at : at + len(block), at : at + len(block)] = g * block
            r, at = r + whole, at + len(block)
        return r

    def forward(self, x: Tensor) -> Tensor:
        seen = self.lora_dropout["default"](x)
        return self.base_layer(x) + self.scale * (seen @ self.v.T @ self.core().T @ self.u.T)


class Twin:
    """A network where `peft_loop` expects PEFT's."""

    def __init__(self, network: Any) -> None:
        self.base_model = SimpleNamespace(model=network)

    def __call__(self, **inputs: Tensor) -> Any:
        return self.base_model.model(**inputs)


def beside(network: Any, start: CorePayload, p: float) -> dict[str, Beside]:
    """Put cores on a network, in place; by module path."""
    network.double().requires_grad_(False).eval()
    found = {}
    for path in start.cores:
        parent, _, name = path.rpartition(".")
        found[path] = Beside(network.get_submodule(path), start, path, p)
        setattr(network.get_submodule(parent), name, found[path])
    return found


def reference(
    network: Any, start: CorePayload, plan: LocalPlan, held: Sequence[FakeExample], client: int
) -> dict[str, Tensor]:
    """A client of a language model, trained by a per-tensor optimizer.

    Returns:
        Module path -> ``s R`` as it ended.
    """
    cores = beside(network, start, plan.dropout)
    twin = Twin(network)
    masks = Masks(twin, cores, plan, dropout_seeds(SEED, 3, client))
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = optimizer_of(trained, plan)
    total = plan.steps or plan.epochs * math.ceil(len(held) / plan.batch_size)
    schedule = schedule_of(optimizer, plan, total)
    for rows in itertools.islice(epochs(len(held), plan, (SEED, 3, client)), total):
        optimizer.zero_grad()
        backward(twin, [held[i] for i in rows], plan, masks)
        if plan.max_grad_norm:
            nn.utils.clip_grad_norm_(trained, plan.max_grad_norm)
        optimizer.step()
        schedule.step()
    return {path: (c.scale * c.core()).detach() for path, c in cores.items()}


def labelled_reference(
    network: Any,
    start: CorePayload,
    plan: LocalPlan,
    held: Sequence[Any],
    client: int,
    head: Callable[[Any], Sequence[nn.Parameter]],
) -> dict[str, Tensor]:
    """The same of a classifier, without dropout; its ``head`` trains beside the cores."""
    cores = beside(network, start, 0.0)
    for parameter in head(network):
        parameter.requires_grad_(True)
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = optimizer_of(trained, plan)
    order = step_indices(len(held), plan, seed=SEED, round=3, client=client)
    types = getattr(network.config, "type_vocab_size", 0) > 1
    for rate, indices in zip(learning_rates(plan.steps, plan), order, strict=True):
        optimizer.zero_grad()
        network(**labelled.padded([held[i] for i in indices], types)).loss.backward()
        nn.utils.clip_grad_norm_(trained, plan.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    return {path: (c.scale * c.core()).detach() for path, c in cores.items()}
