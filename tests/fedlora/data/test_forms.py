"""The forms of data that people have: all are read alike, and what is none of them is named."""

import gzip
import json
from dataclasses import replace

import pandas as pd
import pyarrow as pa
import pytest

from fedlora.core.errors import DataError
from fedlora.data import Jsonl

datasets = pytest.importorskip("datasets")
pytest.importorskip("flwr_datasets")

ROWS = [
    {
        "instruction": f"Say {i}, twice; or\tthrice",
        "input": "" if i % 4 else 'a "quoted"\ntext',
        "output": f"answer {i}" if i % 5 else "NA",
        "client": f"0{i % 3}",
    }
    for i in range(30)
]
LINES = "".join(json.dumps(r) + "\n" for r in ROWS).encode()


def records(path, **options):
    return list(Jsonl(path=str(path), **options).records())


@pytest.fixture
def wanted(tmp_path):
    (tmp_path / "wanted.jsonl").write_bytes(LINES)
    return records(tmp_path / "wanted.jsonl")


def compressed(content: bytes, how: str) -> bytes:
    with pa.BufferOutputStream() as sink:
        with pa.CompressedOutputStream(sink, how) as stream:
            stream.write(content)
        return sink.getvalue().to_pybytes()


def table(folder, save):
    path = folder / "saved"
    save(pd.DataFrame(ROWS), path)
    return path.read_bytes()


def arrow(frame, path):
    whole = pa.Table.from_pandas(frame)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, whole.schema) as writer:
        writer.write_table(whole)


FORMS = {
    "array.json": lambda _: json.dumps(ROWS).encode(),
    "pretty.json": lambda _: json.dumps(ROWS, indent=2).encode(),
    "wrapped.json": lambda _: json.dumps({"version": 1, "data": ROWS}).encode(),
    "one_split.json": lambda _: json.dumps({"train": ROWS}, indent=1).encode(),
    "lines.ndjson": lambda _: b"\n\n" + LINES.replace(b"\n", b"\r\n"),
    "bom.jsonl": lambda _: b"\xef\xbb\xbf" + LINES,
    "wide.json": lambda _: json.dumps(ROWS).encode("utf-16"),
    "lines.jsonl.gz": lambda _: gzip.compress(LINES),
    "lines.jsonl.zst": lambda _: compressed(LINES, "zstd"),
    "array.json.zst": lambda _: compressed(json.dumps(ROWS).encode(), "zstd"),
    "t.csv": lambda f: table(f, lambda d, p: d.to_csv(p, index=False)),
    "index.csv": lambda f: table(f, lambda d, p: d.rename_axis("index").to_csv(p)),
    "unnamed_index.csv": lambda f: table(f, lambda d, p: d.to_csv(p)),
    "bom.csv": lambda f: table(f, lambda d, p: d.to_csv(p, index=False, encoding="utf-8-sig")),
    "semicolon.csv": lambda f: table(f, lambda d, p: d.to_csv(p, index=False, sep=";")),
    "t.tsv": lambda f: table(f, lambda d, p: d.to_csv(p, index=False, sep="\t")),
    "t.csv.gz": lambda f: gzip.compress(table(f, lambda d, p: d.to_csv(p, index=False))),
    "t.parquet": lambda f: table(f, lambda d, p: d.to_parquet(p)),
    "t.parquet.gz": lambda f: gzip.compress(table(f, lambda d, p: d.to_parquet(p))),
    "t.arrow": lambda f: table(f, arrow),
    "no_suffix": lambda f: table(f, lambda d, p: d.to_parquet(p)),
    "wrong_suffix.jsonl": lambda _: json.dumps(ROWS).encode(),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_records(name, tmp_path, wanted):
    (tmp_path / name).write_bytes(FORMS[name](tmp_path))
    assert records(tmp_path / name) == wanted
    assert wanted[0].client_name == "00"  # as it was written, not as a number


def test_files_of_several_forms_are_one_data_set(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(ROWS[:10]))
    pd.DataFrame(ROWS[10:20]).to_csv(tmp_path / "b.CSV", index=False)
    pd.DataFrame(ROWS[20:]).to_parquet(tmp_path / "c.parquet")
    (tmp_path / "README.md").write_text("# About")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "old.json").write_text("[]")
    found = records(tmp_path, partition="iid", clients=3)
    assert sorted(r.instruction for r in found) == sorted(r["instruction"] for r in ROWS)
    assert records(tmp_path / "*.[cCjp]*", partition="iid", clients=3) == found


