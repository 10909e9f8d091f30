"""One client's optimisation, in plain PyTorch.

A step minimises the mean cross-entropy over the supervised tokens of its whole batch, however the
batch is cut into forward passes, plus the plan's penalty and local term. All trainable tensors live
in one flat buffer (`fedlora.training.flat`).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from fedlora.core.choice import Indices
from fedlora.core.rates import learning_rates
from fedlora.core.seeding import dropout_seeds
from fedlora.core.types import LocalPlan
from fedlora.data.batches import (
    Batch,
    TokenExample,
    lengths_of,
    micro_batches,
    num_steps,
    step_indices,
)
from fedlora.models.language_model import LanguageModel
from fedlora.training.flat import ChosenScalars, FlatParameters, trained_state
from fedlora.training.gradient import add_gradient
from fedlora.training.private import add_private_gradient


@dataclass(frozen=True)
class Trace:
    """Losses, tokens and gradient norms of a client's optimizer steps."""

    losses: tuple[float, ...]
    """Mean cross-entropy of the step's supervised tokens, without any penalty."""
    tokens: tuple[int, ...]
    """Supervised tokens of the step."""
    grad_norms: tuple[float, ...]
    """Global gradient norm before clipping."""
    delta_norm: float
    """Euclidean norm of the change of all trained parameters."""

    @staticmethod
    def of(
        losses: Sequence[Tensor], tokens: Sequence[int], norms: Sequence[Tensor], change: Tensor
    ) -> "Trace":
        """Build a trace from scalars on a device, in one transfer: each transfer has to wait for
        the device."""
        numbers = torch.stack([*losses, *norms, change]).tolist()
        steps = len(losses)
        return Trace(tuple(numbers[:steps]), tuple(tokens), tuple(numbers[steps:-1]), numbers[-1])

    def metrics(self) -> dict[str, float]:
        """The metrics of the round; ``loss`` is the mean over tokens."""
        tokens = sum(self.tokens)
        total = math.fsum(x * n for x, n in zip(self.losses, self.tokens, strict=True))
        return {
            "loss": total / max(1, tokens),  # private steps may all be empty
            "loss_first": self.losses[0],
            "loss_last": self.losses[-1],
            "steps": float(len(self.losses)),
            "tokens": float(tokens),
            "grad_norm": math.fsum(self.grad_norms) / len(self.grad_norms),
            "delta_norm": self.delta_norm,
        }


def optimizer_for(plan: LocalPlan, buffers: list[nn.Parameter]) -> torch.optim.Optimizer:
    """A fresh optimizer. Fused AdamW is one kernel per buffer, on CPU as on GPU."""
    if plan.optimizer == "adamw":
        return torch.optim.AdamW(
            buffers,
            lr=plan.lr,
            betas=plan.betas,
            eps=plan.eps,
            weight_decay=plan.weight_decay,
            fused=True,
        )
    return torch.optim.SGD(
        buffers, lr=plan.lr, momentum=plan.momentum, weight_decay=plan.weight_decay
    )


class Stepper:
    """A fresh optimizer of flat buffers, or of the scalars in them that train.

    Args:
        plan: optimizer and clipping.
        buffers: with gradients.
        masks: ``[n]`` bool of each buffer: its scalars that train; None: all.
    """

    def __init__(
        self, plan: LocalPlan, buffers: list[nn.Parameter], masks: Sequence[Tensor] | None = None
    ) -> None:
        self._chosen = None if masks is None else ChosenScalars(buffers, masks)
        self._buffers = buffers if self._chosen is None else self._chosen.buffers
        self.optimizer = optimizer_for(plan, self._buffers)
        self._max_grad_norm = plan.max_grad_norm

    def step(self, rate: float) -> Tensor:
        """Clip the gradients and take one step at a learning rate; the global gradient norm before
        clipping, a scalar."""
        if self._chosen is not None:
            self._chosen.gather()
        norm = clip_and_step(self.optimizer, self._buffers, rate, self._max_grad_norm)
        if self._chosen is not None:
            self._chosen.scatter()
        return norm


