"""The benchmark of asynchrony: its ways build, and are compared at equal virtual time."""

import pytest

from simulations.app.compose import load
from simulations.app.parts import build_parts
from simulations.bench.asynchrony import WAYS, compare, main, table, words_of
from tests.simulations.reporting.test_budgets import folder


@pytest.mark.parametrize("way", WAYS)
def test_every_way_builds(way, tmp_path):
    parts = build_parts(load(words_of(way, tmp_path, ())))
    assert parts.devices is not None
    assert (parts.buffered is not None) == (way == "buffered")


def test_ways_are_compared_at_equal_virtual_time(tmp_path):
    fast = {0: 4.0, 2: 1.5, 4: 1.2}
    folders = {"slow": folder(tmp_path / "slow"), "fast": folder(tmp_path / "fast", losses=fast)}
    record = compare(folders, [])
    assert record["budgets_s"] == [10.0, 20.0, 40.0]  # the faster one has spent 40 s
    assert record["ways"]["slow"]["quality"] == [4.0, 3.0, 2.0]
    assert record["ways"]["fast"]["quality"] == [4.0, 1.5, 1.2]
    assert "fast" in table(record)


def test_the_commands_can_be_listed(capsys):
    assert main(["--list", "seed=3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(WAYS)
    assert all(line.startswith("fedlora run ") and line.endswith("seed=3") for line in lines)
