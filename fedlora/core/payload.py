"""What travels between a server and its clients: an open base class, one subclass per kind.

A payload is named tensors and a header of JSON values. On the wire and on disk it is found again by
the dotted path of its class, as configuration is, so that a new kind of update is a new folder of
`fedlora.techniques` and no edit here or anywhere else.
"""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

if TYPE_CHECKING:  # `types` holds payloads in its jobs
    from fedlora.core.choice import Indices
    from fedlora.core.types import Adapter, Client, Expected, LocalPlan

_CLASSES: dict[str, type["Payload"]] = {}


@dataclass(frozen=True)
class MovedBase:
    """A base model whose adapted weights have moved: ``W + shift``."""

    version: str
    """Identity of the shift: equal versions hold equal tensors."""
    shift: Mapping[str, Tensor]
    """Module path -> ``[d_out, d_in]``."""


@dataclass(frozen=True)
class Parametrisation:
    """Low-rank factors that are functions of the scalars that train: ``B = U R`` of a trained ``R``
    between fixed ``U`` and ``A``. What is no function of them is fixed."""

    start: Mapping[str, Tensor]
    """Name -> the values from which training begins."""
    factors: "Callable[[Mapping[str, Tensor]], Adapter]"
    """The factors that such values make, differentiable in each of them."""


