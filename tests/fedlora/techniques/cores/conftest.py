"""Both ways to compute the products with clients' factors."""

from tests.fedlora.engine.fused.conftest import products

__all__ = ["products"]