# --- a file per client ---------------------------------------------------------------------------


def per_client(folder, names):
    for i, name in enumerate(names):
        rows = [{k: v for k, v in r.items() if k != "client"} for r in ROWS[3 * i : 3 * i + 3]]
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(rows))
    return folder


@pytest.mark.parametrize("pattern", ["", "*.json", "**/*.json"])
def test_a_file_per_client(pattern, tmp_path):
    per_client(tmp_path, ["anna.json", "bob.json", "carl.json"])
    found = records(tmp_path / pattern if pattern else tmp_path)
    assert {r.client_name for r in found} == {"anna", "bob", "carl"}
    assert len(found) == 9


def test_files_of_one_name_in_two_folders_are_two_clients(tmp_path):
    per_client(tmp_path, ["a/data.json", "b/data.json"])
    for path in (tmp_path, tmp_path / "*" / "data.json"):
        assert {r.client_name for r in records(path)} == {"a/data", "b/data"}


@pytest.mark.parametrize(
    "names",
    [
        ["train/anna.json", "test/anna.json", "train/bob.json", "test/bob.json"],
        ["anna/train.json", "anna/test.json", "bob/train.json", "bob/test.json"],
        ["anna_train.json", "anna_test.json", "bob_train.json", "bob_test.json"],
        ["anna.train.json", "anna.test.json", "bob.train.json", "bob.test.json"],
    ],
)
def test_names_of_files_can_name_splits_too(names, tmp_path):
    found = records(per_client(tmp_path, names))
    assert {(r.client_name, r.split) for r in found} == {
        (who, split) for who in ("anna", "bob") for split in ("train", "test")
    }


def test_files_of_splits_whose_records_have_clients(tmp_path):
    for name, rows in {"train": ROWS[:20], "validation": ROWS[20:]}.items():
        pd.DataFrame(rows).to_parquet(tmp_path / f"{name}-00000-of-00001.parquet")
    found = records(tmp_path)
    assert {r.split for r in found} == {"train", "eval"}
    assert {r.client_name for r in found} == {"00", "01", "02"}


def test_a_word_that_names_a_split_in_some_files_only_is_part_of_a_client(tmp_path):
    found = records(per_client(tmp_path, ["test_user.json", "anna.json"]))
    assert {r.client_name for r in found} == {"test_user", "anna"}


def test_two_files_whose_names_may_be_one_client_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"'client' is '07' at .* and '7' at"):
        records(per_client(tmp_path, ["07.json", "7.json"]))


def test_the_fingerprint_follows_names_that_mean_something(tmp_path):
    source = Jsonl(path=str(per_client(tmp_path, ["anna.json", "bob.json"])))
    before = source.fingerprint()
    (tmp_path / "bob.json").rename(tmp_path / "bert.json")
    assert source.fingerprint() != before
    assert replace(source, template="alpaca").fingerprint() == source.fingerprint()


# --- the library `datasets` ----------------------------------------------------------------------


def test_a_saved_data_set_gives_the_same_records(tmp_path, wanted):
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    assert records(tmp_path / "saved") == wanted
    datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)).save_to_disk(str(tmp_path / "d"))
    assert records(tmp_path / "d") == wanted
    before = Jsonl(path=str(tmp_path / "d")).fingerprint()
    datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS[1:])).save_to_disk(
        str(tmp_path / "other")
    )
    assert Jsonl(path=str(tmp_path / "other")).fingerprint() != before


