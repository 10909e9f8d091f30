r"""Differential privacy of examples: every client trains by DP-SGD, and its server is not trusted.

Two runs are neighbours if one example of one client is added or removed; observers see all that the
client sends, and a server that keeps to the protocol (it sends the clip and the noise that clients
use). A client of ``n`` examples whose rounds have ``S`` steps with batches of ``L`` on
average releases ``S`` sampled Gaussians of rate ``L / n`` in every round in which it takes part, so
each client has an ``ε`` of its own (`fedlora.core.example_privacy` has the mechanism).
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fedlora.algebra.summand import Summands
from fedlora.core.checks import at_least
from fedlora.core.errors import RunError
from fedlora.core.example_privacy import ExamplePrivacy
from fedlora.core.files import write_file
from fedlora.core.reading import json_in
from fedlora.core.technique import default_technique
from fedlora.core.types import LocalPlan
from fedlora.data.batches import num_steps
from fedlora.models.head import FROZEN
from fedlora.population.sampling import cohort
from fedlora.privacy.account import Releases, accountant, calibrated, required
from fedlora.server.composes import VIRTUAL_TIME, Around
from fedlora.server.method import Method
from fedlora.server.protection import SAVED, PlannedRun, PrivacySpec, Protection

BEGUN = "privacy_rounds.json"
"""In the run folder of real clients: how many rounds were begun, repeated ones among them."""
NOT_COVERED = (
    "Not covered: the number of a client's examples and steps, its losses, tokens and failures in "
    "what it reports, examples that are evaluated, statistics of inputs by which a base was "
    "pruned, a server that sends clients another clip or noise than it says, two clients that hold "
    "the same example, the choice of hyperparameters, arithmetic in floating point, and in a "
    "simulation anybody who knows the seed."
)
Point = tuple[float, int]
"""Sampling rate and number of releases."""


@dataclass(frozen=True)
class ExampleLevel(PrivacySpec):
    """Configuration of `privacy=example`."""

    epsilon: float = 8.0
    """Target of the client that is told most about, after all rounds; 0: ``sigma`` is given."""
    sigma: float = 0.0
    """Noise of a step's sum of gradients in clips; 0: from ``epsilon``. Both 0: none."""
    delta: float = 1e-5
    """``δ``."""
    clip: float = 1.0
    """Largest norm of one example's gradient."""
    max_epsilon: float = 0.0
    """The run ends before the round in which a client would exceed it; 0: ``epsilon``, if given."""

    def __post_init__(self) -> None:
        for name in ("epsilon", "sigma", "max_epsilon"):
            at_least(f"privacy.{name}", getattr(self, name), 0)
        if not 0 < self.delta < 1:
            raise ValueError(f"privacy.delta={self.delta!r} must lie in (0, 1)")
        at_least("privacy.clip", self.clip, 0, strict=True)
        if self.epsilon and self.sigma:
            raise ValueError(
                f"privacy.epsilon={self.epsilon} and privacy.sigma={self.sigma} both say how much "
                "noise there is: set one of them to 0"
            )

    @property
    def words(self) -> str:
        return "example"

    @property
    def on_summands(self) -> bool:
        """Clients add noise themselves, so any average of theirs is protected."""
        return False

    @property
    def refuses(self) -> Mapping[str, str]:
        return {
            VIRTUAL_TIME: "devices decide who takes part, which no account here knows; use "
            "devices=none",
        }

    def check(self, around: Around) -> None:
        strategy, setup = around.strategy, around.setup
        plan = setup.client
        for wrong, why in (
            (
                type(strategy).run_round is not Method.run_round,
                f"{strategy.label} sends activations of every example at every step; use a "
                "strategy whose clients train alone, such as fedit",
            ),
            (
                type(plan.technique) is not type(default_technique()),
                f"{plan.technique.key} {plan.technique.does}, in steps of its own; use a strategy "
                "of LoRA, such as fedit",
            ),
            (
                strategy.chooses,
                f"clients of {strategy.label} choose by their examples what they train; use "
                "another strategy, such as fedit",
            ),
            (
                setup.head != FROZEN,
                f"model.head={setup.head} trains a head, whose gradients by example are not "
                "computed; use model.head=frozen",
            ),
            (
                bool(plan.max_examples),
                f"client.max_examples={plan.max_examples} draws examples a second time, which no "
                "account counts; use client.max_examples=0 and fewer client.steps",
            ),
            (
                plan.group_by_length,
                "client.group_by_length=true makes batches by the lengths of all examples; use "
                "client.group_by_length=false",
            ),
        ):
            if wrong:
                raise ValueError(why)

    def begin(self, run: PlannedRun) -> "ExampleLevelRun":
        return ExampleLevelRun(self, run)


