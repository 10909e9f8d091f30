"""Both ways to compute the products with clients' factors."""

import pytest


@pytest.fixture(params=["spread", "calls"])
def products(request, monkeypatch) -> str:
    """Whether rows are copied so that clients' products can be done in stacks."""
    low, high = (1, 10**9) if request.param == "spread" else (10**9, 0)
    monkeypatch.setattr("fedlora.engine.fused.batch.SPREAD_LANES", low)
    monkeypatch.setattr("fedlora.engine.fused.batch.SPREAD_SCALARS", high)
    return request.param
