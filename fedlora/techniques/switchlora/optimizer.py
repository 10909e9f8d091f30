"""AdamW that counts steps per vector, so that single rows and columns can be reset."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class RowAdamW(torch.optim.Optimizer):
    """AdamW with decoupled weight decay and bias correction by each vector's own count of steps.

    Without resets it equals ``torch.optim.AdamW`` up to rounding, whose CPU path takes only one
    count per parameter.

    Args:
        groups: with ``params`` and ``side``: ``a`` (a vector is a row), ``b`` (a column), or
            ``None`` (one count for the whole parameter).
        lr: learning rate.
        betas: decay rates of both moments.
        eps: added to the root of the second.
        weight_decay: acts on frozen vectors too.
    """

    def __init__(
        self,
        groups: Iterable[Mapping[str, Any]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__([dict(g) for g in groups], {**defaults, "side": None})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step on every parameter that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    _update(p, p.grad, self._of(p, group["side"]), group)

    def reset(self, p: nn.Parameter, side: str, slots: Sequence[int]) -> None:
        """Reset moments and step counts of these vectors."""
        state = self._of(p, side)
        for name in ("exp_avg", "exp_avg_sq", "step"):
            _rows(state[name], side)[list(slots)] = 0.0

    def hold(self, p: nn.Parameter, side: str, slots: Sequence[int]) -> None:
        """Do not count the next step for these vectors."""
        _rows(self._of(p, side)["step"], side)[list(slots)] -= 1.0

    def _of(self, p: Tensor, side: str | None) -> dict[str, Any]:
        state: dict[str, Any] = self.state[p]
        if not state:
            shape = {"a": (p.shape[0], 1), "b": (1, p.shape[-1])}.get(side or "", ())
            state["step"] = torch.zeros(shape, dtype=torch.float32, device=p.device)
            state["exp_avg"] = torch.zeros_like(p)
            state["exp_avg_sq"] = torch.zeros_like(p)
        return state


def _rows(t: Tensor, side: str) -> Tensor:
    """A view with a row per vector."""
    return t if side == "a" else t.t()


def _update(p: Tensor, grad: Tensor, state: Mapping[str, Any], group: Mapping[str, Any]) -> None:
    """One AdamW step of ``p [m, n]`` with step counts ``[m, 1]``, ``[1, n]`` or ``[]``."""
    (b1, b2), lr, step = group["betas"], group["lr"], state["step"]
    step += 1
    if group["weight_decay"]:
        p.mul_(1 - lr * group["weight_decay"])
    first, second = state["exp_avg"], state["exp_avg_sq"]
    first.lerp_(grad, 1 - b1)
    second.mul_(b2).addcmul_(grad, grad, value=1 - b2)

    # Bias corrections, one per vector. A frozen vector may have no counted step yet, hence 1.
    count = step.clamp(min=1.0).double()
    c1, c2 = (1 - b1**count).to(p.dtype), (1 - b2**count).sqrt().to(p.dtype)
    if step.ndim == 0:
        denominator = second.sqrt().div_(float(c2)).add_(group["eps"])
        p.addcdiv_(first, denominator, value=-lr / float(c1))
    else:
        denominator = second.sqrt().div_(c2).add_(group["eps"])
        p.addcdiv_(first / c1, denominator, value=-lr)
