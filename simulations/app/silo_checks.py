"""What cannot be trained over silos, refused before anything is loaded."""

from typing import Protocol

from fedlora.data.jsonl import Jsonl
from fedlora.data.source import Source
from fedlora.data.template import CHAT, TEMPLATES
from fedlora.engine.base import OFF, ON, STATES, EngineSpec
from fedlora.models.spec import ModelSpec
from fedlora.population.sampling import Population
from fedlora.server.method import Method
from simulations.app.refusals import refuse


class Asked(Protocol):
    """The groups that are looked at (`simulations.app.parts.Parts`)."""

    @property
    def strategy(self) -> Method: ...
    @property
    def data(self) -> Source: ...
    @property
    def model(self) -> ModelSpec: ...
    @property
    def engine(self) -> EngineSpec: ...
    @property
    def population(self) -> Population: ...


def check_silos(parts: Asked) -> None:
    """Refuse what needs the server to hold records, or a client's own state, of a silo.

    Raises:
        ConfigError: one sentence that says why and what to use instead.
    """
    refuse(_refusals(parts), "runtime=silos")


def _refusals(parts: Asked) -> list[tuple[bool, str]]:
    """Conditions with the sentences that refuse them."""
    data, strategy, model = parts.data, parts.strategy, parts.model
    state = keeping(strategy)
    return [
        (
            not isinstance(data, Jsonl),
            f"data={data.name} is one data set that a server divides over clients; use data=jsonl, "
            "which every silo reads from its own card's records",
        ),
        (
            data.template not in (*TEMPLATES, CHAT),
            f"data.template={data.template!r} is a file of the server's that silos do not have; "
            f"use one of {[*TEMPLATES, CHAT]}",
        ),
        (
            data.labelled or model.classifies,
            "silos number the labels of their own records, and no two need to agree; "
            "use model.task=causal_lm with instructions",
        ),
        (
            type(strategy).run_round is not Method.run_round,
            f"{strategy.label} sends activations at every step, and a silo answers one message a "
            "round; use a strategy whose clients train alone, such as flexlora",
        ),
        (
            state is not None,
            f"{(state or strategy).label} keeps a state of each client at the server, and a silo "
            "shares only what it sends; use a strategy whose clients keep nothing, such as "
            "flexlora",
        ),
        (
            getattr(parts.engine, "prefix", OFF) in (ON, STATES),
            "engine.prefix=on: states of frozen blocks are kept for a store of all clients; use "
            "engine.prefix=off",
        ),
        (
            bool(parts.population.clients),
            f"population.clients={parts.population.clients}: the connected silos are the clients; "
            "leave it at 0",
        ),
    ]


def keeping(method: Method) -> Method | None:
    """The method, or the one within it, whose clients keep a state at the server; None: neither."""
    nested = getattr(method, "aggregator", None)
    return next((m for m in (method, nested) if isinstance(m, Method) and keeps(m)), None)


def keeps(method: Method) -> bool:
    """Whether a method's clients keep a state between rounds."""
    return type(method).kept is not Method.kept
