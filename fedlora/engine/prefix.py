"""Hidden states behind the frozen blocks, computed once per example and kept on disk.

A file holds the states of consecutive examples of one client's split, as many as fit well into
memory. The process that first needs them computes them (`fedlora.models.prefix`), writes the file
under another name and renames it, so that other processes, and this one after a kill, find it whole
or not at all. Two processes that need it at once write the same. Every file says what it was
computed from and is read with its checksum: one that does not fit is computed again.
"""

import hashlib
import json
import logging
import math
import shutil
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fedlora.core.cache import cache_root
from fedlora.core.files import write_file
from fedlora.core.seeding import torch_generator
from fedlora.data.store import Example, TokenStore
from fedlora.models.language_model import LanguageModel
from fedlora.models.layers import AdaptedLinear
from fedlora.models.prefix import Prefix

log = logging.getLogger(__name__)

Key: TypeAlias = tuple[int, str, int]
"""Client, split, and number of the file among those of the split."""

FORMAT = 1
DTYPES = ("float32", "bfloat16")
OPEN = 1024
"""Files that a process keeps mapped."""
CHUNK = 2**17
"""Tokens of one file: states of more need never be in memory together."""
TOKENS = 4096
"""Tokens, with padding, of a forward pass that computes states."""
ROUNDING = "rounding"
"""Metadata key of a file: squared norms of the rounding error and of the states before it."""
COUNTED = 64
"""Files that a process writes before it counts again what all files take."""
LEFT_FREE = 2**30
"""Bytes of the disk that are left to others."""
PROBE = (9, 5, 2)
"""Tokens of the sequences of the self-check."""


def why_not_prefix(model: LanguageModel) -> str:
    """The reason in a few words why a model's first blocks cannot be left out; empty: they can.

    Random sequences pass through the prefix one at a time; from there on, in one padded batch, they
    must have the logits that they have without a prefix.
    """
    if not model.info.frozen_blocks:
        return f"no block of {model.info.name} lies before the first adapter"
    name, random = type(model.network).__name__, torch_generator(0, "prefix check")
    drawn = [torch.randint(0, model.vocabulary, (n,), generator=random).numpy() for n in PROBE]
    examples = [Example(ids.astype(np.int32), 1, None, 0) for ids in drawn]
    try:
        prefix = Prefix(model.network, model.info.frozen_blocks)
        states = [_states(model, prefix, [e])[0] for e in examples]
        with torch.no_grad():
            whole = model.logits(model.collate(examples, "full").to(model.device))
            given = [replace(e, states=h) for e, h in zip(examples, states, strict=True)]
            batch = model.collate(given, "full").to(model.device)
            assert batch.states is not None
            with prefix.replaced(batch.states):
                found = model.logits(batch)
    except Exception as error:
        return f"{name} cannot begin behind its first blocks ({type(error).__name__}: {error})"
    full = model.network.dtype in (torch.float32, torch.float64)
    gap, most = float((found - whole).abs().max()), max(1.0, float(whole.abs().max()))
    if not gap <= (1e-4 if full else 2**-4) * most:
        return f"{name} gives other logits behind its first blocks (by {gap:.1e})"
    return ""


