"""A classifier in two parts: the base model on the sequences of all clients, then their heads.

Sequences lie one per row or end to end, ``[1, N]``. End to end, the hidden states ``[1, N, d]`` are
pooled to ``[S, 1, d]``, and the head is told that each sequence has one token. So whatever an
architecture does there stays its own: of one token, the first, the last and the mean are the same.

The head runs in the network's own forward pass, in which the base model returns what it has
computed before. Clients whose heads differ are computed one after another.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedlora.core.seeding import torch_generator
from fedlora.data.batches import Batch, TokenExample, states_of
from fedlora.models.blocks import forward_replaced
from fedlora.models.head import POOLER
from fedlora.models.language_model import LanguageModel
from fedlora.models.last_block import LastBlock, find_last_block
from fedlora.models.ragged import RaggedUnsupported

Heads: TypeAlias = Sequence[tuple[int, Mapping[str, Tensor]]]
"""Each client's number of sequences and head, in the order of the batch; heads by the names of the
network's parameters (empty: the model's own)."""

TRIED = (3, 1, 4, 2)
"""Lengths of the sequences on which the last block is tried, in tokens."""
POOLINGS = ("first", "last", "mean")
"""What a head is given of a sequence: its first token (``[CLS]``), its last, or the mean of all."""


@dataclass(frozen=True, eq=False)
class Sample:
    """A text of random tokens, to try a model on."""

    input_ids: np.ndarray[Any, Any]
    """``[t]``."""
    label: int = 0
    responses: None = None
    states: None = None

    @property
    def prompt_tokens(self) -> int:
        """Where the second of two texts begins: half way."""
        return len(self.input_ids) // 2

    @staticmethod
    def of(ids: Tensor) -> "Sample":
        """A text of these tokens ``[t]``."""
        return Sample(ids.cpu().numpy())


class PaddedClassifier:
    """A classifier that reads one sequence per row.

    Args:
        model: a classifier.
    """

    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        self._base: nn.Module = getattr(model.network, model.network.base_model_prefix)

    def batch(self, examples: Sequence[TokenExample]) -> Batch:
        """Examples as rows, on the CPU."""
        return self._model.collate(examples, "full")

    def logits(self, batch: Batch, heads: Heads = ()) -> Tensor:
        """Logits ``[S, classes]``, in float32 at least.

        Args:
            batch: made by `batch`, on the model's device.
            heads: of the clients; empty: the model's own for all.
        """
        if not heads:
            return self._model.logits(batch)
        assert batch.mask is not None
        given = {"input_ids": batch.inputs, "attention_mask": batch.mask.to(torch.int64)}
        output = self._encode(batch, given)
        return self._apply(output, output.last_hidden_state, given, heads)

    def _encode(self, batch: Batch, given: Mapping[str, Tensor]) -> Any:
        """What the base model returns for these arguments, and token types if there are some."""
        types = {} if batch.segments is None else {"token_type_ids": batch.segments}
        with self._model.entered(batch):
            return self._base(**given, **types)

    def _apply(
        self, output: Any, hidden: Tensor, given: Mapping[str, Tensor], heads: Heads
    ) -> Tensor:
        """The heads on the hidden states.

        Args:
            output: of the base model.
            hidden: ``[S, t, d]``, in place of its own.
            given: the network's ``input_ids`` and ``attention_mask``, ``[S, t]``.
            heads: of the clients.
        """
        network: Any = self._model.network
        pooler, found, at = getattr(self._base, POOLER, None), [], 0
        for count, head in heads:
            rows = slice(at, at + count)
            at += count

            def give(rows: slice = rows) -> Any:
                own = {"last_hidden_state": hidden[rows]}
                if pooler is not None:  # a part of the head that is inside the base model
                    own["pooler_output"] = pooler(hidden[rows])
                return type(output)(**{**output, **own})

            with forward_replaced(self._base, lambda *_, give=give, **__: give()):
                named = {name: x[rows] for name, x in given.items()}
                if head:
                    whole = functional_call(network, dict(head), (), named)
                else:  # which would go through all parameters for nothing
                    whole = network(**named)
                found.append(whole.logits)
        logits = found[0] if len(found) == 1 else torch.cat(found)
        return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


class RaggedClassifier(PaddedClassifier):
    """A classifier that reads sequences laid end to end.

    Args:
        model: a classifier, with nothing mounted; a forward pass of it tells how it pools.

    Raises:
        RaggedUnsupported: if it pools in none of the `POOLINGS`, or it cannot be told in which.
    """

    def __init__(self, model: LanguageModel) -> None:
        super().__init__(model)
        config = model.network.config.get_text_config()
        self._pad, self._position_pad = int(config.pad_token_id), _position_pad(self._base)
        self.last: LastBlock | None = None
        """The last block, to be `LastBlock.narrowed` in forward passes; None: it is not of that
        kind."""
        self.pooling = self._find_pooling()
        if self.pooling != "mean":
            self.last = self._find_last_block()

    def _find_pooling(self) -> str:
        """The pooling that gives the logits of the network itself, by trial on one sequence."""
        model = self._model
        ids = torch.randint(
            0,
            model.vocabulary,
            (min(9, model.info.context),),
            generator=torch_generator(0, "pooling"),
        )
        sample, gaps = Sample.of(ids), {}
        with torch.no_grad():
            wanted = model.logits(model.collate([sample], "full").to(model.device))
            for pooling in POOLINGS:
                self.pooling = pooling
                found = self.logits(self.batch([sample]).to(model.device))
                gaps[pooling] = float((found - wanted).abs().max())
        best, other, *_ = sorted(POOLINGS, key=gaps.__getitem__)
        rounding = 2**-4 if model.network.dtype in (torch.bfloat16, torch.float16) else 1e-4
        if not gaps[best] <= rounding * max(1.0, float(wanted.abs().max())):
            raise RaggedUnsupported("its head reads neither one token nor the mean of all")
        if not gaps[other] > 4 * gaps[best]:
            raise RaggedUnsupported(f"its head gives the same for the {best} and the {other} token")
        return best

    def _find_last_block(self) -> LastBlock | None:
        random = torch_generator(0, "last block")
        model = self._model
        lengths = [min(n, model.info.context) for n in TRIED]
        texts = [torch.randint(0, model.vocabulary, (n,), generator=random) for n in lengths]
        batch = self.batch([Sample.of(t) for t in texts]).to(model.device)
        return find_last_block(model, lengths, batch.positions, lambda: self._run(batch)[0])

    def batch(self, examples: Sequence[TokenExample]) -> Batch:
        """Examples end to end, on the CPU.

        ``inputs``, ``position_ids`` and ``segments`` are ``[1, N]``, ``states`` ``[1, N, d]``.
        ``positions [S]`` are the rows that the head reads; for the mean, the rows where the
        sequences begin.
        """
        padded, held = self._model.collate(examples, "full", states=False), states_of(examples)
        mask, inputs = padded.mask, padded.inputs  # [S, t]
        assert mask is not None
        lengths = mask.sum(1)  # [S]
        rows = lengths.cumsum(0) - lengths
        places = torch.arange(inputs.shape[1])
        if self.pooling == "last":  # as transformers: the last that is not the padding token
            rows = rows + (places * (inputs != self._pad)).argmax(1)
        places = places.expand_as(inputs)
        if self._position_pad is not None:
            real = (inputs != self._position_pad).long()
            places = real.cumsum(1) * real + self._position_pad
        segments = padded.segments
        return Batch(
            inputs[mask][None],
            rows,
            padded.targets,
            places[mask][None],
            segments=None if segments is None else segments[mask][None],
            states=None if held is None else torch.cat(held)[None],
        )

    def logits(self, batch: Batch, heads: Heads = ()) -> Tensor:
        """As of a padded batch; all heads are computed here."""
        is_narrow = self.last is not None and self.last.is_narrowed
        if self.last is not None:
            self.last.rows = batch.positions
        output = self._run(batch)
        hidden = output.last_hidden_state
        hidden = hidden[0][:, None] if is_narrow else self._pool(hidden, batch.positions)
        ones = torch.ones(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
        given = {"input_ids": ones, "attention_mask": ones}
        return self._apply(output, hidden, given, heads or [(len(hidden), {})])

    def _run(self, batch: Batch) -> Any:
        """What the base model returns for a batch."""
        assert batch.position_ids is not None
        given = {"input_ids": batch.inputs, "position_ids": batch.position_ids}
        return self._encode(batch, given)

    def _pool(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """``[1, N, d]`` to ``[S, 1, d]``, for the rows ``[S]`` of a `batch`."""
        if self.pooling != "mean":
            return hidden[0].index_select(0, rows)[:, None]
        total = hidden.shape[1]
        lengths = torch.diff(rows, append=rows.new_tensor([total]))  # [S]
        each = torch.arange(len(rows), device=rows.device)
        owners = each.repeat_interleave(lengths, output_size=total)  # [N]
        sums = hidden.new_zeros(len(rows), hidden.shape[2]).index_add(0, owners, hidden[0])
        return (sums / lengths[:, None])[:, None]


def _position_pad(base: nn.Module) -> int | None:
    """The padding row of the position embeddings, after which RoBERTa and its relatives count, with
    padding tokens left out; None: positions count from 0."""
    embeddings = getattr(getattr(base, "embeddings", None), "position_embeddings", None)
    found: int | None = getattr(embeddings, "padding_idx", None)
    return found
