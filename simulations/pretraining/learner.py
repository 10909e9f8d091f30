"""The trained parameters of pre-training: the whole network, or low-rank factors by three methods.

    full         every weight
    lora         factors of the adapted layers (Hu et al., arXiv:2106.09685), B = 0 at first
    relora       the same, merged into the weights and begun anew every so many steps (Lialin et
                 al., arXiv:2307.05695): optimizer state cleared, learning rate warmed up again
    switchlora   vectors of the factors are switched throughout (Zhou et al., arXiv:2406.06564)

Embeddings, norms and head are trained by all of them.
"""

import copy
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedlora.core.seeding import torch_generator
from fedlora.models.modules import find_modules
from fedlora.techniques.switchlora.controller import SwitchController
from fedlora.techniques.switchlora.init import check_rank
from fedlora.techniques.switchlora.optimizer import RowAdamW
from fedlora.techniques.switchlora.peft import (
    NAME,
    Adapted,
    adapt,
    pretraining,
    wrap_network,
)
from fedlora.techniques.switchlora.schedule import Switching
from simulations.pretraining.recipe import (
    Network,
    Recipe,
    build_model,
    build_optimizer,
)

METHODS = ("full", "lora", "relora", "switchlora")
NUMERICAL_RANK = 1e-3
"""Singular values above this fraction of the largest count: float32 sums have a noise floor."""


@dataclass(frozen=True)
class Method:
    """The method and its options; a method ignores options of other methods."""

    method: str = "full"
    rank: int = 32
    alpha: float = 1.0
    interval: float = 40.0
    ratio: float = 0.1
    freeze: int = 5
    choice: str = "ring"
    merge_every: int = 200
    """Steps between two merges of relora."""
    merge_warmup: int = 20
    """Steps over which its learning rate rises again."""
    full_steps: int = 0
    """First train the adapted layers' own weights for so many steps, their factors after that."""
    pools: str = ""
    """Folder for switchlora's candidate vectors in memory-mapped files."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method={self.method!r} is not one of {METHODS}")
        for name, low in (("rank", 1), ("merge_every", 1), ("merge_warmup", 0), ("full_steps", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"{name}={getattr(self, name)} must be >= {low}")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"alpha={self.alpha} must be a number > 0")
        if self.method == "switchlora":
            try:
                Switching(self.interval, self.ratio, self.freeze, self.choice)
            except ValueError as error:  # which speaks of a federation's keys
                raise ValueError(str(error).replace("client.technique.", "")) from error

    @property
    def switching(self) -> Switching:
        """The switching options of switchlora."""
        return Switching(self.interval, self.ratio, self.freeze, self.choice)


class Learner:
    """A network and its optimizer; this one trains everything."""

    def __init__(self, network: Any, optimizer: torch.optim.Optimizer) -> None:
        self.network, self.optimizer = network, optimizer
        self.weights = _weights(network)
        """Initial weights of the adapted layers."""

    def rate(self, step: int) -> float:
        """The factor on the recipe's learning rate."""
        return 1.0

    def before_step(self, step: int) -> None:
        """Called after the backward pass of a step, counted from 0, and before gradient
        clipping."""

    def after_step(self, step: int) -> None:
        """Called after the optimizer step."""

    def exported(self) -> Any:
        """The plain network that computes the same."""
        return self.network

    def effective(self) -> Mapping[str, Tensor]:
        """Module path -> its weight as it acts."""
        return {path: self.network.get_submodule(path).weight.detach() for path in self.weights}

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint."""
        return {"model": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`."""
        self.network.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    def report(self) -> dict[str, Any]:
        """The number of trained parameters, and the rank of the change of the adapted layers."""
        ranks, largest = [], []
        for path, weight in self.effective().items():
            values = torch.linalg.svdvals((weight - self.weights[path]).double())
            ranks.append(int((values > NUMERICAL_RANK * values[0]).sum()))
            largest.append(len(values))
        trained = sum(p.numel() for p in self.network.parameters() if p.requires_grad)
        return {
            "trained_parameters": trained,
            "update_rank": {
                "mean": round(sum(ranks) / len(ranks), 1),
                "smallest": min(ranks),
                "largest": max(ranks),
                "possible": round(sum(largest) / len(largest), 1),
            },
        }


def _weights(network: Any) -> dict[str, Tensor]:
    modules = find_modules(network, "all-linear")
    return {m.path: network.get_submodule(m.path).weight.detach().clone() for m in modules}


