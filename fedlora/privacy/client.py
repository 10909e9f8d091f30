r"""Differential privacy of clients: central, of all global states together.

    S_t: client k takes part iff u_{t,k} < q                      Poisson; may be empty
    total = Σ_{k∈S_t} clip(x_k, C) + N(0, (z_Δ C)² I)             x_k: what the method says it adds
    state ← absorb(state, total, q N)                             a fixed denominator, weights 1

Two runs are neighbours if one client with all of its examples is added or removed, in all rounds.
McMahan et al., "Learning Differentially Private Recurrent Language Models", arXiv:1710.06963.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedlora.algebra.summand import Summands
from fedlora.core.checks import at_least, one_of
from fedlora.core.errors import RunError
from fedlora.core.files import write_file
from fedlora.core.reading import json_in
from fedlora.core.types import Client
from fedlora.population.sampling import Roster, cohort, outside, poisson
from fedlora.privacy.account import Releases, accountant, calibrated, required
from fedlora.privacy.adaptive import Adaptive, counted
from fedlora.privacy.clip import clipped
from fedlora.privacy.noise import Noise, noised, scalars, shapes_of
from fedlora.secagg.config import FEWEST, SecAgg
from fedlora.secagg.limit import Limit
from fedlora.server.composes import (
    COLLUSION,
    MEMORY,
    NOISE,
    SILOS,
    STALE,
    STATISTIC,
    VIRTUAL_TIME,
    Around,
)
from fedlora.server.method import Method
from fedlora.server.norm_bound import OFF
from fedlora.server.postprocess import Moment, Postprocessor
from fedlora.server.protection import SAVED, PlannedRun, PrivacySpec, Protection

POISSON, FIXED, GAUSSIAN, BANDED = "poisson", "fixed", "gaussian", "banded"
ABORTED = "privacy_aborted.json"
"""In the run folder: how many rounds ended because too few clients succeeded."""
NEGLIGIBLE = 1e-3
"""The probability, as a fraction of ``δ``, that any round fails for the size of its cohort."""
NOT_COVERED = (
    "Not covered: training losses, failures, cohorts, ranks, norms and bytes in the run folder "
    "(they are for the experimenter), evaluation on clients that train, statistics of inputs by "
    "which a base was pruned, that a round ended for too few answers, the choice of "
    "hyperparameters, arithmetic in floating point, and anybody who knows the seed, from "
    "which a simulation draws its noise."
)


@dataclass(frozen=True)
class StandsFor:
    """A larger run whose noise per client this run has."""

    cohort: int = 0
    """``M``, its expected clients per round; 0: there is none."""
    population: int = 0
    """``N'``, its clients that can train."""

    def __post_init__(self) -> None:
        at_least("privacy.stands_for.cohort", self.cohort, 0)
        if bool(self.cohort) != bool(self.population) or self.cohort > self.population:
            raise ValueError(
                f"privacy.stands_for.cohort={self.cohort} with privacy.stands_for.population="
                f"{self.population}: both must be 0, or 1 <= cohort <= population"
            )