class ExampleLevelRun(Protection):
    """The example-level privacy of one run.

    Args:
        spec: as configured.
        run: its population, plan, seed and length.

    Raises:
        ValueError: if the library is missing, or the specification cannot be met.
    """

    def __init__(self, spec: ExampleLevel, run: PlannedRun) -> None:
        self.spec, self.roster, self.base, self.seed = spec, run.roster, run.plan, run.seed
        self.rounds, self._seeded, self._file = run.rounds, run.seeded, run.folder / BEGUN
        if spec.epsilon or spec.sigma:
            required()
        self.multiplier = spec.sigma
        """``σ``."""
        if spec.epsilon:
            target = spec.epsilon, spec.delta
            points = self._frontier(run.rounds)
            self.multiplier = max(calibrated(Releases(0.0, q), n, *target) for q, n in points)
        if self.multiplier and (first := self.epsilon(1)) > self.budget:
            raise ValueError(
                f"privacy.max_epsilon={self.budget:g} is below the epsilon of the first round, "
                f"{first:.4g} at privacy.sigma={self.multiplier:g}: use a larger one of the two"
            )

    @property
    def budget(self) -> float:
        """What no client's ``ε`` exceeds."""
        return self.spec.max_epsilon or self.spec.epsilon or math.inf

    def examples(self, client: int) -> int:
        """The examples that a client trains on."""
        return self.roster.shards[client].trains(self.base.loss)

    def _point(self, client: int, rounds: int) -> Point:
        n = self.examples(client)
        return min(1.0, self.base.batch_size / n), rounds * num_steps(n, self.base)

    def _frontier(self, rounds: int, repeats: int = 0) -> list[Point]:
        """What could be told most: no other client has both a larger rate and more releases. Every
        client counts in all repeated rounds."""
        took_part = self._took_part(rounds)
        return _maximal({self._point(client, n + repeats) for client, n in took_part.items()})

    def _took_part(self, rounds: int) -> Counter[int]:
        """Client id -> in how many of the first rounds it takes part."""
        drawn = (cohort(self.roster, self.seed, t) for t in range(1, rounds + 1))
        return Counter(c.id for clients in drawn for c in clients)

    def epsilon(self, rounds: int, repeats: int = 0) -> float:
        """The largest ``ε`` of a client after this many rounds, of which some were done again,
        infinite without noise."""
        found = (
            Releases(self.multiplier, q).epsilon(n, self.spec.delta)
            for q, n in self._frontier(rounds, repeats)
        )
        return max(found, default=0.0)

    # --- rounds ---------------------------------------------------------------------------------

    def plan(self, base: LocalPlan) -> LocalPlan:
        if not self._seeded:  # what was sent before a round is repeated was other noise
            write_file(self._file, json.dumps({"rounds": self._begun() + 1}))
        privacy = ExamplePrivacy(self.spec.clip, self.multiplier, self._seeded)
        return replace(base, privacy=privacy)

    def exhausted(self, done: int) -> str:
        if math.isinf(self.budget):
            return ""
        found = self.epsilon(done + 1, self._repeats(done))
        if found <= self.budget:
            return ""
        return (
            f"the run ends after round {done}: another would make epsilon {found:.4g} at delta "
            f"{self.spec.delta:g} for some client, above {self.budget:g}"
        )

    def record(self, done: int) -> dict[str, float | int | str]:
        if not self.multiplier:
            return {}
        return {"privacy/epsilon": self.epsilon(done, self._repeats(done))}

    def _begun(self) -> int:
        if not self._file.is_file():
            return 0
        return int(json_in(self._file, "the number of rounds that were begun,", RunError)["rounds"])

    def _repeats(self, done: int) -> int:
        """Rounds that were begun and never completed; in a simulation they repeat the same bits."""
        return max(0, self._begun() - done)

    def saved(self) -> dict[str, Any]:
        return {SAVED: {"multiplier": self.multiplier}}

    def restore(self, saved: Mapping[str, Any]) -> None:
        self.multiplier = float(saved[SAVED]["multiplier"])

    def statement(self, zero: Callable[[], Summands]) -> list[str]:
        spec = self.spec
        if not self.multiplier:
            return [f"privacy=example without noise (clip {spec.clip:g}): no guarantee"]
        end = min(self.epsilon(self.rounds), self.budget)
        sizes = sorted(self.examples(i) for i in self.roster.trainable)
        middle = sizes[len(sizes) // 2]
        noise = self.multiplier / self.base.batch_size
        return [
            f"privacy=example: epsilon at most {end:.4g} at delta {spec.delta:g} after "
            f"{self.rounds} rounds, for one example of one client added or removed, against all "
            f"who see what the client sends. sigma={self.multiplier:.4g}; clients hold "
            f"{sizes[0]} to {sizes[-1]} examples (median {middle}), batches of "
            f"{self.base.batch_size} expected; {accountant(Releases(self.multiplier, 0.5))}",
            *([] if self._seeded else [self._of_each()]),
            f"privacy: every entry of a step's gradient has noise of {noise:.3g} clips; the mean "
            "of examples that all agree has a norm of at most one",
            f"privacy: {NOT_COVERED}",
        ]

    def _of_each(self) -> str:
        """What is claimed of every real client, each with its own examples and rounds."""
        told = []
        for client, n in sorted(self._took_part(self.rounds).items()):
            q, releases = self._point(client, n)
            found = Releases(self.multiplier, q).epsilon(releases, self.spec.delta)
            name = self.roster.clients[client].tier or f"client {client}"
            held = self.examples(client)
            told.append(f"{name} {min(found, self.budget):.4g} ({held} examples, {n} rounds)")
        return f"privacy: epsilon of each, at most: {', '.join(told)}"


def _maximal(points: Iterable[Point]) -> list[Point]:
    """The points that no other one exceeds in both."""
    found: list[Point] = []
    for q, n in sorted(points, reverse=True):
        if not found or n > found[-1][1]:
            found.append((q, n))
    return found
