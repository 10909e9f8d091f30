"""A client of a split: it holds the first blocks (with a U-shape also the last), their adapters and
its data, and trains on the gradients that it receives across the cut.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.core.seeding import torch_seed
from fedlora.core.types import LocalPlan
from fedlora.data.batches import Batch, TokenExample, lengths_of
from fedlora.models.language_model import LanguageModel
from fedlora.models.layers import padded_bits
from fedlora.models.stages import Span, Stage, Stages
from fedlora.split.batches import Order, Seeds, Shape, Step, pack, pad, step_of
from fedlora.split.loss import sum_loss
from fedlora.split.protocol import Cut, Down, InitMessage, Up
from fedlora.split.trainable import TrainableStage
from fedlora.techniques.lora.layer import LowRank
from fedlora.techniques.lora.payload import LowRankPayload
from fedlora.wire.rows import Parts


@dataclass(frozen=True)
class _Pending:
    """A forward pass whose gradient is still to come."""

    step: int
    packed: Tensor | None
    """``[tokens, d]`` with its graph: the activations before the wire rounded them. None: another
    process has them."""


class SplitClient:
    """One client of one round, on a resident model that it shares with others.

    Args:
        stages: of the resident model.
        examples: its training examples.
        init: its start of the round.

    Raises:
        ModelError: if the cut does not lie inside the model.
        ValueError: if there is nothing to train on, or the adapters do not fit.
    """

    def __init__(self, stages: Stages, examples: Sequence[TokenExample], init: InitMessage) -> None:
        client, plan, terms = init.client, init.plan, init.terms
        if not examples:
            raise ValueError(
                f"client {client.id} has nothing to train on: no example with a token that has a "
                f"loss (client.loss={plan.loss})"
            )
        self.init = init
        self.examples = examples
        self.model = stages.model
        self.head, self.tail = client_stages(stages, init.cut)
        self.trainable = trainable_of(stages, init)
        self._order = Order(
            len(examples), plan, seed=terms.seed, client=client.id, lengths=lengths_of(examples)
        )
        self._seeds = Seeds(seed=terms.seed, client=client.id)
        self._pending: _Pending | None = None

    def receive(self, down: Down) -> Up:
        """Do one exchange.

        Raises:
            ValueError: if a gradient does not belong to the step that waits for one, or activations
                are not finite.
        """
        grad_norm = self._learn(down)
        if down.adapter is not None:
            self.trainable.load(down.adapter)
        if down.middle is not None:
            return self._finish(down.step, down.middle)
        sent: dict[str, object] = {}
        if down.forward:
            step = self._step(down.step)
            u_shaped = self.tail is not None
            sent = {
                "hidden": self._forward(down.step, step),
                "shape": step.shape,
                "labels": None if u_shaped else step.labels,
                "tokens": step.batch.tokens,
            }
        if down.upload:
            sent |= {
                "adapter": self.trainable.adapter(),
                "optimizer_state": self.trainable.optimizer_state(),
            }
        return Up(down.step, grad_norm=grad_norm, **sent)  # type: ignore[arg-type]

    def grads(self) -> dict[str, Tensor]:
        """Gradients from a U-shape's tail that wait for the next optimizer step, by buffer. With
        adapters and optimizer state, another process can continue from them (`resume`)."""
        return {f"{i}": g.clone() for i, g in enumerate(self.trainable.flat.grads)}

    def resume(self, step: int, grads: Mapping[str, Tensor], *, forward: bool) -> None:
        """Continue where another process stopped.

        With ``forward`` a pending forward pass is computed again. Its masks are functions of the
        step, so it is bitwise identical to the one that was lost. Without it, only the tail of the
        step is still to be computed.
        """
        if forward:
            self._forward(step, self._step(step))
        else:
            self._pending = _Pending(step, None)
        for i, saved in grads.items():
            self.trainable.flat.grads[int(i)].copy_(saved)

    def ready(self, step: int, *, graph: bool) -> bool:
        """Whether a step waits in this process for its tail or its gradient.

        Args:
            step: the step.
            graph: whether the graph of its forward pass is needed, as for a gradient.
        """
        here = self._pending
        return here is not None and here.step == step and not (graph and here.packed is None)

    @property
    def pending(self) -> int:
        """The step whose gradient is still to come; -1: none."""
        return -1 if self._pending is None else self._pending.step

    def _step(self, step: int) -> Step:
        return step_of(self.examples, self._order[step], self.init.plan)

    def _learn(self, down: Down) -> float:
        """Backward pass and optimizer step; a forward pass without a gradient is dropped."""
        if down.middle is not None:
            return 0.0
        pending, self._pending = self._pending, None
        if down.gradient is None:
            return 0.0
        if pending is None or pending.packed is None or pending.step != down.of:
            waiting = "none waits" if pending is None else f"step {pending.step} waits"
            raise ValueError(
                f"client {self.init.client.id} was sent the gradient of step {down.of}, but "
                f"{waiting} for one"
            )
        if pending.packed.requires_grad:
            gradient = self.init.terms.gradients.decode(down.gradient)
            if gradient.shape != pending.packed.shape:
                raise ValueError(
                    f"client {self.init.client.id} sent activations of shape "
                    f"{list(pending.packed.shape)} and received a gradient of shape "
                    f"{list(gradient.shape)}"
                )
            pending.packed.backward(gradient.to(pending.packed))
        return float(self.trainable.step(down.rate))

    def _forward(self, number: int, step: Step) -> Parts:
        """Activations at the cut, encoded for the wire."""
        terms, device = self.init.terms, self.model.device
        self.trainable.zero_grad()
        batch = step.batch.to(device)
        self._mount(self.head, number, step.shape)
        try:
            with autocast(self.model, self.init.plan), self._entered(batch):
                hidden = self.head.hidden(batch.inputs)
        finally:
            self.head.mount({})

        # Without padding, [tokens, d]; noise is part of the graph, rounding by the wire is not.
        packed = pack(hidden, step.shape)
        if terms.noise.clip:
            packed = terms.noise(packed, self._generator("noise", number))
        self._pending = _Pending(number, packed)
        return terms.activations.encode(packed.detach(), self._generator("wire", number))

    def _entered(self, batch: Batch) -> AbstractContextManager[None]:
        """While the context is open, the head begins where the batch's states enter, if that block
        is one of its own; else it runs from the embeddings on."""
        prefix = self.model.prefix
        if prefix is None or prefix.blocks not in self.head.span:
            return nullcontext()
        return self.model.entered(batch)

    def _finish(self, number: int, middle: Parts) -> Up:
        """The tail of a U-shape: the client's mean loss over tokens, and its gradient."""
        assert self.tail is not None
        if self._pending is None or self._pending.step != number:
            raise ValueError(
                f"client {self.init.client.id} was sent hidden states of step {number}, whose "
                "forward it has not begun"
            )
        terms, step = self.init.terms, self._step(number)
        z = terms.activations.decode(middle).to(self.model.device, self.head.dtype).requires_grad_()
        shape, positions = step.shape, step.batch.positions.to(self.model.device)
        self._mount(self.tail, number, shape)
        try:
            with autocast(self.model, self.init.plan):
                logits = self.tail.logits(pad(z, shape), positions)
        finally:
            self.tail.mount({})
        loss = sum_loss(logits, step.batch.targets.to(logits.device), terms.smoothing)
        (loss.total / step.batch.tokens).backward()
        assert z.grad is not None
        sent = terms.gradients.encode(z.grad, self._generator("tail", number))
        return Up(
            number, hidden=sent, loss=float(loss.nll / step.batch.tokens), tokens=step.batch.tokens
        )

    def _mount(self, stage: Stage, number: int, shape: Shape) -> None:
        stage.mount(self.trainable.updates)
        if self.init.plan.dropout > 0 and stage.layers:
            bits = self.model.dropout_bits(self._seeds[number], shape.tokens)
            places = shape.places().to(self.model.device)
            for path in stage.layers:
                self.trainable.updates[path].bits = padded_bits(bits[path], places)

    def _generator(self, purpose: str, step: int) -> torch.Generator:
        """A generator for the random numbers that a client uses in one step."""
        who = self.init
        seed = torch_seed(who.terms.seed, f"split {purpose}", who.client.id, step)
        return torch.Generator(self.model.device).manual_seed(seed)


