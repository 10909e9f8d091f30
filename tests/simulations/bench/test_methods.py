"""The comparison of methods: what is kept of a run, what is run again, and its table."""

import json
from collections.abc import Sequence
from typing import Any

import pytest
from omegaconf import OmegaConf

from fedlora.core.package import ROOT
from simulations.app import since
from simulations.app.compose import load_chosen
from simulations.bench import methods
from simulations.bench.methods import CENTRALISED, Case, Record, rate_of_its_own, row
from simulations.reporting.tables import TUNED_AT, Records, by_method, published

ROUNDS = [
    {"kind": "round", "wire/up_bytes": 3, "wire/down_bytes": 5, "state/hash": hashed}
    for hashed in ("a", "b")
]


def evaluated(number: int, adapter: str, accuracy: float) -> dict[str, object]:
    names = {"kind": "evaluate", "round": number, "group": "seen", "adapter": adapter}
    return names | {"accuracy_weighted": accuracy, "macro_f1_weighted": 0.5, "ignored": 1.0}


def test_the_first_adapter_of_the_first_group_and_all_bytes_are_kept():
    found = row([*ROUNDS, *(evaluated(t, a, 0.1 * t) for t in (1, 2) for a in ("full", "own"))])
    assert found["evaluated"] == {"group": "seen", "adapter": "full", "rounds": [1, 2]}
    assert found["metrics"] == {"accuracy_weighted": [0.1, 0.2], "macro_f1_weighted": [0.5, 0.5]}
    assert (found["up_bytes"], found["down_bytes"], found["state"]) == (6, 10, "b")


def test_a_run_without_an_evaluation_is_no_result():
    with pytest.raises(RuntimeError, match="no evaluation"):
        row(ROUNDS)


def test_every_method_of_conf_is_compared():
    assert {f.stem for f in (ROOT / "conf/strategy").glob("*.yaml")} < set(methods.methods())


def test_a_method_of_ones_own_needs_no_line_here():
    assert methods.personal() == {"fedsa", "local"}
    own = {p: rate_of_its_own(p) for p in methods.presets()}
    assert own["scaffold"] == ("client.lr=0.1",)
    assert own["fedavg"] == own["feddyn"] == ("client.lr=0.5",)
    assert own["fedit"] == own["flexlora"] == ()


def test_the_bound_has_an_experiment_and_methods_share_the_seed():
    full, own = "evaluate.adapters=[full]", "evaluate.adapters=[own]"
    assert Case("x", CENTRALISED, 3).words() == ["experiment=x_centralised", full, "seed=3"]
    words = Case("x", "local", 3, ("rounds=1",)).words()
    assert words == ["experiment=x", "strategy=local", own, "rounds=1", "seed=3"]
    words = Case("x", "scaffold", 3).words()
    assert words == ["experiment=x", "strategy=scaffold", full, "client.lr=0.1", "seed=3"]


@pytest.fixture
def today(monkeypatch):
    """Changes what is composed today: the keys of runs, and their defaults."""

    def change(of_runs: dict[str, object], defaults: dict[str, object] | None = None) -> None:
        def chosen(words: Sequence[str]) -> tuple[Any, dict[str, Any]]:
            cfg, choices = load_chosen(words)
            OmegaConf.set_struct(cfg, False)
            return OmegaConf.merge(cfg, of_runs), choices

        def usual(words: Sequence[str]) -> Any:
            cfg, _ = load_chosen(words)
            OmegaConf.set_struct(cfg, False)
            return OmegaConf.merge(cfg, of_runs if defaults is None else defaults)

        monkeypatch.setattr(methods, "load_chosen", chosen)
        monkeypatch.setattr(since, "load", usual)
        for cached in (methods.composed, since._chosen):
            cached.cache_clear()

    yield change
    for cached in (methods.composed, since._chosen):
        cached.cache_clear()