def test_splits_of_a_data_set_are_kept(tmp_path):
    parts = {"train": ROWS[:20], "validation": ROWS[20:25], "test": ROWS[25:]}
    saved = datasets.DatasetDict({k: datasets.Dataset.from_list(v) for k, v in parts.items()})
    saved.save_to_disk(str(tmp_path / "saved"))
    found = records(tmp_path / "saved")
    assert sorted(r.split for r in found) == ["eval"] * 5 + ["test"] * 5 + ["train"] * 20


def test_a_class_label_is_its_name(tmp_path):
    label = datasets.ClassLabel(names=["no", "yes"])
    rows = {"instruction": ["a", "b"], "output": [0, 1], "client": ["x", "x"]}
    features = {"instruction": datasets.Value("string"), "client": datasets.Value("string")}
    held = datasets.Dataset.from_dict(rows, datasets.Features(features | {"output": label}))
    held.save_to_disk(str(tmp_path / "saved"))
    assert {r.output for r in records(tmp_path / "saved")} == {"no", "yes"}


def test_a_hub_id_is_loaded(monkeypatch, wanted):
    asked = []

    def load(path, *names, revision=None):
        asked.append((path, *names, revision))
        return datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS))

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert records("someone/data", revision="abc") == wanted
    assert records("someone/data", subset="main") == wanted
    assert asked == [("someone/data", "abc"), ("someone/data", "main", None)]


def test_a_hub_that_cannot_be_reached_is_explained(monkeypatch):
    def offline(path, revision=None):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError, match=r"'a/b' is no local file .*no network.*go online once"):
        records("a/b")


def test_splits_with_strange_names_are_named(tmp_path):
    held = {name: datasets.Dataset.from_list(ROWS[:3]) for name in ("train_sft", "test_sft")}
    datasets.DatasetDict(held).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(DataError, match="has a split 'train_sft', which is not one of"):
        records(tmp_path / "saved")


# --- conversations -------------------------------------------------------------------------------

TALK = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"),
        ("assistant", "So long")]  # fmt: skip
SHARE = {"user": "human", "assistant": "gpt", "system": "system"}


def chat(talk=TALK):
    return [{"role": r, "content": t} for r, t in talk]


def share(talk=TALK):
    return [{"from": SHARE[r], "value": t} for r, t in talk]


def parts(talk=TALK):
    return [{"role": r, "content": [{"type": "text", "text": t}]} for r, t in talk]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": chat()},
        {"messages": chat(), "instruction": None, "output": float("nan")},
        {"conversations": share()},
        {"conversation": share(), "id": "x"},
        {"conversations": share(TALK[1:]), "system": "Be brief."},
        {"messages": parts()},
        {"messages": json.dumps(chat())},
        {"messages": {k: [m[k] for m in chat()] for k in ("role", "content")}},
        {"messages": [*chat(), {"role": "user", "content": "One more?"}]},
    ],
)
def test_conversations_in_every_form(row, tmp_path):
    rows = [row | {"client": 1}] * 3
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for record in records(tmp_path / "c.jsonl"):
        assert [(t.role, t.text) for t in record.turns] == TALK[:-1]
        assert (record.instruction, record.input, record.output) == ("", "", "So long")


def test_conversations_in_tables(tmp_path):
    frame = pd.DataFrame({"messages": [chat()] * 3, "client": [1, 1, 2]})
    frame.to_parquet(tmp_path / "t.parquet")
    frame.assign(messages=frame.messages.map(json.dumps)).to_csv(tmp_path / "t.csv", index=False)
    assert records(tmp_path / "t.parquet") == records(tmp_path / "t.csv")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "no answer of the assistant in its 0 messages"),
        (chat(TALK[:2]), "no answer of the assistant in its 2 messages"),
        ("[1", "the conversation is a text that is not JSON"),
        ("Hi", "the conversation is a text that is not JSON"),
        (3, "must be a list of messages, not int"),
        (["Hi"], "message 1 must be an object, not str"),
        ([{"text": "Hi"}], r"message 1 names no speaker: .* found \['text'\]"),
        ([{"role": "boss", "content": "Hi"}], "message 1: role='boss' is not one of"),
        ([{"role": "user", "content": None}], "message 1: 'content' is missing"),
        ([{"role": "user", "content": [{"type": "image"}]}], "is no text but 'image'"),
    ],
)
def test_a_bad_conversation_is_named(messages, message, tmp_path):
    rows = [{"messages": chat(), "client": 1}, {"messages": messages, "client": 1}]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match=rf"c\.jsonl:2.*{message}"):
        records(tmp_path / "c.jsonl")


