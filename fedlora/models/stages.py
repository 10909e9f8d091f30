"""Consecutive parts of a causal language model, for participants that hold one each.

A stage is a shallow copy of the network that keeps only what its participant owns: the same blocks
(not copies of their weights), with a pseudo-block in front that puts hidden states in where the
blocks below the cut stood, and one behind that takes them out. What an architecture does before
its first block (position embeddings, scaling) and after its last one (norm, head, capping of
logits) thus happens exactly once, in the stage that owns it, by the architecture's own code.
"""

import copy
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedlora.core.errors import ModelError
from fedlora.core.types import Module
from fedlora.data.batches import Batch
from fedlora.models.blocks import find_blocks
from fedlora.models.forward import supervised_logits
from fedlora.models.language_model import LanguageModel

_BLOCK = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")
PROBE = (2, 7)
"""Rows and tokens of the self-check."""


def block_of(path: str) -> int | None:
    """The index of the block that a module lies in; None: outside the blocks.

    The first number of a path counts the blocks: ``model.layers.3.self_attn.q_proj`` is in block 3.
    """
    found = _BLOCK.search(path)
    return int(found.group(1)) if found else None


def blocks_of(modules: Iterable[Module]) -> Mapping[str, int]:
    """Module path -> index of its block.

    Raises:
        ModelError: naming a module outside the blocks: no participant of a split could own it.
    """
    found = {}
    for module in modules:
        block = block_of(module.path)
        if block is None:
            raise ModelError(
                f"{module.path} lies outside the model's blocks, so no side of a cut owns its "
                "adapter: choose model.targets inside the blocks"
            )
        found[module.path] = block
    return found


@dataclass(frozen=True)
class Span:
    """Which part of a model a stage is: blocks ``start..stop-1`` and possibly the ends."""

    start: int
    stop: int
    embeds: bool = False
    """Token (and position) embeddings: it reads token ids."""
    heads: bool = False
    """Final norm and output embedding: it writes logits."""

    def __contains__(self, block: object) -> bool:
        return isinstance(block, int) and self.start <= block < self.stop


class _Crossed(Exception):
    """Hidden states that have reached the end of their stage."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class _Enter(nn.Module):
    """Stands for the blocks below: whatever comes in, the stage's own input goes out."""

    def __init__(self, in_tuple: bool) -> None:
        super().__init__()
        self.in_tuple = in_tuple
        """Whether the architecture's blocks return a tuple that begins with the hidden states."""
        self.hidden: Tensor | None = None

    def forward(self, *_: object, **__: object) -> Tensor | tuple[Tensor, None]:
        assert self.hidden is not None
        return (self.hidden, None) if self.in_tuple else self.hidden


class _Leave(nn.Module):
    """Stands for the blocks above: hidden states go no further."""

    def forward(self, hidden: Tensor, *_: object, **__: object) -> Tensor:
        raise _Crossed(hidden)


class _Nothing(nn.Module):
    """Stands for an embedding that the stage below has added already."""

    def forward(self, *_: object, **__: object) -> Tensor:
        return torch.zeros(())


