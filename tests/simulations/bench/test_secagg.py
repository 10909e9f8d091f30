"""The benchmark of secure aggregation measures what it says."""

from simulations.bench.costs.shapes import smollm2
from simulations.bench.secagg import KINDS, measure


def test_bytes_of_the_real_sum_are_those_of_the_simulated_one():
    shapes = smollm2(1)
    found = {kind: measure(kind, shapes, ["ffa"], 4, "none") for kind in KINDS}
    off, simulated, real = (found[kind] for kind in KINDS)
    assert real["up_bytes"] == simulated["up_bytes"] > off["up_bytes"], "small ranks send more"
    assert real["client_seconds"] > 0 == simulated["client_seconds"]
