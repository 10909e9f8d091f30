"""The resident base model of one worker: adapters come and go, the base never changes a bit."""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedlora.models.layers import (
    AdaptedLinear,
    LowRank,
    SparseValues,
    dense_weight,
    mask_index,
)
from fedlora.models.modules import ModelInfo
from fedlora.seeding import mask_noise
from fedlora.types import Adapter, Factors, Module, Payload, SparseDelta

MASKS_KEPT = 4  # distinct (seed, density) pairs whose coordinates stay in memory


class LanguageModel:
    """A frozen causal language model on one device, with one mounted payload at a time.

    The network stays in evaluation mode (no dropout in the base) and builds no key-value cache
    unless asked to; only mounted parameters require gradients. Dropout of the mounted factors acts
    while it was mounted with a positive rate and draws from torch's current generator: who trains
    seeds it within ``torch.random.fork_rng()``, who evaluates mounts with ``dropout=0``.

    Args:
        network: wrapped in place: each adapted layer becomes an `AdaptedLinear` over the original.
        tokenizer: of the same model.
        info: whose ``modules`` are the layers to wrap.
    """

    def __init__(
        self, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, info: ModelInfo
    ) -> None:
        network.requires_grad_(False)
        network.train(False)
        network.config.use_cache = False
        self.network = network
        self.tokenizer = tokenizer
        self.info = info
        self.layers: Mapping[str, AdaptedLinear] = {
            m.path: _wrap(network, m.path) for m in info.modules
        }
        """Module path -> wrapped layer, in module order."""
        self._modules = {m.path: m for m in info.modules}
        self._sparse: tuple[int, float] | None = None  # (seed, density) of a mounted SparseDelta
        self._masks: OrderedDict[tuple[int, float], dict[str, Tensor]] = OrderedDict()

    @property
    def device(self) -> torch.device:
        """Where the network lives."""
        return next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of mounted parameters: float32, or the base's type if that is wider."""
        return torch.promote_types(self.network.dtype, torch.float32)

    def mount(
        self,
        payload: Payload | None,
        dropout: float = 0.0,
        train_a: bool = True,
        train_b: bool = True,
    ) -> list[nn.Parameter]:
        """Put a payload on the base in place of whatever is mounted; ``None``: the base alone.

        Ranks may differ between modules; a module that the payload does not name stays as it is in
        the base. The payload is copied, never aliased, and nothing is changed if it is refused.

        Returns:
            The trainable parameters (A, B of each module, or its values), in module order.

        Raises:
            ValueError: if a module is unknown or a shape or rank is impossible, naming the module.
        """
        updates = {} if payload is None else self.updates(payload, dropout)
        self._sparse = (payload.seed, payload.density) if isinstance(payload, SparseDelta) else None
        for path, layer in self.layers.items():
            layer.update = updates.get(path)
        for a, b in self.factors():
            a.requires_grad_(train_a)
            b.requires_grad_(train_b)
        return [p for u in updates.values() for p in u.parameters() if p.requires_grad]

    def unmount(self) -> None:
        """Leave the base alone."""
        self.mount(None)

    def factors(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """The live ``(A, B)`` of the mounted adapter, in module order; empty without one."""
        mounted = (layer.update for layer in self.layers.values())
        return [(u.a, u.b) for u in mounted if isinstance(u, LowRank)]

    def payload(self) -> Payload:
        """A detached copy of what is mounted, of the type that was mounted (base alone: ``{}``)."""
        if self._sparse is None:
            return {
                path: layer.update.factors()
                for path, layer in self.layers.items()
                if isinstance(layer.update, LowRank)
            }
        seed, density = self._sparse
        values = {
            path: layer.update.values.detach().clone()
            for path, layer in self.layers.items()
            if isinstance(layer.update, SparseValues)
        }
        return SparseDelta(seed=seed, density=density, values=values)

    def effective_weight(self, path: str) -> Tensor:
        """The weight ``[d_out, d_in]`` that a module multiplies by as mounted, without dropout."""
        layer = self.layers[path]
        return effective_weight(layer, layer.update)

    def updates(self, payload: Payload, dropout: float = 0.0) -> dict[str, LowRank | SparseValues]:
        """What a payload would put on each module it names, in module order.

        Raises:
            ValueError: if a module is unknown or a shape or rank is impossible, naming the module.
        """
        named = payload.values if isinstance(payload, SparseDelta) else payload
        for path in named:
            if path not in self._modules:
                raise ValueError(
                    f"the payload updates {path!r}, which is not an adapted module of "
                    f"{self.info.name} (model.targets decides); it has {list(self._modules)[:4]}, "
                    f"... ({len(self._modules)} modules)"
                )
        if isinstance(payload, SparseDelta):
            return dict(self._sparse_updates(payload))
        return dict(self._low_rank_updates(payload, dropout))

    def _low_rank_updates(self, adapter: Adapter, dropout: float) -> dict[str, LowRank]:
        updates = {}
        for path, module in self._modules.items():
            if path in adapter:
                _check(module, adapter[path])
                update = LowRank(adapter[path], dropout, self.dtype)
                updates[path] = update if self.device.type == "cpu" else update.to(self.device)
        return updates

    def _sparse_updates(self, delta: SparseDelta) -> dict[str, SparseValues]:
        masks = self._mask(delta.seed, delta.density)
        updates = {}
        for path in self._modules:
            if path in delta.values:
                values, index = delta.values[path], masks[path]
                if values.shape != index.shape:
                    raise ValueError(
                        f"{path}: {tuple(values.shape)} values, but the mask of seed {delta.seed} "
                        f"and density {delta.density} has {tuple(index.shape)} coordinates"
                    )
                updates[path] = SparseValues(values.to(self.device), index, self.dtype)
        return updates

    def _mask(self, seed: int, density: float) -> dict[str, Tensor]:
        """Where each module stores the coordinates of a mask; drawn once per (seed, density)."""
        key = (seed, density)
        if key not in self._masks:
            self._masks[key] = {
                m.path: mask_index(
                    mask_noise(seed, m.path, m.d_out, m.d_in) < density, self.layers[m.path].base
                ).to(self.device)
                for m in self.info.modules
            }
            if len(self._masks) > MASKS_KEPT:
                self._masks.popitem(last=False)
        self._masks.move_to_end(key)
        return self._masks[key]


def effective_weight(layer: AdaptedLinear, update: nn.Module | None) -> Tensor:
    """The weight ``[d_out, d_in]`` of a layer under an update, detached.

    Raises:
        TypeError: if the base is quantised, or the update has no ``weight``.
    """
    with torch.no_grad():
        if update is None:
            return dense_weight(layer.base).clone()
        if not isinstance(update, LowRank | SparseValues):
            raise TypeError(f"{type(update).__name__} has no effective weight")
        return update.weight(layer.base)


def _wrap(network: Any, path: str) -> AdaptedLinear:
    """Replace a layer by an `AdaptedLinear` over it; one that is wrapped already is kept."""
    parent_path, _, name = path.rpartition(".")
    parent = network.get_submodule(parent_path)
    layer = getattr(parent, name)
    if not isinstance(layer, AdaptedLinear):
        layer = AdaptedLinear(layer)
        setattr(parent, name, layer)
    return layer


def _check(module: Module, factors: Factors) -> None:
    """Refuse factors that do not fit a module."""
    d_in, d_out = factors.a.shape[1], factors.b.shape[0]
    if (d_out, d_in) != (module.d_out, module.d_in):
        raise ValueError(
            f"{module.path}: A {tuple(factors.a.shape)} and B {tuple(factors.b.shape)} do not fit "
            f"a layer with d_out={module.d_out}, d_in={module.d_in}"
        )
    if not 1 <= factors.rank <= module.max_rank:
        raise ValueError(
            f"{module.path}: rank {factors.rank} is not in 1..{module.max_rank} = "
            f"min(d_out={module.d_out}, d_in={module.d_in})"
        )
