"""The cost of a split for a client: bytes, operations and memory of its part of the model, by
formula.

Symbols: a block of the model has linear layers ``W [d_out, d_in]`` with adapters of rank ``r`` and
attention of width ``w`` over ``T`` tokens. Per token, counting a multiplication and an addition as
two:

    forward   Σ 2 d_out d_in + Σ 2 r (d_in + d_out) + 4 T w
    backward  Σ 2 d_out d_in + Σ 4 r (d_in + d_out) + 8 T w      (no gradients of frozen weights)

Nothing below the first block of a model needs a gradient, so the layers that read its input do not
compute theirs. The formulas hold for GPT-2 and Llama-like blocks (attention, then a plain or a
gated MLP) whose first adapted layer reads the block's input; norms, softmax, rotations and
activation functions count nothing. Sources: Vepakomma et al., arXiv:1812.00564 (split learning),
Thapa et al., arXiv:2004.12088 (SplitFed) and Lin et al., arXiv:2407.00952 (SplitLoRA); the formulas
are our own.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from fedlora.models.modules import find_modules
from fedlora.models.stages import block_of
from fedlora.split.protocol import Cut
from fedlora.wire.rows import Wire

LABEL_BYTES = 4
"""Bytes of an int32 label."""
FLOAT_BYTES = 4
"""Bytes of a float32: adapters are trained and activations are saved in it."""
ADAPTER_COPIES = 4
"""Scalars per trainable scalar: itself, its gradient and the two moments of Adam."""

Reads = Literal["input", "attention", "middle", "inner"]
"""What a linear layer of a block reads: the block's (normed) input, the attention's output, the
(normed) input of the MLP, or the MLP's inner activations."""

_ENTRANCES = (
    *("c_attn", "q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value"),
    *("query", "key", "value", "q_lin", "k_lin", "v_lin"),
)
_READS: Mapping[str, Reads] = {
    **dict.fromkeys(_ENTRANCES, "input"),
    **dict.fromkeys(("o_proj", "out_proj", "out_lin"), "attention"),
    **dict.fromkeys(("c_fc", "fc1", "gate_proj", "up_proj", "gate_up_proj", "lin1"), "middle"),
    **dict.fromkeys(("fc2", "down_proj", "lin2"), "inner"),
}


class Flops(NamedTuple):
    """Floating-point operations per token."""

    forward: float
    backward: float


class Memory(NamedTuple):
    """Bytes held during a step, without temporary tensors within an operation."""

    base: int
    """Frozen weights."""
    adapter: int
    """Trainable scalars, their gradients and the moments of Adam."""
    saved: int
    """Activations that the backward pass needs."""


@dataclass(frozen=True)
class Linear:
    """One frozen linear layer and the rank of its adapter (0: none)."""

    d_out: int
    d_in: int
    reads: Reads
    rank: int = 0


@dataclass(frozen=True)
class Block:
    """One transformer block."""

    linears: tuple[Linear, ...]
    heads: int
    parameters: int
    """Parameters of the frozen base: linear layers, biases, norms."""
    activation: int
    """Scalars that the activation function saves for each inner channel: 4 for GPT-2's ``gelu_new``
    written in Python, 3 for a gated one, 1 for one kernel."""

    @property
    def adapter(self) -> int:
        """Scalars in its adapters."""
        return sum(x.rank * (x.d_out + x.d_in) for x in self.linears)

    def width(self, what: Reads) -> int:
        """Scalars per token of what some of its layers read.

        Raises:
            ValueError: if none reads it, as in a mixture of experts, whose MLPs are no linear
                layers.
        """
        for x in self.linears:
            if x.reads == what:
                return x.d_in
        raise ValueError(f"no linear layer of a block reads the {what}: no formula covers it")

    def flops(self, length: int, *, first: bool) -> Flops:
        """Operations per token in a sequence of ``length``.

        Args:
            length: tokens of the sequence.
            first: whether nothing below the block needs a gradient.
        """
        forward = 4.0 * length * self.width("attention")
        backward = 2 * forward
        for x in self.linears:
            adapter = x.rank * (x.d_out + x.d_in)
            forward += 2 * x.d_out * x.d_in + 2 * adapter
            backward += 4 * adapter
            spared = first and x.reads == "input"
            backward += -2 * x.rank * x.d_in if spared else 2 * x.d_out * x.d_in
        return Flops(forward, backward)

    def saved(self, *, first: bool, dropout: bool) -> int:
        """Scalars per token that autograd saves, with a fused attention kernel.

        The inputs of both norms with two statistics each; queries, keys and values, with the output
        of the attention and a scalar per head; what the activation function needs; and the input of
        each adapter with its ``r`` inner scalars, once for all that read the same unless each drops
        out by itself (it then saves what it reads and the mask).
        """
        norms = (self.width("input") + 2) * (1 if first else 2)
        mixed = sum(x.d_out for x in self.linears if x.reads == "input")
        total = norms + mixed + self.width("attention") + self.heads
        total += self.activation * self.width("inner")
        total += sum(x.rank for x in self.linears)
        adapted = [x for x in self.linears if x.rank]
        if dropout:
            return total + sum(x.d_in * (1 if first and x.reads == "input" else 2) for x in adapted)
        read = {x.reads for x in adapted} - {"attention"}  # which the attention itself saves
        return total + sum(self.width(what) for what in read)


