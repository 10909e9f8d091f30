"""Which linear layers of a base model carry an adapter, and what they are."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, Literal

from torch import Tensor, nn

from fedlora.core.checks import wrong_names
from fedlora.core.errors import ConfigError, ModelError
from fedlora.core.types import Adapter, Module
from fedlora.models.blocks import adaptable_parts, text_part
from fedlora.models.head import HeadTensor
from fedlora.models.layers import AdaptedLinear
from fedlora.models.qkv import Split

CAUSAL_LM, CLASSIFICATION = "causal_lm", "classification"
"""What a base model predicts: the next token, or the label of a text."""

_SCAN = ("dt_proj", "x_proj", "out_proj")
WEIGHT_READ: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"mamba": _SCAN, "falcon_mamba": _SCAN, "jamba": ("dt_proj",)}
    | dict.fromkeys(
        ("mamba2", "nemotron_h", "bamba", "granitemoehybrid", "zamba2", "falcon_h1"), ("out_proj",)
    )
)
"""Model type -> ends of linear layers that some kernel does not call: it reads their weight, and an
adapter beside the weight would be ignored. Found in the modelling files of transformers 5.23."""


@dataclass(frozen=True)
class ModelInfo:
    """What can be known of a base model without its weights."""

    name: str
    modules: tuple[Module, ...]
    """The layers that carry an adapter, in the order of ``named_modules()``."""
    parameters: int
    """Parameters of the base model; tied weights count once."""
    context: int
    """Longest sequence, in tokens."""
    fingerprint: str
    """Identity of configuration and weights, wherever they are stored, and of what was split."""
    splits: tuple[Split, ...] = ()
    """Layers that the model's files hold as one and this network computes in parts."""
    mask: str = ""
    """Identity of where a pruned model's weights are zero (`models.masks`); empty: dense."""
    context_stated: bool = True
    """Whether the model itself states ``context`` (`fedlora.models.context`)."""
    vocabulary: int = 0
    """Rows of the input embedding; 0: not known."""
    width: int = 0
    """Scalars of a hidden state; 0: not known."""
    blocks: int = 0
    """Transformer blocks; 0: they cannot be found."""
    adapted: tuple[int, ...] = ()
    """Indices of the blocks that carry adapters; empty: some module lies outside the blocks."""
    task: str = CAUSAL_LM
    """``causal_lm`` or ``classification``."""
    labels: tuple[str, ...] = ()
    """Class names of a classifier, in the order of their index."""
    head_modules: tuple[str, ...] = ()
    """Paths of the modules of a classifier's head (`fedlora.models.head`)."""
    head: tuple[HeadTensor, ...] = ()
    """Their parameters."""

    @property
    def frozen_blocks(self) -> int:
        """How many blocks next to the input carry no adapter, and nothing before them does."""
        return min(self.adapted, default=0)

    @property
    def classifies(self) -> bool:
        """Whether it predicts labels rather than tokens."""
        return self.task == CLASSIFICATION

    def to_json(self) -> dict[str, Any]:
        """JSON values that `from_json` understands."""
        return asdict(self)

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> "ModelInfo":
        """The inverse of `to_json`.

        Raises:
            TypeError: for values that are no model's.
        """
        lists: dict[str, tuple[Any, ...]] = {
            name: tuple(v) for name, v in values.items() if isinstance(v, list | tuple)
        }
        lists["modules"] = tuple(Module(**m) for m in lists["modules"])
        lists["splits"] = tuple(
            Split(x["path"], tuple(Module(**m) for m in x["parts"])) for x in lists["splits"]
        )
        lists["head"] = tuple(HeadTensor(name, tuple(shape)) for name, shape in lists["head"])
        return ModelInfo(**{**values, **lists})


def is_linear(layer: nn.Module) -> bool:
    """Whether the layer is ``nn.Linear``, a quantised subclass of it, or GPT-2's ``Conv1D``.

    The routers of some mixtures of experts (Llama 4, PhiMoE) are subclasses too, but return a
    choice of experts where a linear layer returns a product.
    """
    kind = type(layer).__name__
    return (isinstance(layer, nn.Linear) and not kind.endswith("Router")) or kind == "Conv1D"


