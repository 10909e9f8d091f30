"""The archive of a study's runs: small, the same bytes from the same runs, and enough to go on."""

import json
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from fedlora.core.errors import ConfigError
from fedlora.core.files import write_file
from simulations.app.since import Configuration, in_file, nested
from simulations.study import __main__ as study
from simulations.study.archive import Packed, read_archive, table, write_archive
from simulations.study.cost import cost_file
from simulations.study.parts import pack, take, unpack
from simulations.study.plan import plan
from simulations.study.results import recorded
from simulations.study.runner import PACKED
from simulations.study.spec import parse
from tests.simulations.study.test_killed import kill_all, started
from tests.simulations.study.test_runner import TINY, wait_for
from tests.simulations.study.test_tuning import TUNED, Starter, files, place, quick

__all__ = ["place", "quick"]
PRUNE = {"rounds": [1, 2], "keep": 0.5}


class Real(Starter):
    """Runs that leave a configuration and costs too."""

    def __call__(self, run, folder):
        found = super().__call__(run, folder)
        line = {"cpu_s": 1.5, "wall_s": 2.5, "machine": "m", "load": 0.5}
        cost_file(folder / run.name).write_text(json.dumps(line) + "\n")
        config = nested(run.configuration.values)
        config |= {"output_dir": str(folder), "name": run.name, "report": False}
        (folder / run.name / "config.yaml").write_text(yaml.safe_dump(config))
        return found


def flat(run, at):
    return 0.1 * at


def again(folder):
    shutil.rmtree(folder.parent)


@pytest.mark.parametrize(("prune", "dies_after"), [(None, 5), (None, 16), (PRUNE, 16)])
def test_a_study_goes_on_from_its_archive_to_the_same_tables(
    place, tmp_path, capsys, prune, dies_after
):  # fmt: skip
    file, folder = place(prune=prune)
    assert study.main([file, "--jobs", "2"], whole := Real()) == 0
    wanted = files(folder)
    again(folder)
    results = tmp_path / "results"
    study.main([file, "--jobs", "2"], Real(dies_after=dies_after))
    assert study.main([file, "--list", "--record", str(results)], Real(dies_after=0)) == 0
    archive = results / "study-tuned-runs.zip"
    packed = len(read_archive(archive, "tuned"))
    missing = json.loads((results / "study-tuned.json").read_text())["missing"]
    assert ("nothing is chosen yet" in missing[0]) == (dies_after == 5 or prune is not None)
    again(folder)
    capsys.readouterr()
    assert study.main([file, "--from", str(archive)], rest := Real()) == 0
    said = capsys.readouterr().out
    assert f"{archive}, tuning: " in said and packed
    assert files(folder) == wanted
    if prune is None:
        assert len(rest.started) == len(whole.started) - packed
        assert "done anew" not in said
    elif dies_after == 16:
        assert "done anew method fedit" in said or "done anew method fedavg" in said
    assert study.main([file, "--from", str(archive), "--list"], Real(dies_after=0)) == 0
    assert "it is here already" in capsys.readouterr().out


def test_parts_of_several_machines_are_merged_and_the_bytes_are_the_same(place, tmp_path, capsys):
    file, folder = place()
    here, there = tmp_path / "here", tmp_path / "there"
    for method in ("fedit", "fedavg"):
        only = ["--only", f"method={method}", "--record", str(here)]
        assert study.main([file, *only], Real()) == 0
        again(folder)
    found = json.loads((here / "study-tuned.json").read_text())
    assert found["missing"][0] == "0 of 14 tuning runs are complete; nothing is chosen yet" or (
        found["tuning"] and found["missing"]
    )
    assert study.main([file, "--from", str(here / "study-tuned-runs.zip")], rest := Real()) == 0
    assert len(rest.started) == 4 and not any(run.stage for run in rest.started)
    assert "14 of 14 runs taken" in capsys.readouterr().out
    assert study.main([file, "--list", "--record", str(here)], Real(dies_after=0)) == 0
    again(folder)
    assert study.main([file, "--record", str(there)], Real()) == 0
    both = [(p / "study-tuned-runs.zip").read_bytes() for p in (here, there)]
    assert both[0] == both[1] and len(both[0]) < 18 * 8192
    results = [json.loads((p / "study-tuned.json").read_text()) for p in (here, there)]
    assert results[0]["rows"] == results[1]["rows"] and results[0]["cost"] == results[1]["cost"]
    assert results[0]["missing"] == results[1]["missing"]
    assert str(tmp_path).encode() not in b"".join(
        zipfile.ZipFile(here / "study-tuned-runs.zip").read(name)
        for name in zipfile.ZipFile(here / "study-tuned-runs.zip").namelist()
    )


