import json
import logging
import pickle
import shutil
import threading
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.core.errors import DataError
from fedlora.data import (
    SPLITS,
    Record,
    TokenStore,
    build,
    prepare,
)
from fedlora.data.encode import Encoder
from fedlora.data.store import store_key

from .conftest import CharacterTokenizer, Listed

LAW = settings(derandomize=True, deadline=None, max_examples=25)
TEXT = st.text(max_size=30)
RECORDS = st.lists(
    st.builds(
        Record, st.integers(0, 5), st.sampled_from(SPLITS), st.sampled_from("xy"), TEXT, TEXT, TEXT
    ),
    min_size=1,
    max_size=30,
)
THREE = (
    Record(1, "test", "verse", "Say", "b", "bee", "B"),
    Record(0, "train", "prose", "Say", "a", "ay", "A"),
    Record(1, "train", "verse", "Say", "c", "", "B"),
)


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch):
    Listed.reads.clear()
    monkeypatch.setattr(build, "_BATCH", 4)


@LAW
@given(records=RECORDS)
def test_a_store_holds_what_the_source_gave(records, tmp_path_factory):
    """Examples and references of every (client, split), however the records arrive."""
    tokenizer = CharacterTokenizer()
    source = Listed(rows=tuple(records), max_length=64)
    if not any(r.output for r in records):
        return
    store = TokenStore(prepare(source, tokenizer, "t", tmp_path_factory.mktemp("cache")))
    expected = defaultdict(list)
    for record in records:
        expected[record.client, record.split].append(record)
    assert store.num_clients == max(r.client for r in records) + 1
    encoder = Encoder(tokenizer, 64, "input")
    for k in range(store.num_clients):
        for split in SPLITS:
            held = expected[k, split]
            assert store.count(k, split) == len(held)
            tokens = sum(len(e.input_ids) for e in store.examples(k, split))
            assert store.clients[k].holds(split) == (len(held), tokens)
            assert store.references(k, split) == [r.output for r in held]
            for i, (example, encoded) in enumerate(
                zip(store.examples(k, split), encoder.encode(held), strict=True)
            ):
                assert example.input_ids.dtype == np.int32
                assert example.input_ids.tolist() == encoded.ids
                assert example.prompt_tokens == encoded.prompt_tokens
                assert store.example(k, split, i).input_ids.tolist() == encoded.ids


def test_clients_are_described(tokenizer, tmp_path):
    rows = (*THREE, Record(3, "eval", "verse", "Say", "", "d"), Record(3, "eval", "x", "", "", "e"))
    rows += (Record(3, "eval", "x", "Say", "", "f"),)
    store = TokenStore(prepare(Listed(rows=rows), tokenizer, "t", tmp_path))
    assert [(c.id, c.name, c.category) for c in store.clients] == [
        (0, "A", "prose"),
        (1, "B", "verse"),
        (2, "2", ""),
        (3, "3", "x"),
    ]
    assert [(c.num_train, c.num_eval, c.num_test) for c in store.clients] == [
        (1, 0, 0),
        (1, 0, 1),
        (0, 0, 0),
        (0, 3, 0),
    ]
    assert store.categories == ("prose", "verse", "x")
    assert store.source == {
        "name": "listed",
        "fingerprint": "a",
        "cutoff": 512,
        "truncation": "input",
    }


def test_it_is_built_once(tokenizer, tmp_path):
    first = prepare(Listed(rows=THREE), tokenizer, "t", tmp_path / "deep" / "cache")
    assert prepare(Listed(rows=THREE), tokenizer, "t", tmp_path / "deep" / "cache") == first
    assert Listed.reads == ["a"]


def test_processes_that_come_together_build_one_store(tokenizer, tmp_path):
    start = threading.Barrier(6)
    folders = []

    def worker():
        start.wait()
        folders.append(prepare(Listed(rows=THREE), tokenizer, "t", tmp_path))

    threads = [threading.Thread(target=worker) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(folders) == 6 and len(set(folders)) == 1
    assert Listed.reads == ["a"]
    assert TokenStore(folders[0]).num_clients == 2


@pytest.mark.parametrize(
    "change",
    [
        {"mark": "b"},
        {"max_length": 513},
        {"truncation": "right"},
    ],
)
def test_another_source_has_another_key(tokenizer, change):
    same = store_key(Listed(rows=THREE), tokenizer, "t")
    assert store_key(Listed(rows=THREE), tokenizer, "t") == same
    assert store_key(Listed(rows=THREE, **change), tokenizer, "t") != same


def test_another_tokenizer_has_another_key_even_under_the_same_name(tokenizer):
    source = Listed(rows=THREE)
    keys = {
        store_key(source, tokenizer, "t"),
        store_key(source, tokenizer, "u"),
        store_key(source, CharacterTokenizer(), "t"),
        store_key(source, CharacterTokenizer(eos_token_id=0), "t"),
    }
    assert len(keys) == 4


FILES = ("tokens.npy", "responses.npy", "references.utf8", "index.npy", "clients.npy", "meta.json")


def _cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def _flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("harm", "file"),
    [(_cut, f) for f in FILES]
    + [(lambda p: p.unlink(), f) for f in FILES]
    + [(_flip, f) for f in ("index.npy", "clients.npy", "meta.json")],
)
def test_damage_is_noticed_and_repaired(harm, file, tokenizer, tmp_path, caplog):
    folder = prepare(Listed(rows=THREE), tokenizer, "t", tmp_path)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert set(before) == set(FILES)
    harm(folder / file)
    with pytest.raises(DataError, match=r"is damaged: .+"):
        TokenStore(folder)
    with caplog.at_level(logging.WARNING):
        assert prepare(Listed(rows=THREE), tokenizer, "t", tmp_path) == folder
    assert "is damaged" in caplog.text
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_a_build_that_fails_leaves_nothing(tokenizer, tmp_path):
    bad = (*THREE, Record(0, "validation", "", "", "", "x"))
    with pytest.raises(DataError, match="split='validation'"):
        prepare(Listed(rows=bad), tokenizer, "t", tmp_path)
    assert not [p for p in tmp_path.iterdir() if p.is_dir()]


