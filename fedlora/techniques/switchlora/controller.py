"""All layers of a model in one training run: which vectors are switched when, which are frozen, and
which optimizer state is reset. A step is

    loss.backward()          for all micro-batches
    controller.before_step   switch, reset the partners' optimizer state, clear frozen gradients
    clip, optimizer.step     the gradient norm is that of the vectors that move
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedlora.techniques.switchlora.init import SIDES, Side
from fedlora.techniques.switchlora.layer import SwitchLayer, other
from fedlora.techniques.switchlora.optimizer import RowAdamW
from fedlora.techniques.switchlora.schedule import Switching, draw, expected


@dataclass
class SwitchController:
    """Switches vectors of a model's layers. Every draw is a function of the seed."""

    layers: Mapping[str, SwitchLayer]
    parameters: Mapping[str, Mapping[Side, nn.Parameter]]
    """The parameters that hold the gradients, by layer and factor."""
    switching: Switching
    total: int
    """Steps of the whole run, for the schedule."""
    seed: int
    exchanged: int = 0
    """The number of vectors of both factors that have been switched so far."""

    def groups(self) -> list[dict[str, Any]]:
        """Parameter groups of the adapted layers for `RowAdamW`."""
        return [
            {"params": [p[side] for p in self.parameters.values()], "side": side} for side in SIDES
        ]

    def before_step(self, step: int, optimizer: RowAdamW) -> None:
        """Switch vectors after the backward pass of a step, counted from 0."""
        for path, layer in self.layers.items():
            self._switch(step, layer, self.parameters[path], optimizer)
            for side in SIDES:
                p, held = self.parameters[path][side], layer.frozen_slots(side)
                if held and p.grad is not None:
                    # A frozen vector is a row of A [r, d_in] or a column of B [d_out, r].
                    rows = p.grad if side == "a" else p.grad.t()
                    rows[held] = 0.0
                    if not self.switching.count_frozen:
                        optimizer.hold(p, side, held)
            layer.thaw()

    def _switch(
        self,
        step: int,
        layer: SwitchLayer,
        parameters: Mapping[Side, nn.Parameter],
        optimizer: RowAdamW,
    ) -> None:
        mean = expected(self.switching, layer.rank, step, self.total)
        count = min(draw(self.seed, layer.path, step, mean), layer.max_switches())
        if not count:
            return
        for side in SIDES:
            incoming = layer.choose(side, count, self.switching.choice, self.seed, step)
            slots = layer.switch(side, incoming, self.switching.freeze)
            optimizer.reset(parameters[other(side)], other(side), slots)
        self.exchanged += 2 * count

    def state_dict(self) -> dict[str, Tensor]:
        """Weights, factors, candidate vectors, ids, pointers and frozen steps; draws need no
        state."""
        whole = {"exchanged": torch.tensor(self.exchanged)}
        for path, layer in self.layers.items():
            whole |= {f"{path}/{name}": t for name, t in layer.state().items()}
        return whole

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state_dict`, for a controller of the same layers.

        Raises:
            ValueError: naming the first layer that is not in it, or has another shape there.
        """
        for path, layer in self.layers.items():
            mine = {k[len(path) + 1 :]: t for k, t in state.items() if k.startswith(f"{path}/")}
            if not mine:
                raise ValueError(f"{path} is not in the state")
            layer.load(mine)
        self.exchanged = int(state["exchanged"])
