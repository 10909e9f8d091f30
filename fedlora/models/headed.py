"""An update together with the head of a classifier, which trains beside it.

    <name of a tensor of the update>        as in the update alone
    head/<name of a parameter>              the head, e.g. head/classifier.weight

It wraps a payload of any kind, so that no kind has to know of heads. PEFT's name for the head is
``modules_to_save``.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedlora.core.checks import wrong_names
from fedlora.core.choice import Indices
from fedlora.core.errors import ModelError
from fedlora.core.files import write_file
from fedlora.core.payload import (
    MovedBase,
    Parametrisation,
    Payload,
    mismatch,
    payload_class,
    target_of,
)
from fedlora.core.reading import json_in, tensors_in
from fedlora.core.types import Adapter, Client, Expected, LocalPlan
from fedlora.models.modules import ModelInfo

HEAD = "head/"
"""What the names of a head's tensors begin with, in payloads and in states."""
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""PEFT's files."""
FILE = "head.safetensors"
"""The head beside an update that is not in PEFT's format."""
_PREFIX = "base_model.model."  # of names in PEFT's files
_LORA = "fedlora.techniques.lora.payload.LowRankPayload"
_UPDATE = "update"  # metadata of `FILE`: the class that reads the update


@dataclass(frozen=True, eq=False)
class WithHead(Payload):
    """A payload and a head."""

    noun = "an update with a head"

    update: Payload
    values: Mapping[str, Tensor]
    """Name of a parameter in the network -> its value."""
    travels: bool = True
    """Whether a real client sends and receives the head; false: it keeps its own."""

    @property
    def folder(self) -> str:  # type: ignore[override]
        """That of the update."""
        return self.update.folder

    @property
    def keeps_zeros(self) -> bool:  # type: ignore[override]
        """Whether the update does; the head is not pruned."""
        return self.update.keeps_zeros

    @property
    def chooses(self) -> bool:  # type: ignore[override]
        """Whether clients that start from the update can."""
        return self.update.chooses

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Those of the update, then the head's."""
        yield from self.update.tensors()
        for name, t in self.values.items():
            yield f"{HEAD}{name}", t

    def header(self) -> dict[str, Any]:
        """The update's class and header, and the names of the head."""
        update = {"_target_": target_of(type(self.update)), "header": self.update.header()}
        return {"update": update, "head": list(self.values), "travels": self.travels}

    @classmethod
    def from_header(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """The inverse of `header` and `tensors`."""
        kind = payload_class(header["update"]["_target_"], load=False)
        if issubclass(kind, WithHead):
            raise ValueError("it holds a head within a head")
        own = {name: t for name, t in tensors.items() if not name.startswith(HEAD)}
        values = {str(name): tensors[f"{HEAD}{name}"] for name in header["head"]}
        update = kind.from_header(header["update"]["header"], own)
        return cls(update, values, bool(header["travels"]))

    def floats(self) -> int:
        """Those of the update, and of the head if it travels."""
        return self.update.floats() + self._head_floats()

    def sent_floats(self, plan: LocalPlan) -> int:
        """The same of what is sent after training."""
        return self.update.sent_floats(plan) + self._head_floats()

    def index_bytes(self) -> int:
        """Those of the update."""
        return self.update.index_bytes()

    def _head_floats(self) -> int:
        return sum(t.numel() for t in self.values.values()) if self.travels else 0

    def check(self, sender: Client, expected: Expected) -> str:
        """The update fits what was asked for, and the head has the names and shapes it was sent."""
        start = expected.start
        if not isinstance(start, WithHead):
            return mismatch(type(self), type(start))
        due = start.update.answer()
        if type(self.update) is not due:
            return mismatch(type(self.update), due)
        if wrong := wrong_names(self.values, start.values):
            return f"head: {wrong}"
        for name, t in self.values.items():
            if t.shape != start.values[name].shape:
                shape = tuple(start.values[name].shape)
                return f"{HEAD}{name} has shape {tuple(t.shape)}, expected {shape}"
        if self.travels is not start.travels:
            return "it says of its head that it travels otherwise than was asked"
        return self.update.check(sender, replace(expected, start=start.update))

    def change_norm(self, start: Payload) -> float:
        """Norm of the change of the effective weights, the head's among them."""
        assert isinstance(start, WithHead)
        moved = [
            float((t.double() - start.values[name].double()).norm())
            for name, t in self.values.items()
        ]
        return math.hypot(self.update.change_norm(start.update), *moved)

    def aligned(self, start: Payload) -> Payload:
        """The start of the update, as that aligns it, with the start's head."""
        assert isinstance(start, WithHead)
        return replace(start, update=self.update.aligned(start.update))

    def answer(self) -> type[Payload]:
        """Its own kind; `check` looks at the update in it."""
        return type(self)

    def updates(self, model: Any, dropout: float = 0.0) -> Mapping[str, Any]:
        """Those of the update; the model mounts the `head` by itself."""
        return self.update.updates(model, dropout)

    def read(self, updates: Mapping[str, Any]) -> "WithHead":
        """The present values of the update; the head's are given by `with_head`."""
        return replace(self, update=self.update.read(updates))

    def head(self) -> Mapping[str, Tensor]:
        """The head."""
        return self.values

    def with_head(self, head: Mapping[str, Tensor]) -> "WithHead":
        """The same update with another head."""
        return replace(self, values=dict(head))

    def low_rank(self) -> Adapter | None:
        """Those of the update."""
        return self.update.low_rank()

    def base(self) -> MovedBase | None:
        """That of the update."""
        return self.update.base()

    def linear(self) -> Adapter | None:
        """That of the update."""
        return self.update.linear()

    def trained(self, factors: Adapter) -> "WithHead":
        """With these factors in the update."""
        return replace(self, update=self.update.trained(factors))

    @property
    def indices(self) -> Indices | None:
        """Those of the update."""
        return self.update.indices

    def with_indices(self, indices: Indices) -> "WithHead":
        """With these in the update; the head always trains."""
        return replace(self, update=self.update.with_indices(indices))

    def parametrisation(self, dtype: torch.dtype, device: torch.device) -> Parametrisation | None:
        """That of the update; the head trains as it is."""
        return self.update.parametrisation(dtype, device)

    def retrained(self, values: Mapping[str, Tensor]) -> "WithHead":
        """With these values in the update."""
        return replace(self, update=self.update.retrained(values))

    def export(
        self, folder: Path, info: ModelInfo, base_name: str = "", dropout: float = 0.0
    ) -> str:
        """The update in its own format, and the head: in PEFT's files as ``modules_to_save``, else
        in a file beside."""
        said = self.update.export(folder, info, base_name, dropout)
        head = {name: t.detach().cpu().contiguous() for name, t in self.values.items()}
        if not (folder / CONFIG).is_file():
            save_file(head, folder / FILE, metadata={_UPDATE: target_of(type(self.update))})
            return said
        config = json_in(folder / CONFIG, "the adapter's configuration")
        config["modules_to_save"] = list(info.head_modules)
        write_file(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True))
        tensors = load_file(folder / WEIGHTS) | {f"{_PREFIX}{n}": t for n, t in head.items()}
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        return said

    def reader(self, folder: Path) -> str | None:
        """That of the update; no one, if the head lies in a file beside."""
        return None if (folder / FILE).is_file() else self.update.reader(folder)

    def read_elsewhere(self, folder: Path, network: Any) -> Any:
        """As the update's reader does, which reads the head too."""
        return self.update.read_elsewhere(folder, network)

    @classmethod
    def load(cls, folder: Path, info: ModelInfo) -> "WithHead":
        """The inverse of `export`; PEFT's folders of ``task_type=SEQ_CLS`` by other programs too.

        Raises:
            ModelError: if the folder holds no head, or one of another model or other classes.
        """
        kind, file, prefix = _LORA, folder / WEIGHTS, _PREFIX
        if (folder / FILE).is_file():
            file, prefix = folder / FILE, ""
            with tensors_in(file, "the head") as read:
                kind = str((read.metadata() or {}).get(_UPDATE))
        update = payload_class(kind, load=True).load(folder, info)
        with tensors_in(file, "the head") as read:
            names = set(read.keys())
            head = {h.name: f"{prefix}{h.name}" for h in info.head}
            values = {name: read.get_tensor(key) for name, key in head.items() if key in names}
        for h in info.head:
            found = tuple(values[h.name].shape) if h.name in values else None
            if found != h.shape:
                has = "has none" if found is None else f"has one of shape {found}"
                raise ModelError(
                    f"{folder} {has} of {h.name}, which {info.name} needs in shape {h.shape} for "
                    f"{len(info.labels)} labels: it was not trained for this model and these labels"
                )
        return cls(update, values)
