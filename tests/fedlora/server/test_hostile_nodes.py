"""Hostile nodes in Flower's own loop: the run goes on without them, and they are named."""

from collections.abc import Callable

import numpy as np
import pytest
from flwr.app import Array, MetricRecord, RecordDict

from simulations.app.grid import InProcessGrid
from strategies.fedit import FedIT
from strategies.flexlora import FlexLoRA
from strategies.heterolora import HeteroLoRA
from tests.fedlora.server.test_plain_flower import CONFIG, adapter, app_of

BAD = 1
RANKS = [3, 3, 3, 3]


def arrays(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[RecordDict], None]:
    def apply(content: RecordDict) -> None:
        record = content.array_records["arrays"]
        for name in list(record):
            record[name] = Array(change(np.array(record[name].numpy())))

    return apply


def metrics(**more: object) -> Callable[[RecordDict], None]:
    def apply(content: RecordDict) -> None:
        found = dict(content.metric_records["metrics"])
        content["metrics"] = MetricRecord({**found, **more})  # type: ignore[dict-item]

    return apply


def one(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(a: np.ndarray) -> np.ndarray:
        a.flat[0] = value
        return a

    return change


NOTHING: Callable[[RecordDict], None] = lambda content: content.pop("arrays") and None
ATTACKS: dict[str, Callable[[RecordDict], None]] = {
    "NaN": arrays(one(float("nan"))),
    "inf": arrays(one(float("inf"))),
    "1e30 in one entry": arrays(one(1e30)),
    "1e15 in one entry": arrays(one(1e15)),
    "1e15 everywhere": arrays(lambda a: np.full_like(a, 1e15)),
    "x 1000": arrays(lambda a: 1000 * a),
    "int64": arrays(lambda a: a.astype(np.int64)),
    "float16": arrays(lambda a: a.astype(np.float16)),
    "float64": arrays(lambda a: a.astype(np.float64)),
    "complex": arrays(lambda a: a.astype(np.complex64)),
    "bool": arrays(lambda a: a.astype(np.bool_)),
    "three dimensions": arrays(lambda a: a[None]),
    "empty": arrays(lambda a: a[:0]),
    "two array records": lambda content: content.update(more=adapter(3, 1)),
    "no metrics": lambda content: content.pop("metrics") and None,
    "inf examples": metrics(**{"num-examples": float("inf")}),
    "NaN examples": metrics(**{"num-examples": float("nan")}),
    "1e300 examples": metrics(**{"num-examples": 1e300}),
    "-5 examples": metrics(**{"num-examples": -5}),
    "a list of examples": metrics(**{"num-examples": [1, 2]}),
    "NaN loss": metrics(loss=float("nan")),
    "1e308 loss": metrics(loss=1e308),
    "1,000 metrics": metrics(**{f"m{i}": 1.0 for i in range(1000)}),
}


def final(strategy: object, attack: Callable[[RecordDict], None]) -> dict[str, np.ndarray]:
    def answer(i: int, content: RecordDict) -> RecordDict:
        if i == BAD:
            attack(content)
        return content

    grid = InProcessGrid(app_of(RANKS, {}, answer), nodes=len(RANKS))
    result = strategy.start(grid, adapter(3, 0, b=False), num_rounds=2, train_config=CONFIG)  # type: ignore[attr-defined]
    return {name: array.numpy() for name, array in result.arrays.items()}


@pytest.mark.parametrize("strategy", [FedIT(), FlexLoRA(), HeteroLoRA(prune=False)], ids=str)
@pytest.mark.parametrize("attack", ATTACKS)
def test_a_hostile_node_is_left_out_and_named(attack, strategy, caplog):
    found = final(strategy, ATTACKS[attack])
    assert "round 1: node " in caplog.text
    without = final(strategy, NOTHING)
    for name, array in without.items():
        assert np.array_equal(found[name], array), name
