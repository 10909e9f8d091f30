import csv
import io
import os
import re
import zipfile
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedlora.core.errors import ConfigError, DataError
from fedlora.data import (
    E2E,
    SPLITS,
    TokenStore,
    prepare,
)
from fedlora.data.batches import collate
from fedlora.data.e2e import FILES, attributes, context, sentence
from fedlora.data.encode import Encoder
from fedlora.data.records import Record
from fedlora.data.template import CONTEXT, INSTRUCTION
from simulations.tools.data import main

from .conftest import CharacterTokenizer, shared_file

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
pytest.importorskip("flwr_datasets")

LAW = settings(derandomize=True, deadline=None, max_examples=100)
FOODS = ("Italian", "French", "Fast food")
PARTITIONS = ("iid", "by_mr", "restaurant", "dirichlet")
PARQUET_SPLITS = {"train": "train", "eval": "valid", "test": "test"}


def rows(split, mrs, restaurants=7):
    """Pairs of MR and reference: MR number ``i`` has ``1 + i % 4`` references."""
    return [
        (
            f"name[{split} house {i % restaurants}], priceRange[£{i}-{i + 5}]"
            + (f", food[{FOODS[i % 3]}]" if i % 5 else ""),
            f"It's {split} {i}, reference no. {j}.",
        )
        for i in range(mrs)
        for j in range(1 + i % 4)
    ]


DATA = {"train": rows("train", 40), "eval": rows("eval", 11), "test": rows("test", 8)}


def csv_text(pairs, quoting=csv.QUOTE_MINIMAL):
    out = io.StringIO(newline="")
    csv.writer(out, quoting=quoting).writerows([("mr", "ref"), *pairs])
    return out.getvalue()


def write_folder(folder, data=DATA):
    for split, name in FILES.items():
        quoting = csv.QUOTE_ALL if split == "eval" else csv.QUOTE_MINIMAL
        encoding = "utf-8-sig" if split == "test" else "utf-8"
        (folder / name).write_bytes(csv_text(data[split], quoting).encode(encoding))
    return E2E(path=str(folder))


def write_parquet(file, data=DATA):
    held = [(PARQUET_SPLITS[s], mr, ref) for s in data for mr, ref in data[s]]
    columns = dict(zip(("split", "mr_orig", "ref"), zip(*held, strict=True), strict=True))
    table = pa.table({c: pa.array(v).dictionary_encode() for c, v in columns.items()})
    pq.write_table(table, file)
    return E2E(path=str(file))


@pytest.fixture
def source(tmp_path):
    return write_folder(tmp_path)


def held(source):
    """(context, reference) by client and split."""
    found = defaultdict(list)
    for r in source.records():
        assert not r.input
        found[r.client, r.split].append((r.instruction, r.output))
    return found


def expected(split):
    return [(context(attributes(mr, "here")), sentence(ref)) for mr, ref in DATA[split]]


# --- texts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mr", "wanted"),
    [
        (
            "name[Zizzi], eatType[pub], priceRange[£20-25], familyFriendly[yes], near[Café A]",
            "name : Zizzi | Type : pub | price : £ 20 - 25 | family friendly : yes | near : Café A",
        ),
        (
            "customer rating[5 out of 5],name[Joe's, the 2nd], area[ city  centre ]",
            "customer rating : 5 out of 5 | name : Joe ' s , the 2nd | area : city centre",
        ),
    ],
)
def test_a_context_is_the_attributes_in_their_order(mr, wanted):
    assert context(attributes(mr, "here")) == wanted


@pytest.mark.parametrize(
    ("reference", "wanted"),
    [
        ("Zizzi, a pub, isn't family-friendly.", "Zizzi , a pub , is n't family - friendly ."),
        ("It's £10.50 (or 1,000)!", "It 's £ 10.50 ( or 1,000 ) !"),
        ("You'll say 'DON'T go'. They've 5.", "You 'll say ' DO N'T go ' . They 've 5 ."),
        ("  5-star\n near   Café Rouge ", "5 - star near Café Rouge"),
    ],
)
def test_a_reference_has_its_punctuation_apart(reference, wanted):
    assert sentence(reference) == wanted


