"""What holds for every test: laws are checked on the same examples each time, on one thread."""

from collections import Counter
from copy import deepcopy
from functools import cache

import pytest
import torch
from hydra import version
from hydra._internal import defaults_list
from hypothesis import HealthCheck, settings
from omegaconf import OmegaConf

settings.register_profile(
    "laws",
    derandomize=True,
    deadline=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("laws")
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _configurations_are_composed_quickly():
    """Hydra repeats itself whenever it composes a configuration. A text that has been parsed is
    copied, a version that has been read is kept, and choices are gathered for interpolations only
    where a defaults list has some. What is composed is the same."""
    load, parsed = OmegaConf.load, {}
    choices = defaults_list._create_interpolation_map

    def load_once(file):
        if not hasattr(file, "read"):
            return load(file)
        text = file.read()
        if text not in parsed:
            file.seek(0)
            parsed[text] = load(file)
        return deepcopy(parsed[text])

    def choices_to_fill_in(overrides, defaults, self_added):
        named = any(not d.is_self() and d.is_interpolation() for d in defaults)
        return choices(overrides, defaults, self_added) if named else None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OmegaConf, "load", load_once)
        patch.setattr(version, "_get_version", cache(version._get_version))
        patch.setattr(defaults_list, "_create_interpolation_map", choices_to_fill_in)
        yield


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of two test processes, neither is to wait for the other's last file: files of few long tests
    (whole runs) come first, then all others by their number of tests."""
    if not hasattr(config, "workerinput"):
        return
    number = Counter(item.path for item in items)
    items.sort(key=lambda x: ("simulations" not in x.path.parts, -number[x.path], str(x.path)))


def pytest_addoption(parser: pytest.Parser) -> None:
    """The laws of strategies for a method outside the checkout (docs/own_method.md)."""
    parser.addoption("--config-dir", help="a folder with strategy/<name>.yaml of your own")
