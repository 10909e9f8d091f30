"""What split learning costs a client: bytes, arithmetic, memory and time, by formula.

Symbols: block ``i`` of the model has linear layers ``W [d_out, d_in]`` with adapters of rank ``r``,
attention of width ``w`` over ``T`` tokens and is cut off after block ``c``. Per token, counting a
multiplication and an addition as two:

    forward   Σ 2 d_out d_in + Σ 2 r (d_in + d_out) + 4 T w      (half of the last if causal)
    backward  Σ 2 d_out d_in + Σ 4 r (d_in + d_out) + 8 T w      (no gradients of frozen weights)

In the first block of a model nothing below needs a gradient, so the layers that read its input
spare theirs. The formulas hold for GPT-2 and Llama-like blocks (attention, then a plain or a gated
MLP) whose first adapted layer reads the block's input; norms, softmax, rotations and activation
functions count nothing. Sources: Vepakomma et al., arXiv:1812.00564 (split learning), Thapa et al.,
arXiv:2004.12088 (SplitFed) and Lin et al., arXiv:2407.00952 (SplitLoRA); the formulas are our own.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from fedlora.core.checks import at_least, one_of
from fedlora.split.compression import Wire
from fedlora.split.shapes import Block, Shapes, Split

LABEL_BYTES = 5
"""Per token that the server computes a loss for: an int32 label and a byte of its mask."""
NUMBER = 4
"""Bytes of a float32, in which adapters train and activations are saved."""
ADAPTER_COPIES = 4
"""Of each trainable number: itself, its gradient and the two moments of Adam."""

# -------------------------------------------------------------------------------------------- bytes


@dataclass(frozen=True)
class Traffic:
    """Bytes of one client in one period between aggregations, without headers."""

    up: int
    down: int

    @property
    def total(self) -> int:
        """Both ways."""
        return self.up + self.down


def full_traffic(shapes: Shapes, weight_bytes: int = NUMBER) -> Traffic:
    """Federated learning of all weights: ``W`` each way."""
    return Traffic(shapes.parameters * weight_bytes, shapes.parameters * weight_bytes)


def adapter_traffic(shapes: Shapes, weight_bytes: int = NUMBER) -> Traffic:
    """Federated LoRA: ``P`` each way."""
    return Traffic(shapes.adapter * weight_bytes, shapes.adapter * weight_bytes)


def split_traffic(
    shapes: Shapes,
    split: Split,
    *,
    steps: int,
    tokens: int,
    activations: Wire,
    gradients: Wire,
    weight_bytes: int = NUMBER,
    label_bytes: int = LABEL_BYTES,
) -> Traffic:
    """Split learning: activations and gradients of every step, and the client's adapters once.

    Passing the client's adapters on to the next client (split learning without a federation) costs
    the same as averaging them.

    Args:
        shapes: of the model.
        split: U-shaped, both cross twice and no labels do.
        steps: ``K``, between two aggregations.
        tokens: ``B T``, of a step, padding included where it is sent.
        activations: the wire of activations.
        gradients: the wire of gradients.
        weight_bytes: of a number in an adapter.
        label_bytes: per token.
    """
    forward = steps * activations.bytes(tokens, shapes.hidden)
    backward = steps * gradients.bytes(tokens, shapes.hidden)
    adapters = sum(b.adapter for b in split.client(shapes)) * weight_bytes
    if split.tail is not None:
        return Traffic(forward + backward + adapters, forward + backward + adapters)
    return Traffic(forward + steps * tokens * label_bytes + adapters, backward + adapters)


def break_even(
    shapes: Shapes,
    split: Split,
    other: Traffic,
    *,
    activations: Wire,
    gradients: Wire,
    weight_bytes: int = NUMBER,
    label_bytes: int = LABEL_BYTES,
) -> float:
    """Tokens between two aggregations at which split learning sends as many bytes as ``other``.

    Negative if its adapters alone are more.
    """

    def total(tokens: int) -> int:
        return split_traffic(
            shapes,
            split,
            steps=1,
            tokens=tokens,
            activations=activations,
            gradients=gradients,
            weight_bytes=weight_bytes,
            label_bytes=label_bytes,
        ).total

    return (other.total - total(0)) / (total(1) - total(0))


# --------------------------------------------------------------------------------------- arithmetic


@dataclass(frozen=True)
class Work:
    """Floating-point operations per token."""

    forward: float
    backward: float

    def __add__(self, other: "Work") -> "Work":
        return Work(self.forward + other.forward, self.backward + other.backward)


def block_work(block: Block, length: int, *, first: bool = False, causal: bool = False) -> Work:
    """Of one block.

    Args:
        block: its shapes.
        length: ``T``, of a sequence.
        first: nothing below needs a gradient.
        causal: the attention computes only what it uses; else the full ``T x T`` matrix.
    """
    attention = 4 * length * block.width * (0.5 if causal else 1)
    forward, backward = attention, 2 * attention
    for x in block.linears:
        forward += 2 * x.d_out * x.d_in + 2 * x.adapter
        backward += 4 * x.adapter
        if first and x.reads == "input":
            backward -= 2 * x.rank * x.d_in
        else:
            backward += 2 * x.d_out * x.d_in
    return Work(forward, backward)


def head_work(shapes: Shapes) -> Work:
    """``2 d V`` each way."""
    one_way = 2.0 * shapes.hidden * shapes.vocabulary
    return Work(one_way, one_way)


def client_work(
    shapes: Shapes, split: Split, length: int, *, causal: bool = False, checkpointing: bool = False
) -> Work:
    """Of the client's blocks and, U-shaped, the head.

    Args:
        shapes: of the model.
        split: which blocks.
        length: ``T``.
        causal: see `block_work`.
        checkpointing: its blocks run forward a second time in the backward pass.
    """
    work = Work(0.0, 0.0)
    for i, block in enumerate(split.client(shapes)):
        first = i == 0 and split.cut > 0
        one = block_work(block, length, first=first, causal=causal)
        work += Work(one.forward, one.backward + (one.forward if checkpointing else 0.0))
    return work if split.tail is None else work + head_work(shapes)


def server_work(shapes: Shapes, split: Split, length: int, *, causal: bool = False) -> Work:
    """Of the server's blocks and, unless the split is U-shaped, the head."""
    work = Work(0.0, 0.0)
    for i, block in enumerate(split.server(shapes)):
        work += block_work(block, length, first=i == 0 and split.cut == 0, causal=causal)
    return work + head_work(shapes) if split.tail is None else work