@LAW
@given(st.text(alphabet="aNnT ts'.,0-£é\n", max_size=40))
@example("can't 's .5 5. n't'd")
def test_normalising_moves_only_white_space_and_once_is_enough(text):
    once = sentence(text)
    assert "".join(once.split()) == "".join(text.split())
    assert once == " ".join(once.split())
    assert sentence(once) == once


KEY = st.text(alphabet="abc :|", min_size=1, max_size=8).map(str.strip).filter(bool)
VALUE = st.text(alphabet="abc ,.£'-7|", max_size=12)


@LAW
@given(st.dictionaries(KEY, VALUE, max_size=5))
def test_attributes_are_read_as_they_were_written(given_attributes):
    wanted = given_attributes | {"name": "Zizzi"}
    mr = ", ".join(f"{k}[{v}]" for k, v in wanted.items())
    assert list(attributes(mr, "here").items()) == list(wanted.items())


@pytest.mark.parametrize(
    ("mr", "part"),
    [
        (" ", "''"),
        ("name[Zizzi", r"'name\[Zizzi'"),
        ("name[Zizzi] food[Italian]", r"'name\[Zizzi\] food\[Italian\]'"),
        ("name[Zizzi], food", "'food'"),
        ("name[Zizzi], [Italian]", r"'\[Italian\]'"),
        ("name[Zizzi], name[Joe]", r"'name\[Joe\]'"),
    ],
)
def test_a_malformed_mr_is_named_with_its_line(mr, part, tmp_path):
    data = DATA | {"eval": [*DATA["eval"][:2], (mr, "Text."), *DATA["eval"][2:]]}
    with pytest.raises(DataError, match=rf"devset\.csv:4: the MR .* every key once; {part} is not"):
        list(write_folder(tmp_path, data).records())
    with pytest.raises(DataError, match=rf"p, row {len(DATA['train']) + 2}: the MR"):
        list(write_parquet(tmp_path / "p", data).records())


def test_an_mr_without_a_restaurant_is_named(tmp_path):
    with pytest.raises(DataError, match=r"trainset\.csv:2: the MR 'food\[x\]' has no name"):
        list(write_folder(tmp_path, DATA | {"train": [("food[x]", "Text.")]}).records())


# --- files ---------------------------------------------------------------------------------------


def test_every_form_of_the_files_gives_the_same_records(tmp_path):
    folder = write_folder(tmp_path)
    wanted = list(folder.records())
    assert wanted == list(write_parquet(tmp_path / "e2e.parquet").records())
    with zipfile.ZipFile(tmp_path / "e2e-dataset.zip", "w") as archive:
        for name in FILES.values():
            archive.write(tmp_path / name, f"e2e-dataset/{name}")
        archive.writestr("e2e-dataset/testset.csv", "MR\nname[x]\n")
    assert wanted == list(E2E(path=str(tmp_path / "e2e-dataset.zip")).records())


def test_the_fingerprint_follows_content_and_options_not_the_place(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    source = write_folder(tmp_path / "a")
    assert source.fingerprint() == write_folder(tmp_path / "b").fingerprint()
    for change in ({"clients": 4}, {"partition": "by_mr"}, {"max_eval": 3}, {"seed": 1}):
        assert replace(source, **change).fingerprint() != source.fingerprint()
    changed = write_folder(tmp_path / "b", DATA | {"test": DATA["test"][1:]})
    assert source.fingerprint() != changed.fingerprint()


def _without(name):
    return lambda folder: (folder / name).unlink()


def _write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (_without("devset.csv"), r"has no file devset\.csv; needed are trainset\.csv, devset\.csv"),
        (_write("devset.csv", b"MR\nname[x]\n"), r"devset\.csv has no \['mr', 'ref'\]; found \['M"),
        (_write("devset.csv", b""), r"devset\.csv has no \['mr', 'ref'\]; found \[\]"),
        (_write("devset.csv", b"mr,ref\n"), "has no rows of the eval split"),
        (_write("devset.csv", b"mr,ref\nname[x],a\n\nname[x]\n"), ":4 has 1 fields, not 2"),
        (_write("devset.csv", b"mr,ref\nname[x],\xff\n"), r"devset\.csv is not UTF-8"),
        (
            _write("devset.csv", b'mr,ref\nname[x],"' + b"a" * 200_000),
            r"devset\.csv:2 is not CSV: unexpected end of data",
        ),
    ],
)
def test_a_bad_file_is_named(harm, message, source, tmp_path):
    harm(tmp_path)
    with pytest.raises(DataError, match=message):
        list(source.records())


