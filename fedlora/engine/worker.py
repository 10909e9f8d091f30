"""The objects that a worker process builds once and keeps: base model, token store, engine.

A server describes them in JSON (`WorkerSpec.to_json`) and sends the description with every message.
A worker builds them at the first message and caches them for the next ones.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from fedlora.attack.base import Squad
from fedlora.core.config import build, describe
from fedlora.data.store import TokenStore
from fedlora.engine.attacked import AttackedEngine
from fedlora.engine.base import Engine, EngineSpec
from fedlora.models.language_model import LanguageModel
from fedlora.models.spec import ModelSpec


@dataclass(frozen=True)
class WorkerSpec:
    """A worker's model, data, engine and device."""

    model: ModelSpec
    store: Path
    """Folder of the token store (absolute)."""
    engine: EngineSpec
    device: str = "auto"
    """``auto``: the first CUDA device that Ray left visible, else the CPU."""
    client: int | None = None
    """Id of the only client that the store is of; None: the store has the clients of all."""
    attack: Squad | None = None
    """The clients that attack; None: there are none."""

    def to_json(self) -> str:
        """The description that `worker` understands."""
        plain = {
            "model": describe(self.model),
            "store": str(self.store),
            "engine": describe(self.engine),
            "device": self.device,
        }
        only = {} if self.client is None else {"client": self.client}
        attack = {} if self.attack is None else {"attack": describe(self.attack)}
        return json.dumps(plain | only | attack, sort_keys=True)

    @staticmethod
    def from_json(text: str) -> "WorkerSpec":
        """The inverse of `to_json`."""
        raw = json.loads(text)
        return WorkerSpec(
            build(raw["model"], ModelSpec, "model"),  # type: ignore[type-abstract]
            Path(raw["store"]),
            build(raw["engine"], EngineSpec, "engine"),  # type: ignore[type-abstract]
            raw["device"],
            raw.get("client"),
            build(raw["attack"], Squad, "attack") if "attack" in raw else None,
        )

    def open(self) -> Engine:
        """Load the model, map the data, start the engine.

        Raises:
            ValueError: for a device that is not there.
        """
        model, store = resident(self.to_json())
        if self.attack is None:
            return self.engine.open(model, store)
        return AttackedEngine(self.attack, self.engine, model, store)


@functools.lru_cache(maxsize=1)
def resident(spec: str) -> tuple[LanguageModel, TokenStore]:
    """The base model and the data of this process for a JSON `WorkerSpec`, shared by all callers.

    Raises:
        ValueError: for a device that does not exist.
    """
    described = WorkerSpec.from_json(spec)
    model = described.model.load(resolve_device(described.device))
    return model, TokenStore(described.store, described.client)


@functools.lru_cache(maxsize=1)
def worker(spec: str) -> Engine:
    """The engine of this process for a JSON `WorkerSpec`; another spec replaces it."""
    return WorkerSpec.from_json(spec).open()


def resolve_device(name: str) -> torch.device:
    """``auto``, ``cpu``, ``cuda`` or ``cuda:1`` as a torch device.

    Raises:
        ValueError: naming the device and what this process sees.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"runtime.device={name!r} is not auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"runtime.device={name!r}, but this process sees {torch.cuda.device_count()} CUDA "
            "devices"
        )
    return device
