"""Whole runs on devices: today's bits where they have no effect, and refusals in one sentence."""

import pytest

from fedlora.core.errors import ConfigError
from simulations.app.compose import load, split_overrides
from simulations.app.parts import build_parts

BUFFERED = (
    *("devices=lognormal", "federation.mode=buffered", "federation.buffer=3"),
    *("federation.concurrency=6", "strategy.residual=carry"),
)


def test_equal_devices_that_wait_for_everyone_change_no_bit(federate, finished):
    timed, plain = federate("devices=equal"), finished()
    assert timed.hash == plain.hash
    clocks = [r["time/virtual"] for r in timed.rounds]
    assert 0 < clocks[0] < clocks[1]
    assert "24 devices: 20 GFLOP/s" in timed.said
    assert {r["bytes_up"] for r in timed.clients} == {r["bytes_up"] for r in plain.clients}


@pytest.mark.slow
def test_a_buffered_run_that_is_cut_goes_on_bit_by_bit(federate):
    whole = federate(*BUFFERED, "rounds=4")
    federate(*BUFFERED, "rounds=2", output="cut")
    resumed = federate(*BUFFERED, "rounds=4", "resume=auto", output="cut")
    assert resumed.hash == whole.hash
    assert [r["time/virtual"] for r in resumed.rounds] == [r["time/virtual"] for r in whole.rounds]


@pytest.mark.slow
def test_small_devices_hold_small_ranks_and_the_smallest_never_train(federate):
    memory = "devices.memory=[{bytes: 9e6, fraction: 0.3}, {bytes: 14e6, fraction: 0.7}]"
    words = ("devices=lognormal", "ranks=by_device", "ranks.share=1.0", "ranks.top=16", memory)
    done = federate(*words)
    assert "ranks by device: " in done.said
    assert {row["tier"] for row in done.clients} <= {"r1", "r2", "r4", "r8", "r16"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("federation.over=1.5", "federation.over=1.5 needs devices"),
        ("federation.deadline=9", "federation.deadline=9.0 needs devices"),
        ("federation.mode=buffered", "federation.mode=buffered needs devices"),
        ("ranks=by_device", "ranks=by_device needs devices"),
        ("devices=equal strategy=splitlora", "exchange messages at every step"),
        ("devices=equal federation.mode=buffered", "choose strategy.residual=carry"),
        (
            "devices=equal federation.mode=buffered federation.concurrency=3 strategy=fedit",
            "federation.concurrency=3 must be at least federation.buffer=10",
        ),
        (
            "devices=equal federation.mode=buffered federation.over=2 strategy=fedit",
            "federation.over=2.0 has no effect",
        ),
        ("devices=equal secagg=simulated strategy=fedit", "devices with secagg"),
        ("devices=equal devices.available=2", "devices.available=2.0 must lie in"),
        (
            "devices=equal runtime=silos data=jsonl data.path=records.jsonl",
            "devices with runtime=silos: real clients take the time that they take",
        ),
        (
            "federation.mode=buffered runtime=silos data=jsonl data.path=records.jsonl",
            "runtime=silos has none",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_sentence(overrides, message):
    with pytest.raises(ConfigError) as caught:
        build_parts(load(split_overrides("", overrides)))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
