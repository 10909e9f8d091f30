"""Texts with labels: tokens as the tokenizer lays them out, and numbers that labels keep."""

import dataclasses
import random
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from fedlora.core.errors import DataError
from fedlora.data import SPLITS, Record, TokenStore, build, prepare
from fedlora.data.labels import LabelDraft, LabelledEncoder, longest_first, ordered
from fedlora.data.tokenizer import FolderTokenizer
from tests.planted import planted

from .conftest import Listed

LAW = settings(derandomize=True, deadline=None, max_examples=40)
WORDS = ["one", "two", "three", "four", "five", "six"]
LAYOUTS = {
    "bert": ("[CLS] $A:0 [SEP]:0", "[CLS] $A [SEP] $B:1 [SEP]:1"),
    "roberta": ("[CLS] $A [SEP]", "[CLS] $A [SEP] [SEP] $B [SEP]"),
    "llama": ("[CLS] $A", "[CLS] $A [CLS] $B"),
    "t5": ("$A [SEP]", "$A [SEP] $B [SEP]"),
    "gpt2": ("$A", "$A $B"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Labelled(Listed):
    """Given records of texts with labels."""

    name: ClassVar[str] = "labelled"

    @property
    def labelled(self) -> bool:
        return True


def row(label, split="train", client=0, text="one two", second="", **rest):
    return Record(client, split, "", text, second, label, label=label, **rest)


def pair(first="one", second="two", label="x"):
    return row(label, text=first, second=second)


@pytest.fixture(params=list(LAYOUTS))
def layout(request, tmp_path):
    """The same words as transformers and as the fast reader tokenise them."""
    transformers = pytest.importorskip("transformers")
    vocabulary = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    single, pair = LAYOUTS[request.param]
    special = [("[CLS]", 2), ("[SEP]", 3)]
    words.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=special
    )
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]"
    )
    theirs.save_pretrained(tmp_path)
    return FolderTokenizer(tmp_path), theirs


SENTENCE = st.lists(st.sampled_from(WORDS), min_size=1, max_size=60).map(" ".join)


def test_texts_are_laid_out_as_transformers_does(layout):
    """One text and two, cut to a length: ids, and where the second text begins."""
    ours, theirs = layout

    @LAW
    @given(first=SENTENCE, second=SENTENCE | st.just(""), max_length=st.integers(32, 40))
    def law(first, second, max_length):
        (found,) = LabelledEncoder(ours, max_length).encode([pair(first, second)])
        texts = (first, second) if second else (first,)
        wanted = theirs(*texts, truncation="longest_first", max_length=max_length)
        assert found.ids == wanted["input_ids"]
        assert found.truncated == (len(theirs(*texts)["input_ids"]) > max_length)
        in_second = [i for i, s in enumerate(wanted.sequence_ids()) if s == 1]
        assert found.prompt_tokens == (in_second[0] if in_second else len(found.ids))
        (same,) = LabelledEncoder(theirs, max_length).encode([pair(first, second)])
        assert same == found

    law()


def test_token_types_follow_from_where_the_second_text_begins(layout):
    """As BERT has them: 0 up to the second text, 1 from there to the end."""
    ours, theirs = layout
    (found,) = LabelledEncoder(ours, 64).encode([pair("one two", "three")])
    types = theirs("one two", "three", return_token_type_ids=True)["token_type_ids"]
    assert types in ([0] * len(types), [int(i >= found.prompt_tokens) for i in range(len(types))])


@LAW
@given(st.integers(0, 50), st.integers(0, 50), st.integers(2, 60))
def test_the_longer_text_gives_way(first, second, room):
    a, b = longest_first(first, second, room)
    assert a <= first and b <= second and a + b == min(first + second, room)
    if a < first and b < second:
        assert abs(a - b) <= 1
    elif a < first:
        assert a >= b
    elif b < second:
        assert b >= a


@pytest.mark.parametrize("text", ["", "   ", "\n\t"])
def test_a_text_without_tokens_is_refused_with_its_place(layout, text, tmp_path):
    ours, _ = layout
    bad = (row("x"), row("y", text=text, where="notes.csv:7"))
    with pytest.raises(DataError, match=r"^notes\.csv:7: the text .* has no token"):
        prepare(Labelled(rows=bad), ours, "t", tmp_path)
    assert LabelledEncoder(ours, 64).encode([pair(text, "two"), pair("two", text)])


# --- numbers -------------------------------------------------------------------------------------

NAMES = st.sampled_from(["spam", "ham", "eggs", "10", "9", "Spam"])


