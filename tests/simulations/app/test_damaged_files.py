"""The damaged-file table: each file of a run, each damage, and what comes of it. Files of the token
cache: tests/fedlora/data/test_store.py.

``repaired``: the next start goes on as if nothing had happened. ``older``: it goes on from an
earlier checkpoint, and says so. ``said``: it goes on, and names what is lost. ``refused``: one
sentence that names the file; nothing is changed. Never a traceback, never accepted in silence.
"""

import dataclasses
import json
import shutil

import pytest

from fedlora.core.errors import CheckpointError, ConfigError, DiskError, ModelError, RunError
from fedlora.core.files import claim
from fedlora.core.reading import disk_faults
from fedlora.run.tracking import read_jsonl
from simulations.app.client_app import app
from simulations.app.compose import load
from simulations.app.federate import new_session, open_session, resume, run
from simulations.app.grid import InProcessGrid
from simulations.app.inputs import prepare_inputs
from simulations.app.parts import build_parts
from simulations.reporting.run_folder import read_run
from simulations.tools.base_model import base_of
from tests.simulations.conftest import SMALL, TEXT

WORDS = [*SMALL, *TEXT, "strategy=fedit", "name=one", "resume=auto"]


def _flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def _folder(path):
    path.unlink()
    path.mkdir()


DAMAGE = {
    "cut": lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]),
    "empty": lambda p: p.write_bytes(b""),
    "flip": _flip,
    "noise": lambda p: p.write_bytes(bytes(range(256)) * 4),
    "list": lambda p: p.write_text("[1, true]"),
    "null": lambda p: p.write_text("null"),
    "gone": lambda p: p.unlink(),
    "folder": _folder,
}
STATE, META = "checkpoints/round_00002/state.safetensors", "checkpoints/round_00002/meta.json"
TABLE = {
    **{(STATE, damage): "older" for damage in DAMAGE},
    **{(META, damage): "older" for damage in DAMAGE},
    **{("metrics.jsonl", d): "said" for d in ("cut", "empty", "flip", "noise", "list", "gone")},
    ("metrics.jsonl", "null"): "said",
    ("metrics.jsonl", "folder"): "refused",
    **{("clients.jsonl", damage): "repaired" for damage in DAMAGE},
    ("clients.jsonl", "folder"): "refused",
    **{("status.json", damage): "repaired" for damage in DAMAGE},
    **{("config.yaml", damage): "repaired" for damage in DAMAGE},
    **{("model.json", damage): "repaired" for damage in DAMAGE},
    **{("population.json", damage): "repaired" for damage in DAMAGE},
    **{("run.owner.json", damage): "repaired" for damage in DAMAGE},
    ("run.lock", "noise"): "repaired",
    ("run.lock", "folder"): "refused",
    **{(n, "folder"): "refused" for n in ("config.yaml", "model.json", "population.json")},
    ("run.owner.json", "folder"): "refused",
    ("status.json", "folder"): "repaired",
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of two rounds, its parts and its inputs."""
    cfg = load([*WORDS, f"output_dir={tmp_path_factory.mktemp('out')}"])
    folder = run(cfg, lambda p: InProcessGrid(app, p.runtime.nodes), lambda _: None)
    parts = build_parts(cfg)
    return folder, parts, prepare_inputs(parts, lambda _: None)


def _go_on(whole, target):
    """What a resumed run does before its first message: the session, and what it says."""
    _, parts, inputs = whole
    said = []
    session = new_session(parts, inputs, target, said.append)
    with disk_faults(target), claim(target):
        resume(session, parts, inputs)
        open_session(session, parts, inputs).close()
    return session, "\n".join(said)


QUICK = ("flip", "list", "folder")
CASES = [
    pytest.param(*case, marks=[] if case[1] in QUICK else pytest.mark.slow, id="-".join(case))
    for case in TABLE
]


@pytest.mark.parametrize(("name", "damage"), CASES)
def test_damaged_files_of_a_run(whole, tmp_path, caplog, name, damage):
    target = shutil.copytree(whole[0], tmp_path / "one")
    if not (target / name).exists():  # run.lock and run.owner.json are there only during a run
        (target / name).write_text("{}")
    DAMAGE[damage](target / name)
    if TABLE[name, damage] == "refused":
        with pytest.raises((DiskError, RunError, CheckpointError)) as caught:
            _go_on(whole, target)
        assert name in str(caught.value) and "\n" not in str(caught.value)
        return
    session, said = _go_on(whole, target)
    older = TABLE[name, damage] == "older"
    assert session.done == (1 if older else 2)
    assert ("round_00002" in caplog.text) == older
    if TABLE[name, damage] == "said":
        assert "metrics.jsonl has no record of round" in said
    assert all(r["round"] <= session.done for r in read_jsonl(target / "metrics.jsonl"))
    assert read_run(target).status is not None


def test_without_a_checkpoint_that_can_be_read_nothing_begins_anew(whole, tmp_path):
    target = shutil.copytree(whole[0], tmp_path / "one")
    for meta in target.glob("checkpoints/*/meta.json"):
        meta.write_text(json.dumps(json.loads(meta.read_text()) | {"round": True}))
    with pytest.raises(CheckpointError, match=r"none of the 2 checkpoints .*lacks round"):
        _go_on(whole, target)


@pytest.mark.parametrize("damage", ["cut", "noise", "list", "null"])
def test_a_damaged_description_of_the_base_is_named(whole, tmp_path, damage):
    target = shutil.copytree(whole[0], tmp_path / "one")
    DAMAGE[damage](target / "model.json")
    with pytest.raises(ModelError, match=r"the run's base model .*model\.json"):
        base_of(target, whole[1].resolved["model"], print)


@pytest.mark.parametrize("damage", ["flip", "noise", "list", "gone"])
def test_a_damaged_configuration_does_not_hide_a_refusal(whole, tmp_path, damage):
    """Another configuration is refused; what differs is told if the old one can be read."""
    target = shutil.copytree(whole[0], tmp_path / "one")
    DAMAGE[damage](target / "config.yaml")
    folder, parts, inputs = whole
    other = dataclasses.replace(parts, resolved=parts.resolved | {"seed": 5})
    with pytest.raises(RunError, match="another configuration"):
        _go_on((folder, other, inputs), target)


def test_a_run_folder_that_no_run_has_left(whole, tmp_path):
    with pytest.raises(ConfigError, match="neither never, auto nor a run folder"):
        run(load([*WORDS, f"resume={tmp_path}"]), lambda p: InProcessGrid(app), lambda _: None)
