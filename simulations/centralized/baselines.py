"""SPP and its baselines: each is mounted on a pruned model and trained without federation."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedlora.algebra.init import initial_a
from fedlora.core.types import Factors
from fedlora.data.batches import TokenExample, collate
from fedlora.models.forward import supervised_logits
from fedlora.models.language_model import LanguageModel
from fedlora.models.layers import dense_weight
from fedlora.techniques.lora.layer import LowRank
from fedlora.techniques.lora.payload import LowRankPayload
from fedlora.techniques.sparse.layer import SparseValues
from fedlora.techniques.spp.payload import MaskedScale

BATCH = 4


@dataclass(frozen=True)
class Start:
    """The trained parameters."""

    rank: int = 16
    alpha: float = 16.0
    """The scale is ``alpha / rank``."""
    dropout: float = 0.0
    """The adapter of ``spp`` and ``lora``; None for the masked baselines."""
    seed: int = 0


Mount = Callable[[LanguageModel, Start], list[nn.Parameter]]


class MaskedLowRank(LowRank):
    """``W + M ∘ (alpha / r) B A`` where ``M`` is one where ``W`` is not zero (as in SQFT,
    arXiv:2410.03750)."""

    def __call__(self, x: Tensor, base: nn.Module) -> Tensor:
        """Any leading shape: ``x [..., d_in]`` to ``[..., d_out]``."""
        bias: Any = base.bias
        return functional.linear(x, self.weight(base).to(x.dtype), bias)

    def weight(self, base: nn.Module) -> Tensor:
        """The effective weight, ``[d_out, d_in]``, in the factors' type."""
        w = dense_weight(base)
        return w + (w != 0) * (self.scale * (self.b @ self.a))


def mount_spp(model: LanguageModel, start: Start) -> list[nn.Parameter]:
    """Mount SPP with the initial alpha and beta."""
    modules = model.info.modules
    payload = MaskedScale(
        model.info.mask,
        start.alpha,
        {m.path: start.rank for m in modules},
        {m.path: initial_a(start.seed, m, start.rank) for m in modules},
        {m.path: torch.zeros(m.d_out) for m in modules},
    )
    return model.mount(payload, dropout=start.dropout)


def mount_lora(model: LanguageModel, start: Start) -> list[nn.Parameter]:
    """Mount LoRA with the initial A and B."""
    return model.mount(_factors(model, start), dropout=start.dropout)


def mount_masked_lora(model: LanguageModel, start: Start) -> list[nn.Parameter]:
    """Mount masked LoRA."""
    model.unmount()
    for path, f in _factors(model, start).items():
        model.layers[path].update = MaskedLowRank(f, 0.0, model.device, model.dtype)
    return _parameters(model)


def mount_masked_full(model: LanguageModel, start: Start) -> list[nn.Parameter]:
    """Make every nonzero weight trainable; rank and alpha are not used."""
    model.unmount()
    for layer in model.layers.values():
        index = (layer.weight != 0).reshape(-1).nonzero().squeeze(1)
        layer.update = SparseValues(torch.zeros(len(index)), index, model.dtype)
    return _parameters(model)


METHODS: Mapping[str, Mount | None] = {
    "spp": mount_spp,
    "lora": mount_lora,
    "masked_lora": mount_masked_lora,
    "masked_full": mount_masked_full,
    "none": None,
}


def _factors(model: LanguageModel, start: Start) -> LowRankPayload:
    factors = {
        m.path: Factors(
            initial_a(start.seed, m, start.rank), torch.zeros(m.d_out, start.rank), start.alpha
        )
        for m in model.info.modules
    }
    return LowRankPayload(factors)


def _parameters(model: LanguageModel) -> list[nn.Parameter]:
    updates = [layer.update for layer in model.layers.values()]
    return [p for u in updates if u is not None for p in u.parameters()]


@torch.no_grad()
def loss_of(model: LanguageModel, held: Sequence[TokenExample], loss: str = "full") -> float:
    """Mean loss per token, in nats, with the mounted parameters."""
    total, tokens = 0.0, 0
    for i in range(0, len(held), BATCH):
        batch = collate(held[i : i + BATCH], loss)
        logits = supervised_logits(model.network, batch)
        total += float(functional.cross_entropy(logits, batch.targets, reduction="sum"))
        tokens += batch.tokens
    return total / max(tokens, 1)


def bake(model: LanguageModel) -> None:
    """Make what is mounted the base's own weights."""
    for layer in model.layers.values():
        if layer.update is not None:
            weight = layer.stored_weight(layer.update)
            layer.base.weight = nn.Parameter(weight, requires_grad=False)
    model.unmount()