class Stage:
    """One participant's part of a resident model.

    Args:
        model: whose blocks it shares. Adapters are mounted on it (`mount`), module by module, so
            stages of several participants over one model take turns.
        span: which part.

    Raises:
        ModelError: if the span does not lie inside the model, or its architecture cannot be cut.
    """

    def __init__(self, model: LanguageModel, span: Span) -> None:
        path, blocks = _blocks(model.network)
        if not 0 <= span.start <= span.stop <= len(blocks):
            raise ModelError(
                f"a stage of blocks {span.start}..{span.stop - 1} does not lie inside "
                f"{model.info.name}, which has {len(blocks)} blocks: a cut is in 0..{len(blocks)}"
            )
        self.span = span
        self.model = model
        self.layers = {p: layer for p, layer in model.layers.items() if block_of(p) in span}
        """Module path -> wrapped layer, of this stage alone, in module order."""
        habits = _habits(model, path, blocks)
        self._enter = None if span.embeds else _Enter(habits.in_tuple)
        self.network = _cut(model.network, path, span, self._enter, habits.before)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the hidden states."""
        return self.model.network.dtype

    def mount(self, updates: Mapping[str, Any]) -> None:
        """Put live updates (`LanguageModel.updates`) on this stage's layers; others are left."""
        for path, layer in self.layers.items():
            layer.update = updates.get(path)

    def hidden(self, x: Tensor) -> Tensor:
        """What leaves the stage, ``[b, t, d]``.

        Args:
            x: token ids ``[b, t]`` if the stage embeds, else hidden states ``[b, t, d]``.
        """
        try:
            self.network.base_model(**self._input(x), use_cache=False)
        except _Crossed as crossed:
            return crossed.hidden
        finally:
            self._reset()
        raise ModelError(f"{self.model.info.name}: its forward does not run its blocks in order")

    def logits(self, x: Tensor, positions: Tensor) -> Tensor:
        """Logits ``[n, vocabulary]`` at flat positions ``[n]`` of ``x`` (see `hidden`)."""
        # Shape and positions are all that is read of a batch whose stage does not embed.
        inputs = x if self.span.embeds else x.new_empty(x.shape[:2])
        batch = Batch(inputs, positions, positions)
        try:
            if self.span.embeds:
                return supervised_logits(self.network, batch)
            return supervised_logits(self.network, batch, **self._input(x))
        finally:
            self._reset()

    def _input(self, x: Tensor) -> dict[str, Tensor]:
        if self._enter is None:
            return {"input_ids": x}
        self._enter.hidden = x
        return {"inputs_embeds": x}

    def _reset(self) -> None:
        """A graph must not outlive its step."""
        if self._enter is not None:
            self._enter.hidden = None


class Stages:
    """The stages of one resident model, each made once."""

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self.blocks = len(_blocks(model.network)[1])
        self._made: dict[Span, Stage] = {}

    def check_order(self, first: int, last: int) -> None:
        """Raise a ModelError unless blocks ``0..first-1`` and ``last..`` of a U-shape are apart."""
        if not 0 <= first <= last <= self.blocks:
            raise ModelError(
                f"a client cannot hold the first {first} and the last {self.blocks - last} blocks "
                f"of {self.model.info.name}, which has {self.blocks}"
            )

    def __getitem__(self, span: Span) -> Stage:
        if span not in self._made:
            self._made[span] = Stage(self.model, span)
        return self._made[span]


def check_stages(model: LanguageModel, stages: Iterable[Stage]) -> None:
    """Compare the stages in a row with the whole model, on a probe.

    Raises:
        ModelError: naming the architecture and the difference.
    """
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.vocabulary, PROBE, generator=g).to(model.device)
    positions = torch.arange(ids.numel(), device=model.device)
    name = type(model.network).__name__
    with torch.no_grad():
        whole = supervised_logits(model.network, Batch(ids, positions, positions))
        x = ids
        try:
            for stage in stages:
                x = stage.logits(x, positions) if stage.span.heads else stage.hidden(x)
        except Exception as error:
            raise ModelError(f"{name} cannot be cut: {type(error).__name__}: {error}") from error
    gap = float((x.float() - whole.float()).abs().max())
    if not gap <= 1e-5 * float(whole.float().abs().max()):
        raise ModelError(
            f"{name} cannot be cut: its stages in a row differ from the whole by {gap:.3g} in a "
            "logit"
        )


def _blocks(network: Any) -> tuple[str, nn.ModuleList]:
    """The path of the list of blocks inside the base model, and the list.

    Raises:
        ModelError: if there is none.
    """
    prefix = network.base_model_prefix
    if network.base_model is network:
        raise ModelError(
            f"{type(network).__name__} cannot be cut: it has no base model of its own under "
            f"{prefix!r}"
        )
    path, blocks = find_blocks(network)
    return path.removeprefix(f"{prefix}."), blocks


@dataclass(frozen=True)
class _Habits:
    """What an architecture does around its blocks."""

    in_tuple: bool
    """Blocks return tuples that begin with the hidden states."""
    before: frozenset[str]
    """The modules beside the list of blocks that run before the first block."""