def test_what_a_killed_build_left_is_cleared(tokenizer, tmp_path):
    folder = prepare(Listed(rows=THREE), tokenizer, "t", tmp_path)
    shutil.rmtree(folder)
    (tmp_path / f".unfinished_{folder.name}_killed").mkdir()
    prepare(Listed(rows=THREE), tokenizer, "t", tmp_path)
    assert [p for p in tmp_path.iterdir() if p.is_dir()] == [folder]


def test_tokens_take_two_bytes_if_the_vocabulary_allows(tmp_path):
    source = Listed(rows=THREE)
    for size, dtype in ((2**16, np.uint16), (2**16 + 1, np.uint32)):
        folder = prepare(source, CharacterTokenizer(size=size), str(size), tmp_path)
        assert np.load(folder / "tokens.npy", allow_pickle=False).dtype == dtype
        assert TokenStore(folder).examples(0, "train")[0].input_ids[0] == 1


def test_what_utf8_cannot_hold_is_replaced(tokenizer, tmp_path):
    lone = json.loads('"\\ud83d half a pair"')
    rows = (Record(0, "train", "", lone, lone, lone),)
    store = TokenStore(prepare(Listed(rows=rows), tokenizer, "t", tmp_path))
    assert store.references(0, "train") == ["? half a pair"]


def test_a_store_can_be_sent_to_another_process(tokenizer, tmp_path):
    store = TokenStore(prepare(Listed(rows=THREE), tokenizer, "t", tmp_path))
    assert pickle.loads(pickle.dumps(store)).references(1, "test") == ["bee"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ((), "data=listed has no records"),
        ((Record(0, "train", "", "a", "b", ""),) * 3, "all 3 outputs are empty"),
        ((Record(-1, "train", "", "a", "b", "c"),), "client=-1"),
        ((Record(500, "train", "", "a", "b", "c"),), "ids reach 500 but only 1 clients"),
    ],
)
def test_a_source_without_sense_is_refused(rows, message, tokenizer, tmp_path):
    with pytest.raises(DataError, match=message):
        prepare(Listed(rows=rows), tokenizer, "t", tmp_path)


def test_questions_without_an_answer_are_refused(tokenizer, tmp_path):
    store = TokenStore(prepare(Listed(rows=THREE), tokenizer, "t", tmp_path))
    with pytest.raises(IndexError, match=r"client 2 is not in 0\.\.1"):
        store.count(2, "train")
    with pytest.raises(ValueError, match="split='valid' is not one of"):
        store.examples(0, "valid")
    with pytest.raises(IndexError, match="client 0's train split has 1 examples, no #1"):
        store.example(0, "train", 1)


def test_statistics_count_what_is_there(tmp_path):
    rows = (
        Record(0, "train", "x", "a", "b", "cc"),
        Record(0, "train", "x", "a", "i" * 90, "cc"),
        Record(0, "test", "x", "a", "b", "r" * 90),
        Record(1, "eval", "y", "a", "b", ""),
        Record(1, "test", "y", "a", "b", ""),
        Record(3, "train", "y", "a", "b", ""),
        Record(3, "train", "y", "a", "b", "d"),
    )
    source = Listed(rows=rows, max_length=64, truncation="right")
    s = TokenStore(prepare(source, CharacterTokenizer(), "t", tmp_path)).statistics()
    prompt = 1 + len("### Task\na\n\n### Input\nb\n\n### Answer\n")
    lengths = sorted([prompt + 3, 64, 64, prompt + 1, prompt + 1, prompt + 1, prompt + 2])
    assert s["clients"] == 4
    assert s["examples"] == {"train": 4, "eval": 1, "test": 2}
    assert s["tokens"] == sum(lengths)
    assert s["tokens_per_example"]["median"] == lengths[3]
    assert s["tokens_per_example"]["max"] == 64
    assert s["response_token_share"] == (3 + (64 - prompt) + 3 * 1 + 2) / sum(lengths)
    assert s["truncated_share"] == 2 / 7
    assert s["without_response"] == 1
    assert s["empty_outputs"] == 3
    assert s["clients_with_only_empty_outputs"] == [1]
    assert s["clients_without_training_examples"] == [1, 2]
    assert s["train_examples_per_client"]["mean"] == 1
    assert s["largest_categories"] == {"y": 2, "x": 1, "": 1}
    assert json.loads(json.dumps(s)) == s