class LowRank(Learner):
    """LoRA from ``A ~ U(-1/sqrt(d_in), 1/sqrt(d_in))`` and ``B = 0``."""

    def __init__(self, network: Network, recipe: Recipe, method: Method) -> None:
        self.method, self.seed = method, recipe.seed
        self.weights = _weights(network)
        self.adapted = self._adapt(network, recipe)
        pretraining(self.adapted.network)
        self.network, self.optimizer = self.adapted.network, self._optimizer(recipe)
        self._release(0)

    def _adapt(self, network: Network, recipe: Recipe) -> Adapted:
        found = adapt(network, self.method.rank, "all-linear", self.method.alpha)
        for path, layer in found.layers.items():
            self._begin(path, layer, 0)
        return found

    def _begin(self, path: str, layer: Any, turn: int) -> None:
        a, b = layer.lora_A[NAME].weight.detach(), layer.lora_B[NAME].weight.detach()
        g = torch_generator(self.seed, "pretrain-lora", zlib.crc32(path.encode()), turn)
        bound = 1 / math.sqrt(a.shape[1])
        a.uniform_(-bound, bound, generator=g)
        b.zero_()

    def _optimizer(self, recipe: Recipe) -> RowAdamW:
        layers = self.adapted.layers.values()
        groups: list[dict[str, Any]] = [
            {"params": [layer.lora_A[NAME].weight for layer in layers], "side": "a"},
            {"params": [layer.lora_B[NAME].weight for layer in layers], "side": "b"},
        ]
        named = self.adapted.network.named_parameters()
        rest = [p for name, p in named if p.requires_grad and "lora_" not in name]
        groups.append({"params": [p for p in rest if p.ndim >= 2], "weight_decay": recipe.decay})
        groups.append({"params": [p for p in rest if p.ndim < 2]})
        if self.method.full_steps:
            groups.append({"params": self._own()})
        return RowAdamW(groups, recipe.lr, betas=(0.9, recipe.beta2))

    def _own(self) -> list[nn.Parameter]:
        return [layer.base_layer.weight for layer in self.adapted.layers.values()]

    def _release(self, step: int) -> None:
        """Select the trained parameters: the layers' own weights, or their factors."""
        own = step < self.method.full_steps
        for p in self._own():
            p.requires_grad_(own)
            p.grad = p.grad if own else None
        for layer in self.adapted.layers.values():
            for p in (layer.lora_A[NAME].weight, layer.lora_B[NAME].weight):
                p.requires_grad_(not own)

    def after_step(self, step: int) -> None:
        if step + 1 == self.method.full_steps:
            self._release(step + 1)

    def exported(self) -> Any:
        return copy.deepcopy(self.adapted.network).merge_and_unload()

    def effective(self) -> Mapping[str, Tensor]:
        with torch.no_grad():
            return {
                path: layer.base_layer.weight + layer.get_delta_weight(NAME)
                for path, layer in self.adapted.layers.items()
            }

    def load(self, state: Mapping[str, Any]) -> None:
        super().load(state)
        self._release(int(state["step"]))


class ReLoRA(LowRank):
    """LoRA that is merged and reset at intervals."""

    def _since(self, step: int) -> int:
        """Steps since the last merge; before the first, since the factors' turn came."""
        return (step - self.method.full_steps) % self.method.merge_every

    def rate(self, step: int) -> float:
        if step < self.method.full_steps + self.method.merge_every or not self.method.merge_warmup:
            return 1.0
        return min(1.0, (self._since(step) + 1) / self.method.merge_warmup)

    def after_step(self, step: int) -> None:
        super().after_step(step)
        turn = (step + 1 - self.method.full_steps) // self.method.merge_every
        if step < self.method.full_steps or self._since(step + 1) or not turn:
            return
        assert isinstance(self.optimizer, RowAdamW)
        with torch.no_grad():
            for path, layer in self.adapted.layers.items():
                layer.base_layer.weight += layer.get_delta_weight(NAME)
                self._begin(path, layer, turn)
                for side, factor in (("a", layer.lora_A), ("b", layer.lora_B)):
                    every = list(range(self.method.rank))
                    self.optimizer.reset(factor[NAME].weight, side, every)


class SwitchLoRA(LowRank):
    """`fedlora.techniques.switchlora`."""

    controller: SwitchController

    def _adapt(self, network: Network, recipe: Recipe) -> Adapted:
        method = self.method
        peft, self.controller = wrap_network(
            network,
            method.rank,
            switching=method.switching,
            total=max(1, recipe.steps - method.full_steps),
            seed=recipe.seed,
            alpha=method.alpha,
            pools=Path(method.pools) if method.pools else None,
        )
        layers = {
            path: peft.get_base_model().get_submodule(path) for path in self.controller.layers
        }
        return Adapted(peft, layers)

    def before_step(self, step: int) -> None:
        if step >= self.method.full_steps:
            assert isinstance(self.optimizer, RowAdamW)
            self.controller.before_step(step - self.method.full_steps, self.optimizer)

    def state(self) -> dict[str, Any]:
        return super().state() | {"switch": self.controller.state_dict()}

    def load(self, state: Mapping[str, Any]) -> None:
        super().load(state)
        self.controller.load_state_dict(state["switch"])

    def report(self) -> dict[str, Any]:
        return super().report() | {
            "exchanged": self.controller.exchanged,
            "pool_floats": sum(
                pool.numel()
                for layer in self.controller.layers.values()
                for pool in layer.candidates.values()
            ),
        }


def require(recipe: Recipe, method: Method) -> None:
    """Refuse a method that does not fit a recipe, before any text is read.

    Raises:
        ValueError: for a rank that cannot switch, or settings that contradict each other.
    """
    if method.full_steps >= recipe.steps:
        raise ValueError(
            f"full_steps={method.full_steps} leaves none of the run's {recipe.steps} steps to the "
            "factors; choose fewer, or more tokens"
        )
    if method.method == "switchlora":
        for m in find_modules(build_model(recipe), "all-linear"):
            check_rank(m.path, m.d_out, m.d_in, method.rank)


def learner(network: Network, recipe: Recipe, method: Method) -> Learner:
    """The learner of a method for a network.

    Raises:
        ValueError: for a rank that cannot switch, or settings that contradict each other.
    """
    if method.method == "full":
        return Learner(network, build_optimizer(network, recipe))
    kinds = {"lora": LowRank, "relora": ReLoRA, "switchlora": SwitchLoRA}
    return kinds[method.method](network, recipe, method)
