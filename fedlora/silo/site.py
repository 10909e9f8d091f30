"""The work of a silo: what it says of itself, and how it opens its own model and records.

A server sends an `Assignment`, which holds no path of the silo's. The silo answers with a
`SiloInfo`: counts and fingerprints, no text and no token.
"""

import dataclasses
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from fedlora.core.cache import cache_root
from fedlora.core.checks import real
from fedlora.core.config import build, describe
from fedlora.core.errors import ConfigError
from fedlora.data.jsonl import Jsonl
from fedlora.data.store import ClientInfo, TokenStore, find_or_prepare
from fedlora.engine.base import EngineSpec
from fedlora.engine.worker import WorkerSpec
from fedlora.models.spec import ModelSpec
from fedlora.silo.card import NAME, SiloCard
from fedlora.silo.records import SiloRecords

COUNTS = ("num_train", "num_eval", "num_test", "train_tokens", "eval_tokens", "test_tokens")
"""What a silo says of its records, with the next two; fields of `ClientInfo`."""
WITH_LOSS = ("predicting", "responding")
MARK = "silo"
"""The key that tells an assignment from the description of a simulation's worker."""


@dataclass(frozen=True)
class Assignment:
    """What a server tells a silo about its run."""

    silo: str
    """Name of the silo that it is meant for."""
    client: int
    """The silo's client id in the run."""
    model: ModelSpec
    data: Jsonl
    """How records are read; its path is the server's and is not used."""
    engine: EngineSpec
    fingerprint: str
    """Fingerprint of the server's base model."""
    records: str = ""
    """Key of the token store that the silo has introduced itself with; empty: not yet."""
    run: str = ""
    """Names the run for what the silo keeps of it (`fedlora.silo.memory`); empty: before round 1.
    """

    def to_json(self) -> str:
        """For a message."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for part in ("model", "data", "engine"):
            plain[part] = describe(plain[part])
        return json.dumps(plain, sort_keys=True)

    @staticmethod
    def from_json(text: str) -> "Assignment":
        """The inverse of `to_json`."""
        raw = json.loads(text)
        model: ModelSpec = build(raw["model"], ModelSpec, "model")  # type: ignore[type-abstract]
        engine: EngineSpec = build(raw["engine"], EngineSpec, "engine")  # type: ignore[type-abstract]
        data = build(raw["data"], Jsonl, "data")
        return Assignment(**{**raw, "model": model, "engine": engine, "data": data})


@dataclass(frozen=True)
class SiloInfo:
    """What a silo says of itself."""

    name: str
    attention: int
    mlp: int
    device: str
    records: str
    """Key of its token store: a hash of its records and of how they are read."""
    counts: Mapping[str, int]
    """`COUNTS` and `WITH_LOSS`."""
    cut: int
    """Examples that are cut to the maximal length."""
    versions: Mapping[str, str]

    def to_json(self) -> str:
        """For a message."""
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: str) -> "SiloInfo":
        """The inverse of `to_json`.

        Raises:
            ValueError: if a value has another type than it must have.
        """
        raw = json.loads(text)
        counts = {k: _whole(k, raw["counts"][k]) for k in (*COUNTS, *WITH_LOSS)}
        name, records = str(raw["name"]), str(raw["records"])
        if not NAME.fullmatch(name) or not records.isalnum():
            raise ValueError(f"name={name!r:.80} or records={records!r:.80} is no name")
        versions = {str(k)[:40]: str(v)[:40] for k, v in [*dict(raw["versions"]).items()][:8]}
        ranks = _whole("attention", raw["attention"]), _whole("mlp", raw["mlp"])
        cut = _whole("cut", raw["cut"])
        return SiloInfo(name, *ranks, str(raw["device"])[:16], records, counts, cut, versions)

    def shard(self, client: int) -> ClientInfo:
        """The silo as a client of the population."""
        return ClientInfo(id=client, category="", name=self.name, **self.counts)


def _whole(name: str, value: object) -> int:
    number = real(name, value)
    if number != int(number) or not 0 <= number < 2**53:
        raise ValueError(f"{name}={value!r:.80} must be a whole number >= 0")
    return int(number)


def introduce(card: SiloCard, assignment: Assignment) -> SiloInfo:
    """Check the base model, tokenise the silo's records if that is not done yet, and count them.

    Raises:
        ConfigError, DataError, ModelError: one sentence each, with the silo's name in it.
    """
    model = own_model(card, assignment)
    info = model.describe()
    if info.fingerprint != assignment.fingerprint:
        raise ConfigError(
            f"silo {card.name}: its base model has the fingerprint {info.fingerprint}, the "
            f"server's has {assignment.fingerprint}: name the folder of the same model in the silo "
            "card (model:)"
        )
    store = own_store(card, assignment, model)
    (client,) = store.clients
    if info.vocabulary and store.largest_token >= info.vocabulary:
        raise ConfigError(
            f"silo {card.name}: the tokenizer of {info.name} made a token of its records that the "
            f"model has no embedding for ({info.vocabulary} rows): tokenizer and weights are of "
            "different models"
        )
    counts = {name: int(getattr(client, name)) for name in (*COUNTS, *WITH_LOSS)}
    libraries = {name: metadata.version(name) for name in ("flwr", "torch", "transformers")}
    return SiloInfo(
        card.name,
        card.attention,
        card.mlp,
        card.device,
        store.key,
        counts,
        store.cut_examples,
        {"python": platform.python_version(), **libraries},
    )


def own_model(card: SiloCard, assignment: Assignment) -> ModelSpec:
    """The run's base model, from the silo's own folder if the card names one.

    Raises:
        ConfigError: if the model has no folder that could be named.
    """
    model = assignment.model
    if card.model:
        if not any(f.name == "path" for f in dataclasses.fields(model)):
            raise ConfigError(
                f"silo {card.name}: model={card.model!r} in the card, and model={model.name} is "
                "found by its package alone: leave model: out"
            )
        model = dataclasses.replace(model, path=card.model)  # type: ignore[call-arg]
    return model.resolved()


def own_store(card: SiloCard, assignment: Assignment, model: ModelSpec) -> TokenStore:
    """The token store of the silo's records, built if need be.

    Raises:
        DataError: if they cannot be read.
        ConfigError: if they are not those that the silo joined the run with.
    """
    fields = describe(assignment.data) | {"path": card.records, "number": assignment.client}
    target = f"{SiloRecords.__module__}.{SiloRecords.__qualname__}"
    source = build(fields | {"_target_": target}, SiloRecords, "data")
    folder = find_or_prepare(source, model.tokenizer, model.tokenizer_id(), cache_root())
    store = TokenStore(folder)
    if assignment.records not in ("", store.key):
        raise ConfigError(
            f"silo {card.name}: its records are no longer those that it joined this run with: put "
            "them back, or start a new run"
        )
    return store


def worker_of(card: SiloCard, text: str) -> WorkerSpec:
    """What this silo has to open for the jobs of a message.

    Args:
        card: of the silo.
        text: an `Assignment` as JSON.

    Raises:
        ConfigError: if the message is meant for another silo or is one of a simulation, or the
            records have changed.
        DataError: if they cannot be read.
    """
    raw: dict[str, Any] = json.loads(text)
    if MARK not in raw:
        raise ConfigError(
            f"silo {card.name}: it trains on its own records only, and the run is a simulation "
            "that names data of the server's: use runtime=silos"
        )
    assignment = Assignment.from_json(text)
    if assignment.silo != card.name:
        raise ConfigError(f"silo {card.name}: the message is meant for {assignment.silo}")
    model = own_model(card, assignment)
    store = own_store(card, assignment, model)
    return WorkerSpec(model, store.folder, assignment.engine, card.device, assignment.client)
