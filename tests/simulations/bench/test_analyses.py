"""The cost of analyses is measured for every method and every analysis."""

import pytest

from fedlora.models.modules import ModelInfo
from fedlora.models.spec import Tiny
from simulations.bench import analyses
from simulations.bench.analyses import METHODS, OF, cohort, costs, population


@pytest.fixture(scope="module")
def info() -> ModelInfo:
    return Tiny().resolved().describe()


@pytest.mark.parametrize("name", METHODS)
def test_every_analysis_has_a_time(name, info, monkeypatch):
    monkeypatch.setattr(analyses, "CLIENTS", 4)
    setting = population(info.modules[:2], info.parameters)
    assert len({c.tier for c in setting.clients}) == 4
    found = costs(METHODS[name], setting)
    assert list(found) == ["aggregate", *OF]
    assert all(spent >= 0 for spent in found.values())


def test_what_is_measured_has_something_to_analyse(info, monkeypatch):
    monkeypatch.setattr(analyses, "CLIENTS", 4)
    setting = population(info.modules[:2], info.parameters)
    for rule in METHODS.values():
        state = rule.init_state(setting)
        starts, updates = cohort(rule, state, setting, 1)
        after = rule.aggregate(state, updates)
        for of in (OF["spectrum=all"], OF["lost"], OF["drift"]):
            assert of.record(rule, after, setting, 1, updates, starts)
