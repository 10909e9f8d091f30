"""The client states between rounds, on disk, so that a kill at any instant loses nothing.

    <folder>/<namespace>/<client>/<round>.safetensors

One file per client and round in which it took part, written whole when the round is finished and
before the checkpoint, which lists for every client the round and the SHA-256 of its file: what
clients keep is part of the checkpoint's identity. On resume, files newer than the checkpoint are
removed. A file is removed once no stored checkpoint can refer to it: most clients have one
file, those that took part in the last rounds two or more.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from fedlora.algebra.state import Kept
from fedlora.core.errors import CheckpointError
from fedlora.core.files import remove_drafts, write_file

METHOD = "method"
"""Namespace of what a method's `kept` returns."""
WIRE = "wire"
"""Namespace of what rounding has withheld of a client's replies (`fedlora.wire.change`)."""
STARTS = "starts"
"""Namespace of what a client was sent last, if starts are compressed (`fedlora.wire.tensors`)."""
HOME = "home"
"""Namespace of clients that keep themselves what the wire needs of them (`fedlora.wire.recall`): an
empty state, of the round in which their last reply was accepted."""
CACHED_BYTES = 256 * 2**20
"""Bytes of tensors that stay in memory; the least recently used are read again when needed."""


@dataclass(frozen=True)
class Version:
    """The file that holds what a client keeps."""

    round: int
    """The round at whose end it was written."""
    sha256: str
    bytes: int


