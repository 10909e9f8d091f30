"""What holds for every test: laws are checked on the same examples each time, on one thread."""

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