def test_what_was_measured_with_todays_configuration_is_not_run_again(
    tmp_path, monkeypatch, today, capsys
):  # fmt: skip
    def measured(case: Case) -> dict[str, object]:
        return {"words": case.words(), "refused": "no"}

    monkeypatch.setattr(methods, "measure", measured)
    file = tmp_path / "record.json"
    today({"federation": {"old": 1}})
    for method, seed in (("fedit", 0), ("fedit", 1), ("rolora", 0)):
        Record(file).add(Case("smoke", method, seed))
    content = json.loads(file.read_text())
    own = content["runs"]["fedit"]["1"]["configuration"]
    assert own["choices"] == {} and own["values"]["seed"] == 1 and len(own["values"]) < 5
    assert content["configurations"]["all"]["values"]["federation.old"] == 1
    assert Record(file).has(Case("smoke", "fedit", 0))
    assert not Record(file).has(Case("smoke", "fedit", 2))
    assert not Record(file).has(Case("smoke", "fedit", 0, ("rounds=9",)))
    planted = {"federation": {"old": 1, "planted": 3}, "strategy": {"mine": "x"}}
    today(planted)
    for method, seed in (("fedit", 0), ("fedit", 1), ("rolora", 0)):
        assert Record(file).has(Case("smoke", method, seed))
    capsys.readouterr()
    for of_runs, said in (
        (planted, "federation.planted=3 is new, its default is 4"),
        ({"federation": {"old": 2}}, "federation.old=2, was 1"),
        ({}, "federation.old is no key any more, it was 1"),
        ({"client": {"lr": 0.125}}, "client.lr=0.125, was"),
    ):
        today(of_runs, {"federation": {"old": 1, "planted": 4}, "strategy": {"mine": "x"}})
        assert not Record(file).has(Case("smoke", "fedit", 0))
        assert said in capsys.readouterr().out
    assert json.loads(file.read_text())["runs"]["fedit"]["0"]["refused"] == "no"


def test_a_row_without_a_configuration_is_run_again(tmp_path, capsys):
    file = tmp_path / "record.json"
    file.write_text(json.dumps({"runs": {"fedit": {"0": {"identity": "x"}}}}))
    assert not Record(file).has(Case("smoke", "fedit", 0))
    assert "recorded without its configuration" in capsys.readouterr().out


def test_the_table_has_the_best_first_and_says_who_cannot_run():
    def run(accuracy: float) -> dict[str, object]:
        metrics = {key: [0.0, 0.25] for key in ("macro_f1_weighted", "accuracy_worst_tenth")}
        metrics["accuracy_weighted"] = [0.9, accuracy]
        return {"metrics": metrics, "up_bytes": 2**20, "down_bytes": 2**21, "cpu_s": 7.2}

    runs = {
        "a": {"0": run(0.1), "1": run(0.3)},
        "b": {"0": run(0.4)},
        "c": {"0": {"refused": "no"}},
    }
    lines = by_method(runs).splitlines()
    assert lines[2] == "| `b` | 1 | 40.0 | 25.0 | 25.0 | 1 MiB | 2 MiB | 7 |"
    assert lines[3].startswith("| `a` | 2 | 20.0 ± 14.1 | 25.0 ± 0.0 |")
    assert lines[-1] == "- `c` cannot run: no"


def test_published_rows_have_ours_beside_them_and_the_tuned_ones_of_the_common_setting(tmp_path):
    place = tmp_path / "docs/results"
    place.mkdir(parents=True)
    theirs = {"method": "fedit", "ranks": "8", "accuracy": {"0.1": 90.47, "0.01": None}}
    said = {"source": "They", "about": "another model", "rows": [theirs]}
    ours = {
        "fedit": {str(s): {"metrics": {"accuracy_weighted": [a]}} for s, a in enumerate((0.1, 0.3))}
    }
    (place / "published-banking77.json").write_text(json.dumps(said))
    (place / "methods-intents_banking77.json").write_text(json.dumps({"runs": ours}))
    start = "| `fedit` | 8 | 90.5 | – | 20.0 ± 14.1 | "
    assert published(Records(tmp_path)).splitlines()[-1] == start + "– |"
    cells = [
        {"method": "fedit"} | TUNED_AT | {"spread": "alpha_0.5"},
        {"method": "fedit"} | TUNED_AT,
    ]
    rows = [
        {
            "cell": cell,
            "metrics": {"accuracy_weighted": {"interval": [mean, mean - 0.02, mean + 0.02]}},
        }
        for cell, mean in zip(cells, (0.9, 0.6), strict=True)
    ]
    (place / "study-banking77.json").write_text(json.dumps({"rows": rows}))
    assert published(Records(tmp_path)).splitlines()[-1] == start + "60.0 ± 2.0 |"
