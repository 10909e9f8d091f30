"""A base model with most of its weights zero, made once from another and kept in the cache."""

import dataclasses
import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from fedlora.cache import cache_root, locked
from fedlora.data.source import Source
from fedlora.data.store import TokenStore, prepare
from fedlora.models.folder import ModelError
from fedlora.models.language_model import LanguageModel
from fedlora.models.spec import ModelSpec, Tiny
from fedlora.prune.activations import Activations, measure, windows
from fedlora.prune.masks import density, save_masks
from fedlora.prune.prune import Pruning, by_block, prune, prune_from
from fedlora.seeding import generator
from fedlora.types import at_least

VERSION = 1  # of what pruning writes: part of the cache's key
ABOUT = "pruning.json"


@dataclass(frozen=True)
class Pruned(ModelSpec):
    """Another base model, pruned. Its targets are what is pruned, and what carries updates.

    Calibration is federated: `clients` of a source each send what their own text says of the
    layers' inputs (`fedlora.prune.activations.Activations`), and the sums decide. They equal what
    all the text together would have said.
    """

    base: ModelSpec = field(default_factory=Tiny)
    """What is pruned."""
    method: str = "wanda"
    """``wanda``, ``magnitude`` (no calibration) or ``sparsegpt``."""
    pattern: str = "0.5"
    """Share of zeros, or N:M, which keeps N of M."""
    sequential: bool = False
    """Block after block (an exchange for each) instead of all at once (one exchange)."""
    calibration: Source | None = None
    """The source of text; None: only ``magnitude`` needs none."""
    clients: int = 32
    """How many clients calibrate, drawn from those that hold enough text."""
    samples: int = 2
    """Sequences of each, from its training examples end to end."""
    length: int = 256
    """Tokens of a sequence."""
    seed: int = 0
    """Of the draw of clients."""
    path: str = ""
    """Folder of the pruned model; empty: make it or find it in the cache."""

    def __post_init__(self) -> None:
        super().__post_init__()
        Pruning(self.method, self.pattern, self.sequential)
        for name in ("clients", "samples", "length"):
            at_least(f"model.{name}", getattr(self, name), 1)
        at_least("model.seed", self.seed, 0)
        if not self.path and self.method != "magnitude" and self.calibration is None:
            raise ValueError(
                f"model.method={self.method} needs text: model.calibration={self.calibration!r} "
                "must be a source of data (${data}); magnitude needs none"
            )

    @property
    def name(self) -> str:
        return f"{self.base.name}-{self.method}-{self.pattern.replace(':', 'of')}"

    def folder(self) -> Path:
        if self.path:
            return Path(self.path).expanduser().absolute()
        base = dataclasses.replace(self.base, targets=self.targets, dtype=self.dtype)
        target = cache_root() / "models" / f"{self.name}-{self._key(base)}"
        if (target / ABOUT).is_file():
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(target.with_name(f"{target.name}.lock")):
            if not (target / ABOUT).is_file():
                self._make(base, target)
        return target

    def resolved(self) -> Self:
        return dataclasses.replace(self, path=str(self.folder()), calibration=None)

    def _key(self, base: ModelSpec) -> str:
        """Identity of everything that decides the weights."""
        text = None
        if self.method != "magnitude":
            text = [self._store(base).name, self.clients, self.samples, self.length, self.seed]
        how = [self.method, self.pattern, self.sequential, self.dtype, self.targets]
        parts = [VERSION, base.describe().fingerprint, how, text]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]

    def _store(self, base: ModelSpec) -> Path:
        assert self.calibration is not None
        return prepare(self.calibration, base.tokenizer(), base.tokenizer_id(), cache_root())

    def _make(self, base: ModelSpec, target: Path) -> None:
        """Prune and write, then give the folder its name in one step."""
        from fedlora.models.export import merge  # PEFT: seconds that a description need not wait

        model = base.load(torch.device("cpu"))
        if model.info.splits:
            raise ModelError(
                "model.base splits a fused projection, which its files hold whole: prune it with "
                "model.base.split_qkv=false"
            )
        pruning = Pruning(self.method, self.pattern, self.sequential)
        texts: dict[int, list[Tensor]] = {}
        if self.method != "magnitude":
            store = TokenStore(self._store(base))
            texts = calibration_texts(store, self.clients, self.samples, self.length, self.seed)
        masks, about = prune_federated(model, pruning, list(texts.values()))
        building = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            merge(model, {}, building)
            about |= {"mask": save_masks(masks, building), "density": density(masks)}
            about |= {"base": self.base.name, "method": self.method, "pattern": self.pattern}
            about |= {"sequential": self.sequential, "calibration_clients": list(texts)}
            (building / ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
            building.chmod(0o755)
            shutil.rmtree(target, ignore_errors=True)
            building.rename(target)
        finally:
            shutil.rmtree(building, ignore_errors=True)


def calibration_texts(
    store: TokenStore, clients: int, samples: int, length: int, seed: int
) -> dict[int, list[Tensor]]:
    """Client -> its sequences ``[1, length]``, from the start of its training examples.

    Raises:
        ModelError: if fewer clients than asked for hold so much text.
    """
    enough = [c.id for c in store.clients if c.train_tokens >= samples * length]
    if len(enough) < clients:
        most = max((c.train_tokens for c in store.clients), default=0)
        raise ModelError(
            f"calibration asks {clients} clients for {samples} sequences of {length} tokens, and "
            f"{len(enough)} hold so much text (the largest {most} tokens): lower model.clients, "
            "model.samples or model.length"
        )
    drawn = generator(seed, "calibration").choice(len(enough), clients, replace=False)
    chosen = sorted(enough[int(i)] for i in drawn)
    return {
        c: windows((e.input_ids.tolist() for e in store.examples(c, "train")), samples, length)
        for c in chosen
    }


def prune_federated(
    model: LanguageModel, pruning: Pruning, clients: Sequence[Sequence[Tensor]]
) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
    """Prune by what clients say of their own texts.

    Args:
        model: changed in place.
        pruning: what goes.
        clients: the sequences of each.

    Returns:
        The masks, and what the exchange took: ``exchanges`` and, of each client over all of them,
        ``floats_per_client``.
    """
    network, paths = model.network, list(model.layers)
    if pruning.method == "magnitude":
        return prune(network, paths, pruning, []), {"exchanges": 0, "floats_per_client": 0}
    groups = by_block(paths) if pruning.sequential else {"": paths}
    masks: dict[str, Tensor] = {}
    floats = 0
    for block, group in groups.items():
        total: Activations | None = None
        for texts in clients:
            grams = pruning.method == "sparsegpt"
            seen = measure(network, group, texts, grams=grams, until=block)
            total = seen if total is None else total + seen
        assert total is not None
        floats += total.floats
        masks |= prune_from(network, group, pruning, total)
    return masks, {"exchanges": len(groups), "floats_per_client": floats}
