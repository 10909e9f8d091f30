"""What a run consists of, as the server is given it; `fedlora.server.session` says what happens."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedlora.attack.base import NOBODY, Squad
from fedlora.core.payload import Payload
from fedlora.core.types import LocalPlan, Setting
from fedlora.data.store import TokenStore
from fedlora.population.sampling import Roster
from fedlora.robust.rule import NO_RULE, Rule
from fedlora.run.tracking import Tracker
from fedlora.secagg.config import SecAgg
from fedlora.server.analyses import Analyses
from fedlora.server.early_stop import Watch
from fedlora.server.method import Method
from fedlora.server.postprocess import Postprocessor
from fedlora.server.protection import UNPROTECTED, Protection
from fedlora.server.schedule import EvaluationSchedule, Rounds
from fedlora.server.virtual_time import VirtualTime
from fedlora.wire.tensors import NO_COMPRESSION, Compression

log = logging.getLogger(__name__)


@dataclass
class SessionParts:
    """The method, the population, the schedules, and what acts between them."""

    method: Method
    setting: Setting
    roster: Roster
    plan: LocalPlan
    schedule: EvaluationSchedule
    rounds: Rounds
    workers: int
    """Processes that train at once, as far as the server knows: how finely cohorts are split."""
    folder: Path
    """The run folder; checkpoints go to its ``checkpoints/``."""
    tracker: Tracker
    messages_per_worker: int = 4
    """Messages into which a worker's part of a round is split; the engine's preference."""
    config_hash: str = ""
    audit: Callable[[Payload], Mapping[str, float | int | str]] | None = None
    """Checks the global model after every round, for the round's record."""
    postprocess: Sequence[Postprocessor] = ()
    """Applied to accepted changes before they are averaged; empty: none."""
    privacy: Protection = UNPROTECTED
    """Who takes part, and what hides each client's change in the sum."""
    robust: Rule = NO_RULE
    """What takes the place of the method's mean."""
    compression: Compression = NO_COMPRESSION
    """The formats of changes on the wire."""
    squad: Squad = NOBODY
    """The clients that attack; what they do together is done here."""
    secagg: SecAgg = field(default_factory=SecAgg)
    """How sums are secure, or simulated to be."""
    analyses: Analyses = field(default_factory=lambda: Analyses(spectrum="none"))
    """What a round's record says of the global update and the clients' changes."""
    store: TokenStore | None = None
    """What clients hold: what they say of it is compared with it; None: it is not known."""
    watch: Watch | None = None
    """What ends the run early; None: nothing does."""
    at_home: bool = False
    """Whether clients are on machines of their own, and keep there what the wire needs of them."""
    virtual: VirtualTime | None = None
    """The clock of a run whose clients have devices; None: rounds take no virtual time."""
    emit: Callable[[str], None] = log.info
