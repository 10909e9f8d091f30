r"""The server of a split: it holds the blocks above the cuts and trains on clients' activations.

    concat      all clients' activations in one batch, one step per exchange (SplitLoRA's figure):
                loss = Σ_i w_i mean_t(loss_it), w_i by `weights`
    sequential  one client after another, a step each (SplitFed V2, SplitLoRA's GPT-2 code)
    per_client  a copy of the server's adapters for each client (SplitFed V1, the Llama 3 code)

The gradient that a client receives is computed before the server's own step. With ``concat`` it has
the factor ``w_i``; ``gradient=own_mean`` divides by it, so that a client receives the same gradient
under every rule for the same server weights.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.core.checks import at_least, one_of
from fedlora.core.seeding import generator, torch_seed
from fedlora.core.types import Client, LocalPlan
from fedlora.models.language_model import LanguageModel
from fedlora.models.layers import padded_bits
from fedlora.models.stages import Span, Stage, Stages
from fedlora.split.batches import Seeds, Shape, pad
from fedlora.split.client import autocast
from fedlora.split.loss import Loss, sum_loss
from fedlora.split.protocol import Cut, Terms, Up
from fedlora.split.trainable import TrainableStage
from fedlora.wire.rows import Parts, Wire

UPDATES = ("concat", "sequential", "per_client")


@dataclass(frozen=True)
class Rule:
    """How the server learns from several clients."""

    update: str = "concat"
    """``concat``, ``sequential`` or ``per_client``."""
    weights: str = "uniform"
    """Weights of clients in the joint loss of ``concat``: ``uniform``, by the number of their
    ``examples``, or by supervised ``tokens`` of the step."""
    gradient: str = "own_mean"
    """What a client receives: the gradient of its ``own_mean`` loss, or of the ``joint`` loss."""
    order: str = "fixed"
    """Order of clients with ``sequential``: ``fixed`` (by id), or ``shuffle`` for a new order in
    each step."""
    tokens: int = 16384
    """Padded tokens of one forward pass with ``concat``. A larger batch is cut, which changes only
    rounding. 0: never."""

    def __post_init__(self) -> None:
        one_of("strategy.rule.update", self.update, UPDATES)
        one_of("strategy.rule.weights", self.weights, ("uniform", "examples", "tokens"))
        one_of("strategy.rule.gradient", self.gradient, ("own_mean", "joint"))
        one_of("strategy.rule.order", self.order, ("fixed", "shuffle"))
        at_least("strategy.rule.tokens", self.tokens, 0)


@dataclass(frozen=True)
class ClientInfo:
    """What the server knows of a client during a round."""

    client: Client
    cut: Cut
    seeds: Seeds
    """Seeds of the client's dropout masks; those of the server's blocks are part of the same
    stream."""


@dataclass(frozen=True)
class Answer:
    """The server's result for one client's activations."""

    gradient: Parts
    loss: float
    """Mean negative log-likelihood of the step's supervised tokens."""
    tokens: int


class SpoiledStep(FloatingPointError):
    """A step of the server that one client's numbers have made useless: without it the others can
    take it again."""

    def __init__(self, client: int, reason: str) -> None:
        super().__init__(reason)
        self.client = client


@dataclass
class _Pass:
    """A forward pass of the server's blocks over the rows of some clients."""

    ids: Sequence[int]
    """Clients in the order of their rows."""
    leaves: Mapping[int, Tensor]
    """The activations of each client, ``[tokens, d]``; autograd puts their gradient here."""
    weights: Mapping[int, float]
    """The weight of each client in the joint loss."""
    output: Tensor
    """Logits ``[n, vocabulary]``, or hidden states ``[rows, width, d]`` with a U-shape."""


