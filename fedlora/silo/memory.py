"""What a silo keeps between the rounds of a run: in files of its own, which the server never sees.

    <cache>/silo_memory/<name>/<run>/<round>.memory

A file is the SHA-256 of what follows, and a safetensors file. The folder of a run that is over can
be removed; a silo that has lost it in a run says so, and is sent a whole start.
"""

import hashlib
import json
import logging
import re
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from fedlora.algebra.init import sample_a
from fedlora.core.cache import cache_root
from fedlora.core.errors import ConfigError, RunError
from fedlora.core.files import remove_drafts, write_file
from fedlora.silo.card import SiloCard
from fedlora.wire.change import Named
from fedlora.wire.recall import HELD_NOTHING, Forgotten, Held

log = logging.getLogger(__name__)

FOLDER = "silo_memory"
RUN = re.compile(r"[0-9a-f]{8,64}")
"""A run as the server names it: a part of a path here, so nothing else will do."""
_DIGEST = hashlib.sha256().digest_size
_START, _WITHHELD = "start/", "withheld/"


class SiloMemory:
    """A silo's memory of one run (`fedlora.wire.recall.Memory`).

    Args:
        folder: of the run; made when something is kept.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def held(self, round: int) -> Held:
        """What was kept in a round; nothing of round 0.

        Raises:
            Forgotten: if its file is gone or damaged.
        """
        if not round:
            return HELD_NOTHING
        file = self._file(round)
        try:
            blob = file.read_bytes()
            if hashlib.sha256(blob[_DIGEST:]).digest() != blob[:_DIGEST]:
                raise Forgotten(f"{file} is damaged: the next start will be whole")
            tensors = safetensors.torch.load(blob[_DIGEST:])
        except (OSError, SafetensorError) as error:
            raise Forgotten(f"{file} cannot be read: {error}; the next start will be whole") from (
                error
            )
        return Held(_within(tensors, _START), _within(tensors, _WITHHELD))

    def keep(self, round: int, held: Held, since: int) -> None:
        """Write what is kept of a round, whole or not at all.

        Args:
            round: in which it is kept.
            held: what.
            since: the round that the server builds on. It and the one before stay, for a server
                that goes on from its last checkpoint but one; no server builds on the others.

        Raises:
            RunError: if it cannot be written.
        """
        tensors = {_START + n: _own(t) for n, t in held.start.items()}
        tensors |= {_WITHHELD + n: _own(t) for n, t in held.withheld.items()}
        blob = safetensors.torch.save(tensors)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_drafts(self.folder)
            write_file(self._file(round), hashlib.sha256(blob).digest() + blob)
            needed = {round, since, *[r for r in self.rounds() if r < since][-1:]}
            for other in [r for r in self.rounds() if r not in needed]:
                self._file(other).unlink(missing_ok=True)
        except OSError as error:
            log.error("%s cannot be written: %s", self.folder, error)
            raise RunError("the silo cannot write what it keeps: its log says why") from None

    def drawn(self, seed: int, name: str, *shape: int) -> Tensor:
        """The initial factor ``A [r, d_in]`` of a module, from the run's seed.

        Args:
            seed: of the run.
            name: of the tensor, ``<path>/a``.
            shape: its.
        """
        return sample_a(seed, name.removesuffix("/a"), *shape)

    def rounds(self) -> list[int]:
        """The rounds of which something is kept, ascending."""
        return sorted(int(file.stem) for file in self.folder.glob("*.memory"))

    def _file(self, round: int) -> Path:
        return self.folder / f"{round:05d}.memory"


def memory_of(card: SiloCard, text: str) -> SiloMemory:
    """A silo's memory of the run of a message.

    Args:
        card: of the silo.
        text: an `fedlora.silo.site.Assignment` as JSON.

    Raises:
        ConfigError: if the message names no run.
    """
    run = json.loads(text).get("run")
    if not isinstance(run, str) or not RUN.fullmatch(run):
        raise ConfigError(f"silo {card.name}: the message names no run whose memory could be meant")
    return SiloMemory(cache_root() / FOLDER / card.name / run)


def _within(tensors: Named, prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _own(t: Tensor) -> Tensor:
    """A float32 copy on the CPU whose storage is its own: safetensors refuses shared memory."""
    return t.detach().float().cpu().clone().contiguous()
