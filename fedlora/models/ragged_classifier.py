"""A classifier that reads sequences laid end to end: one row of logits for each of them.

The network's own forward pass runs on a stand-in of one token a sequence, ``[S, 1]``. Its base
model is given the ``N`` real tokens instead, and the hidden states ``[1, N, d]`` that it returns
are pooled to ``[S, 1, d]``. So the head computes ``S`` rows, and whatever an architecture does in
between stays its own: of one token, the first, the last and the mean are the same.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedlora.core.seeding import torch_generator
from fedlora.data.batches import Batch, TokenExample
from fedlora.models.head import POOLER
from fedlora.models.language_model import LanguageModel
from fedlora.models.ragged import RaggedUnsupported

POOLINGS = ("first", "last", "mean")
"""What a head is given of a sequence: its first token (``[CLS]``), its last, or the mean of all."""

_STAND_IN = ("input_ids", "attention_mask", "inputs_embeds", "position_ids", "token_type_ids")
"""Arguments of a base model that the real tokens replace."""


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


class RaggedClassifier:
    """A classifier's batches and logits in the ragged layout.

    Args:
        model: a classifier, with nothing mounted; a forward pass of it tells how it pools.

    Raises:
        RaggedUnsupported: if it pools in none of the `POOLINGS`, or it cannot be told in which.
    """

    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        self._base: nn.Module = getattr(model.network, model.network.base_model_prefix)
        config = model.network.config.get_text_config()
        self._pad, self._position_pad = int(config.pad_token_id), _position_pad(self._base)
        self.pooling = self._find_pooling()

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

    def batch(self, examples: Sequence[TokenExample]) -> Batch:
        """Examples end to end, on the CPU.

        ``inputs``, ``position_ids`` and ``segments`` are ``[1, N]``. ``positions [S]`` are the rows
        that the head reads; for the mean, the rows where the sequences begin.
        """
        padded = self._model.collate(examples, "full")
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
        more = {"segments": padded.segments, "states": padded.states}
        return Batch(
            inputs[mask][None],
            rows,
            padded.targets,
            places[mask][None],
            **{name: x[mask][None] for name, x in more.items() if x is not None},
        )

    def logits(self, batch: Batch) -> Tensor:
        """Logits ``[S, classes]`` of a `batch` on the model's device, in float32 at least."""
        own = {"input_ids": batch.inputs, "position_ids": batch.position_ids}
        if batch.segments is not None:
            own["token_type_ids"] = batch.segments

        def give(_: nn.Module, args: Any, given: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
            return (), {k: v for k, v in given.items() if k not in _STAND_IN} | own

        def pool(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (self._pool(args[0], batch.positions), *args[1:])

        def pool_output(_: nn.Module, args: Any, output: Any) -> Any:
            output.last_hidden_state = self._pool(output.last_hidden_state, batch.positions)
            return output

        # Some base models end with a pooler of their own, which reads the hidden states too.
        pooler = getattr(self._base, POOLER, None)
        handles = [] if pooler is None else [pooler.register_forward_pre_hook(pool)]
        handles.append(self._base.register_forward_pre_hook(give, with_kwargs=True))
        handles.append(self._base.register_forward_hook(pool_output))
        ones = torch.ones(len(batch.positions), 1, dtype=torch.int64, device=batch.inputs.device)
        try:
            network: Any = self._model.network
            with self._model.entered(batch):
                logits: Tensor = network(input_ids=ones, attention_mask=ones).logits
        finally:
            for handle in handles:
                handle.remove()
        return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits

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