def test_a_bad_table_is_named(tmp_path):
    source = write_parquet(tmp_path / "e2e.parquet")
    table = pq.read_table(tmp_path / "e2e.parquet")
    for change, message in (
        (lambda t: t.drop(["ref"]), r"e2e\.parquet has no \['ref'\]; found"),
        (lambda t: t.set_column(0, "split", pa.array(["no"] * len(t))), "row 0: split='no' is n"),
        (
            lambda t: t.set_column(2, "ref", pa.array(["a"] + [None] * (len(t) - 1))),
            "row 1: the value of 'ref' is missing",
        ),
        (lambda t: t.slice(0, 10), "has no rows of the eval split"),
    ):
        pq.write_table(change(table), tmp_path / "e2e.parquet")
        with pytest.raises(DataError, match=message):
            list(source.records())
    (tmp_path / "e2e.parquet").write_text("mr,ref\n")
    with pytest.raises(DataError, match="is not a Parquet file"):
        list(source.records())


def test_a_path_that_does_not_exist_says_what_could():
    source = E2E(path="no/such/e2e.parquet")
    for read in (source.fingerprint, lambda: list(source.records())):
        with pytest.raises(DataError, match=r"e2e\.parquet' does not exist .* devset\.csv"):
            read()


# --- clients -------------------------------------------------------------------------------------


@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("clients", [1, 3, 7])
def test_every_pair_lands_exactly_once_and_always_in_the_same_place(partition, clients, source):
    source = replace(source, partition=partition, clients=clients)
    found = held(source)
    for split in SPLITS:
        together = [pair for k in range(clients) for pair in found[k, split]]
        assert sorted(together) == sorted(expected(split))
    assert all(found[k, "train"] for k in range(clients))
    assert list(source.records()) == list(source.records())
    if clients > 1:
        assert held(replace(source, seed=1)) != found


@pytest.mark.parametrize("clients", [2, 3, 7])
def test_iid_clients_have_equal_sizes(clients, source):
    sizes = [len(h) for (_, s), h in held(replace(source, clients=clients)).items() if s == "train"]
    assert max(sizes) - min(sizes) <= 1


def owners(found, split, what):
    homes = defaultdict(set)
    for (client, s), pairs in found.items():
        if s == split:
            for pair in pairs:
                homes[what(pair)].add(client)
    return homes


def of_context(pair):
    return pair[0]


def of_restaurant(pair):
    return re.match(r"name : ([^|]*) \|", pair[0])[1]


@pytest.mark.parametrize(
    ("partition", "what"), [("by_mr", of_context), ("restaurant", of_restaurant)]
)
def test_what_is_owned_has_one_owner_and_owners_are_about_equal(partition, what, source):
    found = held(replace(source, partition=partition))
    assert {len(homes) for homes in owners(found, "train", what).values()} == {1}
    largest = max(Counter(map(what, expected("train"))).values())
    sizes = [len(found[k, "train"]) for k in range(3)]
    assert max(sizes) - min(sizes) <= largest
    spread = owners(held(source), "train", what)  # unlike the rows of iid clients
    assert max(len(homes) for homes in spread.values()) > 1


@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("split", ["eval", "test"])
def test_held_out_mrs_are_dealt_whole_and_evenly(partition, split, source):
    found = held(replace(source, partition=partition))
    assert {len(homes) for homes in owners(found, split, of_context).values()} == {1}
    sizes = [len(found[k, split]) for k in range(3)]
    assert max(sizes) - min(sizes) <= 4  # references of the largest MR
    assert found[0, split] == held(source)[0, split]  # whoever owns what to train on


def test_more_clients_than_held_out_mrs_leave_some_without(source):
    found = held(replace(source, clients=20))
    assert sum(bool(found[k, "test"]) for k in range(20)) == 8


