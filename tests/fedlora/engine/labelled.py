"""A small exact world of classifiers, and the plain PEFT loop that they are measured by."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import peft
import torch
from torch import Tensor

from fedlora.core.rates import learning_rates
from fedlora.core.types import Adapter, Factors, LocalPlan
from fedlora.data.batches import step_indices
from tests.fedlora.engine.world import SEED
from tests.fedlora.models.classifiers import PAD, Labelled


def padded(held: Sequence[Labelled], types: bool) -> dict[str, Tensor]:
    """A batch as a tokenizer's ``pad`` and a user's collator make it."""
    width = max(len(e.input_ids) for e in held)
    rows = [[*e.input_ids.tolist(), *[PAD] * (width - len(e.input_ids))] for e in held]
    mask = [[1] * len(e.input_ids) + [0] * (width - len(e.input_ids)) for e in held]
    batch = {"input_ids": rows, "attention_mask": mask, "labels": [e.label for e in held]}
    if types:
        batch["token_type_ids"] = [
            [int(e.prompt_tokens <= t < len(e.input_ids)) for t in range(width)] for e in held
        ]
    return {name: torch.tensor(np.array(values)) for name, values in batch.items()}


def peft_model(network: Any, start: Adapter, heads: Sequence[str]) -> Any:
    """PEFT's model for sequence classification with these factors, all of one rank and alpha.

    Args:
        network: a plain one; changed in place.
        start: the factors.
        heads: modules to save, which PEFT then trains.
    """
    first = next(iter(start.values()))
    config = peft.LoraConfig(
        task_type="SEQ_CLS",
        r=first.rank,
        lora_alpha=first.alpha,
        target_modules=list(start),
        lora_dropout=0.0,
        modules_to_save=list(heads),
    )
    model = peft.get_peft_model(network, config).double().eval()
    with torch.no_grad():
        for path, f in start.items():
            layer = model.base_model.model.get_submodule(path)
            layer.lora_A["default"].weight.copy_(f.a)
            layer.lora_B["default"].weight.copy_(f.b)
    return model


def peft_loop(
    model: Any, held: Sequence[Labelled], plan: LocalPlan, *, round: int, client: int, heads: bool
) -> list[float]:
    """Train as anybody would with PEFT: AdamW, one batch a step, clipped gradients.

    Args:
        model: of `peft_model`; without dropout.
        held: the client's examples.
        plan: of its round; AdamW.
        round: its number.
        client: whose order of examples.
        heads: whether the modules to save train.

    Returns:
        The loss of each step.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or (heads and "modules_to_save" in name))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, betas=plan.betas, eps=plan.eps, weight_decay=plan.weight_decay
    )
    order = step_indices(len(held), plan, seed=SEED, round=round, client=client)
    types = getattr(model.config, "type_vocab_size", 0) > 1
    losses = []
    for rate, indices in zip(learning_rates(plan.steps, plan), order, strict=True):
        optimizer.zero_grad()
        loss = model(**padded([held[i] for i in indices], types)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, plan.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def factors_of(model: Any, like: Adapter) -> dict[str, Factors]:
    """The factors of a PEFT model."""
    layers = {path: model.base_model.model.get_submodule(path) for path in like}
    return {
        path: Factors(
            layer.lora_A["default"].weight.detach().clone(),
            layer.lora_B["default"].weight.detach().clone(),
            like[path].alpha,
        )
        for path, layer in layers.items()
    }
