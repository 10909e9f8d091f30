"""The physical limit: how fast could this machine possibly train these clients?

A frozen linear ``[o, d]`` costs ``2 d o`` FLOP per token forward and ``2 d o`` for the gradient of
its input; its adapter of rank ``r`` costs ``6 r (d + o)``: two products forward, four backward.
Where nothing trainable lies below a layer, its input needs no gradient, and the products that make
one are not counted. The head is counted for tokens with a loss alone. Causal attention of a token
that sees ``t`` tokens (itself included) costs ``4 t w`` forward and ``8 t w`` backward per layer
with heads of total width ``w``. Norms, activations, softmax, optimizer and memory traffic count
nothing. Divided by the speed of a large matrix product on one core this is a lower bound of the
time, whatever the engine.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedlora.core.types import Factors, TrainJob
from fedlora.models.language_model import LanguageModel
from fedlora.models.layers import AdaptedLinear
from fedlora.models.modules import is_linear, shape
from fedlora.techniques.lora.payload import LowRankPayload
from simulations.bench.engine.cases import Fed, fed

SIZES = (1024, 2048)
ACCELERATOR_SIZES = (4096, 8192)


@dataclass(frozen=True)
class Layer:
    """A frozen linear layer."""

    path: str
    d_in: int
    d_out: int
    input_gradient: bool
    """Whether something trainable lies below it."""


@dataclass(frozen=True)
class Shape:
    """What a base model's FLOPs depend on."""

    layers: tuple[Layer, ...]
    """All linear layers but the head."""
    head: int
    """``d * vocabulary``."""
    attention: int
    """Width of all heads of a layer, summed over the layers."""

    @property
    def frozen(self) -> int:
        """FLOP per token of the frozen layers, without the head."""
        return sum((4 if x.input_gradient else 2) * x.d_in * x.d_out for x in self.layers)

    def adapters(self, ranks: Mapping[str, int]) -> int:
        """FLOP per token of adapters of these ranks."""
        flop = 0
        for x in self.layers:
            r = ranks.get(x.path, 0)
            flop += 6 * r * (x.d_in + x.d_out) - (0 if x.input_gradient else 2 * r * x.d_in)
        return flop

    def step(self, batch: Iterable[Fed], ranks: Mapping[str, int]) -> int:
        """FLOP of one optimizer step."""
        per_token, flop = self.frozen + self.adapters(ranks), 0
        for example in batch:
            n = example.tokens
            flop += n * per_token + 4 * self.head * example.supervised
            flop += 12 * self.attention * n * (n + 1) // 2
        return flop


def measure_shape(model: LanguageModel) -> Shape:
    """The shape of a model with adapters on all of its modules.

    Which inputs need a gradient is seen in one forward pass, so no architecture has to be known.
    """
    found: dict[str, Layer] = {}
    head = model.network.get_output_embeddings()
    handles = []
    for path, layer in model.network.named_modules():
        if isinstance(layer, AdaptedLinear) or (is_linear(layer) and layer is not head):
            base = layer.base if isinstance(layer, AdaptedLinear) else layer
            if path.removesuffix(".base") not in found:
                d_out, d_in = shape(base)
                found[path] = Layer(path, d_in, d_out, False)
                handles.append(layer.register_forward_pre_hook(_noting(found, path)))
    ones = {
        m.path: Factors(torch.zeros(1, m.d_in), torch.zeros(m.d_out, 1), 1.0)
        for m in model.info.modules
    }
    try:
        model.mount(LowRankPayload(ones))
        model.network(input_ids=torch.zeros(1, 2, dtype=torch.int64), use_cache=False)
    finally:
        model.unmount()
        for handle in handles:
            handle.remove()
    config = model.network.config.get_text_config()
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    return Shape(tuple(found.values()), head.weight.numel(), width * int(config.num_hidden_layers))


def _noting(found: dict[str, Layer], path: str) -> Any:
    def note(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        layer = found[path]
        found[path] = Layer(path, layer.d_in, layer.d_out, args[0].requires_grad)

    return note


def flop(of: Shape, jobs: Sequence[TrainJob], store: Any) -> int:
    """FLOP that training these jobs needs at least."""
    return sum(of.step(batch, job.client.ranks) for job in jobs for batch in fed(job, store))


def gemm_peak(dtype: str = "float32", device: str = "cpu", repeats: int = 4) -> float:
    """FLOP per second of the best large matrix product in this process with one thread.

    On a CPU by CPU time: others who use the core must not lower the limit.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    best, on_cpu = 0.0, device == "cpu"
    clock = time.process_time if on_cpu else time.perf_counter
    for n in SIZES if on_cpu else ACCELERATOR_SIZES:
        kind = {"dtype": getattr(torch, dtype), "device": device}
        a, b, out = (torch.ones(n, n, **kind) for _ in range(3))
        for _ in range(repeats):
            began = clock()
            torch.mm(a, b, out=out)
            if not on_cpu:
                torch.cuda.synchronize(device)
            best = max(best, 2 * n**3 / (clock() - began))
    torch.set_num_threads(threads)
    return best
