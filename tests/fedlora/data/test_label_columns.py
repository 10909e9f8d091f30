"""Texts with a label column, in every form of file, divided by label and by domain."""

import dataclasses
import json
from collections import Counter, defaultdict

import numpy as np
import pytest

from fedlora.core.errors import ConfigError, DataError
from fedlora.data import SPLITS, Jsonl, TokenStore, prepare

datasets = pytest.importorskip("datasets")
pd = pytest.importorskip("pandas")

TOPICS = ("sport", "music", "law", "food")


def rows(n=120):
    return [
        {
            "text": f"text {i}",
            "other": f"second {i}" if i % 3 else None,
            "label": TOPICS[i * 7 // 3 % 4],
            "client": i % 5,
            "category": f"paper {i % 3}",
        }
        for i in range(n)
    ]


def labelled(path, **options):
    return Jsonl(path=str(path), label_field="label", **options)


def saved(folder, held, name="t.jsonl", **options):
    (folder / name).write_text("\n".join(map(json.dumps, held)))
    return labelled(folder / name, **options)


def as_jsonl(frame, folder):
    frame.to_json(folder / "t.jsonl", orient="records", lines=True)
    return folder / "t.jsonl"


def as_csv(frame, folder):
    frame.to_csv(folder / "t.csv", index=False)
    return folder / "t.csv"


def as_parquet(frame, folder):
    frame.to_parquet(folder / "t.parquet")
    return folder / "t.parquet"


def as_data_set(frame, folder):
    datasets.Dataset.from_pandas(frame).save_to_disk(folder / "saved")
    return folder / "saved"


FORMS = [as_jsonl, as_csv, as_parquet, as_data_set]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_texts_and_labels(form, tmp_path):
    frame = pd.DataFrame(rows())
    source = labelled(form(frame, tmp_path), second_text_field="other")
    found = {r.instruction: r for r in source.records()}
    assert len(found) == 120 and source.labelled
    for row in rows():
        record = found[row["text"]]
        assert (record.label, record.output) == (row["label"], row["label"])
        assert record.input == (row["other"] or "")
        assert (record.client_name, record.category) == (str(row["client"]), row["category"])
        assert record.where


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [int, float, str, np.int8, np.uint64])
def test_numbers_in_any_spelling_are_their_own_indices(form, dtype, tokenizer, tmp_path):
    frame = pd.DataFrame({"text": [f"t {i}" for i in range(48)], "client": 0})
    frame["label"] = np.arange(48).astype(dtype) % 12 if dtype is not str else ""
    if dtype is str:
        frame["label"] = [str(i % 12) for i in range(48)]
    source = labelled(form(frame, tmp_path))
    store = TokenStore(prepare(source, tokenizer, "t", tmp_path / "cache"))
    assert store.labels == tuple(map(str, range(12)))


def test_one_label_in_several_spellings_is_one(tokenizer, tmp_path):
    spelled = [1, "1", 1.0, " 1", 0, "0", 0.0, False]
    held = [{"text": f"t {i}", "label": y, "client": 0} for i, y in enumerate(spelled[:-1] * 3)]
    store = TokenStore(prepare(saved(tmp_path, held), tokenizer, "t", tmp_path / "cache"))
    assert store.labels == ("0", "1")


def test_class_labels_of_a_saved_data_set_have_their_names(tokenizer, tmp_path):
    """Also by split; the names are sorted, whatever numbers they had."""
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["zoo", "art"])}
    )
    part = {"text": [f"t {i}" for i in range(40)], "label": [i % 2 for i in range(40)]}
    held = datasets.Dataset.from_dict(part, features=features)
    folder = tmp_path / "saved"
    datasets.DatasetDict(train=held, validation=held, test=held).save_to_disk(folder)
    source = labelled(folder, partition="iid", clients=4)
    store = TokenStore(prepare(source, tokenizer, "t", tmp_path / "cache"))
    assert store.labels == ("art", "zoo")
    assert [store.label_counts(split).sum() for split in SPLITS] == [40, 40, 40]
    named = [r.label for r in source.records() if r.instruction == "t 0"]
    assert named == ["zoo"] * 3


def test_an_unknown_class_of_a_saved_data_set_is_missing(tmp_path):
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b"])}
    )
    part = {"text": ["t", "u", "v"], "label": [0, 1, -1]}
    datasets.Dataset.from_dict(part, features=features).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match=r"row 2: the value of 'label' is missing"):
        list(labelled(tmp_path / "saved", partition="iid", clients=1).records())


PARTITIONS = [
    {"partition": "natural"},
    {"partition": "iid", "clients": 7},
    {"partition": "dirichlet", "clients": 10, "alpha": 0.01, "min_examples": 3},
    {"partition": "pathological", "clients": 6, "classes_per_client": 2},
    {"partition": "domain", "clients": 6},
    {"partition": "domain", "clients": 2},
]


