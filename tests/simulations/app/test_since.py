"""A recorded configuration is today's if nothing but keys at their defaults has come since."""

from dataclasses import replace

import pytest
from omegaconf import OmegaConf

from simulations.app import since
from simulations.app.compose import load_chosen
from simulations.app.identity import digest, run_hash
from simulations.app.since import Configuration, configuration, difference, in_file, nested, shared

SMALL = {
    "seed": 0,
    "rounds": 3,
    "federation": {"lr": 0.5},
    "data": {"path": "x"},
    "model": {"a": 1},
}


def composed(*words):
    cfg, choices = load_chosen(words)
    return configuration(OmegaConf.to_container(cfg, resolve=True), choices)


def before(now, *gone, **values):
    """A record from before there were some keys, and groups."""
    kept = {k: v for k, v in now.values.items() if not k.startswith(gone)}
    choices = {k: v for k, v in now.choices.items() if not k.startswith(gone)}
    return Configuration(kept | values, choices)


NEW = ("robust", "attack", "compression", "secagg", "privacy", "federation.buffer")


@pytest.fixture(scope="module")
def rolora():
    return composed("experiment=intents_banking77", "strategy=rolora", "seed=3")


def test_keys_and_groups_at_their_defaults_are_no_difference(rolora):
    assert difference(rolora, rolora) == ""
    assert difference(before(rolora, *NEW), rolora) == ""
    assert difference(before(rolora, *NEW, "strategy.schedule"), rolora) == ""
    assert not any(key.startswith(("tracking", "runtime", "experiment")) for key in rolora.choices)


def test_what_ends_a_run_early_is_a_difference_of_whole_runs(rolora):
    words = ("experiment=intents_banking77", "strategy=rolora", "seed=3")
    patient = composed(*words, "federation.patience=2")
    assert difference(before(rolora, "federation.patience"), rolora) == ""
    assert difference(rolora, patient) == "federation.patience=2, was 0"
    plain, other = (
        OmegaConf.to_container(load_chosen([*words, *more])[0], resolve=True)
        for more in ((), ("federation.patience=2",))
    )
    assert digest(plain) != digest(other)
    assert run_hash(plain, "d", "m") == run_hash(other, "d", "m"), "a run goes on under another"


def test_a_changed_value_and_a_removed_key_are_named(rolora):
    changed = before(rolora, *NEW, **{"client.lr": 0.5})
    assert difference(changed, rolora) == "client.lr=0.01, was 0.5"
    gone = before(rolora, *NEW, **{"client.moment": 0.5})
    assert difference(gone, rolora) == "client.moment is no key any more, it was 0.5"
    many = before(rolora, **{f"a{i}": i for i in range(5)})
    assert difference(many, rolora).endswith("a2 is no key any more, it was 2; and 2 more")
    assert "rounds=15, was 15.0" in difference(before(rolora, rounds=15.0), rolora)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["robust=median"], "robust._target_='fedlora.robust.coordinate.Median' is new, its "),
        (["federation.buffer=11"], "federation.buffer=11 is new, its default is 10"),
        (["+federation.other=1"], "federation.other=1 is new and has no default"),
        (["secagg=simulated", "federation.norm_bound=cohort"], "secagg.kind='simulated' is new"),
    ],
)
def test_a_new_key_with_another_value_is_a_difference(words, said):
    now = composed("experiment=intents_banking77", *words)
    then = before(now, *NEW, "federation.other")
    assert said in difference(then, now)


def test_an_experiment_that_sets_a_new_key_is_a_difference_though_its_words_are_the_same():
    now = composed("experiment=privacy")
    then = before(now, "federation.norm_bound")
    assert difference(then, now) == ("federation.norm_bound='off' is new, its default is 'cohort'")


def test_defaults_are_those_of_the_choices_that_were_recorded(rolora):
    then = before(rolora, "strategy.schedule")
    unknown = Configuration(then.values, {})
    assert difference(unknown, rolora) == "strategy.schedule='ba' is new and has no default"
    gone = Configuration(then.values, then.choices | {"strategy": "no_such"})
    assert difference(gone, rolora) == "strategy.schedule='ba' is new and has no default"
    other = replace(rolora, choices=rolora.choices | {"strategy": "no_such"})
    assert difference(then, other) == ""


def test_a_new_key_follows_the_recorded_ones(monkeypatch):
    content = SMALL | {"twice": "${seed}"}
    monkeypatch.setattr(since, "load", lambda words: OmegaConf.create(content))
    since._chosen.cache_clear()
    now = configuration(SMALL | {"seed": 7, "twice": 7}, {})
    assert difference(configuration(SMALL | {"seed": 7}, {}), now) == ""
    other = replace(now, values=dict(now.values) | {"twice": 0})
    assert difference(configuration(SMALL | {"seed": 7}, {}), other) == (
        "twice=0 is new, its default is 7"
    )
    since._chosen.cache_clear()


def test_paths_are_compared_by_name_and_content_and_nothing_names_the_machine(tmp_path):
    found = []
    for folder, text in (("anna", "one"), ("bert", "one"), ("carl", "two")):
        file = tmp_path / folder / "chat.txt"
        file.parent.mkdir()
        file.write_text(text)
        model = {"base": str(tmp_path / folder / "llama"), "path": str(file)}
        one = SMALL | {"model": model, "template": str(file), "wait": float("inf")}
        found.append(configuration(one, {}))
    anna, bert, carl = found
    assert difference(anna, bert) == "" and "template='chat.txt#" in difference(anna, carl)
    assert anna.values["model.base"] == "llama" and anna.values["wait"] == "inf"
    assert "anna" not in str(anna.record())


def test_a_run_folder_s_file_is_read_back(tmp_path, rolora):
    file = tmp_path / "config.yaml"
    assert in_file(file) is None
    file.write_text("seed: [")
    assert in_file(file) is None
    file.write_text(OmegaConf.to_yaml(OmegaConf.create(nested(rolora.values))))
    assert in_file(file) == Configuration(rolora.values, {})


def test_what_rows_share_is_taken_out_once():
    common, rests = shared([{"a": 1, "b": 2, "c": 1}, {"a": 1, "b": 3, "c": 1.0}])
    assert common == {"a": 1} and rests == [{"b": 2, "c": 1}, {"b": 3, "c": 1.0}]
    assert shared([]) == ({}, [])
