"""The trained part of one side of a split: adapters on its own blocks, and an optimizer whose state
is kept.

The optimizer is that of the sequential engine (one flat buffer), so a split of one client is
bitwise identical to an unsplit client.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from fedlora.core.types import (
    Adapter,
    Factors,
    LocalPlan,
)
from fedlora.server.validation import absurd
from fedlora.techniques.lora.layer import LowRank
from fedlora.training.flat import FlatParameters
from fedlora.training.loop import clip_and_step, optimizer_for

OptimizerState = Mapping[str, Tensor]
"""Tensors of an optimizer by name: ``exp_avg``, ``exp_avg_sq``, ``step`` or the like."""


class TrainableStage:
    """Live adapters of one stage and their optimizer.

    Args:
        updates: module path -> the update that is mounted there (`LanguageModel.updates`); may be
            empty.
        plan: optimizer, clipping, and which factors train.
        optimizer_state: as `optimizer_state` returned it; empty: a new optimizer.
    """

    def __init__(
        self,
        updates: Mapping[str, LowRank],
        plan: LocalPlan,
        optimizer_state: OptimizerState | None = None,
    ) -> None:
        self.updates = dict(updates)
        self.plan = plan
        for update in self.updates.values():
            update.a.requires_grad_(plan.train_a)
            update.b.requires_grad_(plan.train_b)
        trained = [p for u in self.updates.values() for p in u.parameters() if p.requires_grad]
        self.flat = FlatParameters(trained)
        buffers = self.flat.buffers
        self.optimizer = optimizer_for(plan, buffers) if buffers else None
        if optimizer_state and self.optimizer is not None:
            self._restore(optimizer_state)

    def zero_grad(self) -> None:
        """Clear the gradients before a step's first backward pass."""
        self.flat.zero_grad()

    def step(self, rate: float) -> Tensor:
        """One optimizer step at a learning rate; the norm of the gradient before clipping."""
        if self.optimizer is None:
            return torch.zeros(())
        return clip_and_step(self.optimizer, self.flat.buffers, rate, self.plan.max_grad_norm)

    def adapter(self) -> Adapter:
        """A detached copy of the adapters, on the CPU, where sent and stored tensors are."""
        return {path: _on_cpu(update.factors()) for path, update in self.updates.items()}

    def load(self, adapter: Adapter) -> None:
        """Overwrite the adapters in place; the optimizer keeps its state.

        Raises:
            ValueError: naming a module whose rank is another.
        """
        with torch.no_grad():
            for path, update in self.updates.items():
                new = adapter[path]
                if new.a.shape != update.a.shape or new.b.shape != update.b.shape:
                    raise ValueError(
                        f"{path}: rank {new.rank} arrived where rank {update.a.shape[0]} trains"
                    )
                update.a.copy_(new.a)
                update.b.copy_(new.b)

    def optimizer_state(self) -> dict[str, Tensor]:
        """A detached copy of the optimizer state, on the CPU; empty before its first step."""
        return {
            f"{i}/{name}": value.detach().to("cpu", copy=True)
            for i, buffer in enumerate(self.flat.buffers)
            for name, value in self._state(buffer).items()
            if isinstance(value, Tensor)
        }

    def _state(self, buffer: Tensor) -> Mapping[str, object]:
        assert self.optimizer is not None
        found: Mapping[str, object] = self.optimizer.state.get(buffer, {})
        return found

    def _restore(self, optimizer_state: OptimizerState) -> None:
        assert self.optimizer is not None
        for name, value in optimizer_state.items():
            i, _, key = name.partition("/")
            buffer = self.flat.buffers[int(i)]
            if value.numel() not in (1, buffer.numel()):
                raise ValueError(
                    f"the optimizer's {key} holds {value.numel()} scalars, the stage trains "
                    f"{buffer.numel()}"
                )
            self.optimizer.state[buffer][key] = value.to(buffer.device, copy=True)


def check_optimizer_state(state: OptimizerState, adapter: Adapter, plan: LocalPlan) -> None:
    """Raise a ValueError unless a client's optimizer state is one of these adapters: it is stored
    and sent to the client again.

    Args:
        state: as received; empty: the client has not stepped.
        adapter: what the client trains.
        plan: optimizer, and which factors train.
    """
    sides = ("a",) * plan.train_a + ("b",) * plan.train_b
    size = sum(getattr(f, side).numel() for f in adapter.values() for side in sides)
    due = {"0/exp_avg": size, "0/exp_avg_sq": size, "0/step": 1}
    if plan.optimizer == "sgd":
        due = {"0/momentum_buffer": size}
    if state and state.keys() != due.keys():
        raise ValueError(f"optimizer state {sorted(state)[:4]}, expected {sorted(due)}")
    for name, t in state.items():
        if not t.is_floating_point() or t.numel() != due[name]:
            raise ValueError(
                f"the optimizer's {name[2:]} is {t.numel()} scalars of {t.dtype}, expected "
                f"{due[name]} floats"
            )
        if name != "0/exp_avg" and name != "0/momentum_buffer" and bool((t < 0).any()):
            raise ValueError(f"the optimizer's {name[2:]} is negative")
    if wrong := absurd((f"the optimizer's {n[2:]}", t) for n, t in state.items()):
        raise ValueError(wrong)


def _on_cpu(f: Factors) -> Factors:
    return Factors(f.a.cpu(), f.b.cpu(), f.alpha)
