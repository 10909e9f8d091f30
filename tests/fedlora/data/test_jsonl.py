import json
from collections import Counter, defaultdict
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedlora.core.errors import ConfigError, DataError
from fedlora.data import Jsonl

pytest.importorskip("datasets")
pytest.importorskip("flwr_datasets")

LAW = settings(derandomize=True, deadline=None, max_examples=15)


def rows(n=60):
    return [
        {
            "instruction": "Add.",
            "input": f"{i}",
            "output": f"{i + 1}",
            "client": f"user {i * i % 7}",
            "category": "odd" if i % 2 else "even",
        }
        for i in range(n)
    ]


def write(folder, records, name="data.jsonl", **options):
    text = "\n".join(json.dumps(r) for r in records)
    (folder / name).write_text(text + "\n\n", encoding="utf-8")
    return Jsonl(path=str(folder / name), **options)


def clients(source):
    held = defaultdict(list)
    for r in source.records():
        held[r.client].append(r)
    return [held[k] for k in range(len(held))]


PARTITIONS = [
    {"partition": "natural"},
    {"partition": "iid", "clients": 7},
    {"partition": "dirichlet", "clients": 5, "alpha": 0.9},
]


@pytest.mark.parametrize("options", PARTITIONS, ids=lambda o: o["partition"])
def test_every_record_lands_exactly_once_and_always_in_the_same_place(options, tmp_path):
    source = write(tmp_path, rows(), **options)
    records = list(source.records())
    assert sorted(int(r.input) for r in records) == list(range(60))
    assert list(dict.fromkeys(r.client for r in records)) == sorted({r.client for r in records})
    assert records == list(source.records())
    assert records != list(replace(source, seed=1).records())


def test_natural_clients_are_the_values_of_the_key(tmp_path):
    source = write(tmp_path, rows(), partition="natural", key="client")
    for k, held in enumerate(clients(source)):
        names = {rows()[int(r.input)]["client"] for r in held}
        assert names == {held[0].client_name}
        assert held[0].client_name == sorted({r["client"] for r in rows()})[k]


def test_numbers_can_be_keys_and_outputs(tmp_path):
    source = write(
        tmp_path, [{"instruction": "a", "output": i % 3, "client": i % 2} for i in range(6)]
    )
    records = list(source.records())
    assert {r.client_name for r in records} == {"0", "1"}
    assert Counter(r.output for r in records) == {"0": 2, "1": 2, "2": 2}
    assert {r.input for r in records} == {""} and {r.category for r in records} == {""}


def test_iid_clients_have_equal_sizes_and_no_order(tmp_path):
    held = clients(write(tmp_path, rows(), partition="iid", clients=7))
    assert {len(h) for h in held} == {8, 9}
    assert sorted(int(r.input) for r in held[0]) != list(range(len(held[0])))


def test_dirichlet_is_more_even_with_a_larger_alpha(tmp_path):
    def imbalance(alpha):
        held = clients(
            write(tmp_path, rows(400), partition="dirichlet", clients=5, alpha=alpha, by="category")
        )
        odd = [sum(r.category == "odd" for r in h) / len(h) for h in held]
        return max(odd) - min(odd)

    assert imbalance(1000.0) < 0.1 < imbalance(0.2)


@LAW
@given(
    n=st.integers(1, 40),
    eval_fraction=st.floats(0, 0.45),
    test_fraction=st.floats(0, 0.45),
    seed=st.integers(0, 3),
)
@example(n=3, eval_fraction=0.49, test_fraction=0.5, seed=0)
def test_every_client_can_train_and_holds_out_what_was_asked(
    n, eval_fraction, test_fraction, seed, tmp_path_factory
):
    source = write(
        tmp_path_factory.mktemp("data"),
        [r | {"client": "one"} for r in rows(n)],
        eval_fraction=eval_fraction,
        test_fraction=test_fraction,
        seed=seed,
    )
    counts = Counter(r.split for r in source.records())
    assert counts["train"] >= 1
    if n > 2:
        assert bool(counts["eval"]) == (eval_fraction > 0)
        assert abs(counts["eval"] - eval_fraction * n) <= 1
        assert bool(counts["test"]) == (test_fraction > 0)
    else:
        assert counts["train"] == n