def _habits(model: LanguageModel, path: str, blocks: nn.ModuleList) -> _Habits:
    """One token is sent as far as through the first block."""
    in_tuple: list[bool] = []
    before: set[str] = set()

    def look(_: nn.Module, __: object, output: object) -> None:
        in_tuple.append(isinstance(output, tuple))
        raise _Crossed(torch.zeros(()))

    def note(name: str) -> Callable[[nn.Module, object], None]:
        return lambda _, __: before.add(name)

    beside = model.network.base_model.get_submodule(path.rpartition(".")[0]).named_children()
    handles = [m.register_forward_pre_hook(note(name)) for name, m in beside if m is not blocks]
    handles.append(blocks[0].register_forward_hook(look))
    try:
        with torch.no_grad():
            model.network(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=model.device))
    except _Crossed:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return _Habits(any(in_tuple), frozenset(before))


def _cut(
    network: Any, path: str, span: Span, enter: nn.Module | None, before: Collection[str]
) -> Any:
    """A copy of the network, with its weights shared, that owns the span alone."""
    prefix = network.base_model_prefix
    blocks = network.base_model.get_submodule(path)
    own = list(blocks[span.start : span.stop])
    front = [] if enter is None else [_like(enter, blocks[0])]
    back = [] if span.heads else [_like(_Leave(), blocks[0])]
    chosen = [*front, *own, *back]
    config = _config(network.config, span, len(front), len(back))
    base = _without(network.base_model, path, span, before)
    _set(base, path, nn.ModuleList(chosen))
    for module in _lineage(base, path):
        if hasattr(module, "config"):
            module.config = config
    copied = _shallow(network)
    copied.config = config
    copied._modules = {
        name: base if name == prefix else (child if span.heads else None)
        for name, child in network._modules.items()
    }
    return copied


def _config(config: Any, span: Span, front: int, back: int) -> Any:
    """The configuration of a model with so many blocks; kinds of layers move along."""
    new = copy.copy(config)
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        own = list(kinds[span.start : span.stop])
        new.layer_types = [kinds[0]] * front + own + [kinds[0]] * back
    new.num_hidden_layers = front + span.stop - span.start + back
    return new


def _like(pseudo: nn.Module, block: nn.Module) -> nn.Module:
    """A pseudo-block with what a model may ask a block for besides running it."""
    for name in ("attention_type", "is_sliding", "layer_type"):
        if hasattr(block, name):
            setattr(pseudo, name, getattr(block, name))
    return pseudo


def _shallow(module: nn.Module) -> Any:
    """A copy with its own table of children; everything in the tables is shared."""
    new = copy.copy(module)
    new._modules = dict(module._modules)
    new._forward_pre_hooks = type(module._forward_pre_hooks)(module._forward_pre_hooks)
    new._forward_hooks = type(module._forward_hooks)(module._forward_hooks)
    return new


def _without(base: nn.Module, path: str, span: Span, before: Collection[str]) -> Any:
    """A shallow copy, down to the list of blocks, without the ends that the span does not own."""
    new = _shallow(base)
    parents, name = path.split(".")[:-1], path.rpartition(".")[2]
    at = new
    for parent in parents:
        at._modules[parent] = _shallow(at._modules[parent])
        at = at._modules[parent]
    for child, module in list(at._modules.items()):
        owned = span.embeds if child in before else span.heads
        if child == name or owned or module is None:
            continue
        if isinstance(module, nn.Embedding):
            at._modules[child] = _Nothing()
        elif next(module.parameters(), None) is not None:
            at._modules[child] = nn.Identity()
    return new


def _lineage(base: nn.Module, path: str) -> list[Any]:
    """The base model and what lies between it and its list of blocks."""
    found: list[Any] = [base]
    for name in path.split(".")[:-1]:
        found.append(getattr(found[-1], name))
    return found


def _set(base: nn.Module, path: str, blocks: nn.ModuleList) -> None:
    parent, _, name = path.rpartition(".")
    base.get_submodule(parent)._modules[name] = blocks