def optimise(
    model: LanguageModel,
    parameters: Sequence[nn.Parameter],
    examples: Sequence[TokenExample],
    plan: LocalPlan,
    *,
    seed: int,
    round: int,
    client: int,
    chosen: Indices | None = None,
) -> Trace:
    """Train the mounted parameters in place as the plan says.

    Args:
        model: the parameters are mounted on it.
        parameters: those that are trained.
        examples: at least one.
        plan: optimizer, steps and loss.
        seed: of the run; ``seed``, ``round`` and ``client`` decide the order of the examples and
            the dropout masks.
        round: counted from 1.
        client: the client's id.
        chosen: rank indices that train of every pair of factors; None: all.

    Raises:
        FloatingPointError: naming step and loss, if a loss or the result is not finite.
    """
    flat = FlatParameters(parameters)
    masks = None if chosen is None else flat.masks(model, chosen)
    stepper = Stepper(plan, flat.buffers, masks)
    rates = learning_rates(num_steps(len(examples), plan), plan)
    stream = {"seed": seed, "round": round, "client": client}
    order = step_indices(len(examples), plan, **stream, lengths=lengths_of(examples))
    losses, norms, tokens = [], [], []
    seeds = dropout_seeds(seed, round, client)
    state = None if plan.term is None else trained_state(model, flat)
    try:
        for step, (rate, indices) in enumerate(zip(rates, order, strict=True)):
            if plan.privacy is None:
                batches = micro_batches(examples, indices, plan, model.collate)
                tokens.append(sum(b.tokens for b in batches))
                flat.zero_grad()
                losses.append(backward(model, batches, seeds, tokens[-1], plan))
            else:
                drawn = [examples[i] for i in indices]
                loss, own = add_private_gradient(
                    model, flat, drawn, plan, seeds, step=step, stream=stream
                )
                add_penalty(model, plan)
                tokens.append(own)
                losses.append(loss)
            if plan.term is not None and state is not None:
                with torch.no_grad():
                    plan.term.add_gradient(state)
            norms.append(stepper.step(rate))
        change = flat.change()
    finally:
        flat.release()
    trace = Trace.of(losses, tokens, norms, change)
    check_trace(trace, plan)
    return trace


def backward(
    model: LanguageModel,
    batches: Sequence[Batch],
    seeds: Iterator[int],
    tokens: int,
    plan: LocalPlan,
) -> Tensor:
    """Add the gradient of one step's loss to the parameters: `add_gradient`, and of the penalty.

    Returns:
        The mean cross-entropy of the step without the penalty, a detached scalar.

    Raises:
        ValueError: under a plan with privacy, which a mean over a batch does not give.
    """
    if plan.privacy is not None:
        raise ValueError(f"{plan.technique.key}: its own steps have no gradients by example")
    loss = add_gradient(model, batches, seeds, tokens, plan)
    add_penalty(model, plan)
    return loss


def add_penalty(model: LanguageModel, plan: LocalPlan) -> None:
    """Add the gradient of the technique's penalty, if it has one."""
    if plan.technique.penalises:
        plan.technique.penalty(model.parameters()).backward()


def clip_and_step(
    optimizer: torch.optim.Optimizer,
    buffers: Sequence[nn.Parameter],
    rate: float,
    max_grad_norm: float,
) -> Tensor:
    """Clip the gradients and take one optimizer step at a learning rate.

    Returns:
        The global gradient norm before clipping, a scalar.
    """
    norm = get_total_norm([b.grad for b in buffers if b.grad is not None])
    if max_grad_norm > 0:
        clip_grads_with_norm_(buffers, max_grad_norm, norm)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    return norm


def check_trace(trace: Trace, plan: LocalPlan) -> None:
    """Raise a FloatingPointError that names the first step whose loss is not finite."""
    steps = len(trace.losses)
    setting = (
        f"client.optimizer={plan.optimizer}, client.lr={plan.lr}, "
        f"client.max_grad_norm={plan.max_grad_norm}"
    )
    for step, loss in enumerate(trace.losses, 1):
        if not math.isfinite(loss):
            raise FloatingPointError(f"loss is {loss} at step {step} of {steps} ({setting})")
    if not math.isfinite(trace.delta_norm):
        raise FloatingPointError(
            f"the update is not finite after step {steps}, whose loss was {trace.losses[-1]} "
            f"({setting})"
        )