@pytest.mark.parametrize("options", PARTITIONS, ids=str)
@pytest.mark.parametrize("given", [False, True])
def test_every_record_lands_once_and_every_client_can_train(options, given, tmp_path):
    held = [r | {"fold": ("test", "train", "dev", "train")[i % 4]} for i, r in enumerate(rows())]
    source = saved(tmp_path, held, split_field="fold" if given else "", **options)
    records = list(source.records())
    assert sorted(r.instruction for r in records) == sorted(r["text"] for r in held)
    assert {r.client for r in records if r.split == "train"} == {r.client for r in records}
    assert records == list(source.records())
    assert records != list(dataclasses.replace(source, seed=1).records()) or (
        given and options["partition"] == "natural"
    )
    if given:
        named = {r["text"]: r["fold"] for r in held}
        for r in records:
            assert {"dev": "eval"}.get(named[r.instruction], named[r.instruction]) == r.split
    if options["partition"] == "pathological":
        held_labels = Counter(client for client, _ in {(r.client, r.label) for r in records})
        assert max(held_labels.values()) <= 2
    if options["partition"] == "domain":
        held_domains = defaultdict(set)
        for r in records:
            held_domains[r.client].add(r.category)
        assert sum(map(len, held_domains.values())) == max(3, options["clients"])


@pytest.mark.parametrize("options", PARTITIONS[1:4], ids=str)
def test_records_that_name_their_split_follow_the_labels(options, tmp_path):
    """The file begins with all test rows: they must not all go to the first clients."""
    held = [r | {"fold": "test" if i < 60 else "train"} for i, r in enumerate(rows())]
    source = saved(tmp_path, held, split_field="fold", **options)
    records = list(source.records())
    held = Counter((r.split, r.label, r.client) for r in records)
    for label in TOPICS:
        own, other = (
            np.array([held[split, label, k] for k in range(source.clients)])
            for split in ("train", "test")
        )
        assert np.all(np.abs(other - own * other.sum() / own.sum()) < 1)


def test_a_draw_leaves_every_label_some_training_example(tokenizer, tmp_path):
    """Also labels of one example, at any seed."""
    held = [{"text": f"t {i}", "label": i // 2, "client": i % 3} for i in range(60)]
    held += [{"text": "lone", "label": "99", "client": 0}]
    for seed in range(5):
        source = saved(tmp_path, held, seed=seed, eval_fraction=0.4, test_fraction=0.4)
        store = TokenStore(prepare(source, tokenizer, "t", tmp_path / "cache"))
        assert len(store.labels) == 31
        assert store.label_counts("train").sum(axis=0).min() >= 1
        assert store.num_examples == 61


BAD = [
    ({"label": None}, r"t\.jsonl:3: the value of 'label' is missing \(None\)"),
    ({"label": ""}, r"t\.jsonl:3: the value of 'label' is empty"),
    ({"label": "  "}, r"t\.jsonl:3: the value of 'label' is empty"),
    ({"label": ["a"]}, r"t\.jsonl:3: 'label' must be a text or a number, not list"),
    ({"text": None}, r"t\.jsonl:3: the value of 'text' is missing"),
    ({"text": {"a": 1}}, r"t\.jsonl:3: 'text' must be a text or a number, not dict"),
    ({"label": "007"}, r"'label' is '7' at .*t\.jsonl:1 and '007' at .*t\.jsonl:3"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=lambda v: str(v)[:20])
def test_a_bad_record_is_named(change, message, tmp_path):
    held = [{"text": f"t {i}", "label": 7 + i % 2, "client": 0} for i in range(4)]
    held[2] |= change
    with pytest.raises(DataError, match=message):
        list(saved(tmp_path, held).records())


def test_without_the_field_it_says_which_options_name_it(tmp_path):
    held = [{"sentence": "t", "label": 1, "client": 0}]
    with pytest.raises(
        DataError, match=r"has no field 'text'; found .*data\.text_field and data\."
    ):
        list(saved(tmp_path, held).records())


@pytest.mark.parametrize(
    "options",
    [{"text_field": "label"}, {"second_text_field": "label"}, {"second_text_field": "text"}],
)
def test_a_label_is_no_text(options):
    """A model that reads the label has nothing to predict."""
    with pytest.raises(ValueError, match=r"must name different fields"):
        labelled("x.jsonl", **options)


def test_a_second_text_needs_labels():
    with pytest.raises(ValueError, match=r"data\.second_text_field='b' has no effect without"):
        Jsonl(path="x.jsonl", second_text_field="b")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"partition": "pathological", "classes_per_client": 5}, "between 1 and the 4 labels"),
        (
            {"partition": "pathological", "classes_per_client": 1, "clients": 3},
            "can hold 3 of the 4 labels",
        ),
        ({"partition": "dirichlet", "clients": 50, "min_examples": 3}, "needs 150 records"),
        ({"partition": "domain", "clients": 121}, "121 is more than the 120 records"),
    ],
)
def test_a_partition_that_cannot_be_met_is_refused(options, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        list(saved(tmp_path, rows(), **options).records())


def test_a_field_to_divide_by_that_no_row_has_is_refused(tmp_path):
    with pytest.raises(DataError, match="has no field 'topic'"):
        list(saved(tmp_path, rows(), partition="domain", by="topic").records())


def test_a_label_of_the_test_split_alone_is_refused(tokenizer, tmp_path):
    held = [r | {"fold": "train"} for r in rows(20)]
    held += [{"text": "new", "label": "opera", "client": 0, "fold": "test"}]
    source = saved(tmp_path, held, split_field="fold")
    with pytest.raises(DataError, match=r"'opera' \(.*t\.jsonl:21, test split\) is on no training"):
        prepare(source, tokenizer, "t", tmp_path / "cache")
