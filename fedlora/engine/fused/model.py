"""One frozen network that computes with the adapters of many clients at once."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedlora.core.payload import MovedBase
from fedlora.engine.fused.bank import AdapterBank
from fedlora.engine.fused.batch import FusedBatch, padded_batch, ragged_batch
from fedlora.engine.fused.head import head_nll, is_plain
from fedlora.engine.fused.kernels import FusedDelta, FusedLinear, LayerPlan, Segment
from fedlora.engine.fused.lanes import Group, Lane, Shares, Spread
from fedlora.models.forward import supervised_hidden
from fedlora.models.language_model import LanguageModel
from fedlora.models.last_block import LastBlock
from fedlora.models.layers import LinearUpdate, dense_weight, dropout_bits
from fedlora.models.ragged import RaggedAttention, ragged
from fedlora.models.recompute import check_recomputable, recomputing
from fedlora.models.two_parts import Heads, PaddedClassifier, RaggedClassifier

KNOWN = 1024
"""Groups whose segments are kept in memory; a round on ``s`` slots needs a few ``s`` of them."""


@dataclass(frozen=True, eq=False)
class _Prepared:
    """One batch's clients in the rows of a layer's input."""

    shares: Shares
    segments: list[list[Segment]]
    """The segments of every layer, group by group."""


NOTHING = _Prepared(Shares((), None, None, None), [])
"""Before a batch is prepared."""


class FusedModel:
    """Runs fused batches on a resident `LanguageModel`, which is unchanged afterwards.

    Args:
        model: its adapted layers use the clients' adapters while `mounted`.
        is_ragged: whether sequences are laid end to end (`check.why_not_ragged` says if they can
            be).
        checkpoint: recompute each block's activations in the backward pass: less memory, a third
            more time.

    Raises:
        ValueError: if activations should be recomputed and the architecture does not support it.
    """

    def __init__(self, model: LanguageModel, is_ragged: bool, checkpoint: bool = False) -> None:
        if checkpoint:
            check_recomputable(model.network)
        self.model = model
        self.is_ragged = is_ragged
        self.checkpoint = checkpoint
        self._attention = RaggedAttention()
        self._anchor = torch.zeros((), device=model.device, requires_grad=True)
        self._hidden = int(model.network.config.get_text_config().hidden_size)
        self._classifier: PaddedClassifier | None = None
        self._last: LastBlock | None = None
        if model.info.classifies and is_ragged:
            self._classifier = rows = RaggedClassifier(model)
            self._last = rows.last
        elif model.info.classifies:
            self._classifier = PaddedClassifier(model)
        self._layers = list(model.layers.values())
        paths = frozenset() if self._last is None else self._last.pooled
        self._reads_pooled = [path in paths for path in model.layers]
        self._plain_head = self._classifier is None and is_plain(model)
        self._autocast = False
        self._cast: dict[int, Tensor] = {}
        self._moved: dict[int, Tensor] = {}
        self._bank: AdapterBank | None = None
        self._known: dict[tuple[object, ...], list[Segment]] = {}
        self._all = self._pooled = NOTHING
        self._bits: list[Tensor] = []
        self._batch: FusedBatch | None = None
        self._copied: tuple[Tensor, int, Tensor] | None = None

    def factor_dtype(self, autocast: bool) -> torch.dtype:
        """The type of products with factors: bfloat16 under autocast, else the base's; on a CPU
        float32 at least, as in PEFT, where products this small are cheaper in it."""
        if autocast:
            return torch.bfloat16
        dtype: torch.dtype = self.model.network.dtype
        is_cpu = self.model.device.type == "cpu"
        return torch.promote_types(dtype, torch.float32) if is_cpu else dtype

    def require_free(self) -> None:
        """Raise a RuntimeError if a bank is mounted: another stream of results is still open."""
        if self._bank is not None:
            raise RuntimeError(
                "another stream of results of this engine is not finished: take all of them, or "
                "close it, before the next call"
            )

    @contextmanager
    def mounted(
        self,
        bank: AdapterBank,
        autocast: bool = False,
        generate: bool = False,
        base: MovedBase | None = None,
    ) -> Iterator[None]:
        """Let the network compute with a bank's adapters, until the context ends.

        Args:
            bank: holds the adapters.
            autocast: compute in bfloat16 where torch's autocast does.
            generate: leave attention to the network, for `prepare_rows`.
            base: the moved base under all adapters; None: the model's own.

        Raises:
            RuntimeError: if a bank is mounted already.
        """
        self.require_free()
        layers = self.model.layers.values()
        with ExitStack() as stack:
            if self.is_ragged and not generate:
                stack.enter_context(ragged(self.model.network, self._attention))
                if self._last is not None:
                    stack.enter_context(self._last.narrowed(self._attention))
            if self.checkpoint and torch.is_grad_enabled():
                stack.enter_context(recomputing(self.model.network))
            self._bank, self._autocast = bank, autocast
            moved = {} if base is None else self.model.moved(base)
            self._moved = {i: moved[p] for i, p in enumerate(self.model.layers) if p in moved}
            for index, layer in enumerate(layers):
                layer.update = _ManyAdapters(self, index)
            try:
                yield
            finally:
                self.model.unmount()
                self._forget()
                self._bank = None
                self._known, self._cast, self._moved = {}, {}, {}

    def batch(self, lanes: Sequence[Lane]) -> FusedBatch:
        """Lanes, in the order of their slots, in this model's layout."""
        labelled = None if self._classifier is None else self._classifier.batch
        if not self.is_ragged:
            return padded_batch(lanes, self._hidden, labelled)
        return ragged_batch(lanes, self._hidden, labelled, pooled=self._last is not None)

    def backward(self, batch: FusedBatch) -> Tensor:
        """Add every lane's gradient to its row of the bank.

        Returns:
            ``[lanes]``: each lane's part of its step's loss, the sum over its supervised tokens
            divided by `Lane.tokens`.
        """
        nll = self.nll(batch)
        weighted = nll * batch.weights.to(nll.device, nll.dtype)
        weighted.sum().backward()
        return self.per_lane(weighted.detach(), batch)

    def nll(self, batch: FusedBatch) -> Tensor:
        """The negative log-likelihood of every supervised token or label, ``[n]``."""
        if not self._plain_head:
            logits, targets = self.logits(batch)
            return functional.cross_entropy(logits, targets, reduction="none")
        self.prepare(batch)
        moved, network = batch.batch.to(self.model.device), self.model.network
        with self._precision(), self.model.entered(moved):
            hidden = supervised_hidden(network, moved)
            return head_nll(hidden, network.get_output_embeddings(), moved.targets)

    def logits(self, batch: FusedBatch) -> tuple[Tensor, Tensor]:
        """``[n, classes]`` of the supervised tokens or labels, and their targets ``[n]``."""
        self.prepare(batch)
        moved = batch.batch.to(self.model.device)
        with self._precision():
            if self._classifier is None:
                logits = self.model.logits(moved)
            else:
                logits = self._classifier.logits(moved, self._heads(batch))
        return logits, moved.targets

    def _heads(self, batch: FusedBatch) -> Heads:
        """The lanes' heads; none if all use the model's own."""
        assert self._bank is not None
        if not any(lane.layout.head for lane in batch.lanes):
            return ()
        return [(len(x.examples), self._bank.head(x.slot, x.layout)) for x in batch.lanes]

    def _precision(self) -> torch.autocast:
        device = self.model.device.type
        return torch.autocast(device, dtype=torch.bfloat16, enabled=self._autocast)

    def prepare(self, batch: FusedBatch) -> None:
        """Set which rows of the next forward pass belong to which client, for layers and
        attention."""
        self._renew()
        device = self.model.device
        self._batch = batch
        self._all = self._prepared(batch.all.to(device))
        if batch.pooled is not None:
            self._pooled = self._prepared(batch.pooled.to(device))
        self._bits = self._draw_bits(batch)
        if batch.geometry is not None:
            self._attention.geometry = batch.geometry.to(device)

    def prepare_rows(self, groups: Sequence[Group]) -> None:
        """As `prepare`, for inputs ``[rows, width]`` of any width, as in generation: `Group.rows`
        counts sequences, and there is no dropout."""
        self._renew()
        self._all = self._prepared(Shares(tuple(groups), None, None, None))

    def _renew(self) -> None:
        """Forget the last batch, and bring the bank up to date."""
        assert self._bank is not None
        self._bank.refresh()
        self._forget()

    def _prepared(self, shares: Shares) -> _Prepared:
        by_group = [self._of_group(group) for group in shares.groups]
        return _Prepared(shares, [list(of_layer) for of_layer in zip(*by_group, strict=True)])

    def _forget(self) -> None:
        """Drop everything that belongs to one batch."""
        self._batch = self._copied = None
        self._all = self._pooled = NOTHING
        self._bits = []

    @staticmethod
    def per_lane(values: Tensor, batch: FusedBatch) -> Tensor:
        """Sums ``[lanes]`` over the supervised tokens' ``values [n]``."""
        sums = values.new_zeros(len(batch.lanes))
        return sums.index_add_(0, batch.owners.to(values.device), values)

    def _of_group(self, group: Group) -> list[Segment]:
        """A group's segment of every layer, in module order."""
        assert self._bank is not None
        lane, clients = group.lanes[0], len(group.lanes)
        flags = (lane.train_a, lane.train_b, lane.dropped)
        key = (lane.slot, clients, lane.layout, *flags)
        if key not in self._known:
            if len(self._known) >= KNOWN:
                self._known.clear()
            boost = 2**16 / (2**16 - lane.dropped) if lane.dropped < 2**16 else 0.0
            views = self._bank.views(lane.slot, clients, lane.layout)
            scales = [0.0 if p is None else p.scale * boost for p in lane.layout.parts]
            self._known[key] = [
                Segment(clients, v, scale, lane.train_a, lane.train_b)
                for v, scale in zip(views, scales, strict=True)
            ]
        return self._known[key]

    def _plan(self, index: int, x: Tensor) -> LayerPlan:
        """The plan of layer ``index`` for its input ``x [..., d_in]``."""
        # Rows that the layer was given, as a multiple of those prepared: 1 in training, the width
        # of the input in generation, where a prepared row is a whole sequence.
        prepared = self._of_layer(index)
        shares, rows = prepared.shares, x.numel() // x.shape[-1]
        sizes = [group.rows for group in shares.groups]
        expected = sum(sizes) if shares.spread is None else shares.spread.back.shape[0]
        stretch, rest = divmod(rows, expected)
        if rest or stretch == 0 or (stretch > 1 and self._batch is not None):
            raise ValueError(
                f"layer {index} was given {rows} rows, but another number was prepared: the model "
                "does not pass every token through it once"
            )
        sizes = [n * stretch for n in sizes]
        bits = self._bits[index] if self._bits else None
        segments, thresholds = prepared.segments[index], shares.thresholds
        kind = self.factor_dtype(self._autocast)
        return LayerPlan(sizes, segments, bits, thresholds, shares.spread, kind)

    def _of_layer(self, index: int) -> _Prepared:
        """What is prepared for the rows that a layer is given."""
        return self._pooled if self._reads_pooled[index] else self._all

    def _draw_bits(self, batch: FusedBatch) -> list[Tensor]:
        """Random bits ``[M, d_in]`` of every layer's dropout; an empty list without dropout.

        Drawn client by client for the client's own tokens, so that the masks are those of the
        client trained alone. A layer that is given pooled rows has the bits of these.
        """
        if batch.all.thresholds is None:
            return []
        device = self.model.device
        widths = [m.d_in for m in self.model.info.modules]
        shares = [self._of_layer(index).shares for index in range(len(widths))]
        bits = [
            torch.empty(sum(g.rows for g in s.groups), width, dtype=torch.int16, device=device)
            for s, width in zip(shares, widths, strict=True)
        ]
        places = {id(s): s.places(batch.drawn) for s in shares}

        # A lane's bits go to its rows of every layer before the next lane's are drawn. Those of a
        # client without dropout may be anything: its threshold drops nothing.
        for number, (lane, tokens) in enumerate(zip(batch.lanes, batch.drawn, strict=True)):
            if not lane.dropped:
                continue
            drawn = dropout_bits(tokens, widths, lane.seed, device)
            for of_layer, to, s in zip(drawn, bits, shares, strict=True):
                where, source = places[id(s)][number]
                if source is None:
                    to[where].copy_(of_layer)
                else:
                    torch.index_select(of_layer, 0, source, out=to[where])
        return bits

    def layer(self, x: Tensor, base: nn.Module, index: int) -> Tensor:
        """Output ``[..., d_out]`` of the adapted layer ``index`` for ``x [..., d_in]``."""
        plan = self._plan(index, x)
        weight = base.weight
        assert isinstance(weight, Tensor)
        if (known := self._product(index, x)) is not None:
            return self._added(x, known.shape[-1], known, plan)
        if not weight.is_floating_point():
            y: Tensor = base(x)
            return y + self._added(x, y.shape[-1], None, plan)
        bias: Any = base.bias
        weight = self._moved.get(index, dense_weight(base))
        if self._autocast:
            weight, bias = (
                self._to_bfloat16(weight),
                None if bias is None else self._to_bfloat16(bias),
            )
        across = weight.t()
        rows = self._copy(x, weight.dtype, plan.spread)
        out: Tensor = FusedLinear.apply(x, self._anchor, across, bias, rows, plan)  # type: ignore[no-untyped-call]
        return out

    def _product(self, index: int, x: Tensor) -> Tensor | None:
        """What the frozen weight of a layer is known to give for ``x``; None: that is not known, or
        would be another if it were computed now, or again in the backward pass."""
        known = self._layers[index].product
        if known is None or index in self._moved or self._autocast or self.checkpoint:
            return None
        return known if known.shape[:-1] == x.shape[:-1] and not x.requires_grad else None

    def _added(self, x: Tensor, d_out: int, known: Tensor | None, plan: LayerPlan) -> Tensor:
        """The adapters' part ``[..., d_out]``, and what is known of the frozen weight's."""
        rows = self._copy(x, x.dtype, plan.spread)
        out: Tensor = FusedDelta.apply(x, self._anchor, d_out, known, rows, plan)  # type: ignore[no-untyped-call]
        return out

    def _copy(self, x: Tensor, dtype: torch.dtype, spread: Spread | None) -> Tensor | None:
        """The spread copy ``[M, d_in]`` of a layer's input; one for layers that share the input."""
        if spread is None:
            return None
        if self._copied is None or self._copied[0] is not x or self._copied[1] != x._version:
            flat = x.detach().reshape(-1, x.shape[-1]).to(dtype)
            self._copied = (x, x._version, flat.index_select(0, spread.out))
        return self._copied[2]

    def _to_bfloat16(self, tensor: Tensor) -> Tensor:
        """A frozen tensor in bfloat16, cast once while mounted."""
        key = tensor.data_ptr()
        if key not in self._cast:
            self._cast[key] = tensor.detach().to(torch.bfloat16)
        return self._cast[key]


class _ManyAdapters(LinearUpdate):
    """The update of one adapted layer while a fused model is mounted."""

    def __init__(self, fused: FusedModel, index: int) -> None:
        self._fused, self._index = fused, index

    def __call__(self, x: Tensor, base: nn.Module) -> Tensor:
        return self._fused.layer(x, base, self._index)

    def parameters(self) -> list[nn.Parameter]:
        """No parameters for autograd: gradients go to the bank."""
        return []

    def weight(self, base: nn.Module) -> Tensor:
        """Raise a TypeError: a layer with many adapters has no single weight."""
        raise TypeError("many clients' adapters are mounted: there is no single effective weight")