class Payload(ABC):
    """What a client receives and returns. Never changed once made."""

    noun: ClassVar[str]
    """The kind as error messages call it: ``factors``, ``a SparseDelta``."""
    keeps_zeros: ClassVar[bool] = False
    """Whether the zeros of a pruned base stay zero under it."""
    folder: ClassVar[str] = "adapter"
    """Subfolder of a run folder to which the final payload is exported: ``adapter`` or ``update``;
    empty: no format can hold it."""
    chooses: ClassVar[bool] = False
    """Whether clients that start from it can choose the rank indices that they train."""
    alone: ClassVar[str] = "updates of another kind one by one"
    """The note of an engine that runs clients with this start one by one. Payloads with `low_rank`
    factors run together and need none."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _CLASSES[target_of(cls)] = cls

    # --- framing ------------------------------------------------------------------------------

    @abstractmethod
    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor, with a name such as ``model.layers.0.self_attn.q_proj/a``."""

    @abstractmethod
    def header(self) -> dict[str, Any]:
        """What `from_header` needs beside the tensors, as JSON values."""

    @classmethod
    @abstractmethod
    def from_header(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """The inverse of `header` and `tensors`: these tensors, by name, in their order.

        Raises:
            KeyError, ValueError: if a tensor is missing, or tensors contradict each other.
        """

    def copy(self) -> "Payload":
        """A copy with its own trained tensors: writing into them changes no other payload. A moved
        base may be shared."""
        own = {name: t.clone() for name, t in self.tensors()}
        return self.from_header(self.header(), own)

    def floats(self) -> int:
        """Scalars that are sent to or by a real client."""
        return sum(t.numel() for _, t in self.tensors())

    def sent_floats(self, plan: "LocalPlan") -> int:
        """Scalars that a client sends after training as planned: all, except those that the server
        already has."""
        return self.floats()

    def index_bytes(self) -> int:
        """Bytes that say which rank indices are sent, where a client has chosen them."""
        return 0

    # --- validation ---------------------------------------------------------------------------

    @abstractmethod
    def check(self, sender: "Client", expected: "Expected") -> str:
        """Why it must not be averaged, in a few words; empty: it may.

        `fedlora.server.validation` looks at its type, its sender's name and its values. What is
        left are its form, its shapes and what it was trained on.

        Args:
            sender: the client as it says it is.
            expected: what was asked for.
        """

    @abstractmethod
    def change_norm(self, start: "Payload") -> float:
        """``||W_self - W_start||_F`` of the effective weights, over all modules together.

        Raises:
            TypeError: if the two have no common change.
        """

    def aligned(self, start: "Payload") -> "Payload":
        """What its change is measured against: the start, or its leading block if ranks shrink."""
        return start

    def answer(self) -> type["Payload"]:
        """What a client sends back that starts from it and trains without more ado."""
        return type(self)

    # --- on a model ---------------------------------------------------------------------------

    @abstractmethod
    def updates(self, model: Any, dropout: float = 0.0) -> Mapping[str, Any]:
        """What it puts on each module that it names, in module order; copies, never aliases.

        Merged weights are those of the updates (`LinearUpdate.weight`).

        Args:
            model: a `fedlora.models.language_model.LanguageModel`.
            dropout: rate, where it has a branch with an input of its own.

        Returns:
            Module path -> `fedlora.models.layers.LinearUpdate`.

        Raises:
            ValueError: if a module is unknown or a shape is impossible, naming the module.
        """

    @abstractmethod
    def read(self, updates: Mapping[str, Any]) -> "Payload":
        """What these updates, made by `updates`, have been trained to: a detached copy."""

    def low_rank(self) -> "Adapter | None":
        """The low-rank factors that are all it has, over `base`; None: it is something else.

        Engines may train and evaluate payloads with factors together.
        """
        return None

    def base(self) -> MovedBase | None:
        """The moved base that it refers to; None: the model's own."""
        return None

    def parametrisation(self, dtype: torch.dtype, device: torch.device) -> Parametrisation | None:
        """What trains in place of its `low_rank` factors; None: they do themselves.

        Args:
            dtype: of the scalars that train and of the factors.
            device: where they are.
        """
        return None

    def head(self) -> Mapping[str, Tensor] | None:
        """The head of a classifier that it brings, which trains beside it, by the names of the
        network's parameters; None: the model's own stays as it is."""
        return None

    def linear(self) -> "Adapter | None":
        """The gradient of a linear term of the client's objective, which its plan's local term adds
        at every step: a pair for each pair of factors. None: it brings none."""
        return None

    @property
    def travels(self) -> bool:
        """Whether a real client sends and receives its `head`; false: it keeps its own."""
        return True

    def with_head(self, head: Mapping[str, Tensor]) -> "Payload":
        """The same with another head."""
        raise TypeError(f"{self.noun} has no head")

    def trained(self, factors: "Adapter") -> "Payload":
        """What a client sends whose `low_rank` factors an engine has trained to these."""
        raise TypeError(f"{self.noun} has no factors to be trained")

    @property
    def indices(self) -> "Indices | None":
        """The rank indices that its client has trained; None: it has made no choice."""
        return None

    def with_indices(self, indices: "Indices") -> "Payload":
        """The same as sent by a client that has trained these rank indices."""
        raise TypeError(f"{self.noun} has no rank indices")

    def retrained(self, values: Mapping[str, Tensor]) -> "Payload":
        """What a client sends whose `parametrisation` an engine has trained to these values."""
        raise TypeError(f"{self.noun} trains its factors themselves")

    # --- on disk ------------------------------------------------------------------------------

    @abstractmethod
    def export(self, folder: Path, info: Any, base_name: str = "", dropout: float = 0.0) -> str:
        """Write it for others, in a standard format where there is one.

        Args:
            folder: an empty one.
            info: `fedlora.models.modules.ModelInfo` of the base.
            base_name: folder or hub id of the base.
            dropout: what further training would use.

        Returns:
            What a user should know of it, if anything. Nothing is written without `folder`.
        """

    def reader(self, folder: Path) -> str | None:
        """The other program, with its version, that reads what `export` wrote; None: no one."""
        return None

    def read_elsewhere(self, folder: Path, network: Any) -> Any:
        """The plain base with the exported folder on it, as that program mounts it.

        Args:
            folder: written by `export`.
            network: a ``PreTrainedModel`` of the base as its files have it; may be changed.

        Returns:
            What computes as ``network`` does.
        """
        raise TypeError(f"no other program reads {self.noun}")

    @classmethod
    @abstractmethod
    def load(cls, folder: Path, info: Any) -> "Payload":
        """The inverse of `export`.

        Raises:
            ModelError: if the folder does not hold one, or it is of another base.
        """


def plain_factors(payload: Payload) -> "Adapter | None":
    """The low-rank factors over the model's own base that are all a payload has; None: it is
    something else."""
    return payload.low_rank() if payload.base() is None else None


def mismatch(found: type[Payload], due: type[Payload]) -> str:
    """The error of one kind that came where another is required."""
    return (
        f"it holds {found.noun} where {due.noun} {'is' if due.noun[:2] == 'a ' else 'are'} required"
    )


def target_of(cls: type) -> str:
    """The dotted path of a class: ``_target_``."""
    return f"{cls.__module__}.{cls.__qualname__}"


def payload_class(target: object, *, load: bool) -> type[Payload]:
    """The payload class of a dotted path.

    Args:
        target: ``_target_`` of a header.
        load: import its module if this process has not done so. Never for what a client sent: it
            would choose what the server imports.

    Raises:
        ValueError: if that is no payload class.
    """
    name = str(target)
    if name not in _CLASSES and load:
        try:
            importlib.import_module(name.rpartition(".")[0])
        except (ImportError, ValueError) as error:
            raise ValueError(f"_target_={name!r} names no payload class: {error}") from error
    if name not in _CLASSES:
        raise ValueError(f"_target_={name!r} names no payload class that is known here")
    return _CLASSES[name]
