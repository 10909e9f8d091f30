"""The resident base model of one worker: adapters come and go, the base never changes a bit."""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fedlora.algebra.init import initial_a
from fedlora.core.seeding import mask_noise
from fedlora.core.types import (
    Adapter,
    MaskedScale,
    Payload,
    Rebased,
    SparseDelta,
)
from fedlora.models.layers import (
    AdaptedLinear,
    LinearUpdate,
    LowRank,
    Rebuilt,
    SparseValues,
    dropout_bits,
    mask_index,
)
from fedlora.models.masks import check_zeros
from fedlora.models.modules import ModelInfo, check_adapter, check_paths, check_scale
from fedlora.models.qkv import join_state
from fedlora.techniques.spp.layer import BlockScaled
from fedlora.techniques.spp.scale import merged_gain, scale

MASKS_KEPT = 4  # distinct (seed, density) pairs whose coordinates stay in memory

if TYPE_CHECKING:  # transformers takes seconds to import, and whoever only configures needs none
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class LanguageModel:
    """A frozen causal language model on one device, with one mounted payload at a time.

    The network stays in evaluation mode (no dropout in the base) and builds no key-value cache
    unless asked to; only mounted parameters require gradients. Dropout of the mounted factors acts
    while it was mounted with a positive rate: who trains calls `seed_dropout` before every forward,
    who evaluates mounts with ``dropout=0``. No global generator is used.

    Args:
        network: wrapped in place: each adapted layer becomes an `AdaptedLinear` over the original.
        tokenizer: of the same model.
        info: whose ``modules`` are the layers to wrap.
        folder: that it was loaded from, for what lies beside its weights; None: from none.
    """

    def __init__(
        self,
        network: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        info: ModelInfo,
        folder: Path | None = None,
    ) -> None:
        network.requires_grad_(False)
        network.train(False)
        network.config.use_cache = False
        self.network = network
        self.tokenizer = tokenizer
        self.info = info
        self.folder = folder
        self.layers: Mapping[str, AdaptedLinear] = {
            m.path: _wrap(network, m.path) for m in info.modules
        }
        """Module path -> wrapped layer, in module order."""
        self._mounted: Payload = {}
        self._masks: OrderedDict[tuple[int, float], dict[str, Tensor]] = OrderedDict()

    @property
    def device(self) -> torch.device:
        """Where the network lives."""
        return next(self.network.parameters()).device

    @property
    def vocabulary(self) -> int:
        """How many token ids the network has embeddings for."""
        embeddings: Any = self.network.get_input_embeddings()
        return int(embeddings.num_embeddings)

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
        self._mounted = {} if payload is None else payload
        for path, layer in self.layers.items():
            layer.update = updates.get(path)
        for a, b in self.factors():
            a.requires_grad_(train_a and a.requires_grad)
            b.requires_grad_(train_b and b.requires_grad)
        return [p for u in updates.values() for p in u.parameters() if p.requires_grad]

    def unmount(self) -> None:
        """Leave the base alone."""
        self.mount(None)

    def seed_dropout(self, seed: int, rows: int) -> None:
        """Determine the masks of the next forward; without dropout nothing is drawn.

        Args:
            seed: of all its masks (`fedlora.core.seeding.dropout_seeds`).
            rows: tokens of the forward, padding included.
        """
        dropping = [
            (path, layer.update)
            for path, layer in self.layers.items()
            if isinstance(layer.update, LowRank | BlockScaled) and layer.update.p > 0
        ]
        if not dropping:
            return
        bits = self.dropout_bits(seed, rows)
        for path, update in dropping:
            update.bits = bits[path]

    def dropout_bits(self, seed: int, rows: int) -> dict[str, Tensor]:
        """Module path -> what the masks of one forward are a function of, ``[rows, d_in]`` int16.

        Of all modules, so that whoever holds some of them draws what whoever holds all would.
        """
        widths = [m.d_in for m in self.info.modules]
        drawn = dropout_bits(rows, widths, seed, self.device)
        return dict(zip(self.layers, drawn, strict=True))

    def factors(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """The live ``(A, B)`` of the mounted adapter, in module order; empty without one. Of SPP:
        alpha, or the change of it, and beta."""
        mounted = (layer.update for layer in self.layers.values())
        both = [u.parameters() for u in mounted if isinstance(u, LowRank | BlockScaled)]
        return [(pair[0], pair[1]) for pair in both if pair]

    def payload(self) -> Payload:
        """A detached copy of what is mounted, of the type that was mounted (base alone: ``{}``).

        Of factors over a moved base it is the factors: the base has not moved since.
        """
        mounted = self._mounted
        if isinstance(mounted, MaskedScale):
            return self._scale_payload(mounted)
        if isinstance(mounted, SparseDelta):
            values = {
                path: layer.update.values.detach().clone()
                for path, layer in self.layers.items()
                if isinstance(layer.update, SparseValues)
            }
            return replace(mounted, values=values)
        return {
            path: layer.update.factors()
            for path, layer in self.layers.items()
            if isinstance(layer.update, LowRank) and layer.update.parameters()
        }

    def _scale_payload(self, mounted: MaskedScale) -> MaskedScale:
        live = {
            path: layer.update
            for path, layer in self.layers.items()
            if isinstance(layer.update, BlockScaled)
        }
        return replace(
            mounted,
            alpha={p: u.alpha.detach().clone() for p, u in live.items() if p in mounted.alpha},
            beta={p: u.beta.detach().clone() for p, u in live.items()},
            change={p: u.change.detach().clone() for p, u in live.items() if u.change is not None},
        )

    def effective_weight(self, path: str) -> Tensor:
        """The weight ``[d_out, d_in]`` that a module multiplies by as mounted, without dropout."""
        layer = self.layers[path]
        return layer.effective_weight(layer.update)

    def base_state(self, payload: Payload | None = None) -> dict[str, Tensor]:
        """The base's own tensors under the names that the model's files have.

        They are shared, but for those of split layers, which are put together again. With a payload
        its update is added to the weights it names, rounded once to the type of the base.

        Raises:
            TypeError: if there is a payload and the base is quantised.
            ModelError: if a scaled weight loses a zero or gains one, or is not finite (by overflow
                or underflow).
        """
        state = {
            name: tensor
            for name, tensor in self.network.state_dict().items()
            if not _ancestors(name) & self.layers.keys()
        }
        for path, layer in self.layers.items():
            state |= {f"{path}.{name}": t for name, t in layer.base.state_dict().items()}
        for path, update in self.updates(payload or {}).items():
            state[f"{path}.weight"] = stored = self.layers[path].stored_weight(update)
            if isinstance(update, BlockScaled):
                kept = {path: (self.layers[path].weight != 0).cpu()}
                check_zeros(kept, lambda _, w=stored: w, "merging")  # type: ignore[misc]
        return join_state(state, self.info.splits)

    def updates(self, payload: Payload, dropout: float = 0.0) -> dict[str, LinearUpdate]:
        """What a payload would put on each module it names, in module order.

        Raises:
            ValueError: if a module is unknown or a shape or rank is impossible, naming the module,
                or the payload is of another pruned base.
        """
        if isinstance(payload, MaskedScale):
            check_scale(payload, self.info)
            return dict(self._scaled_updates(payload, dropout))
        if isinstance(payload, SparseDelta):
            check_paths(payload.values, self.info)
            return dict(self._sparse_updates(payload))
        if isinstance(payload, Rebased):
            return dict(self._rebuilt(payload, dropout))
        check_adapter(payload, self.info)
        return dict(self._low_rank_updates(payload, dropout))

    def _rebuilt(self, payload: Rebased, dropout: float) -> dict[str, Rebuilt]:
        check_paths(payload.shift, self.info)
        check_adapter(payload.factors, self.info)
        for m in self.info.modules:
            shift = payload.shift.get(m.path)
            if shift is not None and tuple(shift.shape) != (m.d_out, m.d_in):
                raise ValueError(
                    f"{m.path}: a shift {tuple(shift.shape)} does not fit a layer with "
                    f"d_out={m.d_out}, d_in={m.d_in}"
                )
        found, dtype = payload.factors, self.dtype
        return {
            path: Rebuilt(payload.shift[path], found.get(path), dropout, layer.base, dtype)
            for path, layer in self.layers.items()
            if path in payload.shift
        }

    def _low_rank_updates(self, adapter: Adapter, dropout: float) -> dict[str, LowRank]:
        device, dtype = self.device, self.dtype
        return {
            path: LowRank(adapter[path], dropout, device, dtype)
            for path in self.layers
            if path in adapter
        }

    def _scaled_updates(self, payload: MaskedScale, dropout: float) -> dict[str, BlockScaled]:
        drawn = {
            m.path: initial_a(payload.seed, m, payload.blocks[m.path])
            for m in self.info.modules
            if payload.seed >= 0 and m.path in payload.beta
        }
        alpha = {**drawn, **payload.alpha}
        return {
            path: BlockScaled(
                alpha[path],
                payload.beta[path],
                scale(payload, path),
                dropout,
                self.layers[path].base,
                dtype=self.dtype,
                tied=payload.tied.get(path, 0),
                change=payload.change.get(path),
                gain=merged_gain(payload, path),
                trains=payload.trains,
            )
            for path in self.layers
            if path in payload.beta
        }

    def _sparse_updates(self, delta: SparseDelta) -> dict[str, SparseValues]:
        masks, dtype = self._mask(delta.seed, delta.density), self.dtype
        updates = {}
        for path, index in masks.items():
            if path in delta.values:
                values = delta.values[path]
                if values.shape != index.shape:
                    raise ValueError(
                        f"{path}: {tuple(values.shape)} values, but the mask of seed {delta.seed} "
                        f"and density {delta.density} has {tuple(index.shape)} coordinates"
                    )
                updates[path] = SparseValues(values, index, dtype)
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


def _ancestors(name: str) -> set[str]:
    """``a.b.weight`` -> ``{a, a.b}``."""
    parts = name.split(".")
    return {".".join(parts[:i]) for i in range(1, len(parts))}


def _wrap(network: Any, path: str) -> AdaptedLinear:
    """Replace a layer by an `AdaptedLinear` over it; one that is wrapped already is kept."""
    parent_path, _, name = path.rpartition(".")
    parent = network.get_submodule(parent_path)
    layer = getattr(parent, name)
    if not isinstance(layer, AdaptedLinear):
        layer = AdaptedLinear(layer)
        setattr(parent, name, layer)
    return layer