@dataclass(frozen=True)
class ClientLevel(PrivacySpec):
    """Configuration of `privacy=client`."""

    epsilon: float = 8.0
    """Target after all rounds, from which ``z`` follows; 0: ``sigma`` is given."""
    sigma: float = 0.0
    """``z``, the standard deviation of the sum's noise in clips; 0: from ``epsilon``. Both 0: no
    noise, no guarantee."""
    delta: float = 1e-5
    """``δ``."""
    clip: float = 0.1
    """``C``, in the units of the method's summands; the first one, if it adapts."""
    adaptive: Adaptive | None = field(default_factory=Adaptive)
    """How the clip follows the clients' norms; None: it stays."""
    sampling: str = POISSON
    """``poisson``, or ``fixed``: cohorts of a fixed size, which cost more."""
    noise: str = GAUSSIAN
    """``gaussian``, or ``banded``: correlated over rounds (`fedlora.privacy.noise`)."""
    bands: int = 1
    """Bands of ``noise=banded``: a client can take part every so many rounds."""
    max_epsilon: float = 0.0
    """The run ends before the round that would exceed it; 0: ``epsilon``, if that is given."""
    stands_for: StandsFor = field(default_factory=StandsFor)
    """The noise is that of the mean of a larger run."""

    def __post_init__(self) -> None:
        for name in ("epsilon", "sigma", "max_epsilon"):
            at_least(f"privacy.{name}", getattr(self, name), 0)
        if not 0 < self.delta < 1:
            raise ValueError(f"privacy.delta={self.delta!r} must lie in (0, 1)")
        if not self.clip > 0:
            raise ValueError(f"privacy.clip={self.clip!r} must be > 0")
        if self.epsilon and self.sigma:
            raise ValueError(
                f"privacy.epsilon={self.epsilon} and privacy.sigma={self.sigma} both say how much "
                "noise there is: set one of them to 0"
            )
        if math.isinf(self.clip) and (self.epsilon or self.sigma or self.adaptive):
            raise ValueError(
                "privacy.clip=inf bounds nothing: give a number, or set privacy.epsilon=0, "
                "privacy.sigma=0 and privacy.adaptive=null"
            )
        one_of("privacy.sampling", self.sampling, (POISSON, FIXED))
        one_of("privacy.noise", self.noise, (GAUSSIAN, BANDED))
        at_least("privacy.bands", self.bands, 1)
        self._check_bands()

    def _check_bands(self) -> None:
        """Refuse bands where they mean nothing."""
        if self.noise == GAUSSIAN and self.bands > 1:
            raise ValueError(
                f"privacy.bands={self.bands} are of privacy.noise=banded; use it, or bands=1"
            )
        if self.noise == BANDED and self.sampling == FIXED:
            raise ValueError(
                "privacy.noise=banded deals clients into groups that are sampled by turns; use "
                "privacy.sampling=poisson"
            )
        if self.noise == BANDED and self.adaptive is not None:
            raise ValueError(
                "privacy.noise=banded cancels over rounds of one clip; use privacy.adaptive=null"
            )

    @property
    def words(self) -> str:
        return "client"

    @property
    def traits(self) -> frozenset[str]:
        return frozenset({NOISE})

    @property
    def refuses(self) -> Mapping[str, str]:
        return {
            STATISTIC: "one client moves such a statistic by more than the clip; the clip is a "
            "bound of norms itself, so use robust=none",
            VIRTUAL_TIME: "devices decide who takes part, which no account here knows; use "
            "devices=none",
            SILOS: "a few silos take part in every round, where this claim is worth nothing; use "
            "privacy=example",
            MEMORY: "what a client has left behind in earlier rounds was clipped in none of them; "
            "use compression.error_feedback=false and federation.error_feedback=false",
            COLLUSION: "attackers who look at the changes of others move the sum for every one of "
            "them, and the clip bounds one client; use an attack of each client alone, such as "
            "attack=sign",
            STALE: "changes that are weighted by age have no fixed bound, and their clients are "
            "not sampled anew each round; use synchronous rounds",
        }

    def check(self, around: Around) -> None:
        strategy, rounds = around.strategy, around.rounds
        if type(strategy).run_round is not Method.run_round:
            raise ValueError(
                f"{strategy.label} trains the server's part in every step, without noise; use a "
                "strategy whose clients train alone, such as fedit"
            )
        if who := unequal(strategy):
            raise ValueError(
                f"{who} weighs clients by their examples, and one client's share of the sum must "
                "not be larger than the clip; use strategy.weights=uniform"
            )
        if rounds.norm_bound != OFF:
            raise ValueError(
                f"federation.norm_bound={rounds.norm_bound} rejects clients by the norms of the "
                "others, so that one client changes who else counts; the clip bounds all, so use "
                "federation.norm_bound=off"
            )
        if rounds.min_clients > 1:
            raise ValueError(
                f"federation.min_clients={rounds.min_clients}: a sampled cohort may be smaller or "
                "empty; use federation.min_clients=1"
            )

    def begin(self, run: PlannedRun) -> "ClientPrivacy":
        return ClientPrivacy(self, run.roster, run.seed, run.rounds, run.folder)


def unequal(strategy: Method) -> str:
    """The strategy, or the aggregator in it, that does not weigh all clients alike; empty: none."""
    for label, method in (("strategy", strategy), ("its aggregator", _aggregator(strategy))):
        if method is None:
            continue
        given = getattr(method, "weights", None)
        own = type(method).reference_weights is not Method.reference_weights
        if (given is None and not own) or given not in (None, "uniform"):
            return f"{label} {method.label}"
    return ""


def _aggregator(strategy: Method) -> Method | None:
    found = getattr(strategy, "aggregator", None)
    return found if isinstance(found, Method) else None


@dataclass(frozen=True, eq=False)
class Release(Postprocessor):
    """One round's clip and noise. It keeps the norms that it saw."""

    round: int
    """Counted from 1."""
    clip: float
    """``C``."""
    std: float
    """Standard deviation of each entry of the sum's noise."""
    cohort: float
    """The fixed denominator: the expected number of clients."""
    noise: Noise
    norms: dict[int, float] = field(default_factory=dict)
    """Client id -> norm of its change before the clip."""

    def weights(self, weights: Sequence[float]) -> list[float]:
        """1 for each client."""
        return [1.0] * len(weights)

    def weight(self, weight: float) -> float:
        """The expected number of clients."""
        return self.cohort

    def each(self, summands: Summands, client: Client, now: Moment) -> Summands:
        found, self.norms[client.id] = clipped(summands, self.clip)
        return found

    def whole(self, total: Summands, weight: float, now: Moment) -> Summands:
        if self.std == 0:
            return total
        return noised(total, self.noise.of(self.round, shapes_of(total)), self.std)


