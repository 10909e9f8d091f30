"""Small random models for sequence classification of every family, and texts with labels."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification as Auto
from transformers import (
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    ModernBertConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    RobertaConfig,
)

from fedlora.models.blocks import adapted_blocks
from fedlora.models.classifier import Classifier, configured
from fedlora.models.head import draw_head, head_modules, head_parameters, head_tensors
from fedlora.models.modules import CLASSIFICATION, ModelInfo, find_modules

VOCABULARY, CLASSES, PAD = 40, 5, 1
LABELS = tuple(f"intent {i}" for i in range(CLASSES))
SIZES: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "pad_token_id": PAD,
    "initializer_range": 0.3,
}


def _modernbert(**more: Any) -> PretrainedConfig:
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0)
    return ModernBertConfig(**SIZES, **special, local_attention=8, **more)


def _distilbert() -> PretrainedConfig:
    sizes = {"vocab_size": VOCABULARY, "dim": 16, "hidden_dim": 20, "n_layers": 2, "n_heads": 4}
    return DistilBertConfig(
        **sizes, max_position_embeddings=32, pad_token_id=PAD, initializer_range=0.3
    )


def _deberta() -> PretrainedConfig:
    """As the published checkpoints: relative positions alone."""
    return DebertaV2Config(
        **SIZES,
        relative_attention=True,
        position_biased_input=False,
        pos_att_type=["p2c", "c2p"],
        position_buckets=8,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        type_vocab_size=0,
    )


def _gpt2() -> PretrainedConfig:
    return GPT2Config(
        vocab_size=VOCABULARY, n_positions=32, n_embd=16, n_layer=2, n_head=4, initializer_range=0.3
    )


def _decoder(schema: Any) -> PretrainedConfig:
    return schema(**{k: v for k, v in SIZES.items() if k != "pad_token_id"}, num_key_value_heads=2)


CONFIGS: Mapping[str, Callable[[], PretrainedConfig]] = {
    "bert": lambda: BertConfig(**SIZES),
    "roberta": lambda: RobertaConfig(**{**SIZES, "max_position_embeddings": 34}, type_vocab_size=1),
    "distilbert": _distilbert,
    "deberta": _deberta,
    "modernbert": _modernbert,
    "modernbert_mean": lambda: _modernbert(classifier_pooling="mean"),
    "llama": lambda: _decoder(LlamaConfig),
    "qwen2": lambda: _decoder(Qwen2Config),
    "gpt2": _gpt2,
}


def tokenizer() -> PreTrainedTokenizerFast:
    """``<s> a </s>``, or ``<s> a </s> b </s>`` of two texts."""
    vocabulary = {"<s>": 0, "<pad>": PAD, "</s>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> $B:1 </s>:1",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="w3"
    )


def network(family: str, labels: Sequence[str] = LABELS, seed: int = 0) -> Any:
    """A random network in float64 throughout, its head drawn from a run's seed."""
    torch.manual_seed(seed)
    config = configured(CONFIGS[family](), labels, Path(family), tokenizer())
    made = Auto.from_config(config)
    for name, parameter in made.named_parameters():
        if name.endswith("bias"):  # zero by default, which would hide a forgotten bias
            nn.init.normal_(parameter)
    draw_head(made, head_parameters(made), seed)
    return exact(made).eval()


def exact(network: Any) -> Any:
    """The network in float64: norms of Llama and Qwen2 compute in float32."""
    network = network.double()
    for name, layer in list(network.named_modules()):
        if type(layer).__name__.endswith("RMSNorm"):
            parent, _, leaf = name.rpartition(".")
            norm = nn.RMSNorm(layer.weight.shape[0], eps=layer.variance_epsilon).double()
            norm.weight.data.copy_(layer.weight)
            setattr(network.get_submodule(parent), leaf, norm)
    return network


def classifier(family: str, labels: Sequence[str] = LABELS, seed: int = 0) -> Classifier:
    return wrap(network(family, labels, seed), labels)


def wrap(network: Any, labels: Sequence[str] = LABELS, layers: Any = "all") -> Classifier:
    """As a spec loads it."""
    head = head_modules(network)
    modules = find_modules(network, "all-linear", layers, outside=head)
    blocks, adapted = adapted_blocks(network, [m.path for m in modules])
    info = ModelInfo(
        "random",
        modules,
        sum(p.numel() for p in network.parameters()),
        32,
        "none",
        task=CLASSIFICATION,
        labels=tuple(labels),
        head_modules=head,
        head=head_tensors(network),
        blocks=blocks,
        adapted=adapted,
    )
    return Classifier(network, tokenizer(), info)


@dataclass(frozen=True, eq=False)
class Labelled:
    input_ids: Any
    prompt_tokens: int
    label: int
    responses: None = None
    states: Any = None


def examples(n: int, seed: int = 0, longest: int = 14, classes: int = CLASSES) -> list[Labelled]:
    """Single texts and pairs of unequal length; labels are drawn, so that some may be missing."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(n):
        first, second = rng.integers(1, longest // 2, 2)
        ids = [0, *rng.integers(3, VOCABULARY, first), 2]
        at = len(ids)
        if i % 2:
            ids += [*rng.integers(3, VOCABULARY, second), 2]
        found.append(Labelled(np.array(ids, dtype=np.int32), at, int(rng.integers(classes))))
    return found


def logits(model: Classifier, held: Sequence[Labelled]) -> Tensor:
    with torch.no_grad():
        return model.logits(model.collate(held, "full"))


def one_by_one(model: Classifier, held: Sequence[Labelled]) -> Tensor:
    """Logits of each example in a batch of its own, which has no padding."""
    return torch.cat([logits(model, [e]) for e in held])
