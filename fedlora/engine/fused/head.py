"""Cross-entropy through a frozen output embedding without holding all logits at once.

The vocabulary is the widest layer of a small model: 1,024 tokens of 2,048 logits are 8 MB, which
softmax, loss and their gradients read and write a dozen times. This module computes the loss and
the gradient of the hidden states for one chunk of tokens at a time, so that its logits stay in the
cache. The embedding is frozen, so the logits are not needed for any other gradient.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fedlora.core.seeding import torch_generator
from fedlora.models.language_model import LanguageModel

CHUNK_NUMBERS = 1 << 18
"""Logits at a time: 1 MB in float32, a second-level cache."""


class _HeadNLL(torch.autograd.Function):
    """``-log softmax(W h + b)[target]`` of every row, ``[n]``."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
    ) -> Tensor:
        # hidden [n, d], weight [vocabulary, d]; slope [n, d] is the gradient of each row's loss.
        wants = ctx.needs_input_grad[0]
        slope = torch.empty_like(hidden) if wants else None
        wide = torch.promote_types(hidden.dtype, torch.float32)
        nll = torch.empty(len(targets), dtype=wide, device=hidden.device)
        size = max(1, CHUNK_NUMBERS // weight.shape[0])
        for at in range(0, len(targets), size):
            # Log-probabilities of a chunk, [size, vocabulary], and the loss of its targets.
            chunk, aims = hidden[at : at + size], targets[at : at + size, None]
            logits = chunk @ weight.t() if bias is None else torch.addmm(bias, chunk, weight.t())
            logs = torch.log_softmax(logits, dim=-1, dtype=wide)
            nll[at : at + size] = -logs.gather(1, aims)[:, 0]
            # Gradient of the hidden state: (p - one_hot(target)) W, [size, d].
            if slope is not None:
                p = logs.exp_()
                p.scatter_add_(1, aims, p.new_full((1, 1), -1.0).expand_as(aims))
                torch.mm(p.to(weight.dtype), weight, out=slope[at : at + size])
        ctx.slope = slope
        return nll

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.slope * grad[:, None].to(ctx.slope.dtype), None, None, None


def head_nll(hidden: Tensor, head: nn.Module, targets: Tensor) -> Tensor:
    """The negative log-likelihood of each target.

    Args:
        hidden: ``[n, d]``, the input of the output embedding.
        head: a plain output embedding (`is_plain`), frozen.
        targets: ``[n]`` int64.

    Returns:
        ``[n]`` in float32, or float64 for a model in float64.
    """
    weight, bias = head.weight, head.bias
    assert isinstance(weight, Tensor)
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    cast = None if bias is None else bias.to(dtype)
    nll: Tensor = _HeadNLL.apply(hidden.to(dtype), weight.to(dtype), cast, targets)  # type: ignore[no-untyped-call]
    return nll


def is_plain(model: LanguageModel) -> bool:
    """Whether the network's logits are exactly the output of its output embedding, a linear layer,
    without scaling or soft capping. A forward pass tests it."""
    network: Any = model.network
    head = network.get_output_embeddings()
    if type(head) is not nn.Linear or not head.weight.is_floating_point():
        return False
    seen: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    ids = torch.randint(0, model.vocabulary, (1, 3), generator=torch_generator(0, "head check"))
    try:
        with torch.no_grad():
            logits = network(input_ids=ids.to(model.device), use_cache=False).logits
            return len(seen) == 1 and torch.equal(logits, head(seen[0]))
    finally:
        handle.remove()
