"""An error gives the new name of an old key or class; nothing has two names."""

import re

import pytest

from fedlora.core import renamed
from fedlora.core.config import build, locate
from fedlora.core.errors import ConfigError
from fedlora.core.package import ROOT
from simulations.app.compose import load

CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("old", renamed.KEYS)
def test_an_old_key_is_refused_with_the_new_one(old):
    message = re.escape(f"{old} is {renamed.KEYS[old]} since version 0.2")
    with pytest.raises(ConfigError, match=message):
        load([f"{old}=1"])
    assert f"`{old}" in CHANGELOG
    group, _, key = renamed.KEYS[old].partition(".")
    files = [*(ROOT / "conf" / group).rglob("*.yaml"), ROOT / "conf/config.yaml"]
    texts = [file.read_text(encoding="utf-8") for file in files]
    assert any(re.search(rf"\b{key.split('.')[-1]}:", text) for text in texts)


@pytest.mark.parametrize("old", renamed.CLASSES)
def test_an_old_class_is_refused_with_the_new_one(old):
    new = renamed.CLASSES[old]
    assert locate(new).__name__ == new.rpartition(".")[2]
    with pytest.raises(ConfigError, match=re.escape(f"{old} is {new} since version 0.2")):
        locate(old)
    assert f"`{old.rpartition('.')[0]}`" in CHANGELOG


def test_an_old_key_in_a_file_is_refused_with_the_new_one():
    raw = {"_target_": "fedlora.core.types.EvaluatePlan", "teacher_forced_rouge": True}
    with pytest.raises(ConfigError, match=r"is evaluate\.plan\.metrics\.teacher_forced since"):
        build(raw, object, "evaluate.plan")


def test_other_names_have_no_answer():
    assert renamed.answer(["client.lr", "fedlora.core.types.LocalPlan"]) == ""
