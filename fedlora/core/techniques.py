"""The kinds of local training, and why an average made for one kind means nothing for another."""

from collections.abc import Mapping
from dataclasses import dataclass

from fedlora.core.types import LocalPlan

LORA, SPP, SWITCHLORA = "lora", "spp", "switchlora"


@dataclass(frozen=True)
class Technique:
    """One kind of local training, in words for those who combined it with something else."""

    key: str
    """What makes a client's plan one of this kind."""
    does: str
    """What its clients do."""
    averaged: str
    """What a strategy made for it averages."""
    client: str
    """The config group that brings it."""
    strategy: str
    """A strategy made for it."""
    keeps_zeros: bool = False
    """Whether it needs a pruned base, whose zeros its merged update leaves where they are."""


TECHNIQUES: Mapping[str, Technique] = {
    LORA: Technique(
        "client.technique=lora",
        "trains LoRA's A and B without exchanges (client.switch)",
        "LoRA's A and B, over a base that all clients hold alike",
        "client=adamw",
        "strategy=flexlora",
    ),
    SPP: Technique(
        "client.technique=spp",
        "scales the weights of a pruned model by alpha and beta",
        "SPP's alpha and beta",
        "client=spp",
        "strategy=spp",
        keeps_zeros=True,
    ),
    SWITCHLORA: Technique(
        "client.switch",
        "lets clients exchange vectors by themselves, so that each one's frozen weights move their "
        "own way",
        "exchanged vectors, over a base that moves for all clients alike",
        "client=switchlora",
        "strategy=switchlora",
    ),
}


def technique(plan: LocalPlan) -> str:
    """Which kind a client's plan is."""
    return SWITCHLORA if plan.technique == LORA and plan.switch is not None else plan.technique


def require(plan: LocalPlan, needed: str, strategy: str) -> None:
    """Refuse a plan of another kind than a strategy is made for.

    Raises:
        ValueError: one sentence that says why and what to use instead.
    """
    found = technique(plan)
    if found != needed:
        mine, other = TECHNIQUES[found], TECHNIQUES[needed]
        raise ValueError(
            f"{mine.key} {mine.does}, and {strategy} averages {other.averaged}: use "
            f"{mine.strategy}, or {other.client}"
        )
    if plan.switch is not None and found != SWITCHLORA:
        raise ValueError(
            f"client.switch with client.technique={found}: only LoRA's vectors are exchanged; use "
            "client.switch=null, or client=switchlora with strategy=switchlora"
        )