class ClientStore:
    """Named tensors per client and namespace, of the last finished round.

    Args:
        folder: of the run's client states; made when the first client keeps something.
        cached_bytes: of tensors that stay in memory.
    """

    def __init__(self, folder: Path, cached_bytes: int = CACHED_BYTES) -> None:
        self.folder, self._most = folder, cached_bytes
        self._current: dict[tuple[str, int], Version] = {}
        self._written: dict[tuple[str, int], list[int]] = {}  # rounds whose files exist, ascending
        self._staged: dict[tuple[str, int], Kept | None] = {}
        self._cache: OrderedDict[tuple[str, int], Kept] = OrderedDict()
        self._cached = 0

    # --- a round ------------------------------------------------------------------------------

    def get(self, client: int, namespace: str = METHOD) -> Kept | None:
        """What a client kept when it last took part; ``None``: nothing. Not to be changed.

        Raises:
            CheckpointError: naming a file that is missing or damaged.
        """
        key = (namespace, client)
        if key not in self._current:
            return None
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        return self._remember(key, self._load(key))

    def round(self, client: int, namespace: str = METHOD) -> int:
        """The round in which a client kept what it keeps; 0: it keeps nothing."""
        found = self._current.get((namespace, client))
        return found.round if found else 0

    def stage(self, client: int, kept: Kept | None, namespace: str = METHOD) -> None:
        """Take note of what a client keeps from now on (None: nothing); `get` sees it after
        `commit`."""
        self._staged[namespace, client] = kept

    def commit(self, round: int) -> None:
        """Write what was staged, at the end of a round and before its checkpoint."""
        for key, kept in sorted(self._staged.items(), key=lambda item: item[0]):
            if kept is None:
                self._current.pop(key, None)
                self._forget(key)
                continue
            blob = safetensors.torch.save({name: _standalone(t) for name, t in kept.items()})
            file = self._file(key, round)
            file.parent.mkdir(parents=True, exist_ok=True)
            write_file(file, blob)
            self._current[key] = Version(round, hashlib.sha256(blob).hexdigest(), len(blob))
            rounds = self._written.setdefault(key, [])
            rounds[:] = [r for r in rounds if r < round] + [round]
            self._forget(key)
            self._remember(key, safetensors.torch.load(blob))
        self._staged = {}

    def prune(self, oldest: int) -> None:
        """Remove files that no checkpoint needs: of each client all older than the one that was
        current at the end of round ``oldest``, that of the oldest checkpoint."""
        for key, rounds in self._written.items():
            needed = max((r for r in rounds if r <= oldest), default=0)
            for round in [r for r in rounds if r < needed]:
                self._file(key, round).unlink(missing_ok=True)
                rounds.remove(round)

    # --- checkpoints and records --------------------------------------------------------------

    def index(self) -> dict[str, dict[str, list[Any]]]:
        """The index for the checkpoint: namespace -> client -> round, SHA-256 and bytes of its
        file."""
        found: dict[str, dict[str, list[Any]]] = {}
        for (namespace, client), v in sorted(self._current.items()):
            found.setdefault(namespace, {})[str(client)] = [v.round, v.sha256, v.bytes]
        return found

    def restore(self, round: int, index: Mapping[str, Mapping[str, list[Any]]]) -> None:
        """Go on from a checkpoint: files of later rounds are removed, the others stay.

        Args:
            round: of the checkpoint; 0: there is none.
            index: as `index` gave it.
        """
        self._staged, self._written = {}, {}
        self._cache.clear()
        self._cached = 0
        self._current = {
            (namespace, int(client)): Version(*version)
            for namespace, clients in index.items()
            for client, version in clients.items()
        }
        for file in sorted(self.folder.glob("*/*/*.safetensors")):
            namespace, client, written = file.parent.parent.name, file.parent.name, int(file.stem)
            if written > round:
                file.unlink()
            else:
                self._written.setdefault((namespace, int(client)), []).append(written)
        for folder in self.folder.glob("*/*"):
            remove_drafts(folder)

    def clients(self, namespace: str = METHOD) -> frozenset[int]:
        """The clients that keep something."""
        return frozenset(client for name, client in self._current if name == namespace)

    def record(self) -> dict[str, float | int | str]:
        """The number of clients with a stored state, its bytes and their mean over these clients;
        empty if there is none. The state is not sent, so it does not count as traffic."""
        if not self._current:
            return {}
        total = sum(v.bytes for v in self._current.values())
        clients = len({client for _, client in self._current})
        return {
            "client_state/bytes": total,
            "client_state/bytes_mean": total / clients,
            "client_state/clients": clients,
        }

    # --- files --------------------------------------------------------------------------------

    def _file(self, key: tuple[str, int], round: int) -> Path:
        namespace, client = key
        return self.folder / namespace / f"{client:06d}" / f"{round:05d}.safetensors"

    def _load(self, key: tuple[str, int]) -> dict[str, Tensor]:
        version = self._current[key]
        file = self._file(key, version.round)
        lost = (
            f"what client {key[1]} kept in round {version.round} cannot be recovered: restore the "
            "file, or begin again in a new run folder"
        )
        try:
            blob = file.read_bytes()
        except OSError as error:
            raise CheckpointError(f"cannot read {file}: {error.strerror}; {lost}") from error
        found = hashlib.sha256(blob).hexdigest()
        if found != version.sha256:
            raise CheckpointError(
                f"{file} ({len(blob)} bytes) is damaged: its SHA-256 is {found[:12]}…, the "
                f"checkpoint says {version.sha256[:12]}…; {lost}"
            )
        try:
            return safetensors.torch.load(blob)
        except SafetensorError as error:
            raise CheckpointError(f"{file} is no safetensors file: {error}; {lost}") from error

    def _remember(self, key: tuple[str, int], kept: Kept) -> Kept:
        self._cache[key] = kept
        self._cached += _size(kept)
        while self._cached > self._most and self._cache:
            self._forget(next(iter(self._cache)))
        return kept

    def _forget(self, key: tuple[str, int]) -> None:
        if key in self._cache:
            self._cached -= _size(self._cache.pop(key))


def _size(kept: Kept) -> int:
    return sum(t.numel() * t.element_size() for t in kept.values())


def _standalone(t: Tensor) -> Tensor:
    """A CPU copy whose storage is its own: safetensors refuses tensors that share memory."""
    return t.detach().to("cpu", copy=True).contiguous()