def test_a_part_is_recorded_with_what_is_missing(place, tmp_path, capsys):
    file, folder = place()
    content = {key: value for key, value in TUNED.items() if key != "tuning"}
    Path(file).write_text(yaml.safe_dump(content, sort_keys=False))
    results = tmp_path / "results"
    record = ["--record", str(results)]
    assert study.main([file, "--list", *record], Real(dies_after=0)) == 0
    assert json.loads((results / "study-tuned.json").read_text())["missing"] == [
        "no run is complete"
    ]
    assert study.main([file, "--only", "method=fedit", "seed=0", *record], Real(flat)) == 0
    assert "study-tuned-runs.zip: 1 runs, 1 of them new" in capsys.readouterr().out
    found = json.loads((results / "study-tuned.json").read_text())
    assert found["missing"] == [
        "method fedit: no complete run of seed 1", "method fedavg: no complete run of seed 0, 1",
    ]  # fmt: skip
    assert [row["complete"] for row in found["rows"]] == [1, 0] and found["cost"]["runs"] == 1
    assert not (folder / "table.csv").exists()


# ------------------------------------------------------------------------- which runs are taken


@pytest.fixture
def one(tmp_path):
    """A run of a plan with a whole run folder."""
    metrics = {"loss_worst_tenth": "lower", "spectrum/effective_rank": "higher"}
    found = parse("s", {"axes": TUNED["axes"], "base": TUNED["base"], "metrics": metrics})
    run = plan(found)[0]
    Real(flat)(run, tmp_path)
    folder = tmp_path / run.name
    records, clients = [], []
    for at in range(1, run.rounds + 1):
        analyses = {"spectrum/effective_rank": 0.1 / at, "spectrum/old": 1.0 if at < 3 else None}
        records.append(
            {"kind": "round", "round": at, "engine": "fused", "wire/up_bytes": 7, "train/loss": 2.0}
            | {"wire/down_bytes": 9, "round/seconds": 0.1 * at, "state/hash": "abc"} | analyses
        )  # fmt: skip
        for adapter in ("full", "own") if at % 2 == 0 else ():
            panel = {"round": at, "group": "seen", "adapter": adapter}
            for client in range(3):
                clients.append(
                    panel | {"client": client, "tier": "T1", "rank": "8", "examples": 5}
                    | {"metrics": {"loss": 0.3 * client, "f1": 0.5}, "weights": {"loss": 5.0}}
                )  # fmt: skip
            records.append(
                {"kind": "evaluate", **panel, "loss": 0.3, "clients": 3, "nothing": None}
            )
    for name, rows in (("metrics.jsonl", records), ("evaluations.jsonl", clients)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    status = {"status": "completed", "rounds_done": run.rounds, "kind": "", "message": ""}
    (folder / "status.json").write_text(json.dumps(status))
    return run, folder, found.metrics


def test_what_tables_read_of_a_run_is_the_same_from_the_archive(one, tmp_path):
    run, folder, metrics = one
    packed = pack(run, folder, metrics)
    assert isinstance(packed, Packed)
    write_archive(tmp_path / "a.zip", "s", {packed.key: packed})
    (read,) = read_archive(tmp_path / "a.zip", "s").values()
    assert read == packed
    unpack(read, tmp_path / "other" / run.name)
    other = tmp_path / "other" / run.name
    rows = recorded(run, folder, metrics).rows
    assert rows == recorded(run, other, metrics).rows
    assert rows[0]["loss_worst_tenth"] == 0.6 and rows[-1]["spectrum/old"] == 1.0
    assert cost_file(other).read_text() == cost_file(folder).read_text()
    assert pack(run, other, metrics) == packed
    text = json.dumps(packed.content())
    assert not any(word in text for word in ("state/hash", "train/loss", "f1", str(tmp_path)))


def taken(packed, run, folder, halts=()):
    return take({packed.key: packed}, run.stage, [run], folder, halts)


def test_a_new_key_at_its_default_is_no_reason_and_any_other_change_is(one, tmp_path):
    run, folder, metrics = one
    packed = pack(run, folder, metrics)
    values = {k: v for k, v in packed.configuration.values.items() if not k.startswith("robust")}
    older = replace(packed, configuration=Configuration(values, packed.configuration.choices))
    assert taken(older, run, tmp_path / "a").taken == 1
    again_ = taken(older, run, tmp_path / "a")
    assert again_.taken == 0 and list(again_.left) == ["it is here already"]
    changed = Configuration(values | {"client.lr": 0.125}, packed.configuration.choices)
    left = taken(replace(packed, configuration=changed), run, tmp_path / "b").left
    assert list(left) == [f"client.lr={run.configuration.values['client.lr']!r}, was 0.125"]
    elsewhere = replace(packed, key=("", (("method", "gone"),), 0))
    assert list(taken(elsewhere, run, tmp_path / "b").left) == ["the plan has no such run"]
    assert not (tmp_path / "b").exists()
    short = replace(packed, status=packed.status | {"rounds_done": 1})
    assert "it ended after round 1" in next(iter(taken(short, run, tmp_path / "b").left))
    early = replace(short, status=short.status | {"message": "stopped early"})
    assert taken(early, run, tmp_path / "b").taken == 1


def test_texts_that_look_like_numbers_are_unpacked_as_texts(one, tmp_path):
    run, folder, metrics = one
    packed = pack(run, folder, metrics)
    values = packed.configuration.values | {"model.revision": "1e5", "data.texts": ["on", "2e3"]}
    then = Configuration(values, {})
    unpack(replace(packed, configuration=then), tmp_path / "there")
    assert in_file(tmp_path / "there" / "config.yaml") == then


def test_a_half_run_of_this_machine_gives_way_and_a_complete_one_stays(one, tmp_path):
    run, folder, metrics = one
    packed = pack(run, folder, metrics)
    here = tmp_path / "study" / "runs" / run.name
    shutil.copytree(folder, here)
    assert taken(packed, run, tmp_path / "study").taken == 0
    assert not (here / PACKED).exists()
    write_file(here / "status.json", '{"status": "running", "rounds_done": 1}')
    assert taken(packed, run, tmp_path / "study").taken == 1
    assert (here / PACKED).exists()


def test_a_folder_named_before_a_key_came_is_still_the_runs(place):
    file, folder = place()
    assert study.main([file], Real()) == 0
    wanted = files(folder)
    for old in sorted((folder / "runs").glob("*-s?-????????")):
        config = yaml.safe_load((old / "config.yaml").read_text())
        del config["robust"]
        (old / "config.yaml").write_text(yaml.safe_dump(config))
        old.rename(old.with_name(f"{old.name[:-8]}deadbeef"))
        cost_file(old).unlink()
    (folder / "plan.json").unlink()
    assert study.main([file], none := Real()) == 0
    assert none.started == [] and files(folder) == wanted
    old = next((folder / "runs").glob("fedit-s0-deadbeef"))
    config = yaml.safe_load((old / "config.yaml").read_text()) | {"rounds": 5}
    (old / "config.yaml").write_text(yaml.safe_dump(config))
    assert study.main([file], some := Real()) == 0
    assert [run.stem for run in some.started] == ["fedit-s0-"]


# -------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"no archive", "is no zip archive"),
        ({"study.json": {"format": 1, "study": "other"}}, "is of study 'other', not of 'tuned'"),
        ({"study.json": {"format": 2, "study": "tuned"}}, "has format 2; this version reads"),
        ({"x": {}}, "has format none"),
        ({"study.json": {"format": 1, "study": "tuned"}, "../x.json": {}}, "member '../x.json'"),
        ({"study.json": {"format": 1, "study": "tuned"}, "runs/../x.json": {}}, "is no run of"),
        ({"study.json": {"format": 1, "study": "tuned"}, "runs/x.json": {"cell": 1}}, "is damaged"),
        ({"study.json": {"format": 1, "study": "tuned"}, "runs/x.json": []}, "holds no object"),
        (None, "there is no such file"),
    ],
)
def test_mistakes_are_one_sentence(place, tmp_path, capsys, content, said):
    file, folder = place()
    archive = tmp_path / "study-tuned-runs.zip"
    if isinstance(content, bytes):
        archive.write_bytes(content)
    elif content is not None:
        with zipfile.ZipFile(archive, "w") as found:
            for name, value in content.items():
                found.writestr(name, json.dumps(value))
    for words in ["--from", str(archive)], ["--record", str(tmp_path)]:
        if content is None and words[0] == "--record":
            continue
        assert study.main([file, *words], none := Real(dies_after=0)) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1 and not none.started
    assert not folder.exists()


