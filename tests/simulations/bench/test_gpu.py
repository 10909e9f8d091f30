"""The check for a GPU, on the CPU."""

from dataclasses import replace

import pytest
import torch

from simulations.bench import gpu
from simulations.bench.engine.cases import SHORT, Case, Draw
from simulations.bench.machine import write

CASE = Case("small", "llama32x2", 3, replace(SHORT, steps=1), Draw(4, 20), Draw(2, 2))


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_it_says_so_in_a_sentence(capsys):
    assert gpu.main([]) == 1
    said = capsys.readouterr()
    assert said.err == "gpu-check needs a GPU, and PyTorch sees none on this machine\n"
    assert not said.out


def test_every_entry_is_measured_and_agrees(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("simulations.bench.peak.SIZES", (64,))
    found = gpu.measured([CASE], "cpu", seconds=600.0, repeats=1)
    assert list(found) == ["small float32", "small bfloat16"]
    record = {"tests": {"exit_code": 0, "summary": ""}, "cases": found}
    assert gpu.wrong(record) == []
    write(tmp_path / "gpu.json", record)
    said = capsys.readouterr().out
    assert all(entry.label in said for entry in gpu.ENTRIES)


def test_what_is_wrong_is_told():
    entries = {"ragged 1x1": {"error": "trains something else"}, "sequential 1x1": {"error": ""}}
    record = {
        "tests": {"exit_code": 1, "summary": "1 failed"},
        "cases": {"wide": {"entries": entries}},
    }
    assert gpu.wrong(record) == ["tests: 1 failed", "wide, ragged 1x1: trains something else"]


def test_cases_that_do_not_fit_into_the_time_are_left_out(capsys):
    assert gpu.measured([CASE], "cpu", seconds=1.0) == {}
    assert "the time is over" in capsys.readouterr().out


def test_tests_that_take_too_long_are_stopped():
    assert gpu.run_tests(["--version"], seconds=0.01)["exit_code"] == -1
    assert gpu.run_tests(["--version"], seconds=60.0)["exit_code"] == 0
