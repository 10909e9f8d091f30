"""A split round against the unsplit engine, and against itself by other ways."""

import pytest

from fedlora.engine.loop import optimise
from fedlora.models.language_model import LanguageModel
from fedlora.split.batches import ROUND
from fedlora.split.protocol import Cut, Terms
from fedlora.split.server import Rule
from fedlora.split.wire import Wire
from fedlora.types import Adapter, LocalPlan
from tests.fedlora.engine.world import SEED
from tests.fedlora.split.world import MODELS, Federation, assert_same, start

PLAN = LocalPlan(lr=0.02, steps=5, batch_size=3, dropout=0.0, clip=0.0, weight_decay=0.1)
DROPOUT = LocalPlan(lr=0.02, steps=5, batch_size=3, dropout=0.1, clip=0.0, weight_decay=0.1)
DOUBLE = Terms(SEED, activations=Wire("fp64"), gradients=Wire("fp64"))


def unsplit(
    model: LanguageModel, whole: Adapter, federation: Federation
) -> tuple[Adapter, list[float]]:
    """The sequential engine's loop on the first client."""
    i, plan = federation.clients[0], federation.plan
    parameters = model.mount(whole, dropout=plan.dropout)
    held = federation.held[i]
    trace = optimise(model, parameters, held, plan, seed=SEED, round=ROUND, client=i)
    payload = model.payload()
    model.unmount()
    return payload, list(trace.losses)


@pytest.mark.parametrize("plan", [PLAN, DROPOUT], ids=["plain", "dropout"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("update", ["concat", "sequential", "per_client"])
@pytest.mark.parametrize("cut", [Cut(2), Cut(0), Cut(4), Cut(1, 1), Cut(2, 0), Cut(4, 0)], ids=str)
def test_one_client_split_is_the_client_unsplit(
    name: str, plan: LocalPlan, update: str, cut: Cut
) -> None:
    """Bit by bit, in float32: weights, losses, whatever the rule and wherever the cut."""
    model = MODELS[name](double=False)
    whole = start(model)
    f = Federation(model, plan, whole, cuts={0: cut}, rule=Rule(update))
    outcome = f.play()
    want, losses = unsplit(model, whole, f)
    assert_same(outcome.whole(), want)
    metrics = outcome.client().metrics
    assert metrics["loss_first"] == losses[0]
    assert metrics["loss_last"] == losses[-1]