class ClientPrivacy(Protection):
    """The client-level privacy of one run.

    Args:
        spec: as configured.
        roster: the population.
        seed: of the run.
        rounds: that are planned; ``z`` is made for them.
        folder: of the run; aborted rounds are noted there.

    Raises:
        ValueError: if the library is missing, or the specification cannot be met.
    """

    def __init__(
        self, spec: ClientLevel, roster: Roster, seed: int, rounds: int, folder: Path
    ) -> None:
        self.spec, self.roster, self.seed, self.rounds = spec, roster, seed, rounds
        if spec.epsilon or spec.sigma:
            required()
        self.clip = self.used = spec.clip
        """``C`` of the next round, and of the last one."""
        self.multiplier = spec.sigma
        """``z``."""
        if spec.epsilon:
            count = self._events(rounds)
            self.multiplier = calibrated(self.releases, count, spec.epsilon, spec.delta)
        self._noise = Noise(seed, spec.bands)
        self._file = folder / ABORTED
        self._left()  # refuses a count that needs the whole budget
        if self.multiplier and (first := self.epsilon(1)) > self.budget:
            raise ValueError(
                f"privacy.max_epsilon={self.budget:g} is below the epsilon of the first round, "
                f"{first:.4g} at privacy.sigma={self.multiplier:g}: use a larger one of the two"
            )

    # --- numbers of the mechanism ---------------------------------------------------------------

    @property
    def cohort_size(self) -> float:
        """``q N``: the expected number of clients of a round."""
        if self.spec.noise == BANDED:
            return self.actual_rate * len(self.roster.trainable) / self.spec.bands
        return float(self.roster.per_round)

    @property
    def actual_rate(self) -> float:
        """With which a client that may take part in a round does."""
        return min(1.0, self.spec.bands * self.roster.per_round / len(self.roster.trainable))

    @property
    def releases(self) -> Releases:
        """What is accounted: of the larger run, if this one stands for it."""
        spec, larger = self.spec, self.spec.stands_for
        n, m = len(self.roster.trainable), self.roster.per_round
        if larger.cohort:
            n, m = larger.population, larger.cohort
        if spec.sampling == FIXED:
            return Releases(self.multiplier, m / n, (n, m))
        return Releases(self.multiplier, min(1.0, spec.bands * m / n))

    @property
    def _scale(self) -> float:
        """The factor of a sum's noise: ``m / M``, 1 without a larger run."""
        larger = self.spec.stands_for.cohort
        return self.cohort_size / larger if larger else 1.0

    @property
    def _made_for(self) -> float:
        """Clients per round for which the noise is made."""
        return self.spec.stands_for.cohort or self.cohort_size

    def _left(self) -> float:
        """``z_Δ``."""
        adaptive = self.spec.adaptive
        if adaptive is None:
            return self.multiplier
        return adaptive.left_for_changes(self.multiplier, self._made_for)

    def _events(self, rounds: int) -> int:
        """Releases that one client can be in: under bands, every so many rounds."""
        return -(-rounds // self.spec.bands)

    def epsilon(self, rounds: int, aborted: int = 0) -> float:
        """``ε`` after this many rounds, infinite without noise. A round that was aborted counts for
        every client: under bands its repetition asks the same group."""
        return self.releases.epsilon(self._events(rounds) + aborted, self.spec.delta)

    @property
    def budget(self) -> float:
        """What ``ε`` never exceeds."""
        return self.spec.max_epsilon or self.spec.epsilon or math.inf

    # --- rounds ---------------------------------------------------------------------------------

    def cohort(self, roster: Roster, seed: int, round: int) -> list[Client]:
        if self.spec.sampling == FIXED:
            return cohort(roster, seed, round)
        return poisson(roster, seed, round, self.actual_rate, self.spec.bands)

    def exhausted(self, done: int) -> str:
        if math.isinf(self.budget):
            return ""
        found = self.epsilon(done + 1, self._aborted())
        if found <= self.budget:
            return ""
        return (
            f"the run ends after round {done}: another would make epsilon {found:.4g} at delta "
            f"{self.spec.delta:g}, above {self.budget:g}"
        )

    def release(self, round: int) -> Release:
        std = self._left() * self.clip * self._scale if self.multiplier else 0.0
        return Release(round, self.clip, std, self.cohort_size, self._noise)

    def limit(self) -> Limit:
        return Limit(self.clip, self.spec.adaptive is not None)

    def check_sums(self, secagg: SecAgg, zero: Callable[[], Summands]) -> None:
        if not math.isinf(self.clip):
            self.limit().radius(secagg.levels, scalars(shapes_of(zero())))
        if self.spec.sampling == FIXED:
            return
        if self.spec.stands_for.cohort or not self.multiplier:
            self._check_drawn(secagg)  # nothing is claimed of these clients
            return
        n, bands = len(self.roster.trainable), self.spec.bands
        chance = self.rounds * max(
            outside(max(0, group - 1), self.actual_rate, FEWEST, secagg.capacity)
            for group in (n // bands, -(-n // bands))
        )
        if chance > self.spec.delta * NEGLIGIBLE:
            raise ValueError(
                f"privacy=client with secagg={secagg.kind}: a sampled round may have fewer than "
                f"{FEWEST} clients or more than {secagg.capacity:,}, of which there is no secure "
                f"sum (probability {chance:.2g}, more than {NEGLIGIBLE:g} of privacy.delta); "
                f"change the {self.roster.per_round} clients expected in a round "
                "(population.per_round or population.fraction), or use secagg=none"
            )

    def _check_drawn(self, secagg: SecAgg) -> None:
        """Refuse a run that would end at a round of one client, or of more than can be summed: the
        same clients would be drawn whenever it is continued."""
        for round in range(1, self.rounds + 1):
            drawn = len(self.cohort(self.roster, self.seed, round))
            if drawn and not FEWEST <= drawn <= secagg.capacity:
                raise ValueError(
                    f"privacy=client with secagg={secagg.kind}: round {round} has a cohort of "
                    f"{drawn:,}, and there are secure sums of {FEWEST} to {secagg.capacity:,} "
                    f"clients; change the {self.roster.per_round} clients expected in a round "
                    f"(population.per_round or population.fraction) or seed={self.seed}, or use "
                    "secagg=none"
                )

    def released(self, release: Postprocessor, short: float | None = None) -> None:
        assert isinstance(release, Release)
        self.used, adaptive = release.clip, self.spec.adaptive
        if adaptive is not None:
            std = 0.0
            if self.multiplier:
                std = adaptive.noise(self.multiplier, self._made_for) * self._scale
            count = counted(release.clip, release.norms.values()) if short is None else short
            size, round = self.cohort_size, release.round
            self.clip = adaptive.moved(release.clip, count, size, std, self.seed, round)

    def aborted(self) -> None:
        write_file(self._file, json.dumps({"rounds": self._aborted() + 1}))

    def _aborted(self) -> int:
        if not self._file.is_file():
            return 0
        return int(json_in(self._file, "the number of aborted rounds,", RunError)["rounds"])

    def record(self, done: int) -> dict[str, float | int | str]:
        found: dict[str, float | int | str] = {"privacy/clip": self.used}
        if self.multiplier:
            found["privacy/epsilon"] = self.epsilon(done, self._aborted())
        return found

    def saved(self) -> dict[str, Any]:
        return {SAVED: {"clip": self.clip, "multiplier": self.multiplier}}

    def restore(self, saved: Mapping[str, Any]) -> None:
        own = saved[SAVED]
        self.clip, self.multiplier = float(own["clip"]), float(own["multiplier"])

    # --- what is said ---------------------------------------------------------------------------

    def statement(self, zero: Callable[[], Summands]) -> list[str]:
        if not self.multiplier:
            return [f"privacy=client without noise (clip {self.spec.clip:g}): no guarantee"]
        count, mean = scalars(shapes_of(zero())), self._left() * self._scale / self.cohort_size
        return [
            self._claim(),
            f"privacy: the noise of a round's mean has norm {mean * math.sqrt(count):.3g} clips "
            f"({count:,} scalars, {mean:.3g} clips each); the mean of clients that all agree has "
            "at most one",
            f"privacy: {NOT_COVERED}",
        ]

    def _claim(self) -> str:
        spec, larger = self.spec, self.spec.stands_for
        n, m = len(self.roster.trainable), self.cohort_size
        who = "" if spec.sampling == POISSON else " (replaced by another)"
        end = min(self.epsilon(self.rounds), self.budget)
        claim = (
            f"privacy=client: epsilon {end:.4g} at delta {spec.delta:g} "
            f"after {self.rounds} rounds, for one client with all its examples added or removed"
            f"{who}, against all who see every global state and the configuration; the server is "
            f"trusted. z={self.multiplier:.4g}, "
        )
        claim += f"{m:g} of {n} clients expected per round; {accountant(self.releases)}"
        if larger.cohort:
            claim += (
                f". As if {larger.cohort:,} of {larger.population:,} clients took part: the signal "
                f"is that of {m:g}, and no epsilon is claimed for the {n} clients of this run"
            )
        return claim