@pytest.mark.parametrize("partition", PARTITIONS)
def test_caps_count_training_rows_and_held_out_mrs(partition, source):
    source = replace(source, partition=partition)
    capped = held(replace(source, max_train=50, max_eval=6, max_test=2))
    together = {s: [p for k in range(3) for p in capped[k, s]] for s in SPLITS}
    assert len(together["train"]) == 50
    assert not Counter(together["train"]) - Counter(expected("train"))
    for split, mrs in (("eval", 6), ("test", 2)):
        kept = {c for c, _ in together[split]}
        assert len(kept) == mrs
        assert sorted(together[split]) == sorted(p for p in expected(split) if p[0] in kept)
    assert held(replace(source, max_train=10**6, max_eval=11, max_test=10**6)) == held(source)


def test_dirichlet_is_more_even_with_a_larger_alpha(source):
    def imbalance(alpha):
        records = list(replace(source, partition="dirichlet", alpha=alpha).records())
        train = [r for r in records if r.split == "train"]
        share = [
            np.mean([r.category == "French" for r in train if r.client == k]) for k in range(3)
        ]
        return max(share) - min(share)

    assert imbalance(1000.0) < 0.1 < imbalance(0.2)


def test_categories_name_what_the_partition_is_about(source):
    records = list(replace(source, partition="dirichlet", by="food").records())
    assert {r.category for r in records} == {*FOODS, ""}
    assert all(f"food : {r.category}" in r.instruction for r in records if r.category)
    for r in source.records():
        assert r.instruction.startswith(f"name : {r.category} |")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clients": 101}, r"data\.clients=101 is more than the 100 records"),
        ({"clients": 5, "max_train": 4}, r"data\.clients=5 is more than the 4 records"),
        ({"partition": "by_mr", "clients": 41}, r"data\.clients=41 is more than the 40 MRs"),
        ({"partition": "restaurant", "clients": 8}, r"data\.clients=8 is more than the 7 rest"),
        ({"partition": "dirichlet", "clients": 101}, r"clients=101 is more than the 100 records"),
        (
            {"partition": "dirichlet", "by": "price"},
            r"data\.by='price' is no attribute of the MRs, which are \['food', 'name', 'priceRange",
        ),
    ],
)
def test_a_federation_that_the_data_cannot_give_is_refused(options, message, source):
    with pytest.raises(ConfigError, match=message):
        list(replace(source, **options).records())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"partition": "natural"}, r"data\.partition='natural' is not one of \['iid', 'by_mr'"),
        ({"clients": 0}, r"data\.clients=0 must be >= 1"),
        ({"alpha": 0.0}, r"data\.alpha=0\.0 must be > 0"),
        ({"max_train": -1}, r"data\.max_train=-1 must be >= 0"),
        ({"max_length": 8}, r"data\.max_length=8 must be >= 32"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        E2E(path="x", **options)


# --- tokens --------------------------------------------------------------------------------------

TOKENIZERS = {
    "own BOS": CharacterTokenizer(),
    "no BOS": CharacterTokenizer(bos_token_id=None, eos_token_id=0),
    "BOS is EOS": CharacterTokenizer(bos_token_id=2**21 - 1, eos_token_id=2**21 - 1),
}


def tokens(tokenizer, text):
    return tokenizer([text], add_special_tokens=False)["input_ids"][0]


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
def test_a_sequence_is_context_eos_completion_eos(tokenizer, source, tmp_path):
    """And the first loss is at the separator, the last on EOS; targets are the inputs' successors,
    shifted once."""
    store = TokenStore(prepare(source, tokenizer, "t", tmp_path / "cache"))
    eos = tokenizer.eos_token_id
    for (client, split), pairs in held(source).items():
        assert store.references(client, split) == [completion for _, completion in pairs]
        for row, (text, completion) in zip(store.examples(client, split), pairs, strict=True):
            prompt = [*tokens(tokenizer, text), eos]
            response = [*tokens(tokenizer, " " + completion), eos]
            assert row.input_ids.tolist() == prompt + response
            assert row.prompt_tokens == len(prompt)
            batch = collate([row], "response")
            assert batch.inputs.tolist() == [(prompt + response)[:-1]]
            assert batch.positions.tolist() == [len(prompt) - 1 + i for i in range(len(response))]
            assert int(batch.inputs[0, batch.positions[0]]) == eos
            assert batch.targets.tolist() == response


CUT = 40


@LAW
@given(context=st.text("ab |:", max_size=70), completion=st.text("ab .", max_size=70))
def test_what_is_too_long_keeps_the_separator_and_gives_way_like_any_prompt(context, completion):
    tokenizer = CharacterTokenizer()
    record = Record(0, "train", "", context, "", completion)
    (cut,) = Encoder(tokenizer, CUT, "input", CONTEXT).encode([record])
    head = [*tokens(tokenizer, context), 2]
    response = [*tokens(tokenizer, " " + completion if completion else ""), 2]
    assert len(cut.ids) == min(CUT, len(head) + len(response))
    assert cut.truncated == (len(head) + len(response) > CUT)
    assert cut.ids[cut.prompt_tokens - 1] == 2
    assert cut.ids[: cut.prompt_tokens - 1] == head[: cut.prompt_tokens - 1]
    kept = cut.ids[cut.prompt_tokens :]
    assert kept == response[: len(kept)]
    assert len(kept) >= min(len(response), CUT - CUT // 2)
    (right,) = Encoder(tokenizer, CUT, "right", CONTEXT).encode([record])
    assert right.ids == (head + response)[:CUT]


def test_templates_have_names_of_their_own():
    assert CONTEXT.version != INSTRUCTION.version


def test_statistics_tell_the_lengths_of_each_split(
    source, tokenizer_folder, tmp_path, capsys, monkeypatch
):
    tokenizer = CharacterTokenizer()
    s = TokenStore(prepare(source, tokenizer, "t", tmp_path / "cache")).statistics()
    for split in SPLITS:
        lengths = [(len(c) + 1, len(ref) + 2) for c, ref in expected(split)]
        assert s["tokens_by_split"][split]["mean"] == pytest.approx(
            np.mean([sum(n) for n in lengths])
        )
        assert s["tokens_by_split"][split]["max"] == max(sum(n) for n in lengths)
        assert s["response_tokens_by_split"][split]["max"] == max(n for _, n in lengths)
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / "cache"))
    words = [f"data.path={source.path}", "data.partition=restaurant", "model=hf"]
    assert main(["stats", "data=e2e", *words, f"model.path={tokenizer_folder}"]) == 0
    table = capsys.readouterr().out
    assert re.search(r"^data +e2e, max_length 512, truncation input$", table, re.MULTILINE)
    assert re.search(r"^ +test tokens +mean \d+\.\d, .* max \d+$", table, re.MULTILINE)
    assert re.search(r"^ +train response +mean \d+\.\d, .* max \d+$", table, re.MULTILINE)