def test_damaged_bytes_and_rows_that_do_not_fit_are_refused(one, tmp_path):
    run, folder, metrics = one
    packed = pack(run, folder, metrics)
    file = tmp_path / "a.zip"
    write_archive(file, "s", {packed.key: packed})
    whole = file.read_bytes()
    at = whole.index(b"runs/") + 400
    file.write_bytes(whole[:at] + bytes(8) + whole[at + 8 :])
    with pytest.raises(ConfigError, match=r"is damaged: runs/fedit-s0-\w+.json cannot be read"):
        read_archive(file, "s")
    rounds = dict(table([{"round": 1}])) | {"rows": [[1, 2]]}
    write_archive(file, "s", {packed.key: replace(packed, rounds=rounds)})
    with pytest.raises(ConfigError, match="a row has not one value for each key"):
        read_archive(file, "s")


def test_a_folder_without_a_configuration_is_not_packed(one):
    run, folder, metrics = one
    (folder / "config.yaml").unlink()
    assert pack(run, folder, metrics) == "its folder has no config.yaml that can be read"


# ------------------------------------------------------------------------------------- real runs


@pytest.mark.slow
def test_a_killed_study_goes_on_from_its_archive_with_the_same_table(tmp_path, monkeypatch):
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(TINY))
    assert started(tmp_path / "whole", file).wait() == 0
    outputs = tmp_path / "killed"
    process = started(outputs, file)
    folder = outputs / "study-tiny"
    wait_for(lambda: any("completed" in f.read_text() for f in folder.glob("runs/*/status.json")))
    kill_all(process)
    monkeypatch.setenv("FEDLORA_OUTPUT", str(outputs))
    assert study.main([str(file), "--list", "--record", str(tmp_path)]) == 0
    shutil.rmtree(outputs)
    archive = tmp_path / "study-tiny-runs.zip"
    assert 1 <= len(read_archive(archive, "tiny")) < 4
    assert study.main([str(file), "--jobs", "2", "--from", str(archive)]) == 0
    tables = [f / "study-tiny" / "table.csv" for f in (tmp_path / "whole", outputs)]
    assert tables[0].read_bytes() == tables[1].read_bytes()
