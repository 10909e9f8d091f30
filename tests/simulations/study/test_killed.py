"""A real study that is killed with all of its processes ends with the bytes of one that is not."""

import os
import signal
import subprocess
import sys
from contextlib import suppress

import psutil
import pyarrow.parquet as pq
import pytest
import yaml

from fedlora.core.package import ROOT
from simulations.study.runner import rounds_done
from tests.simulations.study.test_runner import TINY, wait_for

ROUNDS = 3
SMALL = TINY | {"base": TINY["base"].replace("rounds=1", f"rounds={ROUNDS}")}
SAME = ["plan.json", "commands.txt", "table.md", "table.csv", "table.tex"]


def started(outputs, file):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "FEDLORA_OUTPUT": str(outputs)}
    command = [sys.executable, "-m", "simulations.study", str(file), "--jobs", "2"]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True
    )


def kill_all(process):
    """SIGKILL for the study and everything that it has started, at once."""
    family = [psutil.Process(process.pid)]
    family += family[0].children(recursive=True)
    for one in family:
        with suppress(psutil.NoSuchProcess):
            one.send_signal(signal.SIGKILL)
    process.wait()
    psutil.wait_procs(family, 30)


def rounds_of(folder):
    return [rounds_done(f) for f in folder.glob("runs/*/") if f.is_dir()]


@pytest.mark.slow
def test_three_kills_change_no_byte_of_the_tables(tmp_path):
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(SMALL))
    assert started(tmp_path / "whole", file).wait() == 0
    folder, halves = tmp_path / "killed" / "study-tiny", 0
    for enough in (1, 4, 8):  # of twelve rounds
        process = started(tmp_path / "killed", file)
        wait_for(lambda enough=enough: sum(rounds_of(folder)) >= enough, 300)
        kill_all(process)
        halves += sum(0 < done < ROUNDS for done in rounds_of(folder))
        assert not (folder / "table.md").exists()
    assert halves, "no run was killed half-way"
    assert started(tmp_path / "killed", file).wait() == 0
    whole = tmp_path / "whole" / "study-tiny"
    assert {name: (folder / name).read_bytes() for name in SAME} == {
        name: (whole / name).read_bytes() for name in SAME
    }
    tables = [pq.read_table(f / "results.parquet").drop("seconds") for f in (folder, whole)]
    assert tables[0].equals(tables[1])