def test_the_environment_names_the_file(source, tokenizer_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FEDLORA_E2E", source.path)
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / "cache"))
    assert main(["show", "data=e2e", "model=hf", f"model.path={tokenizer_folder}"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^name : train house \d \| price .*<eos>\n--- resp", shown, re.MULTILINE)
    assert re.search(r"^ It 's train .* \.<eos>\n--- reference\nIt 's", shown, re.MULTILINE)


# --- the official data ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def official():
    named = os.environ.get("FEDLORA_E2E", "")
    return Path(named) if named else shared_file("e2e.parquet")


def test_the_official_data_is_read_whole(official):
    found = held(E2E(path=str(official)))
    contexts = {}
    for split, count, mrs in (("train", 42061, 4862), ("eval", 4672, 547), ("test", 4693, 630)):
        pairs = [pair for k in range(3) for pair in found[k, split]]
        contexts[split] = set(map(of_context, pairs))
        assert (len(pairs), len(contexts[split])) == (count, mrs)
    assert len(set.union(*contexts.values())) == 4862 + 547 + 630
    assert max(len(found[k, "train"]) for k in range(3)) == 14021
    assert len({of_restaurant(pair) for k in range(3) for pair in found[k, "train"]}) == 34


def test_our_rules_are_nearly_those_of_the_authors(official):
    if official.suffix != ".parquet":
        pytest.skip("only the Parquet file has the authors' texts beside the official ones")
    table = pq.read_table(official).to_pylist()
    for split in ("valid", "test"):
        here = [r for r in table if r["split"] == split]
        assert all(context(attributes(r["mr_orig"], "here")) == r["mr"] for r in here)
        assert np.mean([sentence(r["ref"]) == r["ref_tok"] for r in here]) >= 0.98
