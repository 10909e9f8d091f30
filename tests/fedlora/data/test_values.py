"""Every spelling of "missing", of a value that looks like nothing, and of one id."""

import decimal
import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedlora.core.errors import DataError
from fedlora.data import Jsonl, NaturalInstructions
from fedlora.data.fields import Fields, Row
from fedlora.data.values import (
    check_spellings,
    client_number,
    identity,
    missing,
    split_name,
    text,
)

MISSING = [
    None,
    float("nan"),
    np.nan,
    np.float32("nan"),
    pd.NA,
    pd.NaT,
    np.datetime64("NaT"),
    decimal.Decimal("NaN"),
]
FALSY = [0, 0.0, False, "0", "", np.int64(0), np.bool_(False), "NaN", "None", "null", "NA", [], {}]


@pytest.mark.parametrize("value", MISSING, ids=repr)
def test_what_stands_for_nothing_is_missing(value):
    assert missing(value)
    assert Fields().read(Row({"instruction": "a", "output": "b", "input": value}, "x")).input == ""
    with pytest.raises(DataError, match=r"x: the value of 'output' is missing \("):
        Fields().read(Row({"instruction": "a", "output": value}, "x"))


@pytest.mark.parametrize("value", FALSY, ids=repr)
def test_what_is_false_or_a_word_is_a_value(value):
    assert not missing(value)


@pytest.mark.parametrize("value", [0, 0.0, False, "0", "", "NaN", np.int64(0), np.bool_(False)])
def test_a_value_that_is_false_is_its_text(value):
    entry = Fields().read(Row({"instruction": value, "input": value, "output": value}, "x"))
    assert entry.instruction == entry.input == entry.output == str(value)


@pytest.mark.parametrize(
    "spellings",
    [
        [1, 1.0, "1", " 1", "1 ", "1.0", "1.", np.int64(1), np.float32(1), decimal.Decimal("1.0")],
        [0, 0.0, "0", "-0", np.uint8(0), "0.00"],
        [-3, "-3", -3.0],
        [True, np.bool_(True), "True", " True"],
        ["é", "e\N{COMBINING ACUTE ACCENT}", " é\n"],
        [10**20, str(10**20), float(10**20)],
    ],
)
def test_spellings_of_one_id_are_one_id(spellings):
    assert len({identity(v, "client", "x") for v in spellings}) == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [("7", "007"), (1000, "1e3"), ("+5", 5), ("a b", "a  b"), ("true", True), ("2.50", 2.5)],
)
def test_spellings_that_may_be_two_ids_are_refused(one, other):
    ids = [(identity(v, "user", "x"), place) for v, place in ((one, "a:1"), (other, "a:2"))]
    with pytest.raises(DataError, match=r"'user' is .* at a:1 and .* at a:2: if that is one"):
        check_spellings(ids, "user")


@pytest.mark.parametrize("ids", [("Anna", "anna"), ("a1", "a01"), ("9007199254740992", 2**53 + 1)])
def test_ids_that_differ_are_two(ids):
    found = [identity(v, "user", "x") for v in ids]
    check_spellings(((i, "x") for i in found), "user")
    assert len(set(found)) == 2


@pytest.mark.parametrize("value", [None, 1.5, "one", -1, True, "", "1e3", float("inf"), pd.NA])
def test_a_client_number_is_a_whole_number(value):
    with pytest.raises(DataError, match=r"x: client_id=.* must be a whole number"):
        client_number(value, "client_id", "x")


@pytest.mark.parametrize("value", [["a"], {"a": 1}, b"a", np.zeros(2)])
def test_what_has_no_plain_text_is_refused(value):
    with pytest.raises(DataError, match="x: 'output' must be a text or a number, not"):
        text(value, "output", "x")


