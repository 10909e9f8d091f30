"""What secure aggregation cannot be combined with, refused before anything is loaded."""

from typing import Protocol

from fedlora.attack.base import Attack
from fedlora.models.head import LOCAL
from fedlora.models.spec import ModelSpec
from fedlora.robust.rule import Rule
from fedlora.secagg.config import NONE, SecAgg
from fedlora.server.composes import NOISE
from fedlora.server.method import Method
from fedlora.server.norm_bound import OFF
from fedlora.server.protection import PrivacySpec
from fedlora.server.schedule import Rounds
from fedlora.wire.codec import ROUNDING
from fedlora.wire.tensors import Compression
from simulations.app.refusals import refuse
from simulations.app.silo_checks import keeping


class Asked(Protocol):
    """The groups that are looked at (`simulations.app.parts.Parts`)."""

    @property
    def secagg(self) -> SecAgg: ...
    @property
    def strategy(self) -> Method: ...
    @property
    def model(self) -> ModelSpec: ...
    @property
    def federation(self) -> Rounds: ...
    @property
    def robust(self) -> Rule: ...
    @property
    def attack(self) -> Attack: ...
    @property
    def compression(self) -> Compression: ...
    @property
    def privacy(self) -> PrivacySpec: ...


def check_secagg(parts: Asked) -> None:
    """Refuse what needs the server to see an update.

    Raises:
        ConfigError: one sentence that says why and what to use instead.
    """
    if parts.secagg.on:
        refuse([*_refusals(parts), *_private(parts)], f"secagg={parts.secagg.kind}")


def _refusals(parts: Asked) -> list[tuple[bool, str]]:
    """Conditions with the sentences that refuse them."""
    strategy, rounds, model = parts.strategy, parts.federation, parts.model
    state = keeping(strategy)
    return [
        (
            type(strategy).run_round is not Method.run_round,
            f"{strategy.label} sends activations at every step, of which there is no sum; use a "
            "strategy whose clients train alone, such as fedit",
        ),
        (
            state is not None or model.head == LOCAL,
            f"{(state or strategy).label} keeps a state of each client at the server, made of its "
            "update; use a strategy whose clients keep nothing, such as fedit, and model.head "
            "frozen or averaged",
        ),
        (bool(strategy.needs_updates), strategy.needs_updates),
        (
            rounds.norm_bound != OFF,
            f"federation.norm_bound={rounds.norm_bound} compares updates, and the server sees "
            "their sum alone; use federation.norm_bound=off, with postprocess=bound at the clients",
        ),
        (
            rounds.max_update_norm > 0 or rounds.max_factor_norm > 0 or rounds.rebalance,
            f"federation.max_update_norm={rounds.max_update_norm:g}, federation.max_factor_norm="
            f"{rounds.max_factor_norm:g} and federation.rebalance={rounds.rebalance} look at "
            "updates, and the server sees their sum alone; leave them at 0, 0 and false, with "
            "postprocess=bound, which clients apply themselves",
        ),
        (
            parts.robust.acts,
            f"robust={type(parts.robust).__name__.lower()} compares clients' changes, and the "
            "server sees their sum alone; use robust=none, with postprocess=bound at the clients",
        ),
        (
            parts.compression.acts,
            "compression: sums have a fixed-point format of their own; use compression=none, with "
            "secagg.bits=16 for fewer bytes",
        ),
        (
            type(parts.attack).together is not Attack.together,
            f"attack={type(parts.attack).__name__.lower()}: its attackers see all updates, which "
            "nobody does here; use an attack of single clients, such as attack=sign",
        ),
        (
            rounds.wire in ROUNDING,
            f"federation.wire={rounds.wire} rounds updates, and sums have a fixed-point format of "
            "their own; use federation.wire=float32 with secagg.bits and secagg.levels",
        ),
    ]


def _private(parts: Asked) -> list[tuple[bool, str]]:
    """The same, where noise is added to the sum."""
    secagg, privacy = parts.secagg, parts.privacy
    noisy = NOISE in privacy.traits
    return [
        (
            noisy and secagg.sketch != NONE,
            f"secagg.sketch={secagg.sketch} with privacy={privacy.words}: one client can turn what "
            "sketches give back by more than the clip of its change; use secagg.sketch=none",
        ),
        (
            noisy and secagg.degree > 0,
            f"secagg.degree={secagg.degree} with privacy={privacy.words}: a client counts only if "
            "enough of its neighbours stay, so that one client decides about others; use "
            "secagg.degree=0",
        ),
    ]
