"""The guard itself: two cheap cases give what is on record."""

import subprocess
import sys
from pathlib import Path

import pytest

CHEAP = ("pretrain-full", "ranks-normal")
ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("name", CHEAP)
def test_a_case_gives_what_is_on_record(name):
    command = [sys.executable, "-m", "tests.regression", "compare", "--only", name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "DIFFERS" not in done.stdout
