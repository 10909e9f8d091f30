"""What holds for every test: laws are checked on the same examples each time, on one thread."""

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "laws",
    derandomize=True,
    deadline=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("laws")
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    """The laws of strategies for a method outside the checkout (docs/own_method.md)."""
    parser.addoption("--config-dir", help="a folder with strategy/<name>.yaml of your own")
