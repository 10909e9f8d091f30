"""Sequence classification: a base model with a head of classes in place of a vocabulary.

Any family for which transformers has a class for sequence classification. Pooling, token types and
positions are those of its own forward pass; decoders are read at the last token of a sequence.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedlora.core.errors import ModelError
from fedlora.core.payload import Payload
from fedlora.data.batches import Batch, TokenExample, padded_states, real_of
from fedlora.models.head import head_parameters
from fedlora.models.language_model import LanguageModel
from fedlora.models.modules import ModelInfo, check_head


class Classifier(LanguageModel):
    """A frozen sequence classifier with one mounted payload at a time.

    The head computes in float32 at least, also over a base in bfloat16.

    Args:
        network: for sequence classification; wrapped in place.
        tokenizer: of the same model.
        info: whose ``modules`` are the layers to wrap.
        folder: that it was loaded from; None: from none.
    """

    def __init__(
        self, network: Any, tokenizer: Any, info: ModelInfo, folder: Path | None = None
    ) -> None:
        super().__init__(network, tokenizer, info, folder)
        config = network.config.get_text_config()
        self._pad = int(config.pad_token_id)
        self._segmented = int(getattr(config, "type_vocab_size", 0) or 0) > 1
        if network.dtype != self.dtype:
            self._widen_head()
        self._own_head = head_parameters(network)
        self._travels = True

    def _widen_head(self) -> None:
        """Hold the head in the type of mounted parameters, and cast what goes into its layers."""
        owners = {name.rpartition(".")[0] for name in head_parameters(self.network)}
        for path in owners:
            layer = self.network.get_submodule(path).to(self.dtype)
            layer.register_forward_pre_hook(_cast(self.dtype))

    def collate(self, examples: Sequence[TokenExample], loss: str, states: bool = True) -> Batch:
        """Examples as one batch, padded on the right with the model's padding token.

        Args:
            examples: at least one; each has at least one token and a label.
            loss: of no effect: an example has one label.
            states: whether the batch brings the examples' states, if they have some.
        """
        lengths = np.array([len(e.input_ids) for e in examples])
        places = np.arange(lengths.max())  # [t]
        mask = places < lengths[:, None]  # [b, t]
        inputs = np.full(mask.shape, self._pad, dtype=np.int64)
        inputs[mask] = np.concatenate([e.input_ids for e in examples])
        second = np.array([e.prompt_tokens for e in examples])[:, None]  # where [SEP] b begins
        segments = ((places >= second) & mask).astype(np.int64) if self._segmented else None
        return Batch(
            torch.from_numpy(inputs),
            torch.arange(len(examples)),
            torch.tensor([e.label for e in examples], dtype=torch.int64),
            mask=torch.from_numpy(mask),
            real=real_of(lengths.tolist(), mask.shape[1]),
            segments=None if segments is None else torch.from_numpy(segments),
            states=padded_states(examples, int(lengths.max())) if states else None,
        )

    def inputs(self, example: TokenExample) -> int:
        """All of its tokens."""
        return len(example.input_ids)

    def logits(self, batch: Batch) -> Tensor:
        """Logits ``[b, classes]`` of a batch on this device, in float32 at least."""
        assert batch.mask is not None
        network: Any = self.network
        more = {} if batch.segments is None else {"token_type_ids": batch.segments}
        with self.entered(batch):
            logits: Tensor = network(
                input_ids=batch.inputs, attention_mask=batch.mask.to(torch.int64), **more
            ).logits
        return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits

    def mount(
        self,
        payload: Payload | None,
        dropout: float = 0.0,
        train_a: bool = True,
        train_b: bool = True,
    ) -> list[nn.Parameter]:
        """As any model does, and the payload's head in place of the model's own, if it brings one.

        Returns:
            The trainable parameters, in module order, then those of the head.

        Raises:
            ValueError: as of any model, or if the head does not fit.
        """
        head = None if payload is None else payload.head()
        check_head(head, self.info)
        parameters = super().mount(payload, dropout, train_a, train_b)
        for name, own in self._own_head.items():
            brought = own if head is None else nn.Parameter(self._copied(head[name]))
            path, _, leaf = name.rpartition(".")
            setattr(self.network.get_submodule(path), leaf, brought)
        self._travels = payload is None or payload.travels
        return [*parameters, *self._trained_head(head)]

    def _trained_head(self, head: Mapping[str, Tensor] | None) -> list[nn.Parameter]:
        """What trains of the head: all of one that was brought, nothing of the model's own."""
        return [] if head is None else list(self._head().values())

    def own_parameters(self) -> list[nn.Parameter]:
        """The head, if it is the client's own."""
        return [] if self._travels else list(self._head().values())

    def _head(self) -> dict[str, nn.Parameter]:
        """The parameters of the head that is mounted."""
        return {name: self.network.get_parameter(name) for name in self._own_head}

    def _copied(self, value: Tensor) -> Tensor:
        return value.detach().to(self.device, self.dtype, copy=True)

    def payload(self) -> Payload | None:
        """A detached copy of what is mounted, as it has been trained, the head too."""
        found = super().payload()
        if found is None or found.head() is None:
            return found
        return found.with_head({n: p.detach().clone() for n, p in self._head().items()})

    def base_state(self, payload: Payload | None = None) -> dict[str, Tensor]:
        """The base's own tensors, with an update added and its head in place of the base's."""
        head = None if payload is None else payload.head()
        check_head(head, self.info)
        state = super().base_state(payload)
        for name, own in self._own_head.items():
            value = own.detach() if head is None else head[name].to(self.device)
            state[name] = value.to(self.network.dtype)
        return state

    def supervised(self, example: TokenExample, loss: str) -> int:
        """One: the label."""
        return 1


def _cast(dtype: torch.dtype) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """A hook that gives a layer its input in a type."""
    return lambda _, inputs: tuple(x.to(dtype) for x in inputs)


def configured(config: Any, labels: Sequence[str], folder: Path, tokenizer: Any) -> Any:
    """A model's configuration for the classification of these labels.

    Args:
        config: a ``PretrainedConfig``; changed in place.
        labels: class names; empty: they are not known yet, and the head has two rows.
        folder: of the model, for messages.
        tokenizer: whose padding token decoders without one are given.

    Raises:
        ModelError: if transformers has no class for sequence classification of this family, or
            there is no padding token.
    """
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    )

    if config.model_type not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
        raise ModelError(
            f"{folder} holds {config.model_type}, for which transformers has no sequence "
            "classification: use another base model, or model.task=causal_lm"
        )
    names = list(labels) or ["LABEL_0", "LABEL_1"]
    config.id2label = dict(enumerate(names))
    config.label2id = {name: i for i, name in enumerate(names)}
    config.problem_type = "single_label_classification"
    text = config.get_text_config()
    if text.pad_token_id is None or not 0 <= text.pad_token_id < text.vocab_size:
        text.pad_token_id = tokenizer.pad_token_id
    if text.pad_token_id is None:
        raise ModelError(
            f"{folder} has no padding token, and its tokenizer neither padding nor end-of-sequence "
            "token: set pad_token_id in its config.json"
        )
    return config