def client_stages(stages: Stages, cut: Cut) -> tuple[Stage, Stage | None]:
    """The stages that a client holds: its first blocks and, with a U-shape, its last ones.

    Raises:
        ModelError: if they do not lie inside the model, or overlap.
    """
    head = stages[Span(0, cut.first, embeds=True)]
    if not cut.u_shaped:
        return head, None
    last = stages.blocks - cut.tail
    stages.check_order(cut.first, last)
    return head, stages[Span(last, stages.blocks, heads=True)]


def trainable_of(stages: Stages, init: InitMessage) -> TrainableStage:
    """The adapters that a client trains, with their optimizer.

    Raises:
        ValueError: if its adapters are not those of its blocks.
    """
    head, tail = client_stages(stages, init.cut)
    own = [*head.layers, *(tail.layers if tail is not None else ())]
    if list(init.adapter) != own:
        raise ValueError(
            f"client {init.client.id} was sent adapters of {len(init.adapter)} modules, its "
            f"blocks have {len(own)}: {list(init.adapter)[:2]} and {own[:2]}"
        )
    updates = LowRankPayload(init.adapter).updates(stages.model, init.plan.dropout)
    factors = {path: u for path, u in updates.items() if isinstance(u, LowRank)}
    return TrainableStage(factors, init.plan, init.optimizer_state)


def autocast(model: LanguageModel, plan: LocalPlan) -> torch.autocast:
    """Mixed precision, if the plan asks for it."""
    enabled = plan.autocast == "bf16"
    return torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=enabled)
