"""CLINC150 and BANKING77: every row once, at any alpha, and nobody without examples."""

import json
from collections import Counter
from functools import cache
from itertools import chain

import numpy as np
import pytest

from fedlora.core.errors import DataError
from fedlora.data import SPLITS, TokenStore, intents, prepare
from fedlora.data.files import parquet_rows
from fedlora.data.intents import Intents, intents_file

SIZES = {"clinc150": (15_000, 3_000, 4_500, 150), "banking77": (8_957, 1_046, 3_080, 77)}
CASES = [
    {"partition": "iid"},
    {"partition": "dirichlet", "alpha": 0.5},
    {"partition": "dirichlet", "alpha": 0.01},
    {"partition": "dirichlet", "alpha": 0.01, "clients": 100},
    {"partition": "dirichlet", "alpha": 1e-6, "clients": 200, "min_examples": 1},
    {"partition": "pathological", "classes_per_client": 3},
    {"partition": "pathological", "classes_per_client": 5, "clients": 100},
    {"partition": "domain", "dataset": "clinc150"},
    {"partition": "domain", "dataset": "clinc150", "clients": 7},
    {"partition": "domain", "dataset": "clinc150", "clients": 40},
    {"partition": "iid", "dataset": "clinc150", "clients": 1},
]


@cache
def records_of(case):
    """The records of a case: text of its options."""
    return list(Intents(**json.loads(case)).records())


@cache
def official(dataset):
    """The rows of each split, without those out of scope."""
    names = {"train": "train", "valid": "eval", "test": "test"}
    held = {split: Counter() for split in SPLITS}
    for row in parquet_rows(intents_file(), ["text"]):
        if row["dataset"] == dataset and row["label"] != "oos":
            held[names[row["split"]]][row["text"], row["label"]] += 1
    return held


@pytest.mark.parametrize("case", CASES, ids=str)
def test_all_clients_together_hold_the_official_splits(case):
    """Every row exactly once, and no client without training examples."""
    source = Intents(**case)
    records = records_of(json.dumps(case))
    for split, rows in official(source.dataset).items():
        held = Counter((r.instruction, r.label) for r in records if r.split == split)
        assert held == rows
    sizes = Counter(r.client for r in records if r.split == "train")
    assert set(sizes) == set(range(source.clients))
    if source.partition == "dirichlet":
        assert min(sizes.values()) >= source.min_examples
    assert all(r.label == r.output and not r.input for r in records)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_clients_are_evaluated_on_the_labels_they_train_on(case):
    """Each label's held-out rows are in proportion to its training rows, up to rounding."""
    source = Intents(**case)
    records = records_of(json.dumps(case))
    held = Counter((r.split, r.label, r.client) for r in records)
    labels = {label for _, label, _ in held}
    for label in labels:
        train, evals, tests = (
            np.array([held[split, label, k] for k in range(source.clients)]) for split in SPLITS
        )
        for other in (evals, tests):
            assert np.all(np.abs(other - train * other.sum() / train.sum()) < 1)
            assert not other[train == 0].any()


@pytest.mark.parametrize("classes", [3, 5, 77])
def test_a_pathological_client_holds_its_number_of_labels(classes):
    records = Intents(partition="pathological", classes_per_client=classes).records()
    held = [set() for _ in range(30)]
    for record in records:
        held[record.client].add(record.label)
    assert {len(labels) for labels in held} == {classes}
    holders = Counter(chain(*held))
    assert max(holders.values()) - min(holders.values()) <= 1


def test_a_client_of_a_domain_holds_no_other():
    held = [set() for _ in range(30)]
    for record in Intents(partition="domain", dataset="clinc150").records():
        held[record.client].add(record.category)
    assert {len(domains) for domains in held} == {1}


def test_the_partition_is_that_of_its_seed():
    assert list(Intents(seed=1).records()) == list(Intents(seed=1).records())
    assert list(Intents(seed=1).records()) != list(Intents(seed=2).records())
    assert Intents(seed=1).fingerprint() != Intents(seed=2).fingerprint()
    assert json.loads(Intents().fingerprint())


@pytest.mark.parametrize("dataset", SIZES)
@pytest.mark.parametrize("partition", ["iid", "dirichlet"])
def test_validation_rows_can_be_trained_on(partition, dataset):
    """Every row once; the test rows follow all training rows, and nothing is left to validate on.
    The default's stores keep their identity."""
    more = Intents(dataset=dataset, partition=partition, train_on="train_valid")
    held = {split: Counter() for split in SPLITS}
    for r in more.records():
        held[r.split][r.instruction, r.label] += 1
    rows = official(dataset)
    assert held["train"] == rows["train"] + rows["eval"]
    assert held["eval"] == Counter()
    assert held["test"] == rows["test"]
    assert sum(held["train"].values()) == {"clinc150": 18_000, "banking77": 10_003}[dataset]
    plain = Intents(dataset=dataset, partition=partition)
    assert more.fingerprint() != plain.fingerprint()
    assert "train_on" not in plain.fingerprint()


@pytest.mark.parametrize("dataset", SIZES)
def test_the_store_has_the_sizes_of_the_papers(dataset, tokenizer, tmp_path, caplog):
    """And says how many examples were moved, in the log and in the statistics."""
    source = Intents(dataset=dataset, alpha=0.001, clients=100)
    with caplog.at_level("INFO"):
        store = TokenStore(prepare(source, tokenizer, "t", tmp_path))
    *sizes, labels = SIZES[dataset]
    counted = [store.label_counts(split) for split in SPLITS]
    assert [c.sum() for c in counted] == sizes
    assert [c.shape for c in counted] == [(100, labels)] * 3
    assert counted[0].sum(axis=1).min() == 10
    moved = store.statistics()["moved_examples"]
    assert 0 < moved < 1000
    assert f"{moved:,} of {sum(sizes):,} examples were moved" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "banking"}, r"data\.dataset='banking' is not one of"),
        ({"partition": "natural"}, r"data\.partition='natural' is not one of"),
        ({"train_on": "valid"}, r"data\.train_on='valid' is not one of"),
        ({"alpha": 0.0}, r"data\.alpha=0\.0 must be > 0"),
        ({"alpha": float("nan")}, r"data\.alpha=nan must be"),
        ({"clients": 0}, r"data\.clients=0 must be >= 1"),
        ({"clients": 1000}, r"data\.min_examples=10 .* needs 10000 records, and there are 8957"),
        ({"min_examples": 300}, r"data\.min_examples=300 .* needs 9000 records"),
        ({"clients": 9000, "partition": "iid"}, "9000 is more than the 8957 records"),
        ({"partition": "domain"}, "banking77 has one domain, 'banking'"),
        (
            {"partition": "pathological", "classes_per_client": 78},
            r"data\.classes_per_client=78 must lie between 1 and the 77 labels",
        ),
        (
            {"partition": "pathological", "classes_per_client": 2},
            r"can hold 60 of the 77 labels",
        ),
        (
            {"partition": "pathological", "classes_per_client": 1, "clients": 8000},
            r"leaves client \d+ without examples",
        ),
    ],
)
def test_what_cannot_be_met_is_refused(options, message):
    with pytest.raises((DataError, ValueError), match=message):
        list(Intents(**options).records())


def test_a_bundle_without_the_file_says_where_it_was_looked_for(monkeypatch, tmp_path):
    monkeypatch.setattr(intents, "places", lambda inside: [tmp_path / inside])
    with pytest.raises(DataError, match=r"data=intents: the file .* in none of .*intents\.parquet"):
        Intents().fingerprint()
