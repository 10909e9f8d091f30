"""What a server holds in place of an update that went into a secure sum."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, NoReturn, Self

from torch import Tensor

from fedlora.core.payload import Payload
from fedlora.core.types import Client, Expected

WHY = "the update went into a secure sum: the server does not have it"


class Withheld(Payload):
    """No payload: its client is known, what it sent is not."""

    noun: ClassVar[str] = "a withheld update"
    folder: ClassVar[str] = ""

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """None."""
        return iter(())

    def header(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    @classmethod
    def from_header(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """The same again."""
        return cls()

    def check(self, sender: Client, expected: Expected) -> str:
        """It cannot be averaged."""
        return WHY

    def change_norm(self, start: Payload) -> float:
        """Not known."""
        _refuse()

    def updates(self, model: Any, dropout: float = 0.0) -> Mapping[str, Any]:
        """Not known."""
        _refuse()

    def read(self, updates: Mapping[str, Any]) -> Payload:
        """Not known."""
        _refuse()

    def export(self, folder: Path, info: Any, base_name: str = "", dropout: float = 0.0) -> str:
        """Not known."""
        _refuse()

    @classmethod
    def load(cls, folder: Path, info: Any) -> Payload:
        """Nothing is written."""
        _refuse()


def _refuse() -> NoReturn:
    raise TypeError(WHY)
