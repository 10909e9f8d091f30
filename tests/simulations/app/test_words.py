"""Overrides as people type them: what Hydra cannot read is quoted, what was meant is named."""

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from fedlora.core.errors import ConfigError
from simulations.app.compose import load, split_overrides
from simulations.app.parts import build_parts
from simulations.app.words import readable, with_search_path
from simulations.run import main

TEXT = st.text(
    st.characters(codec="utf-8", exclude_characters="\0\n\r${}[]()'\",\\ \t"), min_size=1
)
"""What a path is made of; Hydra's own structure and its escapes are left to the examples."""


def value(word: str) -> object:
    return OverridesParser.create().parse_override(word).value()


@given(TEXT)
def test_any_path_arrives_as_it_was_typed(path):
    (word,) = readable([f"data.path=/{path}"])
    assert str(value(word)) == f"/{path}"


@pytest.mark.parametrize(
    "path",
    [
        "~/a.json",
        "/a=b",
        "/a#b",
        "/dä/ü",
        "/日本/a",
        "/a b#c",
        "it's",
        "/(1).json",
        "/[a]{b}",
        "a\\'#",
    ],
)
def test_signs_of_hydras_grammar_in_paths(path):
    assert load([f"output_dir={path}"]).output_dir == path


@pytest.mark.parametrize(
    "word", ["lr=1e-3", "~a.b", "+x=[1,2]", "a='b~c'", "-m", "x=${seed}", "a="]
)
def test_what_hydra_reads_stays_as_it_is(word):
    assert readable([word]) == [word]


def test_each_value_of_a_sweep_is_quoted_by_itself():
    (word,) = readable(["data.path=~/a.json,/b.json"], sweep=True)
    assert word == "data.path='~/a.json',/b.json"
    assert OverridesParser.create().parse_override(word).is_sweep_override()


@pytest.mark.parametrize("word", ["b/c", "a=[1,2", "a={b"])
def test_what_cannot_be_read_is_answered_with_how_to_quote(word):
    with pytest.raises(ConfigError, match=r"quotes of its own .*key='a, b'"):
        load([word])


def test_a_path_with_a_space_in_flowers_string_says_how_to_quote_it():
    with pytest.raises(ConfigError, match="quotes of its own"):
        load(split_overrides("", "data.path=/my data/x.json"))


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("lr=0.1", "client.lr"),
        ("batch_size=3", "client.batch_size"),
        ("per_round=3", "population.per_round"),
        ("client.lrr=3", "client.lr"),
        ("stragety=fedit", "strategy"),
        ("mu=0.1", "client.term.mu, of client/term=fedprox"),
        ("federation.round=3", "federation.rounds"),
    ],
)
def test_a_key_without_its_group_is_answered_with_the_whole_key(word, meant):
    with pytest.raises(ConfigError, match=f"Did you mean .*{meant}.*[?]"):
        load([word])
    if "." not in word:
        with pytest.raises(ConfigError, match=f"Did you mean .*{meant}.*[?]"):
            build_parts(load([f"+{word}"]))


@pytest.mark.parametrize("words", ["-m lr=0.1", "-m lr=0.1,0.2", "--cfg job lr=1"])
def test_a_sweep_and_a_flag_answer_as_a_run_does(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(words.split()) == 2
    assert main(["lr=0.1"]) == 2
    swept, single = capsys.readouterr().out.splitlines()
    assert single.startswith("RUN FAILED: Could not override 'lr'. Did you mean client.lr? (")
    assert swept.partition(" (")[0] == single.partition(" (")[0]


def test_the_second_value_of_a_sweep_is_answered_too(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["-m", "strategy=fedit,flexlor"]) == 2
    said = capsys.readouterr().out
    assert said.startswith("RUN FAILED: In 'config': Could not find 'strategy/flexlor'")


def test_a_key_like_nothing_gets_no_guess():
    with pytest.raises(ConfigError) as error:
        load(["xyzzy=1"])
    assert "Did you mean" not in str(error.value)


def test_folders_of_configuration_reach_every_process_as_absolute_paths(tmp_path, monkeypatch):
    (tmp_path / "my conf").mkdir()
    monkeypatch.chdir(tmp_path)
    words = ["--config-dir", "my conf", "seed=3"]
    due = ["seed=3", f"hydra.searchpath=['file://{tmp_path}/my conf']"]
    assert with_search_path(words) == due
    assert with_search_path(["--config-dir=my conf", "seed=3"]) == due
    assert with_search_path(due) == due, "as they arrive at the server"
    assert with_search_path(["seed=3"]) == ["seed=3"]


def test_a_folder_that_is_not_there_is_one_sentence(capsys):
    assert main(["--config-dir", "/no/such/folder", "seed=3"]) == 2
    assert capsys.readouterr().out.startswith("RUN FAILED: --config-dir '/no/such/folder'")