# ------------------------------------------------------------------------------------------- memory


@dataclass(frozen=True)
class Memory:
    """Bytes that a client holds during a step; what comes and goes within an operation is extra."""

    base: int
    """Frozen weights."""
    adapter: int
    """Trainable numbers, their gradients and the moments of Adam."""
    saved: int
    """Activations that the backward pass needs."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.base + self.adapter + self.saved


def saved_floats(
    block: Block,
    *,
    first: bool = False,
    dropout: bool = False,
    eager_length: int = 0,
) -> int:
    """Numbers per token that autograd saves in one block.

    The inputs of both norms with two statistics each; queries, keys and values, with the output of
    a fused attention and a number per head, or with an eager one's weights; what the activation
    function needs; and the input of each adapter with its ``r`` inner numbers, once for all that
    read the same unless each drops out by itself.

    Args:
        block: its shapes.
        first: nothing below needs a gradient.
        dropout: on the adapters' inputs: each then saves what it reads and the mask.
        eager_length: ``T`` if attention keeps its ``T x T`` weights; 0: a fused kernel.
    """
    norms = (block.hidden + 2) * (1 if first else 2)
    mixed = sum(x.d_out for x in block.linears if x.reads == "input")
    attention = mixed + (block.heads * eager_length or block.width + block.heads)
    adapters = sum(x.rank for x in block.linears)
    read: set[str] = set() if eager_length else {"attention"}  # saved by the attention itself
    for x in (x for x in block.linears if x.rank):
        if dropout:
            adapters += x.d_in * (1 if first and x.reads == "input" else 2)
        elif x.reads not in read:
            read.add(x.reads)
            adapters += x.d_in
    return norms + attention + block.activation * block.inner + adapters


def client_memory(
    shapes: Shapes,
    split: Split,
    tokens: int,
    *,
    dropout: bool = False,
    checkpointing: bool = False,
    base_bytes: int = NUMBER,
    supervised: int | None = None,
) -> Memory:
    """Of a client that trains on ``tokens`` at once, with a fused attention kernel.

    Args:
        shapes: of the model.
        split: which blocks. U-shaped, the client also holds the logits, and a head that is tied to
            the embeddings costs no parameters.
        tokens: ``B T``.
        dropout: see `saved_floats`.
        checkpointing: its blocks save their inputs alone.
        base_bytes: of a frozen weight.
        supervised: tokens whose logits are computed (U-shaped); ``None``: all.
    """
    blocks = split.client(shapes)
    base = shapes.embedding + sum(b.parameters for b in blocks)
    floats = 0
    for i, block in enumerate(blocks):
        whole = saved_floats(block, first=i == 0 and split.cut > 0, dropout=dropout)
        floats += tokens * (block.hidden if checkpointing else whole)
    if split.tail is not None:
        base += shapes.final
        floats += tokens * shapes.hidden
        floats += (tokens if supervised is None else supervised) * shapes.vocabulary
    return Memory(
        base=base * base_bytes,
        adapter=sum(b.adapter for b in blocks) * NUMBER * ADAPTER_COPIES,
        saved=floats * NUMBER,
    )


# --------------------------------------------------------------------------------------------- time


@dataclass(frozen=True)
class Device:
    """What a modelled client can do. These are assumptions: print them beside every result."""

    flops: float = 1e12
    """Floating-point operations per second."""
    up: float = 1.25e6
    """Bytes per second."""
    down: float = 12.5e6
    """Bytes per second."""
    latency: float = 0.02
    """Seconds of one way, beside the bytes."""

    def __post_init__(self) -> None:
        at_least("device.flops", self.flops, 0, strict=True)
        at_least("device.up", self.up, 0, strict=True)
        at_least("device.down", self.down, 0, strict=True)
        at_least("device.latency", self.latency, 0)


@dataclass(frozen=True)
class Step:
    """One client's part in one step."""

    forward: float
    """Operations before its activations leave."""
    backward: float
    """Operations after its gradient arrives."""
    server: float
    """Operations that the server spends on its rows, forward and backward."""
    traffic: Traffic