class SplitServer:
    """The server's half of one round.

    Args:
        stages: of the resident model.
        trainables: the server's adapters: one set for all clients (key -1), or one per client.
        clients: the round's clients.
        plan: of the round.
        rule: see the module.
        terms: of the run.
    """

    def __init__(
        self,
        stages: Stages,
        trainables: Mapping[int, TrainableStage],
        clients: Mapping[int, ClientInfo],
        plan: LocalPlan,
        rule: Rule,
        terms: Terms,
    ) -> None:
        self.model: LanguageModel = stages.model
        self.stages, self.trainables, self.clients = stages, trainables, clients
        self.plan, self.rule, self.terms = plan, rule, terms
        self._passes: list[_Pass] = []
        self._leaves: dict[int, Tensor] = {}
        self._asked: dict[int, tuple[int, int]] = {}  # [tokens, d] that went down to a tail

    def activations(self, i: int, up: Up) -> Tensor:
        """One client's activations ``[tokens, d]``, checked.

        Raises:
            ValueError: if they do not fit the wire format and the client's rows, if a row is longer
                than the model's context, or if its labels do not fit.
        """
        if up.shape is None or up.hidden is None:
            raise ValueError(f"client {i} sent no activations")
        up.shape.check(self.model.info.context, self.plan.batch_size)
        z = self.terms.activations.decode(up.hidden)
        d = self.model.network.config.hidden_size
        if list(z.shape) != [up.shape.tokens, d]:
            raise ValueError(
                f"client {i} sent activations {list(z.shape)} for {up.shape.tokens} tokens of "
                f"{d} scalars"
            )
        if not self.clients[i].cut.u_shaped:
            if up.labels is None:
                raise ValueError(f"client {i} sent no labels, and its cut is not U-shaped")
            up.labels.check(up.shape, self.model.vocabulary)
        supervised = up.shape.tokens if up.labels is None else up.labels.targets.numel()
        if not (1 <= up.tokens <= supervised and (up.labels is None or up.tokens == supervised)):
            raise ValueError(
                f"client {i} says that {up.tokens} of its tokens have a loss; it sent {supervised} "
                f"{'tokens' if up.labels is None else 'labels'}"
            )
        return z

    def store(self, i: int, activations: Tensor) -> None:
        """Keep a client's checked activations for its next turn."""
        self._leaves[i] = activations.to(self.model.device, self.model.network.dtype)

    def receive_tail(self, i: int, up: Up) -> None:
        """Check the answer of a client's tail: the gradient of its loss.

        Raises:
            ValueError: if its shape is not that of the hidden states that were sent, or the loss is
                not finite.
        """
        asked = self._asked[i]
        if up.hidden is None or not 1 <= up.tokens <= asked[0] or not math.isfinite(up.loss):
            raise ValueError(
                f"client {i} sent no gradient, or a loss of {up.loss} over {up.tokens} of "
                f"{asked[0]} tokens"
            )
        gradient = self.terms.gradients.decode(up.hidden)
        if tuple(gradient.shape) != asked:
            raise ValueError(
                f"client {i} sent a gradient of shape {list(gradient.shape)} for hidden states of "
                f"shape {list(asked)}"
            )

    def groups(self, ids: Sequence[int], step: int) -> list[list[int]]:
        """Groups of clients, in order; the rows of each group are one optimizer step."""
        ids = sorted(ids)
        if self.rule.update != "sequential":
            return [ids]
        if self.rule.order == "shuffle":
            order = generator(self.terms.seed, "split turns", step).permutation(len(ids))
            ids = [ids[i] for i in order]
        return [[i] for i in ids]

    def learn(self, ups: Mapping[int, Up], rate: float) -> dict[int, Answer]:
        """One turn without a U-shape: forward, loss, backward, optimizer step.

        The activations of all these clients have been stored (`store`).

        Raises:
            SpoiledStep: naming a client whose loss or gradient is not finite. Nothing has changed:
                the turn can be taken again without it.
        """
        answers: dict[int, Answer] = {}
        self._begin(ups)
        for ids, weights in self._passes_of(ups):
            done = self._forward(ids, weights, ups)
            answers |= self._backward(done, ups)
        self._step(ups, rate)
        return answers

    def middle(self, ups: Mapping[int, Up]) -> dict[int, Parts]:
        """The first half of a turn with a U-shape: hidden states for the clients' tails.

        Raises:
            SpoiledStep: naming a client whose hidden states are not finite.
        """
        self._begin(ups)
        self._passes = []
        wire, sent = self.terms.activations, dict[int, Parts]()
        for ids, weights in self._passes_of(ups):
            done = self._forward(ids, weights, ups)
            self._passes.append(done)
            for i, rows in self._rows(done, ups).items():
                packed = _pack(done.output[rows], ups[i])
                self._asked[i] = (packed.shape[0], packed.shape[1])
                sent[i] = self._encode(wire, packed.detach(), "middle", i, ups)
        return sent

    def finish(
        self, ups: Mapping[int, Up], tails: Mapping[int, Up], rate: float
    ) -> dict[int, Answer]:
        """The second half of a turn with a U-shape: backward from the gradients of the tails.

        Clients that are missing in ``tails`` take no part in the step: the joint loss is that of
        the others.

        Raises:
            SpoiledStep: naming a client whose gradient is not finite. Nothing has changed: after
                `middle` without it the turn can be finished.
        """
        answers: dict[int, Answer] = {}
        weights = self._weights({i: ups[i] for i in tails})
        for done in self._passes:
            done.weights = weights
            answers |= self._backward_from(done, ups, tails)
        self._passes = []
        self._step(tails, rate)
        return answers

    # --- forward ------------------------------------------------------------------------------

    def _passes_of(self, ups: Mapping[int, Up]) -> Iterator[tuple[list[int], dict[int, float]]]:
        """Clients whose rows share a forward pass, with the weights of the joint loss."""
        # Without ``concat`` each client is a forward pass of its own.
        ids = sorted(ups, key=lambda i: (self.clients[i].cut.first, i))
        weights = self._weights(ups)
        if self.rule.update != "concat":
            for i in ids:
                yield [i], weights
            return

        # Clients in sequence while rows * width stays within `Rule.tokens`.
        width = max(up.shape.width for up in ups.values() if up.shape is not None)
        most = max(1, self.rule.tokens // width) if self.rule.tokens else 0
        chunk: list[int] = []
        rows = 0
        for i in ids:
            more = _shape(ups[i]).lengths
            if chunk and most and rows + len(more) > most:
                yield chunk, weights
                chunk, rows = [], 0
            chunk.append(i)
            rows += len(more)
        yield chunk, weights

    def _weights(self, ups: Mapping[int, Up]) -> dict[int, float]:
        """The weight of each client in the loss of its step: 1 if the step has no other client."""
        if self.rule.update != "concat":
            return dict.fromkeys(ups, 1.0)
        weights = dict.fromkeys(ups, 1.0)
        if self.rule.weights == "examples":
            weights = {i: float(self.clients[i].client.num_examples) for i in ups}
        elif self.rule.weights == "tokens":
            weights = {i: float(up.tokens) for i, up in ups.items()}
        total = sum(weights.values())
        return {i: w / total for i, w in weights.items()}

    def _begin(self, ups: Mapping[int, Up]) -> None:
        for trainable in self._trainables(ups):
            trainable.zero_grad()

    def _trainables(self, ups: Mapping[int, Up]) -> list[TrainableStage]:
        keys = sorted(ups) if self.rule.update == "per_client" else [-1]
        return [self.trainables[k] for k in keys]

    def _forward(
        self, ids: Sequence[int], weights: Mapping[int, float], ups: Mapping[int, Up]
    ) -> _Pass:
        """Rows enter at their own cut: those of a client that holds more blocks join later."""
        # x [rows, width, d] runs through the server's stages. In front of each stage the padded
        # rows of the clients whose cut lies there are appended.
        trainable = self._trainables({ids[0]: ups[ids[0]]})[0]
        leaves = {i: self._leaves[i].detach().requires_grad_() for i in ids}
        width = max(_shape(ups[i]).width for i in ids)
        x: Tensor | None = None
        present: list[int] = []
        for stage in self._segments(ids):
            joining = [i for i in ids if self.clients[i].cut.first == stage.span.start]
            present += joining
            rows = [pad(leaves[i], _shape(ups[i]), width) for i in joining]
            x = torch.cat(rows if x is None else [x, *rows])
            self._mount(stage, trainable, present, ups, width)
            try:
                with autocast(self.model, self.plan):
                    if stage.span.heads:
                        x = stage.logits(x, self._positions(ids, ups, width))
                    else:
                        x = stage.hidden(x)
            finally:
                stage.mount({})
        assert x is not None
        return _Pass(ids, leaves, weights, x)

    def _segments(self, ids: Sequence[int]) -> list[Stage]:
        """The server's blocks, cut wherever a client's rows join."""
        cuts = sorted({self.clients[i].cut.first for i in ids})
        tail = self.clients[ids[0]].cut.tail
        last = self.stages.blocks - max(tail, 0)
        ends = [*cuts[1:], last]
        spans = [Span(start, stop) for start, stop in zip(cuts, ends, strict=True)]
        if tail < 0:
            spans[-1] = Span(spans[-1].start, last, heads=True)
        return [self.stages[span] for span in spans]

    def _mount(
        self,
        stage: Stage,
        trainable: TrainableStage,
        ids: Sequence[int],
        ups: Mapping[int, Up],
        width: int,
    ) -> None:
        """Mount the server's adapters on a stage, with the dropout bits of these clients' rows."""
        stage.mount(trainable.updates)
        if self.plan.dropout == 0 or not stage.layers:
            return

        # A client's bits are those of its tokens, [tokens, d_in]; they are padded to the common
        # width and joined in the order of the rows.
        drawn = []
        for i in ids:
            shape = _shape(ups[i])
            bits = self.model.dropout_bits(self.clients[i].seeds[ups[i].step], shape.tokens)
            places = shape.places(width).to(self.model.device)
            drawn.append({p: padded_bits(bits[p], places) for p in stage.layers})
        for path in stage.layers:
            trainable.updates[path].bits = torch.cat([d[path] for d in drawn])

    def _positions(self, ids: Sequence[int], ups: Mapping[int, Up], width: int) -> Tensor:
        """``[n]`` int64: supervised positions in ``[rows * width]``, client by client."""
        found, rows = [], 0
        for i in ids:
            labels, shape = ups[i].labels, _shape(ups[i])
            assert labels is not None
            found.append(labels.positions(shape, width) + rows * width)
            rows += len(shape.lengths)
        return torch.cat(found).to(self.model.device)

    # --- backward -----------------------------------------------------------------------------

    def _backward(self, done: _Pass, ups: Mapping[int, Up]) -> dict[int, Answer]:
        """Loss and backward pass of one forward pass; the answer for each of its clients."""
        # Logits [n, vocabulary], split by the clients' numbers of supervised tokens.
        logits = done.output
        if logits.dtype in (torch.bfloat16, torch.float16):
            logits = logits.float()
        counts = [ups[i].tokens for i in done.ids]
        losses = {}
        for i, own in zip(done.ids, logits.split(counts), strict=True):
            labels = ups[i].labels
            assert labels is not None
            losses[i] = sum_loss(own, labels.targets.to(own.device), self.terms.smoothing)
        _check_finite(losses)

        # The joint loss: each client's mean loss times its weight.
        terms = [_scale_loss(done.weights[i], losses[i].total / ups[i].tokens) for i in done.ids]
        total = terms[0]
        for term in terms[1:]:
            total = total + term
        total.backward()
        return {
            i: self._answer(i, done, ups, float(losses[i].nll / ups[i].tokens), ups[i].tokens)
            for i in done.ids
        }

    def _backward_from(
        self, done: _Pass, ups: Mapping[int, Up], tails: Mapping[int, Up]
    ) -> dict[int, Answer]:
        """Backward pass from the tails' gradients; the answer for each client with one."""
        # The gradient of the output, [rows, width, d]: each client's rows times its weight, zero
        # for clients without an answer.
        rows = self._rows(done, ups)
        there = [i for i in done.ids if i in tails]
        seed = torch.zeros_like(done.output)
        for i in there:
            hidden = tails[i].hidden
            assert hidden is not None
            own = self.terms.gradients.decode(hidden).to(seed)
            padded = pad(own, _shape(ups[i]), seed.shape[1])
            seed[rows[i]] = padded if done.weights[i] == 1 else padded * done.weights[i]
        done.output.backward(seed)
        return {i: self._answer(i, done, ups, tails[i].loss, tails[i].tokens) for i in there}

    def _rows(self, done: _Pass, ups: Mapping[int, Up]) -> dict[int, slice]:
        """The rows of each client in the output."""
        found, at = {}, 0
        for i in done.ids:
            rows = len(_shape(ups[i]).lengths)
            found[i] = slice(at, at + rows)
            at += rows
        return found

    def _answer(
        self, i: int, done: _Pass, ups: Mapping[int, Up], loss: float, tokens: int
    ) -> Answer:
        gradient = done.leaves[i].grad
        assert gradient is not None
        if self.rule.gradient == "own_mean" and done.weights[i] != 1:
            gradient = gradient / done.weights[i]
        sent = self._encode(self.terms.gradients, gradient, "gradient", i, ups)
        return Answer(sent, loss, tokens)

    def _encode(self, wire: Wire, x: Tensor, what: str, i: int, ups: Mapping[int, Up]) -> Parts:
        try:
            return wire.encode(x, self._generator(what, i, ups))
        except ValueError as error:
            raise SpoiledStep(i, f"the server's {what} for client {i}: {error}") from error

    def _step(self, ups: Mapping[int, Up], rate: float) -> None:
        if not ups:
            return
        trainables = self._trainables(ups)
        for trainable in trainables:
            if not all(bool(torch.isfinite(g).all()) for g in trainable.flat.grads):
                largest = max(ups, key=lambda i: float(self._leaves[i].abs().amax()))
                raise SpoiledStep(largest, "the server's gradient is not finite")
        for trainable in trainables:
            trainable.step(rate)
        for i in ups:
            del self._leaves[i]

    def _generator(self, purpose: str, i: int, ups: Mapping[int, Up]) -> torch.Generator:
        seed = torch_seed(self.terms.seed, f"split {purpose}", i, ups[i].step)
        return torch.Generator(self.model.device).manual_seed(seed)


def _shape(up: Up) -> Shape:
    assert up.shape is not None
    return up.shape


def _pack(hidden: Tensor, up: Up) -> Tensor:
    index = _shape(up).index(hidden.shape[1]).to(hidden.device)
    return hidden.flatten(0, 1).index_select(0, index)


def _scale_loss(weight: float, loss: Tensor) -> Tensor:
    return loss if weight == 1 else weight * loss


def _check_finite(losses: Mapping[int, Loss]) -> None:
    for i, loss in losses.items():
        if not torch.isfinite(loss.nll):
            raise SpoiledStep(i, f"the server's loss on client {i} is {float(loss.nll)}")
