"""An independent implementation of a client's round: PEFT, PyTorch, one tensor at a time."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import peft
import torch

from fedlora.core.choice import Indices
from fedlora.core.seeding import dropout_seeds, generator
from fedlora.core.types import Adapter, Factors, LocalPlan
from fedlora.models import layers
from fedlora.techniques.lora.payload import LowRankPayload
from tests.fedlora.engine.world import NETWORKS, SEED, FakeExample
from tests.fedlora.models.networks import ALPHA


class SameDropout(torch.nn.Module):
    """Drops the same numbers as the resident model: a mask for every forward and module."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x):
        return layers.dropout(x, self.p, self.bits)


def peft_network(name: str, factors: Adapter, dropout: float) -> tuple[Any, dict[str, Any]]:
    """The network under PEFT, and its adapted layers by module path."""
    twin = peft.get_peft_model(
        NETWORKS[name](),
        peft.LoraConfig(
            r=1,
            lora_alpha=ALPHA,
            target_modules=list(factors),
            rank_pattern={p: f.rank for p, f in factors.items()},
            fan_in_fan_out=name == "gpt2",
        ),
    ).double()
    twin.eval()
    adapted = {p: twin.base_model.model.get_submodule(p) for p in factors}
    for p, f in factors.items():
        if dropout:
            adapted[p].lora_dropout["default"] = SameDropout(dropout)
        adapted[p].lora_A["default"].weight.data = f.a.clone()
        adapted[p].lora_B["default"].weight.data = f.b.clone()
    return twin, adapted


def padded(batch: Sequence[FakeExample], loss: str) -> tuple[torch.Tensor, ...]:
    """Input ids, attention mask and labels as every PyTorch tutorial builds them."""
    width = max(len(e.input_ids) for e in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.int64)
    mask = torch.zeros(len(batch), width, dtype=torch.int64)
    labels = torch.full((len(batch), width), -100)
    for i, e in enumerate(batch):
        n = len(e.input_ids)
        ids[i, :n] = torch.tensor(e.input_ids)
        mask[i, :n] = 1
        labels[i, :n] = ids[i, :n]
        if loss == "response":
            labels[i, : e.prompt_tokens] = -100
    return ids, mask, labels


def epochs(n: int, plan: LocalPlan, key: tuple[int, int, int]) -> Iterator[np.ndarray]:
    """The rows of every optimizer step, without end."""
    order = generator(key[0], "order", *key[1:])
    while True:
        p = order.permutation(n)
        yield from (p[i : i + plan.batch_size] for i in range(0, n, plan.batch_size))


def optimizer_of(trained: list[torch.nn.Parameter], plan: LocalPlan) -> torch.optim.Optimizer:
    if plan.optimizer == "adamw":
        return torch.optim.AdamW(
            trained, plan.lr, plan.betas, plan.eps, plan.weight_decay, foreach=False
        )
    return torch.optim.SGD(
        trained, plan.lr, plan.momentum, weight_decay=plan.weight_decay, foreach=False
    )


def schedule_of(optimizer: torch.optim.Optimizer, plan: LocalPlan, total: int) -> Any:
    warm = round(plan.warmup * total)

    def factor(i: int) -> float:
        if i < warm:
            return (i + 1) / (warm + 1)
        left = 1 - (i - warm) / max(1, total - warm)
        cosine = 0.5 * (1 - math.cos(math.pi * left))
        return {"linear": max(0.0, left), "cosine": cosine, "constant": 1.0}[plan.schedule]

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def reference(
    name: str,
    factors: Adapter,
    plan: LocalPlan,
    held: Sequence[FakeExample],
    *,
    seed: int = SEED,
    round: int = 3,
    client: int = 0,
    indices: Indices | None = None,
) -> tuple[Adapter, list[float]]:
    """A client trained by PEFT, a per-tensor optimizer, LambdaLR, clip_grad_norm_ and padding.

    With ``indices``, gradients of all other rank indices are set to zero before they are clipped,
    and after each step these indices are set to where they began.

    Returns:
        The trained adapter, and the mean loss per token of every optimizer step.
    """
    twin, adapted = peft_network(name, factors, plan.dropout)
    for layer in adapted.values():
        layer.lora_A["default"].weight.requires_grad_(plan.train_a)
        layer.lora_B["default"].weight.requires_grad_(plan.train_b)
    trained = [p for p in twin.parameters() if p.requires_grad]
    still = [] if indices is None else left_out(adapted, indices)
    optimizer = optimizer_of(trained, plan)
    total = plan.steps or plan.epochs * math.ceil(len(held) / plan.batch_size)
    schedule = schedule_of(optimizer, plan, total)
    masks = Masks(twin, adapted, plan, dropout_seeds(seed, round, client))
    losses = []
    for rows in itertools.islice(epochs(len(held), plan, (seed, round, client)), total):
        optimizer.zero_grad()
        losses.append(backward(twin, [held[i] for i in rows], plan, masks))
        for p, out, _ in still:
            if p.grad is not None:
                p.grad[out] = 0.0
        if plan.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(trained, plan.max_grad_norm)
        optimizer.step()
        with torch.no_grad():
            for p, out, before in still:
                p[out] = before[out]
        schedule.step()
    result = LowRankPayload(
        {
            p: Factors(
                layer.lora_A["default"].weight.detach(),
                layer.lora_B["default"].weight.detach(),
                ALPHA,
            )
            for p, layer in adapted.items()
        }
    )
    return result, losses