def shape(layer: nn.Module) -> tuple[int, int]:
    """``(d_out, d_in)``. ``Conv1D`` stores its weight as ``[d_in, d_out]``; quantised layers pack
    theirs."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return int(weight.shape[1]), int(weight.shape[0])


def kind(path: str) -> Literal["attention", "mlp"]:
    """Attention if a part of the path says so (``self_attn``, ``attn``, ``attention``)."""
    parts = path.lower().split(".")
    return "attention" if any("attn" in p or "attention" in p for p in parts) else "mlp"


def find_modules(
    network: Any,
    targets: str | Sequence[str],
    layers: Any = "all",
    *,
    outside: Sequence[str] = (),
) -> tuple[Module, ...]:
    """The linear layers that ``targets`` names, in the order of ``named_modules()``.

    Args:
        network: a ``PreTrainedModel``, on any device (``meta`` too).
        targets: ``all-linear`` (every linear layer except the output embedding, as in PEFT), or
            ends of module paths such as ``q_proj`` or ``layers.0.mlp.up_proj``. Of a network that
            also takes images or sounds, only layers of its language model (`text_part`).
            Layers whose weight is read past them (`WEIGHT_READ`) are left out.
        layers: the blocks that they lie in (`fedlora.models.blocks.adaptable_parts`).
        outside: paths of modules none of whose layers is adapted: the head of a classifier.

    Raises:
        ConfigError: if a target matches no linear layer, or there is no such block.
    """
    head, inside = network.get_output_embeddings(), text_part(network)
    parts = adaptable_parts(network, layers)
    read = WEIGHT_READ.get(network.config.get_text_config().model_type, ())
    linear = {
        path: layer
        for path, layer in network.named_modules()
        if is_linear(layer) and layer is not head and path.startswith(inside)
        if path.rpartition(".")[2] not in read and path.startswith(parts)
        if not f"{path}.".startswith(tuple(f"{x}." for x in outside))
    }
    if targets == "all-linear":
        chosen = set(linear)
    else:
        wanted = [targets] if isinstance(targets, str) else list(targets)
        chosen = set()
        for target in wanted:
            matches = {p for p in linear if p == target or p.endswith(f".{target}")}
            if not matches:
                ends = list(dict.fromkeys(p.rpartition(".")[2] for p in linear))
                raise ConfigError(
                    f"model.targets: {target!r} is the end of no adaptable linear layer of "
                    f"{type(network).__name__}{_in(layers)}; allowed: 'all-linear' or ends such as "
                    f"{ends}"
                )
            chosen |= matches
    found = tuple(Module(p, kind(p), *shape(layer)) for p, layer in linear.items() if p in chosen)
    if not found:
        raise ModelError(
            f"{type(network).__name__} has no linear layer that could be adapted{_in(layers)}"
        )
    return found


def _in(layers: Any) -> str:
    return "" if layers == "all" else f" in the blocks of model.layers={layers}"


def check_paths(paths: Iterable[str], info: ModelInfo) -> None:
    """Raise a ValueError that names the first path that is not an adapted module of the model."""
    known = [m.path for m in info.modules]
    for path in sorted(set(paths) - set(known)):
        raise ValueError(
            f"the payload updates {path!r}, which is not an adapted module of {info.name} "
            "(model.targets and model.layers decide); it has "
            f"{known[:4]}, ... ({len(known)} modules)"
        )


def check_adapter(adapter: Adapter, info: ModelInfo) -> None:
    """Raise a ValueError that names the first module that the model lacks or that does not fit."""
    check_paths(adapter, info)
    for module in info.modules:
        if module.path not in adapter:
            continue
        factors = adapter[module.path]
        if (factors.b.shape[0], factors.a.shape[1]) != (module.d_out, module.d_in):
            raise ValueError(
                f"{module.path}: A {tuple(factors.a.shape)} and B {tuple(factors.b.shape)} do not "
                f"fit a layer with d_out={module.d_out}, d_in={module.d_in}"
            )
        if not 1 <= factors.rank <= module.max_rank:
            raise ValueError(
                f"{module.path}: rank {factors.rank} is not in 1..{module.max_rank} = "
                f"min(d_out={module.d_out}, d_in={module.d_in})"
            )


def check_head(head: Mapping[str, Tensor] | None, info: ModelInfo) -> None:
    """Raise a ValueError that names the first parameter of a classifier's head that the model lacks
    or that does not fit; None fits."""
    if head is None:
        return
    due = {h.name: h.shape for h in info.head}
    wrong = wrong_names(head, due)
    for name, shape in due.items():
        if not wrong and tuple(head[name].shape) != shape:
            wrong = f"{name} has shape {tuple(head[name].shape)}, not {shape}"
    if wrong:
        raise ValueError(f"the head does not fit {info.name}: {wrong}")


def linear_layers(network: nn.Module, paths: Iterable[str]) -> dict[str, nn.Module]:
    """The linear layers at these paths, without whatever adapters are around them.

    Raises:
        ModelError: naming a path where there is nothing, no linear layer, or a quantised one.
    """
    found = {}
    for path in paths:
        try:
            layer = network.get_submodule(path)
        except AttributeError as error:
            raise ModelError(f"{type(network).__name__} has no module {path!r}") from error
        base = layer.base if isinstance(layer, AdaptedLinear) else layer
        if not is_linear(base):
            raise ModelError(
                f"{path} is a {type(base).__name__}; only linear layers (nn.Linear, Conv1D) can be "
                "pruned: choose other model.targets"
            )
        weight: Any = base.weight
        if not weight.is_floating_point():
            raise ModelError(
                f"{path} stores {weight.dtype} weights: a quantised base cannot be pruned; use "
                "model.quantization=none"
            )
        found[path] = base
    return found
