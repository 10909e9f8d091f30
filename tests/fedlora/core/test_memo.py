"""The memo gives the answer that was found for exactly this question, or finds it anew."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.core import memo
from fedlora.core.memo import FOLDER, is_ours, remembered
from fedlora.data.sotu import Sotu

ANSWER = {"modules": [["a", 1], ["b", 2]], "width": 0.5, "name": None}


class Oracle:
    """Answers, and counts how often it was asked."""

    def __init__(self, answer: Any = ANSWER) -> None:
        self.answer, self.asked = answer, 0

    def __call__(self) -> Any:
        self.asked += 1
        return self.answer


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path))
    return tmp_path


def kept(cache: Path) -> list[Path]:
    return sorted((cache / FOLDER).glob("*.json"))


def test_a_question_is_asked_once(cache: Path) -> None:
    oracle = Oracle()
    found = [remembered("model", {"folder": "x"}, oracle) for _ in range(3)]
    assert found == [ANSWER] * 3
    assert oracle.asked == 1
    assert len(kept(cache)) == 1


def test_the_first_answer_is_what_later_processes_read() -> None:
    """Tuples become lists at once, not in the second run."""
    oracle = Oracle({"shape": (1, 2)})
    assert remembered("model", {}, oracle) == remembered("model", {}, oracle) == {"shape": [1, 2]}


@given(a=st.dictionaries(st.text(), st.integers()), b=st.dictionaries(st.text(), st.integers()))
def test_two_questions_share_an_answer_only_if_they_are_equal(
    a: dict[str, int], b: dict[str, int]
) -> None:
    assert (memo._whole("model", a) == memo._whole("model", b)) == (a == b)
    assert memo._whole("model", a) != memo._whole("store", a)


@pytest.mark.parametrize("name", ["source_hash", "_versions"])
def test_other_sources_and_libraries_ask_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    oracle = Oracle()
    remembered("model", {}, oracle)
    monkeypatch.setattr(memo, name, lambda: "others")
    remembered("model", {}, oracle)
    assert oracle.asked == 2


@pytest.mark.parametrize(
    "damaged",
    [
        lambda text: "",
        lambda text: text[:-9],
        lambda text: "[1]",
        lambda text: "{}",
        lambda text: text.replace("0.5", "0.6"),
        lambda text: json.dumps(json.loads(text) | {"question": "another"}),
    ],
)
def test_what_is_damaged_or_foreign_is_found_anew(damaged: Any, cache: Path) -> None:
    oracle = Oracle()
    remembered("model", {}, oracle)
    (file,) = kept(cache)
    whole = file.read_text()
    file.write_text(damaged(whole))
    assert remembered("model", {}, oracle) == ANSWER
    assert oracle.asked == 2
    assert file.read_text() == whole


def test_what_raises_is_not_kept(cache: Path) -> None:
    def refuse() -> dict[str, Any]:
        raise ValueError("no model")

    for _ in range(2):
        with pytest.raises(ValueError, match="no model"):
            remembered("model", {}, refuse)
    assert not kept(cache)


def test_a_cache_that_cannot_be_written_costs_only_time(cache: Path) -> None:
    (cache / FOLDER).write_text("a file where the folder would be")
    oracle = Oracle()
    assert [remembered("model", {}, oracle) for _ in range(2)] == [ANSWER] * 2
    assert oracle.asked == 2


def test_old_answers_make_room(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memo, "MOST", 3)
    for i in range(6):
        remembered("model", {"i": i}, Oracle())
        assert len(kept(cache)) <= 3
    last = Oracle()
    remembered("model", {"i": 5}, last)
    assert not last.asked


def test_a_users_class_is_not_ours() -> None:
    class Mine(Sotu): ...

    assert is_ours(Sotu())
    assert not is_ours(Mine())
