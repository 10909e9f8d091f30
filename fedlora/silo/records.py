"""The records of one silo: all of them are one client's, whatever fields they have."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedlora.core.checks import at_least
from fedlora.data.fields import Entry, Row
from fedlora.data.jsonl import Jsonl
from fedlora.data.partition import Division


@dataclass(frozen=True, kw_only=True)
class SiloRecords(Jsonl):
    """Records of a single client, with the splits that it has in a simulation.

    A folder with a file per client, read by ``data=jsonl``, gives client ``number`` the same
    examples in the same order as that file gives the silo of this number.
    """

    name: ClassVar[str] = "silo"

    number: int = 0
    """Id of the client in its run: the split is drawn by it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("number", self.number, 0)

    def _is_by_file(self, rows: Sequence[Row]) -> bool:
        return True

    def _partition(self, groups: Sequence[str], entries: Sequence[Entry]) -> Division:
        return Division([[*range(len(entries))]])

    def _splits(
        self, client: int, entries: Sequence[Entry], members: Sequence[int]
    ) -> Iterator[tuple[int, str]]:
        yield from super()._splits(self.number, entries, members)
