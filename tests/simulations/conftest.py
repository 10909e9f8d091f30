"""Whole runs in one process, on the embedded model and the default data."""

import functools
import itertools
import json
import os
import shutil
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import pytest

from fedlora.core.payload import Payload
from fedlora.models.spec import ModelSpec
from fedlora.run.tracking import read_jsonl
from simulations.app import export
from simulations.app.client_app import app
from simulations.app.compose import load
from simulations.app.federate import run
from simulations.app.grid import InProcessGrid

TEXT = ["data.clients=400", "data.max_length=64"]
"""The default data, whose examples are cut short: most of a run's time is training."""
SMALL = [
    "population.clients=24",
    "population.per_round=6",
    "client.steps=2",
    "client.batch_size=2",
    "ranks=uniform",
    "ranks.alpha=12",
    "evaluate=none",
    "runtime=in_process",
    "runtime.nodes=3",
    "report=false",
    "rounds=2",
]


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory):
    """One token cache for the session, never the user's."""
    if "FEDLORA_CACHE" not in os.environ:
        os.environ["FEDLORA_CACHE"] = str(tmp_path_factory.mktemp("cache"))


class Run:
    """A finished run and what it said."""

    def __init__(self, folder: Path, said: list[str]) -> None:
        self.folder, self.said = folder, "\n".join(said)
        self.rounds = [r for r in self.records if r["kind"] == "round"]
        self.hash = self.rounds[-1]["state/hash"] if self.rounds else ""

    @property
    def records(self):
        return read_jsonl(self.folder / "metrics.jsonl")

    @property
    def clients(self):
        return read_jsonl(self.folder / "clients.jsonl")

    @property
    def status(self):
        return json.loads((self.folder / "status.json").read_text())


def small_run(output: Path, *overrides: str, read_back: bool = False) -> Run:
    """Do a small run with overrides. What it exports is read back by PEFT where a test looks at
    that."""
    said: list[str] = []
    text = [] if any(w.startswith("data=") for w in overrides) else TEXT
    cfg = load([*SMALL, *text, f"output_dir={output}", *overrides])
    reading = nullcontext() if read_back else mock.patch.object(export, "read_back", _unread)
    with reading:
        folder = run(cfg, lambda p: InProcessGrid(app, p.runtime.nodes), said.append)
    return Run(folder, said)


def _unread(payload: Payload, folder: Path, spec: ModelSpec) -> None:
    """As for a folder that no other program reads."""


@pytest.fixture
def federate(tmp_path):
    """Do a small run with overrides."""

    def do(*overrides: str, output: str = "out", read_back: bool = False) -> Run:
        return small_run(tmp_path / output, *overrides, read_back=read_back)

    return do


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """Small runs that are done once in a session: to be read only."""
    root, number = tmp_path_factory.mktemp("finished"), itertools.count()
    return functools.cache(
        lambda *overrides, **how: small_run(root / str(next(number)), *overrides, **how)
    )


@pytest.fixture
def finished(once, tmp_path):
    """A small run that several tests look at, in a copy of its folder that may be changed and
    continued (``federate("resume=auto", ...)`` finds it). Nothing is to be patched before it."""

    def do(*overrides: str, output: str = "out", **how: bool) -> Run:
        done = once(*overrides, **how)
        folder = shutil.copytree(done.folder, tmp_path / output / done.folder.name)
        return Run(folder, done.said.splitlines())

    return do
