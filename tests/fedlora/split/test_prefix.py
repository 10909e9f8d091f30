"""Clients of a split begin behind frozen first blocks, with the results of whole stages."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedlora.core.types import LocalPlan
from fedlora.engine.prefix import PrefixCache, why_not_prefix
from fedlora.models import prefix as prefixes
from fedlora.models.language_model import LanguageModel
from fedlora.split.client import SplitClient
from fedlora.split.protocol import Cut
from fedlora.split.server import Rule
from tests.fedlora.engine.world import FakeStore, exact, examples
from tests.fedlora.models import networks
from tests.fedlora.models.networks import wrap
from tests.fedlora.split.world import BLOCKS, DOUBLE, Federation, Outcome, assert_near, start
from tests.planted import planted

FROZEN = 1
PLAN = LocalPlan(lr=0.02, steps=4, batch_size=3, dropout=0.1, max_grad_norm=1.0, weight_decay=0.1)
NETWORKS: dict[str, Callable[[int], torch.nn.Module]] = {
    "llama": networks.llama,
    "gpt2": networks.gpt2,
}
CASES = {
    "plain": {},
    "copies": {"rule": Rule("per_client")},
    "in turn": {"rule": Rule("sequential")},
    "U-shape": {"cuts": dict.fromkeys((0, 1), Cut(2, 1))},
    "all blocks": {"cuts": dict.fromkeys((0, 1), Cut(BLOCKS))},
    "averaged within": {"average_after": frozenset({2})},
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path))


def world(name: str) -> LanguageModel:
    return wrap(exact(NETWORKS[name](BLOCKS)), layers=tuple(range(FROZEN, BLOCKS)))


def played(name: str, states: bool, link: str = "local", **more: object) -> Outcome:
    """A round, with states or without."""
    model = world(name)
    held = {i: examples(7 + i, seed=i) for i in (0, 1)}
    if states:
        assert not why_not_prefix(model)
        cached = PrefixCache(model, FakeStore(held), "float32", 1e9)
        held = {i: cached.attach(i, "train", given) for i, given in held.items()}  # type: ignore[arg-type, misc]
        assert all(e.states is not None for given in held.values() for e in given)
    f = Federation(model, PLAN, start(model), (0, 1), held=held, terms=DOUBLE)
    f = replace(f, **more)  # type: ignore[arg-type]
    return f.play(f.messages() if link == "messages" else None)


def assert_alike(one: Outcome, other: Outcome) -> None:
    for i in one.found:
        assert_near(one.whole(i), other.whole(i), 1e-12)
        ours, theirs = one.client(i).metrics, other.client(i).metrics
        assert ours == pytest.approx(theirs, rel=1e-12)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("case", CASES)
def test_a_round_is_that_without_states(
    name: str, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = CASES[case]
    whole = played(name, states=False, **more)
    entered = []
    replaced = prefixes.Prefix.replaced
    monkeypatch.setattr(
        prefixes.Prefix, "replaced", lambda self, x: entered.append(1) or replaced(self, x)
    )
    assert_alike(played(name, states=True, **more), whole)
    assert len(entered) == 2 * PLAN.steps + 1  # and the self-check's


def test_a_forward_pass_that_is_repeated_begins_there_too() -> None:
    """Behind messages a graph is computed again."""
    assert_alike(
        played("llama", states=True, link="messages"),
        played("llama", states=False, link="messages"),
    )


HEADLESS = {"cuts": dict.fromkeys((0, 1), Cut(1, 1))}
"""Clients hold the first block, which is frozen, and the last one."""


def test_a_cut_below_the_first_adapter_runs_from_the_embeddings() -> None:
    assert_alike(played("gpt2", states=True, **HEADLESS), played("gpt2", states=False, **HEADLESS))


def test_states_in_front_of_a_cut_that_they_lie_behind_are_noticed() -> None:
    """The head would run its blocks as if they were left out, and hand on embeddings."""
    whole = played("gpt2", states=False, **HEADLESS)
    with planted(SplitClient._entered, "prefix.blocks not in self.head.span", "False"):
        broken = played("gpt2", states=True, **HEADLESS)
    with pytest.raises(AssertionError):
        assert_alike(broken, whole)