# --- what is none of these -----------------------------------------------------------------------

SPLIT_FRAMES = {"a": ROWS[:2], "b": ROWS[2:4]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04" + bytes(40), "is a zip archive or an Excel workbook: unpack it, or save"),
        (b"version https://git-lfs.github.com/spec/v1\n", "pointer of Git LFS, not the data: run"),
        (b"<!DOCTYPE html><html></html>", "is an HTML or XML page: download the data file itself"),
        (b"SQLite format 3\x00" + bytes(40), "is an SQLite database: export"),
        (b"\x80\x04\x95" + bytes(40), "is a pickle, which is never opened: save"),
        (b"%PDF-1.7", "is a PDF document"),
        (bytes(100), "is a binary file of an unknown form; records are JSON lines"),
        (b"Once upon a time\nthere was a text\n", "is plain text without a header of fields"),
        (b"caf\xe9,b\n1,2\n", r":1 is not UTF-8: byte 0xe9; save the file as UTF-8"),
        (b'[{"a": 1}\n{"a": 2}]', ":2 is not JSON: .*; needed are records, one per line or in a"),
        (json.dumps(SPLIT_FRAMES).encode(), r"holds several lists, \['a', 'b'\]: save each"),
        (pd.DataFrame(ROWS).to_json().encode(), "holds columns .*, not records: with pandas"),
        (b"a,b,a\n1,2,3\n", r"has the columns \['a'\] twice"),
        (b"instruction,output\na,b\nc\n", r":3 has 1 fields, not 2 as the header"),
        (b'instruction,output\na,"b\n', "is not CSV: unexpected end of data"),
        (gzip.compress(LINES)[:-20], "it is damaged or not complete"),
        (compressed(LINES, "zstd")[:-20], "it is damaged or not complete"),
        (b"PAR1" + bytes(40), "is damaged"),
        (b"", "the files have no records"),
        (b"  \n\n", "the files have no records"),
        (b"[]", "the files have no records"),
    ],
)
def test_a_diagnosis_in_one_sentence(content, message, tmp_path):
    (tmp_path / "data.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        records(tmp_path / "data.jsonl")
    assert "\n" not in str(caught.value)


def test_a_tar_archive_is_named(tmp_path):
    import tarfile

    (tmp_path / "data.jsonl").write_bytes(LINES)
    with tarfile.open(tmp_path / "data.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "data.jsonl", "data.jsonl")
    with pytest.raises(DataError, match="is a tar archive: unpack it"):
        records(tmp_path / "data.tar.gz")


def test_a_folder_without_data_is_named_with_what_it_has(tmp_path):
    (tmp_path / "notes.txt").write_text("Hello")
    with pytest.raises(DataError, match=r"is a folder without data files .* it has: notes\.txt"):
        records(tmp_path)


def test_no_client_at_all_is_explained(tmp_path):
    rows = [{k: v for k, v in r.items() if k != "client"} for r in ROWS]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    message = r"has no field 'client'; found \['input', .*: name the field .* data\.partition=iid"
    with pytest.raises(DataError, match=message):
        records(tmp_path / "a.json")
    assert len(records(tmp_path / "a.json", partition="iid", clients=4)) == 30


def test_a_null_output_is_not_said_to_be_absent(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINES + json.dumps(ROWS[0] | {"output": None}).encode())
    with pytest.raises(DataError, match=r"a\.jsonl:31: the value of 'output' is missing \(None\)"):
        records(tmp_path / "a.jsonl")