class PrefixCache:
    """The states of one model's first blocks for the examples of one token store.

    Args:
        model: whose `LanguageModel.prefix` is set to the blocks that are left out.
        store: the examples.
        dtype: ``float32``: states as the base computes them; ``bfloat16``: rounded to it.
        most: bytes that the files may take.
        readers: adapted layers whose frozen products stand beside the states.

    Raises:
        ModelError: if the model's blocks cannot be left out (`why_not_prefix`).
    """

    def __init__(
        self,
        model: LanguageModel,
        store: TokenStore,
        dtype: str,
        most: float,
        readers: Sequence[AdaptedLinear] = (),
    ) -> None:
        self._model, self._store, self._most = model, store, most
        self._prefix = model.prefix = Prefix(model.network, model.info.frozen_blocks, readers)
        self._rounded = dtype == "bfloat16" and model.network.dtype != torch.bfloat16
        self._key = cache_key(model, store, dtype, readers)
        self.folder = cache_root() / "prefix" / f"{store.folder.name}-{self._key[:16]}"
        self._open: OrderedDict[Key, list[Tensor]] = OrderedDict()
        self._lost = 0.0, 0.0  # squared norms of what was rounded off, and of the states
        self._full = ""
        self._fills, self._used = 0, 0.0

    def attach(self, client: int, split: str, examples: list[Example]) -> list[Example]:
        """A client's examples with their states; as they are, if those are not there and cannot be
        computed now.

        Args:
            client: its id.
            split: of the store.
            examples: all of that split, in its order.
        """
        found: list[Example] = []
        for number, part in enumerate(_chunks(examples)):
            states = self._of((client, split, number), part)
            given = part if states is None else map(_with_states, part, states)
            found.extend(given)
        return found

    def _of(self, key: Key, examples: Sequence[Example]) -> list[Tensor] | None:
        """The states of the examples of one file; None: they are not to be had now."""
        states = self._open.pop(key, None) or self._read(key, examples) or self._fill(key, examples)
        if states is not None:
            self._open[key] = states
            while len(self._open) > OPEN:
                self._open.popitem(last=False)
        return states

    def notes(self) -> tuple[str, ...]:
        """How the states are used, for the notes of an engine."""
        info, rounded = self._model.info, ""
        if self._lost[0]:
            rounded = f", rounded to bfloat16 by {math.sqrt(self._lost[0] / self._lost[1]):.0e}"
        used = f"the first {info.frozen_blocks} of {info.blocks} blocks computed once per example"
        beside = ["frozen products of the last block too"] if self._prefix.readers else []
        return (used + rounded, *beside, *([self._full] if self._full else []))

    def _file(self, key: Key) -> Path:
        return self.folder / f"{key[0] // 1000}" / f"{'-'.join(map(str, key))}.safetensors"

    def _read(self, key: Key, examples: Sequence[Example]) -> list[Tensor] | None:
        """The states of a file, mapped into memory; None: there is no intact file."""
        path, lengths = self._file(key), [self._model.inputs(e) for e in examples]
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                said, states = dict(file.metadata() or {}), file.get_tensor("states")
            off, norm = map(float, said.pop(ROUNDING, "").split())
        except (SafetensorError, OSError, ValueError) as error:
            log.warning("%s cannot be read (%s) and is computed anew", path, error)
            return None
        if said != self._about(key, examples, states) or len(states) != sum(lengths):
            log.warning("%s is damaged or of other examples, and is computed anew", path)
            return None
        self._count(off, norm)
        return list(states.split(lengths))

    def _count(self, off: float, norm: float) -> None:
        """Add the `ROUNDING` of a file."""
        self._lost = self._lost[0] + off, self._lost[1] + norm

    def _fill(self, key: Key, examples: Sequence[Example]) -> list[Tensor] | None:
        """Compute and write the states of a file; None: not now, or there is no room."""
        if self._full or self._model.mounted():  # what is mounted attends in its own way
            return None
        lengths = [self._model.inputs(e) for e in examples]
        exact = torch.cat(_states(self._model, self._prefix, examples))
        states = exact.to(torch.bfloat16) if self._rounded else exact
        off = float((states.to(exact.dtype) - exact).double().square().sum())
        norm = float(exact.double().square().sum())
        self._full = self._no_room(states.numel() * states.itemsize)
        if self._full:
            return None
        path = self._file(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            about = {**self._about(key, examples, states), ROUNDING: f"{off} {norm}"}
            write_file(path, save({"states": states}, about))
        except OSError as error:
            self._full = (
                f"the prefix cache cannot be written ({error}): examples without states run "
                "through all blocks"
            )
            return None
        self._count(off, norm)
        return list(states.split(lengths))

    def _no_room(self, size: int) -> str:
        """What forbids to write so many bytes; empty: nothing."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._fills % COUNTED == 0:  # other processes write here too
            self._used = sum(f.stat().st_size for f in self.folder.glob("*/*.safetensors"))
        self._fills, self._used = self._fills + 1, self._used + size
        if self._used > self._most:
            return (
                f"the prefix cache has reached engine.prefix_gb={self._most / 1e9:g}: examples "
                "without states run through all blocks"
            )
        if shutil.disk_usage(self.folder).free < size + LEFT_FREE:
            return (
                f"the disk of the prefix cache {self.folder} is full: examples without states run "
                "through all blocks"
            )
        return ""

    def _about(self, key: Key, examples: Sequence[Example], states: Tensor) -> dict[str, str]:
        """What a file says of itself: which examples its states are of, and their checksum."""
        ids = np.concatenate([e.input_ids for e in examples])
        return {
            "key": self._key,
            "of": " ".join(map(str, key)),
            "tokens": str(zlib.crc32(np.ascontiguousarray(ids, np.int32).data)),
            "checksum": str(zlib.crc32(states.contiguous().view(torch.uint8).numpy().data)),
        }


def cache_key(
    model: LanguageModel, store: TokenStore, dtype: str, readers: Sequence[AdaptedLinear] = ()
) -> str:
    """Hash of everything that the states depend on."""
    info, network = model.info, model.network
    config: Any = network.config
    parts = {
        "format": FORMAT,
        "model": [info.fingerprint, info.mask, str(network.dtype)],
        "network": [type(network).__name__, str(getattr(config, "quantization_config", ""))],
        "blocks": info.frozen_blocks,
        "examples": store.key,
        "dtype": dtype,
    }
    if readers:
        parts["readers"] = [path for path, layer in model.layers.items() if layer in readers]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _states(model: LanguageModel, prefix: Prefix, examples: Sequence[Example]) -> list[Tensor]:
    """What enters the first adapted block, ``[inputs, d]`` of each example, on the CPU."""
    lengths = [model.inputs(e) for e in examples]
    found: dict[int, Tensor] = {}
    for rows in _packs(lengths):
        batch = model.collate([examples[i] for i in rows], "full").to(model.device)
        states = prefix.capture(lambda batch=batch: model.logits(batch)).cpu()  # type: ignore[misc]
        found |= {i: states[row, : lengths[i]] for row, i in enumerate(rows)}
    return [found[i] for i in range(len(examples))]


def _with_states(example: Example, states: Tensor) -> Example:
    return replace(example, states=states)


def _chunks(examples: Sequence[Example]) -> Iterator[Sequence[Example]]:
    """Consecutive examples of at most `CHUNK` tokens together, or one that has more."""
    first, tokens = 0, 0
    for i, example in enumerate(examples):
        tokens += len(example.input_ids)
        if i > first and tokens > CHUNK:
            yield examples[first:i]
            first, tokens = i, len(example.input_ids)
    if examples:
        yield examples[first:]


def _packs(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices in batches of similar length, longest first, of at most `TOKENS` places each."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        size = max(1, TOKENS // max(1, lengths[order[0]]))
        yield order[:size]
        order = order[size:]
