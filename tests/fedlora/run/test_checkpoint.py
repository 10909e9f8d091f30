"""Laws of checkpoints: what was saved comes back bit for bit; a kill costs one at most."""

import json
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedlora.core.errors import CheckpointError
from fedlora.core.reading import sealed
from fedlora.run.checkpoint import (
    config_hash,
    latest,
    load,
    pack,
    save,
    state_hash,
    unpack,
)

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool)


@st.composite
def states(draw) -> dict[str, Tensor]:
    names = draw(st.lists(st.sampled_from(["z/a", "m.0/b", "ü", "a"]), max_size=4, unique=True))
    state = {}
    for i, name in enumerate(names):
        dtype = draw(st.sampled_from(DTYPES))
        shape = draw(st.sampled_from([(), (0,), (1,), (3, 2), (2, 0, 1)]))
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(i)) * 3
        state[name] = noise.to(dtype)
    return state


def some_state(value: float) -> dict[str, Tensor]:
    return {"w": torch.full((4, 3), value), "round": torch.tensor(int(value))}


def bits(state: dict[str, Tensor]) -> list[tuple]:
    return [
        (n, t.dtype, tuple(t.shape), t.reshape(-1).view(torch.uint8).tolist())
        for n, t in state.items()
    ]


@settings(
    derandomize=True,
    deadline=None,
    max_examples=30,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(state=states(), round=st.integers(0, 200_000))
def test_a_state_comes_back_bit_for_bit_and_in_its_order(tmp_path, state, round):
    path = save(tmp_path, round, state, keep=1, config_hash="abc")
    found = load(path)
    assert bits(found.state) == bits(state)
    assert (found.round, found.config_hash) == (round, "abc")
    assert state_hash(found.state) == state_hash(state)


def test_nan_payloads_views_and_shared_memory_survive(tmp_path):
    odd = torch.tensor([0x7FC00123, -4194303, 1], dtype=torch.int32).view(torch.float32)
    base = torch.arange(12.0).reshape(3, 4)
    state = {
        "nan": odd,
        "t": base.T,
        "row": base[1],
        "again": base,
        "wide": base[:, :1].expand(3, 5),
    }
    found = load(save(tmp_path, 3, state, keep=2)).state
    for name, t in state.items():
        assert torch.equal(found[name].view(torch.int32), t.contiguous().view(torch.int32)), name


def test_the_state_that_was_saved_is_not_changed_and_the_loaded_one_is_writable(tmp_path):
    state = some_state(2)
    before = state_hash(state)
    found = load(save(tmp_path, 2, state, keep=1)).state
    found["w"].add_(1)
    assert state_hash(state) == before


def test_the_hash_sees_names_dtypes_shapes_and_bytes_but_not_the_order():
    w = torch.zeros(2, 3)
    reference = state_hash({"a": w, "b": w})
    assert state_hash({"b": w, "a": w}) == reference
    others = [
        {"a": w, "c": w},
        {"a": w, "b": w.double()},
        {"a": w, "b": w.reshape(3, 2)},
        {"a": w, "b": w.view(torch.int32)},
        {"a": w, "b": -w},
        {"a": w},
    ]
    assert len({state_hash(s) for s in others} | {reference}) == len(others) + 1


def test_only_the_last_are_kept_and_an_abandoned_future_goes(tmp_path):
    for n in range(1, 6):
        save(tmp_path, n, some_state(n), keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["round_00004", "round_00005"]
    save(tmp_path, 2, some_state(2), keep=3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["round_00002"]
    for n in range(3, 7):
        save(tmp_path, n, some_state(n), keep=0)
    assert len(list(tmp_path.iterdir())) == 5
    assert latest(tmp_path).round == 6


def test_a_round_written_twice_is_the_second_one(tmp_path):
    save(tmp_path, 7, some_state(1), keep=2)
    save(tmp_path, 7, some_state(2), keep=2)
    found = latest(tmp_path)
    assert state_hash(found.state) == state_hash(some_state(2))


def test_nothing_saved_is_none(tmp_path):
    assert latest(tmp_path) is None
    assert latest(tmp_path / "absent") is None


def flip(path: Path) -> None:
    blob = bytearray((path / "state.safetensors").read_bytes())
    blob[-1] ^= 1
    (path / "state.safetensors").write_bytes(blob)


def edit(**changes):
    def apply(path: Path) -> None:
        meta = json.loads((path / "meta.json").read_text())
        (path / "meta.json").write_text(json.dumps(meta | changes))

    return apply


def cut(name: str, size: int):
    return lambda path: os.truncate(path / name, size)


DAMAGE = {
    "flipped bit": (flip, "is damaged"),
    "truncated state": (cut("state.safetensors", 20), "is damaged"),
    "empty state": (cut("state.safetensors", 0), "is damaged"),
    "no state": (lambda p: (p / "state.safetensors").unlink(), "cannot read"),
    "truncated meta": (cut("meta.json", 17), "cannot be read: .*cut short or damaged"),
    "no meta": (lambda p: (p / "meta.json").unlink(), "cannot be read: there is no such file"),
    "other format": (edit(format=99), "format 99"),
    "not an object": (
        lambda p: (p / "meta.json").write_text("[]"),
        "holds a list instead of an object",
    ),
    "lost key": (edit(sha256=None), "lacks sha256"),
    "other names": (edit(names=["w", "gone"]), "does not match its checksum"),
    "other hash of the configuration": (edit(config_hash="x"), "does not match its checksum"),
    "an index of another client": (edit(extra={"a": 1}), "does not match its checksum"),
    "another round": (edit(round=99), "is of round 99, its folder is round_00002"),
    "a truth value as round": (edit(round=True), "lacks round"),
    "a float as round": (edit(round=2.0), "lacks round"),
    "a text as round": (edit(round="2"), "lacks round"),
    "a number as hash": (edit(sha256=3), "lacks sha256"),
    "a list as extra": (edit(extra=[]), "lacks extra"),
}


def test_names_that_the_state_does_not_hold_are_named(tmp_path):
    """Even where the checksum was made to fit."""
    path = save(tmp_path, 2, some_state(2), keep=3)
    meta = json.loads((path / "meta.json").read_text())
    del meta["checksum"]
    (path / "meta.json").write_text(json.dumps(sealed(meta | {"names": ["w", "gone"]})))
    with pytest.raises(CheckpointError, match="does not hold"):
        load(path)


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, caplog, kind):
    damage, words = DAMAGE[kind]
    save(tmp_path, 1, some_state(1), keep=3)
    path = save(tmp_path, 2, some_state(2), keep=3)
    damage(path)
    with pytest.raises(CheckpointError, match=words) as error:
        load(path)
    assert str(path) in str(error.value)
    found = latest(tmp_path)
    assert found.round == 1
    assert state_hash(found.state) == state_hash(some_state(1))
    assert "round_00002" in caplog.text


def test_an_exception_while_writing_leaves_the_previous_one_and_no_litter(tmp_path, monkeypatch):
    save(tmp_path, 1, some_state(1), keep=1)
    monkeypatch.setattr(Path, "write_bytes", lambda *_: (_ for _ in ()).throw(OSError()))
    with pytest.raises(OSError):  # noqa: PT011 - whatever the disk says
        save(tmp_path, 2, some_state(2), keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["round_00001"]
    assert latest(tmp_path).round == 1


def killed_at(n: int, folder: Path, round: int) -> bool:
    """Save in a child process that is killed at its n-th step on the disk; whether it was."""
    child = os.fork()
    if child == 0:
        steps = iter(range(n))

        def deadly(call):
            def step(*args, **kwargs):
                if next(steps, None) is None:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args, **kwargs)

            return step

        steps_of = ("rename", "mkdir", "open")
        for owner, name in ((os, "fsync"), (shutil, "rmtree"), *((Path, s) for s in steps_of)):
            setattr(owner, name, deadly(getattr(owner, name)))
        save(folder, round, some_state(20), keep=1)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("again", [False, True], ids=["next round", "the same round again"])
def test_a_kill_at_any_step_leaves_a_complete_checkpoint(tmp_path, again):
    """Whatever the instant, what is found is one of the states that were saved, whole."""
    allowed = {state_hash(some_state(v)) for v in (10, 11, 20)}
    for n in range(40):
        folder = tmp_path / str(n)
        save(folder, 10, some_state(10), keep=2)
        save(folder, 11, some_state(11), keep=2)
        killed = killed_at(n, folder, 11 if again else 12)
        found = latest(folder)
        assert state_hash(found.state) in allowed
        assert not list(folder.glob(".unfinished_*"))
        if not killed:
            assert state_hash(found.state) == state_hash(some_state(20))
            assert n > 5
            return
    pytest.fail("the child was never left alone")


def test_a_nested_state_comes_back_as_it_was(tmp_path):
    nested = {
        "model": {"w": torch.arange(3.0), "b": torch.tensor(2)},
        "optimizer": {"state": {0: {"step": torch.tensor(7.0)}}, "lr": 0.1, "betas": [0.9, 0.95]},
        "more": [None, True, 3, "tensor", {"tensor": 1, "pairs": []}, math.nan, 1e-45],
    }
    again = unpack(load(save(tmp_path, 1, pack(nested), keep=1)).state)
    assert str(again) == str(nested)
    assert all(torch.equal(again["model"][k], nested["model"][k]) for k in ("w", "b"))
    with pytest.raises(TypeError):
        pack({"a": object()})


def test_config_hash_ignores_the_order_of_keys():
    assert config_hash({"a": 1, "b": {"c": 2, "d": 3}}) == config_hash(
        {"b": {"d": 3, "c": 2}, "a": 1}
    )
    assert config_hash({"a": 1}) != config_hash({"a": 2})