def test_splits_have_many_names():
    names = ("train", "Training", " validation ", "dev", "VAL", "test")
    assert [split_name(n, "split", "x") for n in names] == [
        "train",
        "train",
        "eval",
        "eval",
        "eval",
        "test",
    ]
    for strange in (None, float("nan"), "holdout", ""):
        with pytest.raises(DataError, match=r"x: split=.* is not one of"):
            split_name(strange, "split", "x")


# --- all sources agree ---------------------------------------------------------------------------

TABLE = pd.DataFrame(
    {
        "client_id": [0, 0, 0, 1, 1, 1],
        "split": ["train", "eval", "test"] * 2,
        "category": ["c"] * 6,
        "instruction": [f"Is {i} odd?" for i in range(6)],
        "input": ["a", None, "", "0", "b", "c"],
    }
)


def save(folder, frame):
    """The same table in each form, with the source that reads it."""
    frame.to_csv(folder / "t.csv", index=False)
    frame.to_parquet(folder / "t.parquet")
    frame.to_json(folder / "t.jsonl", orient="records", lines=True)
    frame.to_json(folder / "t.json", orient="records")
    options = {"key": "client_id", "split_field": "split"}
    sources = {f: Jsonl(path=str(folder / f"t.{f}"), **options) for f in ("csv", "jsonl", "json")}
    sources["parquet"] = Jsonl(path=str(folder / "t.parquet"), **options)
    sources["natural"] = NaturalInstructions(path=str(folder / "t.parquet"))
    return sources


@pytest.mark.parametrize(
    "outputs", [[0, 1] * 3, [0.5, 0.0] * 3, [False, True] * 3, ["0", "no"] * 3], ids=str
)
def test_all_sources_and_forms_read_the_same_texts(outputs, tmp_path):
    read = {
        name: [(r.client, r.split, r.instruction, r.input, r.output) for r in source.records()]
        for name, source in save(tmp_path, TABLE.assign(output=outputs)).items()
    }
    for name, records in read.items():
        assert [r[-1] for r in records] == [str(v) for v in outputs], name
        assert records == read["natural"], name


@pytest.mark.parametrize("hole", MISSING[:2], ids=repr)
def test_all_sources_and_forms_refuse_a_missing_output(hole, tmp_path):
    frame = TABLE.assign(output=["x", hole, "y", "z", "u", "v"])
    for source in save(tmp_path, frame).values():
        with pytest.raises(DataError, match=r"(:[23]|row 1|record 2): the value of 'output' is"):
            list(source.records())


def test_an_integer_column_with_holes_keeps_its_clients(tmp_path):
    """Pandas turns such a column into floats."""
    frame = TABLE.assign(output="x", client_id=TABLE.client_id.astype(float))
    for name, source in save(tmp_path, frame).items():
        names = {r.client_name for r in source.records()}
        assert names == ({"c"} if name == "natural" else {"0", "1"}), name


def test_clients_in_two_spellings_are_one_or_refused(tmp_path):
    def source(*ids):
        rows = [{"instruction": "a", "output": "b", "client": i} for i in ids]
        (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return Jsonl(path=str(tmp_path / "d.jsonl"))

    assert {r.client_name for r in source(1, 1.0, "1", " 1").records()} == {"1"}
    with pytest.raises(DataError, match=r"'client' is '1' at .*:1 and '01' at .*:2: if that"):
        list(source(1, "01").records())
    for empty in ("", "  "):
        with pytest.raises(DataError, match=":2: the value of 'client' is empty"):
            list(source(1, empty).records())


def test_a_natural_id_of_the_wrong_kind_is_refused_with_its_row(tmp_path):
    rows = TABLE.assign(output="x", input="y").to_dict("records")
    rows[4]["client_id"] = 1.5
    for r in rows:
        r["client_id"] = float(r["client_id"])
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "n.parquet")
    with pytest.raises(DataError, match=r"row 4: client_id=1\.5 must be a whole number"):
        list(NaturalInstructions(path=str(tmp_path / "n.parquet")).records())
