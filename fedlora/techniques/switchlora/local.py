"""A client that switches vectors by itself while it trains, and sends the change of its weights.

Its candidate vectors are a function of the seed and the round, so they are not sent. What they have
learned is lost at the end of the round.
"""

from collections.abc import Sequence

import torch
from torch import nn

from fedlora.core.rates import learning_rates
from fedlora.core.seeding import dropout_seeds
from fedlora.core.types import TrainJob
from fedlora.data.batches import (
    TokenExample,
    lengths_of,
    micro_batches,
    num_steps,
    step_indices,
)
from fedlora.models.language_model import LanguageModel
from fedlora.techniques.rebased.layer import Rebuilt
from fedlora.techniques.rebased.payload import Rebased
from fedlora.techniques.switchlora.controller import SwitchController
from fedlora.techniques.switchlora.init import Side, draw_start
from fedlora.techniques.switchlora.layer import SwitchLayer
from fedlora.techniques.switchlora.optimizer import RowAdamW
from fedlora.techniques.switchlora.schedule import Switching
from fedlora.training.loop import (
    Trace,
    backward,
    check_trace,
    clip_and_step,
)

NO_START = (
    "client.term refers to the factors that a client starts from, and a client that switches "
    "vectors replaces them during the round: use client/term=none"
)


def train_switching(
    model: LanguageModel,
    job: TrainJob,
    examples: Sequence[TokenExample],
    switching: Switching,
) -> tuple[Rebased, Trace]:
    """Train a job's start as its plan says, with switches.

    Args:
        model: resident; the start stays mounted on it.
        job: the job.
        examples: of its client.
        switching: how vectors are switched.

    Returns:
        The difference of the effective weights from the base's, ``[d_out, d_in]`` by module path,
        and the trace of the steps.

    Raises:
        TypeError: if the job does not start from factors over a moved base.
        ValueError: if the plan has a local term.
        FloatingPointError: naming step and loss, if a loss or the result is not finite.
    """
    plan = job.plan
    if plan.term is not None:
        raise ValueError(NO_START)

    # Layers and their trained factors A [r, d_in] and B [d_out, r], by module path.
    model.mount(job.start, dropout=plan.dropout, train_a=plan.train_a, train_b=plan.train_b)
    layers = {path: _layer(path, layer.update, job) for path, layer in model.layers.items()}
    parameters: dict[str, dict[Side, nn.Parameter]] = {
        path: {"a": a, "b": b} for path, (a, b) in zip(layers, model.parameters(), strict=True)
    }
    controller = SwitchController(layers, parameters, switching, switching.total, job.seed)
    optimizer = RowAdamW(
        controller.groups(), plan.lr, plan.betas, plan.eps, weight_decay=plan.weight_decay
    )

    # Effective weights [d_out, d_in] before and after training. A client sends their difference
    # from the base; the trace holds the norm of their change.
    before = {path: layer.effective() for path, layer in layers.items()}
    trace = _steps(model, controller, optimizer, examples, job)
    shift = {
        path: layer.update.change(layer.base)
        for path, layer in model.layers.items()
        if isinstance(layer.update, Rebuilt)
    }
    moved = sum(float((x.effective() - before[p]).square().sum()) for p, x in layers.items())
    trace = Trace(trace.losses, trace.tokens, trace.grad_norms, moved**0.5)
    check_trace(trace, plan)
    return Rebased(shift), trace


def _steps(
    model: LanguageModel,
    controller: SwitchController,
    optimizer: RowAdamW,
    examples: Sequence[TokenExample],
    job: TrainJob,
) -> Trace:
    """All optimizer steps; the change in the trace is still zero."""
    plan, switching = job.plan, controller.switching
    where = {"seed": job.seed, "round": job.round, "client": job.client.id}
    rates = learning_rates(num_steps(len(examples), plan), plan)
    order = step_indices(len(examples), plan, **where, lengths=lengths_of(examples))
    seeds = dropout_seeds(job.seed, job.round, job.client.id)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    losses, norms, tokens = [], [], []
    for step, (rate, indices) in enumerate(zip(rates, order, strict=True)):
        batches = micro_batches(examples, indices, plan, model.collate)
        tokens.append(sum(b.tokens for b in batches))
        optimizer.zero_grad()
        losses.append(backward(model, batches, seeds, tokens[-1], plan))
        # Switches lie between the backward pass and the optimizer step (see `SwitchController`).
        controller.before_step(switching.first + step, optimizer)
        norms.append(clip_and_step(optimizer, trained, rate, plan.max_grad_norm))
    return Trace.of(losses, tokens, norms, torch.zeros_like(losses[0]))


def start_layer(
    path: str, shape: tuple[int, int], rank: int, alpha: float, seed: int, turn: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """``A [r, d_in]`` and ``B [d_out, r]`` at the start of a client's round: candidate vectors.

    Raises:
        ValueError: for a rank that cannot switch.
    """
    start = draw_start(seed, path, *shape, rank, alpha=alpha, turn=turn)
    return start.a, start.b


def _layer(path: str, update: object, job: TrainJob) -> SwitchLayer:
    if not isinstance(update, Rebuilt):
        raise TypeError(
            f"{path}: client/technique=switchlora switches vectors of factors over a base that "
            f"may move, and {type(job.start).__name__} has no such base; use strategy=switchlora"
        )
    # Switches change the frozen weight [d_out, d_in], and other clients use the mounted one.
    update.moved = update.moved.clone()
    d_out, d_in = update.moved.shape
    rank = int(update.a.shape[0])
    start = draw_start(
        job.seed,
        path,
        d_out,
        d_in,
        rank,
        alpha=update.alpha,
        turn=turn_of(job.round),
        dtype=update.moved.dtype,
    )
    return SwitchLayer(
        path=path,
        weight=update.moved,
        a=update.a,
        b=update.b,
        scale=update.scale,
        candidates=start.candidates,
        ids=start.ids,
        pointers=start.pointers,
    )


def turn_of(round: int) -> int:
    """The turn of `draw_candidates` in a round; rounds of a run count from 1, turns from 0."""
    return round - 1
