import json
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import conf
from fedlora.core.errors import DataError
from fedlora.data import NaturalInstructions, task_group

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

CONF = Path(next(iter(conf.__path__)))
NAMES = {"train": "training", "eval": "eval", "test": "test"}


def row(client, split, i):
    return {
        "client_id": client,
        "split": split,
        "category": f"Data to Text {client}.json",
        "instruction": f"Do {client}",
        "input": f"{split} {i}",
        "output": f"out {client} {i}" if i else "",
    }


ROWS = [row(k, s, i) for k in range(3) for s in NAMES for i in range(2)]


def write_folder(folder, rows):
    files = {}
    for r in rows:
        name = f"local_{NAMES[r['split']]}_{r['client_id']}.json"
        files.setdefault(name, []).append({c: r[c] for c in r if c not in ("client_id", "split")})
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    (folder / "global_test.json").write_text("[]")
    return NaturalInstructions(path=str(folder))


def write_parquet(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path)
    return NaturalInstructions(path=str(path))


def test_folder_and_parquet_give_the_same_records(tmp_path):
    """With client ids beyond 9, whose files sort differently by name."""
    rows = [row(k, s, i) for k in range(12) for s in NAMES for i in range(2)]
    folder = write_folder(tmp_path, rows)
    parquet = write_parquet(tmp_path / "ni.parquet", rows)
    records = list(folder.records())
    assert records == list(parquet.records())
    assert [(r.client, r.split, r.input) for r in records] == [
        (r["client_id"], r["split"], r["input"]) for r in rows
    ]
    assert records[0].category == "Data to Text"
    assert records[0].client_name == "Data to Text 0.json"


def test_the_duplicate_client_of_the_folder_is_dropped(tmp_path):
    source = write_folder(tmp_path, [row(k, s, 1) for k in (1612, 1613) for s in NAMES])
    assert {r.client for r in source.records()} == {1612}


def test_a_client_without_training_file_is_kept_for_evaluation(tmp_path):
    source = write_folder(
        tmp_path, [r for r in ROWS if r["client_id"] != 1 or r["split"] != "train"]
    )
    assert {r.split for r in source.records() if r.client == 1} == {"eval", "test"}


def test_missing_texts_are_empty(tmp_path):
    source = write_parquet(tmp_path / "ni.parquet", [row(0, "train", 1) | {"input": None}, ROWS[1]])
    assert next(source.records()).input == ""


def test_the_fingerprint_follows_the_content(tmp_path):
    source = write_parquet(tmp_path / "ni.parquet", ROWS)
    first = source.fingerprint()
    assert source.fingerprint() == first
    write_parquet(tmp_path / "ni.parquet", ROWS[:-1])
    assert source.fingerprint() != first
    folder = write_folder(tmp_path, ROWS)
    first = folder.fingerprint()
    (tmp_path / "local_eval_1.json").unlink()
    assert folder.fingerprint() != first


def test_columns_that_are_missing_are_named_with_those_found(tmp_path):
    rows = [{k: v for k, v in r.items() if k != "output"} for r in ROWS]
    source = write_parquet(tmp_path / "ni.parquet", rows)
    with pytest.raises(DataError, match=r"no \['output'\]; found \['category', 'client_id'"):
        next(source.records())
    (tmp_path / "local_training_0.json").write_text(
        '[{"instruction": "", "input": "", "category": ""}]'
    )
    with pytest.raises(DataError, match=r"local_training_0.json, record 1 has no field 'output'"):
        next(NaturalInstructions(path=str(tmp_path)).records())


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("split", "holdout", r"ni.parquet, row 7: split='holdout' is not one of \['dev'"),
        ("split", None, "row 7: split=None"),
        (
            "client_id",
            None,
            "row 7: client_id=None must be a whole number, 0 or more",
        ),
    ],
)
def test_values_that_are_wrong_are_named_with_their_row(column, value, message, tmp_path):
    rows = [r | {column: value} if i == 7 else r for i, r in enumerate(ROWS)]
    with pytest.raises(DataError, match=message):
        next(write_parquet(tmp_path / "ni.parquet", rows).records())


def test_client_ids_that_are_words_are_refused(tmp_path):
    rows = [r | {"client_id": "one"} for r in ROWS]
    with pytest.raises(DataError, match=r"row 0: client_id='one' must be a whole number"):
        next(write_parquet(tmp_path / "ni.parquet", rows).records())


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(DataError, match="has no files local_"):
        NaturalInstructions(path=str(tmp_path)).fingerprint()
    with pytest.raises(DataError, match=r"'./no/such.parquet' is neither a folder nor a file"):
        NaturalInstructions(path="./no/such.parquet").fingerprint()
    (tmp_path / "bad.parquet").write_text("text")
    with pytest.raises(DataError, match="is not a Parquet file"):
        next(NaturalInstructions(path=str(tmp_path / "bad.parquet")).records())
    (tmp_path / "local_eval_0.json").write_text("[{")
    with pytest.raises(DataError, match=r"local_eval_0.json:1 is not JSON"):
        next(NaturalInstructions(path=str(tmp_path)).records())
    (tmp_path / "local_eval_0.json").write_text("{}")
    with pytest.raises(DataError, match="has no field 'instruction'; found"):
        next(NaturalInstructions(path=str(tmp_path)).records())


