"""A method and a data source outside the checkout, as docs/own_method.md shows them."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedlora.run.tracking import read_jsonl
from tests.simulations.app.launched import ROOT, SAME
from tests.strategies.laws import (
    DOUBLE,
    LAWS,
    examples_are_what_is_averaged,
    splitting_a_client_in_two_doubles_its_vote,
    why_not,
)

DOCUMENT = (ROOT / "docs" / "own_method.md").read_text(encoding="utf-8")
SOURCE = """
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from fedlora.data.records import Record
from fedlora.data.source import Source


@dataclass(frozen=True, kw_only=True)
class Counting(Source):
    name: ClassVar[str] = "counting"
    clients: int = 24

    def fingerprint(self) -> str:
        return f"counting {self.clients}"

    def records(self) -> Iterator[Record]:
        for client in range(self.clients):
            for n in range(12):
                split = "train" if n < 10 else "eval"
                yield Record(client, split, "counting", "Count on", f"{n} {n + 1}", f"{n + 2}")
"""


@pytest.fixture
def work(tmp_path) -> Path:
    """A folder with a method and a data source of one's own, far from the checkout."""
    (tmp_path / "conf" / "strategy").mkdir(parents=True)
    (tmp_path / "conf" / "data").mkdir()
    method = DOCUMENT.split("```python\n")[1].split("```")[0]
    (tmp_path / "mymethod.py").write_text(method)
    (tmp_path / "mysource.py").write_text(SOURCE)
    (tmp_path / "conf" / "strategy" / "mine.yaml").write_text("_target_: mymethod.EqualFedIT\n")
    (tmp_path / "conf" / "data" / "mine.yaml").write_text("_target_: mysource.Counting\n")
    return tmp_path


def test_the_smallest_method_obeys_the_contract(work, monkeypatch):
    """Its weights are its own, so laws of averages by examples are not about it; others are."""
    monkeypatch.syspath_prepend(str(work))
    method = importlib.import_module("mymethod").EqualFedIT()
    about = [law for law in LAWS if not why_not(law, method)]
    assert splitting_a_client_in_two_doubles_its_vote in about
    assert examples_are_what_is_averaged not in about
    for law in about:
        law(method, 1, DOUBLE)
    monkeypatch.delitem(sys.modules, "mymethod")


def run(work: Path, *words: str) -> tuple[int, str]:
    plain = [w for w in SAME if not w.startswith(("data.", "rounds"))]
    command = [sys.executable, "-m", "simulations.run", "--config-dir", "conf", *plain, *words]
    done = subprocess.run(
        [*command, "strategy=mine", "data=mine", "rounds=1", "name=it"],
        cwd=work,
        env=os.environ | {"PYTHONPATH": str(ROOT), "FEDLORA_OUTPUT": str(work / "out")},
        capture_output=True,
        text=True,
        check=False,
        timeout=420,
    )
    return done.returncode, done.stdout + done.stderr


def state(work: Path, name: str = "it") -> str:
    return str(read_jsonl(work / "out" / name / "metrics.jsonl")[-1]["state/hash"])


def test_it_runs_in_one_process(work):
    code, said = run(work, "runtime=in_process")
    assert code == 0, said
    assert said.rstrip().endswith("RUN COMPLETED")


@pytest.mark.slow
@pytest.mark.ray
def test_it_runs_on_ray_with_the_same_result(work):
    assert run(work, "runtime=in_process", "engine=sequential")[0] == 0
    code, said = run(work, "runtime.num_cpus=1", "engine=sequential")
    assert code == 0, said
    assert state(work) == state(work, "it-2")


@pytest.mark.slow
def test_the_command_of_the_document_tests_it_alone(work):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-n", "0", "-q", "-p", "no:cacheprovider"),
            *("tests/strategies/test_contract.py", "-k", "mine"),
            *("--config-dir", str(work / "conf")),
        ],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(work)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert " passed" in done.stdout, done.stdout
    assert "s=fedit" not in done.stdout
