"""Devices: drawn from the seed, one stream a quantity, or read from a user's table."""

from dataclasses import replace

import numpy as np
import pytest

from fedlora.core.errors import ConfigError
from fedlora.devices.table import Devices


def test_devices_are_a_function_of_the_seed_and_of_each_quantity_alone():
    rule = Devices()
    one, same = rule.fleet(50, 3), rule.fleet(50, 3)
    assert one == same
    assert one.devices != rule.fleet(50, 4).devices
    assert one.devices[:20] == rule.fleet(20, 3).devices, "more clients change no other"
    other = replace(rule, up={"median": 1.0, "sigma": 0.1}).fleet(50, 3)
    assert [d.flops for d in other.devices] == [d.flops for d in one.devices]
    assert [d.down for d in other.devices] == [d.down for d in one.devices]


def test_speeds_are_lognormal_and_memory_is_of_its_classes():
    devices = Devices().fleet(4000, 0).devices
    logs = np.log([d.flops for d in devices])
    assert logs.mean() == pytest.approx(np.log(2e10), abs=0.06)
    assert logs.std() == pytest.approx(1.0, abs=0.05)
    held = np.array([d.memory for d in devices])
    for size, fraction in ((2e9, 0.2), (4e9, 0.4), (8e9, 0.4)):
        assert (held == size).mean() == pytest.approx(fraction, abs=0.03)


def test_a_table_is_read_by_client(tmp_path):
    file = tmp_path / "devices.csv"
    file.write_text("id,flops,memory,up,down,watts\n1,2e9,4e9,5,6,7\n0,1e9,3e9,2,3,4\n")
    rule = Devices(table=str(file))
    zero, one = rule.fleet(2, 0).devices
    assert (zero.flops, zero.up, zero.down, zero.watts) == (1e9, 2, 3, 4)
    assert (one.memory, one.latency) == (4e9, 0.0)
    before = rule.fingerprint()
    file.write_text(file.read_text().replace("1e9", "9e9"))
    assert rule.fingerprint() != before != ""
    assert Devices().fingerprint() == ""


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("id,flops,memory,up\n", "down is missing"),
        ("id,flops,memory,up,down,colour\n", "'colour' is none of them"),
        ("id,flops,memory,up,down\n0,1,1,1,0\n", "line 2: down=0.0 must be > 0"),
        ("id,flops,memory,up,down\n0,fast,1,1,1\n", "line 2"),
        ("id,flops,memory,up,down\n0,1,1,1,1\n0,1,1,1,1\n", "client 0 has a row already"),
        ("id,flops,memory,up,down\n0,1,1,1,1\n", "no row for client 1"),
    ],
)
def test_a_wrong_table_is_refused_in_one_sentence(tmp_path, text, why):
    file = tmp_path / "devices.csv"
    file.write_text(text)
    with pytest.raises(ConfigError, match=why):
        Devices(table=str(file)).fleet(2, 0)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"flops": {"median": 1.0}}, "must have the numbers median and sigma"),
        ({"up": {"median": -1.0, "sigma": 1.0}}, "devices.up.median=-1.0 must be > 0"),
        ({"memory": ({"bytes": 1e9, "fraction": 0.5},)}, "fractions sum to 0.5, not 1"),
        ({"available": 0.0}, "devices.available=0.0 must lie in"),
        ({"trace": "t.jsonl", "available": 0.5}, "devices.available=0.5 has no"),
    ],
)
def test_impossible_settings_are_refused(wrong, why):
    with pytest.raises(ValueError, match=why):
        Devices(**wrong)


def test_the_fleet_is_stated_in_one_line():
    text = Devices(available=0.25).fleet(100, 0).text
    assert text.startswith("100 devices: ")
    assert "GFLOP/s" in text
    assert "each available for 25% of every 86,400 s" in text
