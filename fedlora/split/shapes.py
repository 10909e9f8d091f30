"""The linear layers of a model's blocks as far as their costs go, and where a split cuts them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fedlora.core.checks import at_least
from fedlora.models.modules import find_modules
from fedlora.models.stages import block_of

Reads = Literal["input", "attention", "middle", "inner"]
"""What a linear layer of a block reads: the block's (normed) input, the attention's output, the
(normed) input of the MLP, or the MLP's inner activations."""

_ENTRANCES = ("c_attn", "q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value")
_READS: Mapping[str, Reads] = {
    **dict.fromkeys(_ENTRANCES, "input"),
    **dict.fromkeys(("o_proj", "out_proj"), "attention"),
    **dict.fromkeys(("c_fc", "fc1", "gate_proj", "up_proj", "gate_up_proj"), "middle"),
    **dict.fromkeys(("fc2", "down_proj"), "inner"),
}


@dataclass(frozen=True)
class Linear:
    """One frozen linear layer and the rank of its adapter (0: none)."""

    d_out: int
    d_in: int
    reads: Reads
    rank: int = 0

    @property
    def adapter(self) -> int:
        """Numbers in its adapter."""
        return self.rank * (self.d_out + self.d_in)


@dataclass(frozen=True)
class Block:
    """One transformer block."""

    linears: tuple[Linear, ...]
    heads: int
    parameters: int
    """Of the frozen base: linear layers, biases, norms."""
    activation: int
    """Numbers that the activation function saves for each inner channel: 4 for GPT-2's ``gelu_new``
    written in Python, 3 for a gated one, 1 for one kernel."""

    @property
    def width(self) -> int:
        """``w``: of the attention's output."""
        return next(x.d_in for x in self.linears if x.reads == "attention")

    @property
    def hidden(self) -> int:
        """``d``: of the stream between blocks."""
        return next(x.d_in for x in self.linears if x.reads == "input")

    @property
    def inner(self) -> int:
        """Of the MLP."""
        return next(x.d_in for x in self.linears if x.reads == "inner")

    @property
    def adapter(self) -> int:
        """Numbers in its adapters."""
        return sum(x.adapter for x in self.linears)


@dataclass(frozen=True)
class Shapes:
    """What the formulas need to know of a causal language model and its adapters."""

    blocks: tuple[Block, ...]
    hidden: int
    """``d``"""
    vocabulary: int
    embedding: int
    """Parameters of the input embeddings, positions included."""
    final: int
    """Parameters of the final norm and of a head that is not tied to the embeddings."""

    @property
    def parameters(self) -> int:
        """``W``: of the frozen base."""
        return self.embedding + sum(b.parameters for b in self.blocks) + self.final

    @property
    def adapter(self) -> int:
        """``P``: numbers in all adapters."""
        return sum(b.adapter for b in self.blocks)


@dataclass(frozen=True)
class Split:
    """Which blocks a client holds."""

    cut: int
    """The first blocks, beside the embeddings."""
    tail: int | None = None
    """``None``: the server has the end of the model and the labels. A number: U-shaped, the client
    has so many of the last blocks, the final norm and the head."""

    def __post_init__(self) -> None:
        at_least("split.cut", self.cut, 0)
        at_least("split.tail", self.tail or 0, 0)

    def client(self, shapes: Shapes) -> tuple[Block, ...]:
        """The client's blocks, front then tail.

        Raises:
            ValueError: if the model has fewer blocks.
        """
        total, tail = len(shapes.blocks), self.tail or 0
        if self.cut + tail > total:
            raise ValueError(f"split.cut={self.cut} and split.tail={tail} of {total} blocks")
        return shapes.blocks[: self.cut] + shapes.blocks[total - tail :]

    def server(self, shapes: Shapes) -> tuple[Block, ...]:
        """The server's blocks."""
        self.client(shapes)
        return shapes.blocks[self.cut : len(shapes.blocks) - (self.tail or 0)]


def shapes_of(network: Any, ranks: Mapping[str, int]) -> Shapes:
    """Read the shapes of a model.

    Args:
        network: a ``PreTrainedModel``, wrapped by a `LanguageModel` or not, on any device (``meta``
            too).
        ranks: module path -> rank of its adapter; what is not named has none.

    Raises:
        ValueError: if its blocks are not made like those of GPT-2 or Llama.
    """
    config = network.config
    linears: dict[int, list[Linear]] = {}
    for module in find_modules(network, "all-linear"):
        path = module.path.removesuffix(".base")
        index = block_of(path)
        if index is not None:
            reads = _reads(path, module.kind == "attention")
            linear = Linear(module.d_out, module.d_in, reads, ranks.get(path, 0))
            linears.setdefault(index, []).append(linear)
    sizes, embedding, final = _parameters(network)
    return Shapes(
        blocks=tuple(
            Block(
                linears=tuple(linears[i]),
                heads=int(config.num_attention_heads),
                parameters=sizes[i],
                activation=_activation(linears[i], config),
            )
            for i in sorted(linears)
        ),
        hidden=int(config.hidden_size),
        vocabulary=int(config.vocab_size),
        embedding=embedding,
        final=final,
    )


def _reads(path: str, attention: bool) -> Reads:
    name = path.rpartition(".")[2]
    if name == "c_proj":  # GPT-2 calls both of its exits so
        return "attention" if attention else "inner"
    if name not in _READS:
        raise ValueError(
            f"{path} is no layer of a block that the cost formulas know: c_proj, {sorted(_READS)}"
        )
    return _READS[name]


def _parameters(network: Any) -> tuple[dict[int, int], int, int]:
    """Parameters of each block, of the embeddings, and of what follows the blocks."""
    blocks: dict[int, int] = {}
    embedding = final = 0
    for name, parameter in network.named_parameters():
        index = block_of(name)
        if index is not None:
            blocks[index] = blocks.get(index, 0) + parameter.numel()
        elif re.search(r"(?:wte|wpe|embed\w*)\.weight$", name):
            embedding += parameter.numel()
        else:
            final += parameter.numel()
    return blocks, embedding, final


def _activation(linears: Sequence[Linear], config: Any) -> int:
    inner = next(x.d_in for x in linears if x.reads == "inner")
    if sum(x.d_out for x in linears if x.reads == "middle") == 2 * inner:
        return 3
    name = getattr(config, "activation_function", None) or getattr(config, "hidden_act", "")
    return 4 if name == "gelu_new" else 1