@dataclass(frozen=True)
class ClientPart:
    """A client's part of a causal language model: embeddings, first blocks and, U-shaped, the last
    blocks, final norm and head."""

    cut: Cut
    blocks: tuple[Block, ...]
    """The client's blocks, the first ones then the last ones."""
    hidden: int
    """``d``"""
    vocabulary: int
    embedding: int
    """Parameters of the input embeddings, positions included."""
    final: int
    """Parameters of the final norm and of a head that is not tied to the embeddings."""

    @property
    def adapter(self) -> int:
        """Scalars in its adapters."""
        return sum(b.adapter for b in self.blocks)

    def flops(self, length: int) -> Flops:
        """Operations per token in a sequence of ``length``."""
        held = [b.flops(length, first=self._first(i)) for i, b in enumerate(self.blocks)]
        head = 2.0 * self.hidden * self.vocabulary if self.cut.u_shaped else 0.0
        return Flops(head + sum(f.forward for f in held), head + sum(f.backward for f in held))

    def memory(self, tokens: int, *, dropout: bool, supervised: int | None = None) -> Memory:
        """Bytes held during a step.

        Args:
            tokens: ``B T``.
            dropout: on the adapters' inputs.
            supervised: tokens whose logits are computed (U-shaped); ``None``: all.
        """
        base = self.embedding + sum(b.parameters for b in self.blocks)
        kept = [b.saved(first=self._first(i), dropout=dropout) for i, b in enumerate(self.blocks)]
        saved = tokens * sum(kept)
        if self.cut.u_shaped:
            base += self.final
            saved += tokens * self.hidden
            saved += (tokens if supervised is None else supervised) * self.vocabulary
        adapter = self.adapter * ADAPTER_COPIES
        return Memory(base * FLOAT_BYTES, adapter * FLOAT_BYTES, saved * FLOAT_BYTES)

    def traffic(
        self, tokens: int, activations: Wire, gradients: Wire, labels: int = 0
    ) -> tuple[int, int]:
        """Bytes up and down of a step of ``tokens``, without headers and adapters. U-shaped, both
        activations and gradients cross twice and no labels do."""
        forward = activations.bytes(tokens, self.hidden)
        backward = gradients.bytes(tokens, self.hidden)
        if self.cut.u_shaped:
            return forward + backward, forward + backward
        return forward + labels * LABEL_BYTES, backward

    def _first(self, index: int) -> bool:
        return index == 0 and self.cut.first > 0


def client_part(network: Any, ranks: Mapping[str, int], cut: Cut) -> ClientPart:
    """Read a client's part of a model.

    Args:
        network: a ``PreTrainedModel``, wrapped by a `LanguageModel` or not, on any device (``meta``
            too).
        ranks: module path -> rank of its adapter; what is not named has none.
        cut: which blocks.

    Raises:
        ValueError: if its blocks are not made like those of GPT-2 or Llama, or are fewer.
    """
    linears: dict[int, list[Linear]] = {}
    for module in find_modules(network, "all-linear"):
        path = module.path.removesuffix(".base")
        index = block_of(path)
        if index is not None:
            reads = _reads(path, module.kind == "attention")
            linear = Linear(module.d_out, module.d_in, reads, ranks.get(path, 0))
            linears.setdefault(index, []).append(linear)
    total = len(linears)
    if cut.first + max(0, cut.tail) > total:
        raise ValueError(f"a cut of {cut.first} and {max(0, cut.tail)} of {total} blocks")
    config, (sizes, embedding, final) = network.config, _parameters(network)
    blocks = []
    for i in sorted(linears):
        if cut.owns(i, total):
            block = Block(tuple(linears[i]), int(config.num_attention_heads), sizes[i], 0)
            blocks.append(replace(block, activation=_activation(block, config)))
    hidden, vocabulary = int(config.hidden_size), int(config.vocab_size)
    return ClientPart(cut, tuple(blocks), hidden, vocabulary, embedding, final)


def _reads(path: str, attention: bool) -> Reads:
    name = path.rpartition(".")[2]
    if name == "c_proj":  # GPT-2 calls both of its exits so
        return "attention" if attention else "inner"
    if name == "dense":  # and so does BERT, with the entrance of its MLP
        middle = ".intermediate." in path
        return "attention" if attention else "middle" if middle else "inner"
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


def _activation(block: Block, config: Any) -> int:
    middle = sum(x.d_out for x in block.linears if x.reads == "middle")
    if middle == 2 * block.width("inner"):
        return 3
    name = getattr(config, "activation_function", None) or getattr(config, "hidden_act", "")
    return 4 if name == "gelu_new" else 1
