"""Laws of progress lines: few, plain, and right."""

import pytest

from fedlora.run.progress import (
    RoundProgress,
    clock,
    round_summary,
    size,
)


class Clock:
    def __init__(self):
        self.time = 100.0

    def __call__(self):
        return self.time


def progress(total=80, label="round 3/20  train", **kwargs):
    clock, lines = Clock(), []
    return clock, lines, RoundProgress(total, label, now=clock, emit=lines.append, **kwargs)


def test_a_line_says_where_the_round_stands():
    clock, lines, p = progress()
    clock.time += 4.0
    p.done(48, losses=[3.2141] * 47)
    assert lines == ["round 3/20  train  48/80 clients  loss 3.214  12.0 clients/s  ETA 0:03"]


@pytest.mark.parametrize("step", [0.01, 0.3, 1.9, 2.0, 5.0])
def test_there_is_at_most_one_line_per_interval_whatever_the_rhythm(step):
    clock, lines, p = progress(total=200, min_interval=2.0)
    for _ in range(200):
        clock.time += step
        p.done(1, losses=[1.0])
    assert len(lines) <= 200 * step / 2.0
    assert len(lines) >= 200 * step / (2.0 + step) - 1
    assert all("\r" not in line and "\n" not in line for line in lines)


def test_failed_clients_count_as_heard_from_and_not_in_the_loss():
    clock, lines, p = progress(total=4, label="round 3/20  evaluate seen")
    p.done(1, failed=1)
    clock.time += 2
    p.done(3, losses=(2.0, 3.0, 4.0))
    assert lines == [
        "round 3/20  evaluate seen  4/4 clients  1 failed  loss 3.000  2.0 clients/s  ETA 0:00"
    ]


def test_a_clock_that_stands_still_is_no_division_by_zero():
    _, lines, p = progress(min_interval=0.0)
    p.done(0)
    p.done(5)
    assert lines[-1] == "round 3/20  train  5/80 clients"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00"),
        (0.2, "0:01"),
        (59.5, "1:00"),
        (61, "1:01"),
        (3600, "1:00:00"),
        (7325, "2:02:05"),
    ],
)
def test_clock(seconds, text):
    assert clock(seconds) == text


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (3 * 2**20, "3.0 MiB"),
        (2**52, "4096.0 TiB"),
    ],
)
def test_size(num_bytes, text):
    assert size(num_bytes) == text


def test_the_summary_of_a_round_is_one_line():
    record = {
        "kind": "round", "round": 3, "rounds": 20, "clients": 80, "failed": 1, "rejected": 0,
        "train/loss": 3.2,
        "train/loss_first": 3.456, "train/loss_last": 3.1,
        "wire/up_bytes": 2**20, "wire/down_bytes": 2**21,
        "round/seconds": 6.61, "state/hash": "0123456789abcdef",
    }  # fmt: skip
    assert round_summary(record) == (
        "round 3/20  done  80 clients  1 failed  loss 3.200 (first step 3.456, last 3.100)  "
        "sent 1.0 MiB, received 2.0 MiB  6.6 s  state 0123456789ab"
    )


def test_the_summary_of_an_evaluation_names_its_group():
    record = {
        "kind": "evaluate", "round": 5, "group": "seen", "clients": 160, "loss_response": 2.5,
        "perplexity": 12.2, "rouge_l": 0.3, "rouge_l_low": 0.28, "rouge_l_high": 0.32,
    }  # fmt: skip
    assert round_summary(record) == (
        "round 5  evaluate seen  160 clients  response loss 2.500  perplexity 12.200  "
        "ROUGE-L 0.300 (95 %: 0.280 to 0.320)"
    )


def test_an_evaluation_at_the_clients_own_ranks_says_so():
    record = {"kind": "evaluate", "round": 5, "group": "seen", "adapter": "own", "failed": 2}
    assert round_summary(record) == "round 5  evaluate seen (cut to each client's ranks)  2 failed"


def test_what_is_missing_or_null_is_left_out():
    assert round_summary({"round": 1, "train/loss": None}) == "round 1  done"
