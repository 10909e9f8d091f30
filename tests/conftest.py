"""What holds for every test: laws are checked on the same examples each time, on one thread."""

from copy import deepcopy

import pytest
import torch
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
def _texts_are_parsed_once():
    """Hydra parses all files of a configuration whenever it composes one: a text that has been
    parsed is copied."""
    load, parsed = OmegaConf.load, {}

    def load_once(file):
        if not hasattr(file, "read"):
            return load(file)
        text = file.read()
        if text not in parsed:
            file.seek(0)
            parsed[text] = load(file)
        return deepcopy(parsed[text])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OmegaConf, "load", load_once)
        yield


def pytest_addoption(parser: pytest.Parser) -> None:
    """The laws of strategies for a method outside the checkout (docs/own_method.md)."""
    parser.addoption("--config-dir", help="a folder with strategy/<name>.yaml of your own")