def step_times(
    steps: Sequence[tuple[Step, Device]], server_flops: float, rule: str = "concat"
) -> list[float]:
    """Modelled seconds until each client has finished a step; the step takes as long as the last.

        arrive = forward / F + latency + up / b_up
        done   = finish + latency + down / b_down + backward / F

    ``concat``: the server starts when all have arrived and answers all at once. ``sequential``: it
    serves one after another in the order given, ``finish_i = max(arrive_i, finish_{i-1}) + work``.
    ``per_client``: the same in order of arrival, since no client waits for another's update.

    Args:
        steps: of the clients, each with its device.
        server_flops: operations per second.
        rule: how the server updates.
    """
    one_of("rule", rule, ("concat", "sequential", "per_client"))
    at_least("server_flops", server_flops, 0, strict=True)
    arrive = [s.forward / m.flops + m.latency + s.traffic.up / m.up for s, m in steps]
    work = [s.server / server_flops for s, _ in steps]
    finish = [max(arrive, default=0.0) + sum(work)] * len(steps)
    if rule != "concat":
        order = range(len(steps))
        free = 0.0
        for i in order if rule == "sequential" else sorted(order, key=arrive.__getitem__):
            free = finish[i] = max(arrive[i], free) + work[i]
    return [
        f + m.latency + s.traffic.down / m.down + s.backward / m.flops
        for f, (s, m) in zip(finish, steps, strict=True)
    ]