def test_a_split_field_decides(tmp_path):
    named = [r | {"fold": ("train", "validation", "test")[i % 3]} for i, r in enumerate(rows())]
    for r in write(tmp_path, named, split_field="fold").records():
        assert r.split == ("train", "eval", "test")[int(r.input) % 3]


def test_fields_can_have_other_names(tmp_path):
    source = write(
        tmp_path,
        [{"q": "Why?", "ctx": "c", "a": "Because.", "topic": "t", "who": "x"}] * 3,
        instruction_field="q",
        input_field="ctx",
        output_field="a",
        category_field="topic",
        key="who",
    )
    r = next(source.records())
    assert (r.instruction, r.input, r.output, r.category) == ("Why?", "c", "Because.", "t")


def test_a_pattern_reads_every_file_in_order(tmp_path):
    write(tmp_path, rows()[30:], "b.jsonl")
    write(tmp_path, rows()[:30], "a.jsonl")
    source = Jsonl(path=str(tmp_path / "*.jsonl"), partition="iid", clients=3)
    whole = write(tmp_path, rows(), "whole.json", partition="iid", clients=3)
    assert list(source.records()) == list(whole.records())
    before = source.fingerprint()
    write(tmp_path, rows()[31:], "b.jsonl")
    assert source.fingerprint() != before
    assert replace(source, clients=4).fingerprint() != source.fingerprint()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"data\.jsonl:3 is not JSON"),
        ("[1]", r"data\.jsonl:3 must be an object, not list"),
        ('{"instruction": "a", "client": 1}', r":3 has no field 'output'; found \['client', 'inst"),
        ('{"instruction": "a", "output": "b"}', ":3 has no field 'client'"),
        (
            '{"instruction": "a", "output": ["b"], "client": 1}',
            ":3: 'output' must be a text .* list",
        ),
    ],
)
def test_a_bad_line_is_named(line, message, tmp_path):
    good = json.dumps(rows(1)[0])
    (tmp_path / "data.jsonl").write_text(f"{good}\n\n{line}\n{good}\n")
    with pytest.raises(DataError, match=message):
        list(Jsonl(path=str(tmp_path / "data.jsonl")).records())


def test_bytes_that_are_no_text_are_named(tmp_path):
    (tmp_path / "data.jsonl").write_bytes(b'{"instruction": "\xff"}\n')
    with pytest.raises(DataError, match=r"data\.jsonl:1 is not JSON"):
        list(Jsonl(path=str(tmp_path / "data.jsonl")).records())


def test_an_unknown_split_is_named(tmp_path):
    source = write(tmp_path, [r | {"fold": "holdout"} for r in rows(3)], split_field="fold")
    with pytest.raises(DataError, match=r":1: fold='holdout' is not one of"):
        list(source.records())


@pytest.mark.parametrize("partition", ["iid", "dirichlet"])
def test_more_clients_than_records_are_refused(partition, tmp_path):
    with pytest.raises(ConfigError, match=r"data\.clients=61 is more than the 60 records"):
        list(write(tmp_path, rows(), partition=partition, clients=61).records())


def test_only_more_examples_than_there_are_cannot_be_drawn(tmp_path):
    uneven = {"partition": "dirichlet", "clients": 30, "alpha": 0.01}
    found = Counter(r.client for r in write(tmp_path, rows(), **uneven, min_examples=2).records())
    assert set(found.values()) == {2}
    with pytest.raises(ConfigError, match=r"needs 90 records, and there are 60"):
        list(write(tmp_path, rows(), **uneven, min_examples=3).records())


def test_no_files_and_no_records_are_refused(tmp_path):
    with pytest.raises(DataError, match="matches no file"):
        Jsonl(path=str(tmp_path / "*.jsonl")).fingerprint()
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="the files have no records"):
        list(Jsonl(path=str(tmp_path / "empty.jsonl")).records())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"partition": "shard"}, r"data\.partition='shard' is not one of"),
        ({"alpha": 0.0}, r"data\.alpha=0\.0 must be > 0"),
        ({"eval_fraction": 0.5, "test_fraction": 0.5}, "their sum must be < 1"),
        ({"max_length": 8}, r"data\.max_length=8 must be >= 32"),
        ({"truncation": "left"}, r"data\.truncation='left' is not one of"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Jsonl(path="x", **options)
