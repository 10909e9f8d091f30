"""A base model with most of its weights zero, made once from another and kept in the cache."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from fedlora.core.cache import cache_root
from fedlora.core.checks import at_least
from fedlora.core.errors import ModelError
from fedlora.core.files import made_once, write_file
from fedlora.core.reading import json_in
from fedlora.core.seeding import generator
from fedlora.data.source import Source
from fedlora.data.store import ClientInfo, TokenStore, prepare
from fedlora.models.compact import expand
from fedlora.models.language_model import LanguageModel
from fedlora.models.masks import density, save_masks
from fedlora.models.number_format import AUTO
from fedlora.models.spec import ModelSpec, Tiny
from fedlora.population.sampling import (
    Population,
    held_out,
    members,
)
from fedlora.prune.prune import Pruning, prune_by
from fedlora.prune.statistics import (
    Activations,
    measure,
    windows,
)

VERSION = 2  # of what pruning writes: part of the cache's key
ABOUT = "pruning.json"
NUMBER = 8
"""Bytes of a sum or a count that a client sends: float64, in which sums of clients are exact enough
to be those of all their text."""


@dataclass(frozen=True)
class Pruned(ModelSpec):
    """Another base model, pruned. Its targets are what is pruned, in all blocks, and what carries
    updates, in those of `layers`.

    Calibration is federated: `clients` of a source each send the input statistics of their own
    text (`fedlora.prune.statistics.Activations`), and the server prunes by their sum, which equals
    the statistics of all the text together.
    """

    base: ModelSpec = field(default_factory=Tiny)
    """What is pruned."""
    method: str = "wanda"
    """``wanda``, ``magnitude`` (no calibration) or ``sparsegpt``."""
    pattern: str = "0.5"
    """Fraction of zeros, or N:M, which keeps N of M."""
    sequential: bool = False
    """Block after block (one message per client for each) instead of all at once (one in total)."""
    calibration: Source | None = None
    """The source of text; None: only ``magnitude`` needs none."""
    clients: int = 32
    """How many clients calibrate, drawn from those that hold enough text."""
    samples: int = 2
    """Sequences per client, from its training examples end to end."""
    length: int = 256
    """Tokens of a sequence."""
    seed: int = 0
    """Seed of the draw of clients."""
    population: Population | None = None
    """Whose rules hold clients out for evaluation: their text does not calibrate. None: no client
    is held out."""
    population_seed: int = 0
    """Seed of the run; the population draws its held-out clients from it."""
    path: str = ""
    """Folder of the pruned model; empty: make it or find it in the cache."""

    def __post_init__(self) -> None:
        super().__post_init__()
        Pruning(self.method, self.pattern, self.sequential)
        for name in ("clients", "samples", "length"):
            at_least(f"model.{name}", getattr(self, name), 1)
        at_least("model.seed", self.seed, 0)
        if self.dtype == AUTO:
            raise ValueError(
                "model.dtype=auto: the zeros of a pruned model belong to weights in one number "
                "format, which another machine must find again; use float32 or bfloat16"
            )
        self._check_base()
        if not self.path and self.method != "magnitude" and self.calibration is None:
            raise ValueError(
                f"model.method={self.method} needs text: model.calibration={self.calibration!r} "
                "must be a source of data (${data}); magnitude needs none"
            )

    def _check_base(self) -> None:
        """Refuse settings of the base that pruning would ignore."""
        quantization = getattr(self.base, "quantization", "none")
        if quantization != "none":
            raise ValueError(
                f"model.base.quantization={quantization}: quantised weights cannot be pruned; use "
                "model.base.quantization=none"
            )
        if self.base.classifies:
            raise ValueError(
                "model.base.task=classification: pruning measures a language model on clients' "
                "texts; use model.base.task=causal_lm"
            )
        if self.base.targets not in ("all-linear", self.targets):
            raise ValueError(
                f"model.base.targets={_listed(self.base.targets)} says nothing: what is pruned is "
                f"model.targets={_listed(self.targets)}; set that one"
            )
        if self.base.layers != "all":
            raise ValueError(
                f"model.base.layers={_listed(self.base.layers)} says nothing: all blocks are "
                "pruned, and model.layers chooses those that carry updates; set that one"
            )

    @property
    def name(self) -> str:
        made, method, pattern = self.base.name, self.method, self.pattern
        if self.path:
            about = read_about(Path(self.path).expanduser())
            if not about:
                return Path(self.path).name
            made, method, pattern = (about[k] for k in ("base", "method", "pattern"))
        return f"{made}-{method}-{pattern.replace(':', 'of')}"

    def folder(self) -> Path:
        if self.path:
            return expand(Path(self.path).expanduser().absolute())
        base = dataclasses.replace(self.base, targets=self.targets, dtype=self.dtype)
        target = cache_root() / "models" / f"{self.name}-{self._key(base)}"
        return made_once(
            target, lambda draft: self._make(base, draft), lambda made: (made / ABOUT).is_file()
        )

    def resolved(self) -> Self:
        return dataclasses.replace(self, path=str(self.folder()), calibration=None, population=None)

    def _key(self, base: ModelSpec) -> str:
        """Identity of everything that decides the weights."""
        text, info = None, base.describe()
        if self.method != "magnitude":
            if info.context_stated and self.length > info.context:
                raise ModelError(
                    f"model.length={self.length} exceeds the {info.context} positions of "
                    f"{info.name}: calibrate with model.length={info.context} or less"
                )
            store = self._store(base)
            text = [store.name, self._calibrators(TokenStore(store)), self.samples, self.length]
        how = [self.method, self.pattern, self.sequential, self.dtype, self.targets]
        parts = [VERSION, info.fingerprint, base.tokenizer_id(), how, text]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]

    def _store(self, base: ModelSpec) -> Path:
        assert self.calibration is not None
        return prepare(self.calibration, base.tokenizer(), base.tokenizer_id(), cache_root())

    def _calibrators(self, store: TokenStore) -> list[int]:
        """Ids of the clients whose text is used."""
        infos: Sequence[ClientInfo] = store.clients
        if self.population is not None:
            shards = members(self.population, infos)
            apart = set().union(*held_out(self.population, shards, self.population_seed))
            infos = [c for c in infos[: len(shards)] if c.id not in apart]
        return calibrators(infos, self.clients, self.samples, self.length, self.seed)

    def _make(self, base: ModelSpec, draft: Path) -> None:
        """Prune, and write the model into a folder."""
        from fedlora.models.export import write_merged

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
            texts = {
                c: windows(_training_text(store, c), self.samples, self.length)
                for c in self._calibrators(store)
            }
        masks, about = prune_federated(model, pruning, list(texts.values()))
        whole = [path for path, mask in masks.items() if mask.all()]
        if whole:
            raise ModelError(
                f"model.pattern={self.pattern} leaves {whole[0]} without a zero ({len(whole)} of "
                f"{len(masks)} layers): choose a larger fraction"
            )
        write_merged(model, None, draft)
        about |= {"mask": save_masks(masks, draft), "density": density(masks)}
        about |= {"base": self.base.name, "method": self.method, "pattern": self.pattern}
        about |= {"sequential": self.sequential, "calibration_clients": list(texts)}
        write_file(draft / ABOUT, json.dumps(about, indent=1) + "\n")


def read_about(folder: Path) -> dict[str, Any]:
    """The record of a folder that pruning made; empty for any other folder."""
    file = folder / ABOUT
    if not file.is_file():
        return {}
    return json_in(file, "the record of a pruned model")


def calibrators(
    clients: Sequence[ClientInfo], count: int, samples: int, length: int, seed: int
) -> list[int]:
    """Draw ``count`` clients from those with enough training text; their ids, ascending.

    Raises:
        ModelError: if fewer than asked for hold so much.
    """
    enough = [c.id for c in clients if c.train_tokens >= samples * length]
    if len(enough) < count:
        most = max((c.train_tokens for c in clients), default=0)
        raise ModelError(
            f"calibration asks {count} clients for {samples} sequences of {length} tokens, and "
            f"{len(enough)} of {len(clients)} hold so much text (the largest {most} tokens; "
            "clients held out for evaluation do not calibrate): lower model.clients, "
            "model.samples or model.length"
        )
    drawn = generator(seed, "calibration").choice(len(enough), count, replace=False)
    return sorted(enough[int(i)] for i in drawn)


def calibration_traffic(folder: Path) -> dict[str, int]:
    """Traffic of all calibrating clients of a pruned model, for a run's record.

    Empty if the folder has no such record.
    """
    about = read_about(folder)
    if "up_bytes_per_client" not in about:
        return {}
    count = len(about["calibration_clients"])
    return {
        "calibration/clients": count,
        "calibration/exchanges": about["exchanges"],
        "calibration/up_bytes": count * about["up_bytes_per_client"],
        "calibration/down_bytes": count * about["down_bytes_per_client"],
    }


def _training_text(store: TokenStore, client: int) -> Iterator[list[int]]:
    return (e.input_ids.tolist() for e in store.examples(client, "train"))


def _listed(targets: Any) -> str:
    return targets if isinstance(targets, str) else f"[{', '.join(map(str, targets))}]"


def prune_federated(
    model: LanguageModel, pruning: Pruning, clients: Sequence[Sequence[Tensor]]
) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
    """Prune by the summed input statistics of clients, each measured on its own text.

    Args:
        model: changed in place.
        pruning: method and pattern.
        clients: the sequences of each client.

    Returns:
        The masks, and the traffic: ``exchanges`` (messages per client) and, per client in total,
        ``floats_per_client`` (sums and counts, `NUMBER` bytes each), ``up_bytes_per_client`` and
        ``down_bytes_per_client`` (block after block: the pruned weights of the earlier blocks).
    """
    done: list[str] = []
    exchanges = floats = down = 0

    def statistics(block: str, group: Sequence[str]) -> Activations:
        nonlocal exchanges, floats, down
        exchanges += 1
        down = sum(_layer_bytes(model, path, pruning) for path in done)
        done.extend(group)
        total: Activations | None = None
        for texts in clients:
            grams = pruning.method == "sparsegpt"
            seen = measure(model.network, group, texts, grams=grams, until=block)
            total = seen if total is None else total + seen
        assert total is not None
        floats += total.floats
        return total

    masks = prune_by(model.network, list(model.layers), pruning, statistics)
    return masks, {
        "exchanges": exchanges,
        "floats_per_client": floats,
        "up_bytes_per_client": NUMBER * floats,
        "down_bytes_per_client": down,
    }


def _layer_bytes(model: LanguageModel, path: str, pruning: Pruning) -> int:
    """Bytes that send a pruned layer to a client: one bit per weight, and the kept weights if
    pruning changes them."""
    weight = model.layers[path].weight
    changed = int(weight.count_nonzero()) if pruning.method == "sparsegpt" else 0
    return math.ceil(weight.numel() / 8) + changed * weight.element_size()
