"""The resident base model of one worker: adapters come and go, the base never changes a bit."""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from fedlora.core.payload import MovedBase, Payload
from fedlora.core.types import Factors
from fedlora.data.batches import Batch, TokenExample, collate, supervised_tokens
from fedlora.models.forward import supervised_logits
from fedlora.models.layers import (
    AdaptedLinear,
    LinearUpdate,
    dense_weight,
    dropout_bits,
    padded_bits,
    places_of,
)
from fedlora.models.modules import ModelInfo
from fedlora.models.prefix import Prefix
from fedlora.models.qkv import join_state

T = TypeVar("T")

if TYPE_CHECKING:  # transformers takes seconds to import, and configuration alone needs none of it
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
        self.prefix: Prefix | None = None
        """The blocks that batches with `Batch.states` leave out; set by who computes states."""
        self._payload: Payload | None = None
        self._kept: dict[str, OrderedDict[Any, Any]] = {}

    def collate(self, examples: Sequence[TokenExample], loss: str, states: bool = True) -> Batch:
        """Examples as one batch on the CPU (`fedlora.data.batches.collate`).

        Args:
            examples: at least one.
            loss: ``full`` or ``response``.
            states: whether the batch brings the examples' states, if they have some.
        """
        return collate(examples, loss, states)

    def logits(self, batch: Batch) -> Tensor:
        """Logits ``[n, classes]`` of a batch on this device, a row for each of its targets; the
        classes of a language model are its vocabulary."""
        with self.entered(batch):
            return supervised_logits(self.network, batch)

    def entered(self, batch: Batch) -> AbstractContextManager[None]:
        """While the context is open, forward passes begin where the batch's states enter, if it has
        some."""
        if self.prefix is None or batch.states is None:
            return nullcontext()
        return self.prefix.replaced(batch.states)

    def inputs(self, example: TokenExample) -> int:
        """How many of an example's tokens the network is given: the last one is a target alone."""
        return len(example.input_ids) - 1

    def supervised(self, example: TokenExample, loss: str) -> int:
        """How many targets an example has."""
        return supervised_tokens(example, loss)

    @property
    def device(self) -> torch.device:
        """The device of the network."""
        return next(self.network.parameters()).device

    @property
    def vocabulary(self) -> int:
        """How many token ids the network has embeddings for."""
        embeddings: Any = self.network.get_input_embeddings()
        return int(embeddings.num_embeddings)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of mounted parameters: float32, or the base's type if that is wider."""
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

        Args:
            payload: of any technique.
            dropout: rate of whatever branch its layers have.
            train_a: whether the first of two factors trains.
            train_b: whether the second does.

        Returns:
            The trainable parameters, in module order (LoRA: A, B of each module).

        Raises:
            ValueError: if a module is unknown or a shape or rank is impossible, naming the module.
        """
        updates = {} if payload is None else payload.updates(self, dropout)
        self._payload = payload
        for path, layer in self.layers.items():
            layer.update = updates.get(path)
        for update in updates.values():
            update.restrict(train_a, train_b)
        return [p for u in updates.values() for p in u.parameters() if p.requires_grad]

    def unmount(self) -> None:
        """Leave the base alone."""
        self.mount(None)

    def seed_dropout(self, seed: int, rows: int, real: Tensor | None = None) -> None:
        """Determine the masks of the next forward; without dropout nothing is drawn.

        Args:
            seed: of all its masks (`fedlora.core.seeding.dropout_seeds`).
            rows: tokens of the forward, padding included.
            real: `Batch.real`: which rows are tokens; None: all.
        """
        dropping = [
            (path, layer.update)
            for path, layer in self.layers.items()
            if layer.update is not None and layer.update.p > 0
        ]
        if not dropping:
            return
        bits = self.dropout_bits(seed, rows if real is None else len(real))
        places = None if real is None else places_of(real, rows)
        for path, update in dropping:
            update.bits = padded_bits(bits[path], places)

    def dropout_bits(self, seed: int, tokens: int) -> dict[str, Tensor]:
        """Module path -> what the masks of one forward are a function of, ``[tokens, d_in]`` int16.

        For all modules, so that a stage with some of them draws the same bits as the whole model.
        """
        widths = [m.d_in for m in self.info.modules]
        drawn = dropout_bits(tokens, widths, seed, self.device)
        return dict(zip(self.layers, drawn, strict=True))

    def payload(self) -> Payload | None:
        """A detached copy of what is mounted, as it has been trained (`Payload.read`)."""
        return None if self._payload is None else self._payload.read(self.mounted())

    def linear(self) -> Mapping[str, Factors] | None:
        """The correction that came with what is mounted (`Payload.linear`)."""
        return None if self._payload is None else self._payload.linear()

    def mounted(self) -> dict[str, LinearUpdate]:
        """Module path -> what is mounted there, in module order."""
        return {p: x.update for p, x in self.layers.items() if x.update is not None}

    def parameters(self) -> list[list[nn.Parameter]]:
        """The live parameters of every mounted module, in module order; of LoRA: A, B."""
        both = [update.parameters() for update in self.mounted().values()]
        return [own for own in both if own]

    def own_parameters(self) -> list[nn.Parameter]:
        """What trains and stays with the client, no part of the federated model: of a language
        model, nothing."""
        return []

    def moved(self, base: MovedBase) -> dict[str, Tensor]:
        """The weights of a base that has moved, ``W + shift``, in the type of mounted parameters.

        They stand beside the model's own, which stay as they are; those of the last version are
        kept, for all who stand on it.

        Returns:
            Module path -> ``[d_out, d_in]``, not to be changed, in module order.
        """

        def added() -> dict[str, Tensor]:
            found = {}
            for path, layer in self.layers.items():
                if path in base.shift:
                    weight = dense_weight(layer.base).detach()
                    shift = base.shift[path].detach().to(weight.device, self.dtype)
                    found[path] = weight.to(self.dtype) + shift
            return found

        return self.kept("moved", base.version, added, 1)

    def kept(self, kind: str, key: object, make: Callable[[], T], most: int) -> T:
        """What a payload needs again whenever it is mounted here, made once.

        Args:
            kind: of thing; what is kept of one kind does not displace another.
            key: identity among its kind.
            make: how to make it.
            most: things of this kind that are kept.
        """
        found = self._kept.setdefault(kind, OrderedDict())
        if key not in found:
            while len(found) >= most:  # first: two of the largest need not fit
                found.popitem(last=False)
            found[key] = make()
        found.move_to_end(key)
        value: T = found[key]
        return value

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
            ModelError: if a weight loses what its payload must keep (`LinearUpdate.check_stored`).
        """
        state = {
            name: tensor
            for name, tensor in self.network.state_dict().items()
            if not _ancestors(name) & self.layers.keys()
        }
        for path, layer in self.layers.items():
            state |= {f"{path}.{name}": t for name, t in layer.base.state_dict().items()}
        updates = {} if payload is None else payload.updates(self)
        for path, update in updates.items():
            layer = self.layers[path]
            state[f"{path}.weight"] = stored = layer.stored_weight(update)
            update.check_stored(path, layer.base, stored)
        return join_state(state, self.info.splits)


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
