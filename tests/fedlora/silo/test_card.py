"""Silo cards: two forms, and one sentence for each mistake."""

import json

import pytest

from fedlora.core.errors import ConfigError
from fedlora.silo.card import read_card
from fedlora.silo.site import SiloInfo

GOOD = {"name": "hospital-a", "records": "a.jsonl", "rank": 8}


def card(folder, values, suffix=".yaml"):
    file = folder / f"card{suffix}"
    sign = " =" if suffix == ".toml" else ":"
    file.write_text("".join(f"{k}{sign} {json.dumps(v)}\n" for k, v in values.items()))
    return file


@pytest.mark.parametrize("suffix", [".yaml", ".toml"])
def test_both_forms_say_the_same_and_paths_are_from_the_card(tmp_path, suffix):
    found = read_card(card(tmp_path, GOOD | {"cache": "../c", "device": "cuda:1"}, suffix))
    assert (found.name, found.attention, found.mlp, found.device) == ("hospital-a", 8, 8, "cuda:1")
    assert found.records == str(tmp_path / "a.jsonl")
    assert found.cache == str(tmp_path.parent / "c")
    assert found.model == ""


def test_ranks_of_attention_and_other_modules(tmp_path):
    found = read_card(card(tmp_path, GOOD | {"rank": {"attention": 4, "mlp": 2}}))
    assert (found.attention, found.mlp) == (4, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rnak": 8}, "unknown key 'rnak'; known: name, records, rank"),
        ({"name": "../x"}, "name='../x' must be up to 64 letters"),
        ({"name": 7}, "name=7 must be a text"),
        ({"rank": 0}, "rank in attention modules=0 must be >= 1"),
        ({"rank": "8"}, "rank='8' must be a whole number, or attention and mlp"),
        ({"rank": True}, "rank=True must be a whole number"),
        ({"rank": {"attention": 4}}, "must be a whole number, or attention and mlp"),
        ({"device": "tpu"}, "device='tpu' is not auto, cpu, cuda or cuda:N"),
        ({"records": ""}, "records='' must name the silo's own records"),
    ],
)
def test_a_mistake_is_one_sentence_with_the_file(tmp_path, change, message):
    file = card(tmp_path, GOOD | change)
    with pytest.raises(ConfigError) as told:
        read_card(file)
    assert message in str(told.value)
    assert str(told.value).startswith(f"silo card {file}: ")
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("key", sorted(GOOD))
def test_what_a_card_must_have(tmp_path, key):
    with pytest.raises(ConfigError, match=f"there is no '{key}', which it must have"):
        read_card(card(tmp_path, {k: v for k, v in GOOD.items() if k != key}))


@pytest.mark.parametrize("text", ["a: [", "- 1\n", "", "1: 2\n"])
def test_what_is_no_card(tmp_path, text):
    (tmp_path / "card.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"silo card .*card\.yaml"):
        read_card(tmp_path / "card.yaml")
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_card(tmp_path / "nothing.yaml")


INFO = SiloInfo(
    "a",
    *(4, 2, "cpu", "abc"),
    dict.fromkeys(
        [
            *("num_train", "num_eval", "num_test", "train_tokens", "eval_tokens", "test_tokens"),
            *("predicting", "responding"),
        ],
        3,
    ),
    0,
    {"python": "3"},
)


def test_what_a_silo_says_comes_back_as_it_went():
    assert SiloInfo.from_json(INFO.to_json()) == INFO


@pytest.mark.parametrize(
    "change",
    [
        {"name": "a b"},
        {"attention": "4"},
        {"attention": -1},
        {"cut": 0.5},
        {"records": "a/../b"},
        {"counts": {"num_train": 3}},
        {"versions": 3},
    ],
)
def test_what_a_silo_says_is_foreign_input(change):
    raw = json.loads(INFO.to_json()) | change
    with pytest.raises((ValueError, KeyError, TypeError)):
        SiloInfo.from_json(json.dumps(raw))