def left_out(
    adapted: Mapping[str, Any], indices: Indices
) -> list[tuple[torch.nn.Parameter, torch.Tensor, torch.Tensor]]:
    """Every factor, which of its scalars are of no chosen index, and its values before training."""
    found = []
    for path, layer in adapted.items():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        out_a, out_b = (torch.ones_like(p, dtype=torch.bool) for p in (a, b))
        for i in indices[path]:
            out_a[i, :] = False
            out_b[:, i] = False
        found += [(p, out, p.detach().clone()) for p, out in ((a, out_a), (b, out_b))]
    return found


class Masks:
    """Gives every adapted layer the dropout masks of the next forward."""

    def __init__(
        self, twin: Any, adapted: dict[str, Any], plan: LocalPlan, seeds: Iterator[int]
    ) -> None:
        network = twin.base_model.model
        self._paths = [path for path, layer in network.named_modules() if is_adaptable(path, layer)]
        self._widths = [d_in(network.get_submodule(path)) for path in self._paths]
        self._adapted, self._plan, self._seeds = adapted, plan, seeds

    def draw(self, mask: Any) -> None:
        """Bits for the tokens, row after row; zeros for the padding."""
        mask = mask.bool().flatten()
        seed, tokens = next(self._seeds), int(mask.sum())
        drawn = layers.dropout_bits(tokens, self._widths, seed, torch.device("cpu"))
        for path, bits in zip(self._paths, drawn, strict=True):
            if path in self._adapted and self._plan.dropout:
                rows = bits.new_zeros(len(mask), bits.shape[1])
                rows[mask] = bits
                self._adapted[path].lora_dropout["default"].bits = rows


def backward(twin: Any, batch: Sequence[FakeExample], plan: LocalPlan, masks: Masks) -> float:
    """Accumulate the gradient of one optimizer step; its mean loss per token."""
    micro, loss = plan.micro_batch_size or plan.batch_size, 0.0
    prepared = [padded(batch[i : i + micro], plan.loss) for i in range(0, len(batch), micro)]
    tokens = sum(int((labels[:, 1:] != -100).sum()) for *_, labels in prepared)
    for ids, mask, labels in prepared:
        masks.draw(mask[:, 1:])
        if plan.dropout:  # the same shapes, so that the same random numbers fall alike
            logits = twin(input_ids=ids[:, :-1]).logits
        else:
            logits = twin(input_ids=ids, attention_mask=mask).logits[:, :-1]
        nll = torch.nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1), reduction="sum"
        )
        (nll / tokens).backward()
        loss += nll.item() / tokens
    return loss


def is_adaptable(path: str, layer: torch.nn.Module) -> bool:
    """Whether it is one of the network's own linear layers, adapted or not."""
    linear = isinstance(layer, torch.nn.Linear) or type(layer).__name__ == "Conv1D"
    inner = ".lora_" in path or path.endswith(".base_layer") or path == "lm_head"
    return (linear and not inner) or hasattr(layer, "base_layer")


def d_in(layer: torch.nn.Module) -> int:
    """Width of a linear layer's input."""
    base = getattr(layer, "base_layer", layer)
    return base.in_features if isinstance(base, torch.nn.Linear) else base.weight.shape[0]
