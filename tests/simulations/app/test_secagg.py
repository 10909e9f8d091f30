"""Whole runs with secure sums: real equals simulated, and what cannot be combined is refused."""

import pytest

from fedlora.core.errors import ConfigError
from simulations.app.compose import load, split_overrides
from simulations.app.parts import build_parts
from tests.simulations.app.silos import SiloGrid, federate, simulate, write_cards, write_records
from tests.simulations.conftest import small_run

FFA = ("strategy=ffa", "engine=sequential", "rounds=1")


def test_a_real_sum_with_clients_lost_is_the_simulated_one(tmp_path):
    """In training, by an engine with faults, and on purpose in the stage of shares."""
    words = (
        *("strategy=ffa", "engine=faulty", "engine.raise_fraction=0.1", "seed=1", "rounds=1"),
        *("population.per_round=12", "secagg.losses.shares=0.15"),
    )
    real, simulated = (
        small_run(tmp_path / kind, f"secagg={kind}", *words) for kind in ("real", "simulated")
    )
    assert real.hash == simulated.hash
    (record,) = real.rounds
    assert record["secagg/lost"] == simulated.rounds[0]["secagg/lost"] > 0
    kinds = {row.get("failure") for row in real.clients}
    assert kinds == {row.get("failure") for row in simulated.clients}
    assert "aggregate/exactness_gap" not in record
    assert record["secagg/vector_seconds"] > 0
    assert real.status["status"] == "completed"


def test_a_simulated_sum_is_near_the_average(tmp_path):
    plain, summed = (small_run(tmp_path / k, *FFA, f"secagg={k}") for k in ("none", "simulated"))
    near = pytest.approx(plain.rounds[0]["aggregate/update_norm"], rel=1e-2)
    assert summed.rounds[0]["aggregate/update_norm"] == near
    assert summed.hash != plain.hash


@pytest.mark.slow
def test_silos_add_up_as_their_simulation(tmp_path):
    data = write_records(tmp_path / "data")
    grid = SiloGrid([*write_cards(tmp_path, data).values()])
    done = federate(tmp_path / "silos", grid, *FFA, "secagg=real")
    same = simulate(tmp_path / "sim", data, *FFA, "secagg=simulated")
    assert [r["state/hash"] for r in done.rounds] == [r["state/hash"] for r in same.rounds]
    assert done.rounds[0]["secagg/clients"] == 3
    assert not any("payloads" in reply.content for reply in grid.replies)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("strategy=flexlora", "choose strategy.residual=carry"),
        ("strategy=heterolora", "choose strategy.average=change"),
        ("strategy=fedex", "choose strategy.hold=none"),
        ("strategy=fedsa", "FedSA keeps a state of each client"),
        ("strategy=local", "Local keeps a state of each client"),
        ("strategy=splitlora", "sends activations at every step"),
        ("strategy=slora strategy@strategy.aggregator=fedit", "keeps a state of each client"),
        ("strategy=fedit federation.norm_bound=cohort", "use federation.norm_bound=off"),
        ("strategy=fedit federation.max_update_norm=1", "with postprocess=bound"),
        ("strategy=fedit federation.wire=bfloat16", "use federation.wire=float32"),
        ("strategy=fedit federation.rebalance=true", "federation.rebalance=True"),
        ("strategy=fedit robust=median", "use robust=none"),
        ("strategy=fedit compression=int8", "use compression=none"),
        ("strategy=fedit attack=little", "use an attack of single clients"),
        ("strategy=fedit secagg.bits=16", "secagg.levels=22 must lie in 1..15"),
        ("strategy=fedit secagg.losses.keys=1.5", "secagg.losses.keys=1.5 must lie in"),
    ],
)
def test_what_needs_an_update_is_refused_in_one_sentence(overrides, message):
    words = split_overrides("", f"secagg=real {overrides}")
    with pytest.raises(ConfigError) as caught:
        build_parts(load(words))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_cohort_of_one_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="whose sum is its own update"):
        small_run(tmp_path, "strategy=fedit", "secagg=real", "population.per_round=1")