# --- the hub -------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """Puts a data set where the hub would be; returns what was asked for."""
    datasets = pytest.importorskip("datasets")
    asked = []

    def publish(**parts):
        loaded = datasets.DatasetDict(
            {name: datasets.Dataset.from_list(rows) for name, rows in parts.items()}
        )

        def load(path, revision=None):
            asked.append((path, revision))
            return loaded

        monkeypatch.setattr(datasets, "load_dataset", load)
        return asked

    return publish


def test_a_hub_data_set_with_clients_keeps_them(hub, tmp_path):
    asked = hub(train=ROWS)
    source = NaturalInstructions(path="someone/ni", revision="abc")
    assert list(source.records()) == list(write_parquet(tmp_path / "x.parquet", ROWS).records())
    assert asked == [("someone/ni", "abc")]
    assert source.fingerprint() != replace(source, revision="def").fingerprint()


def test_a_hub_data_set_may_name_the_split_by_its_own_splits(hub):
    rows = [{k: v for k, v in r.items() if k != "split"} for r in ROWS]
    hub(train=rows[:4], validation=rows[4:6], test=rows[6:])
    records = list(NaturalInstructions(path="someone/ni").records())
    assert [r.split for r in records] == ["train"] * 4 + ["eval"] * 2 + ["test"] * 12


def test_a_hub_data_set_of_tasks_is_split_by_the_authors_recipe(hub):
    sizes = {"task1_a": 40, "task2_b": 400, "task3_c": 12, "task4_d": 8000}
    rows = [
        {"task_name": t, "id": f"{t}{i}", "definition": t, "inputs": str(i), "targets": f"{t} {i}"}
        for t, n in sizes.items()
        for i in range(n)
    ]
    hub(train=rows[::2], test=rows[1::2])
    source = NaturalInstructions(path="someone/tasks", seed=4)
    records = list(source.records())
    counts = {k: Counter(r.split for r in records if r.client == k) for k in range(4)}
    assert [sum(c.values()) for c in counts.values()] == [20, 40, 12, 650]
    assert counts[3] == {"train": 520, "eval": 65, "test": 65}
    assert len({(r.client, r.input) for r in records}) == len(records)
    assert {(r.client, r.client_name, r.category) for r in records} == {
        (i, name, name[-1]) for i, name in enumerate(sizes)
    }
    assert records == list(source.records())
    assert records != list(replace(source, seed=5).records())


def test_a_hub_that_cannot_be_reached_is_explained(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def offline(path, revision=None):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError, match=r"'someone/ni' .*no network.*give a path, or go online"):
        next(NaturalInstructions(path="someone/ni").records())


def test_strange_hub_data_sets_are_refused(hub):
    hub(train=[{"text": "a"}])
    with pytest.raises(DataError, match=r"the data set someone/ni has no .* found \['text'\]"):
        next(NaturalInstructions(path="someone/ni").records())
    hub(train=[row(0, "holdout", 0)])
    with pytest.raises(DataError, match="row 0: split='holdout' is not one of"):
        next(NaturalInstructions(path="someone/ni").records())


# --- the real data -------------------------------------------------------------------------------


def test_the_shared_file_is_the_1613_clients_of_the_paper(shared):
    began = time.monotonic()
    source = NaturalInstructions(path=str(shared / "ni1613_capped.parquet"))
    category, counts = {}, Counter()
    for r in source.records():
        category[r.client] = r.category
        counts[r.client, r.split] += 1
    assert list(category) == list(range(1613))
    assert counts[967, "train"] == 0 and counts[967, "test"] > 0
    assert [k for k in range(1613) if not counts[k, "train"]] == [967]
    held_out = OmegaConf.load(CONF / "population" / "unseen_task.yaml").unseen_categories
    assert len(held_out) == 12
    assert sum(category[k] in held_out for k in range(1613)) == 155
    assert set(held_out) <= set(category.values())
    assert time.monotonic() - began < 20


def test_a_wrong_column_of_the_shared_file_is_refused_at_once(shared, tmp_path):
    table = pq.read_table(shared / "ni1613_capped.parquet").rename_columns({"output": "answer"})
    pq.write_table(table, tmp_path / "ni.parquet")
    began = time.monotonic()
    with pytest.raises(DataError, match=r"no \['output'\]; found \['answer'"):
        next(NaturalInstructions(path=str(tmp_path / "ni.parquet")).records())
    assert time.monotonic() - began < 1


def test_task_groups_are_names_without_number():
    assert task_group("Question Generation 0.json") == "Question Generation"
    assert task_group("Fill in The Blank") == "Fill in The Blank"