@LAW
@given(
    labels=st.lists(st.tuples(NAMES, st.integers(0, 3), st.sampled_from(SPLITS)), max_size=30),
    seed=st.integers(0, 9),
)
def test_label_ids_depend_on_the_names_alone(labels, seed, tokenizer, tmp_path_factory):
    """Every example keeps the name of its label, whatever the order of the records."""
    known = ("spam", "ham", "eggs", "10", "9", "Spam")
    rows = [row(y, split, k) for y, k, split in labels] + [row(y) for y in known]
    mixed = random.Random(seed).sample(rows, len(rows))
    stores = [
        TokenStore(prepare(Labelled(rows=tuple(r)), tokenizer, "t", tmp_path_factory.mktemp("c")))
        for r in (rows, mixed)
    ]
    assert stores[0].labels == stores[1].labels == tuple(sorted(known))
    for split in SPLITS:
        counts = stores[0].label_counts(split)
        assert np.array_equal(counts, stores[1].label_counts(split))
        for client in range(stores[0].num_clients):
            own = [r.label for r in rows if (r.client, r.split) == (client, split)]
            assert [own.count(name) for name in known] == [
                counts[client, stores[0].labels.index(name)] for name in known
            ]
            for store in stores:
                check_labels(store, client, split)


def check_labels(store, client, split):
    """The law of label ids: each example's is that of its reference."""
    named = [store.labels[e.label] for e in store.examples(client, split)]
    assert named == store.references(client, split)


FAULTS = [
    (build._write_arrays, "numbers[rows[:, -1]]", "(numbers[rows[:, -1]] + 1) % len(numbers)"),
    (LabelDraft.names, "index[name] for name in self.numbers", "*range(len(index))"),
    (TokenStore._example, "flags, label)", "flags, (label + 1) % len(self.labels))"),
    (ordered, "return sorted(labels)", "return list(labels)[::-1]"),
]


@pytest.mark.parametrize(("function", "right", "wrong"), FAULTS)
def test_label_ids_that_are_shifted_are_caught(function, right, wrong, tokenizer, tmp_path):
    """Planted faults: the laws above are not blind."""

    def law(mark):
        source = Labelled(rows=tuple(row(y) for y in "cab"), mark=mark)
        store = TokenStore(prepare(source, tokenizer, "t", tmp_path))
        assert store.labels == ("a", "b", "c")
        check_labels(store, 0, "train")

    law("right")
    with planted(function, right, wrong), pytest.raises(AssertionError):
        law("wrong")


def test_whole_numbers_are_their_own_ids(tokenizer, tmp_path):
    rows = tuple(row(str(y)) for y in (10, 9, 2, 0, 1, *range(3, 9)))
    store = TokenStore(prepare(Labelled(rows=rows), tokenizer, "t", tmp_path))
    assert store.labels == tuple(map(str, range(11)))
    assert [e.label for e in store.examples(0, "train")] == [10, 9, 2, 0, 1, *range(3, 9)]


def test_every_example_with_a_label_counts_as_trained(tokenizer, tmp_path):
    """Also a text of one token, which a causal model could not learn from."""
    store = TokenStore(
        prepare(Labelled(rows=(row("x", text="W"), row("y"))), tokenizer, "t", tmp_path)
    )
    (client,) = store.clients
    assert client.trains("full") == client.trains("response") == 2
    assert store.statistics()["without_response"] == 0


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ((row("x"), row("y"), row("z", "test", where="a.csv:4")), r"'z' \(a\.csv:4, test split\)"),
        ((row("x"), row("y"), row("z", "eval")), "'z' .* is on no training example"),
        ((row("x"), row("x"), row("x", "test")), "all examples have the label 'x'"),
        ((row("x"), row("y"), row("", text="q", where="a.csv:9")), "a.csv:9 has no label"),
    ],
)
def test_labels_that_cannot_be_learnt_are_refused(rows, message, tokenizer, tmp_path):
    with pytest.raises(DataError, match=message):
        prepare(Labelled(rows=rows), tokenizer, "t", tmp_path)
    assert not [p for p in tmp_path.iterdir() if p.is_dir()]


def test_a_damaged_label_is_found_and_built_again(tokenizer, tmp_path):
    source = Labelled(rows=tuple(row(y) for y in "abc"))
    folder = prepare(source, tokenizer, "t", tmp_path)
    index = np.load(folder / "index.npy", allow_pickle=False)
    index[0, -1] += 1
    np.save(folder / "index.npy", index)
    with pytest.raises(DataError, match=r"index\.npy does not match its checksum"):
        TokenStore(folder)
    check_labels(TokenStore(prepare(source, tokenizer, "t", tmp_path)), 0, "train")


def test_data_without_labels_has_none(tokenizer, tmp_path):
    store = TokenStore(
        prepare(Listed(rows=(Record(0, "train", "", "a", "b", "c"),)), tokenizer, "t", tmp_path)
    )
    assert store.labels == () and store.example(0, "train", 0).label == -1
    assert store.label_counts("train").shape == (1, 0)


@pytest.mark.parametrize("option", [{"template": "alpaca"}, {"truncation": "right"}])
def test_layout_options_without_effect_are_refused(option):
    with pytest.raises(ValueError, match=r"has no effect on texts with labels"):
        Labelled(rows=(), **option)
