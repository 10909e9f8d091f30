import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedlora.core.errors import ConfigError, DataError
from fedlora.data import Record
from fedlora.data.encode import Encoder, prompt_room
from fedlora.data.template import ANSWER, prompt, question

from .conftest import CharacterTokenizer

CUTOFF = 56
LAW = settings(derandomize=True, deadline=None, max_examples=50)
TEXT = st.text(alphabet="abc .\n,é東", max_size=90)
RECORDS = st.builds(
    Record, st.just(0), st.just("train"), st.just(""), instruction=TEXT, input=TEXT, output=TEXT
)
TRUNCATIONS = ("input", "right")


def tokens(tokenizer, text):
    return tokenizer([text], add_special_tokens=False)["input_ids"][0]


def uncut(tokenizer, record):
    """BOS and prompt, then response and EOS, as long as they are."""
    head = [tokenizer.bos_token_id, *tokens(tokenizer, prompt(record.instruction, record.input))]
    return head, [*tokens(tokenizer, record.output), tokenizer.eos_token_id]


def encode(tokenizer, record, truncation="input", max_length=CUTOFF):
    (encoded,) = Encoder(tokenizer, max_length, truncation).encode([record])
    return encoded


@pytest.mark.parametrize("truncation", TRUNCATIONS)
@LAW
@given(record=RECORDS)
def test_what_fits_is_prompt_then_response_untouched(truncation, record):
    tokenizer = CharacterTokenizer()
    head, response = uncut(tokenizer, record)
    encoded = encode(tokenizer, record, truncation, max_length=400)
    assert encoded.ids == head + response
    assert encoded.prompt_tokens == len(head)
    assert not encoded.truncated


@pytest.mark.parametrize("truncation", TRUNCATIONS)
@LAW
@given(record=RECORDS)
@example(record=Record(0, "train", "", "Say yes.", "", "yes" * 40))
def test_what_does_not_fit_fills_the_maximal_length_exactly(truncation, record):
    tokenizer = CharacterTokenizer()
    head, response = uncut(tokenizer, record)
    encoded = encode(tokenizer, record, truncation)
    assert len(encoded.ids) == min(CUTOFF, len(head) + len(response))
    assert encoded.truncated == (len(head) + len(response) > CUTOFF)
    assert 0 < encoded.prompt_tokens <= len(encoded.ids)


@LAW
@given(record=RECORDS)
def test_right_is_a_prefix_of_the_uncut_sequence(record):
    """The rule of the FlexLoRA code: cut at `max_length`, EOS only if there is room."""
    tokenizer = CharacterTokenizer()
    head, response = uncut(tokenizer, record)
    encoded = encode(tokenizer, record, "right")
    assert encoded.ids == (head + response)[:CUTOFF]
    assert encoded.prompt_tokens == min(len(head), CUTOFF)


@LAW
@given(record=RECORDS)
@example(record=Record(0, "train", "", "Stop.", "", "b" * 50))
@example(record=Record(0, "train", "", "x", "Stop.", "b" * 50))
def test_input_gives_way_before_the_response(record):
    tokenizer = CharacterTokenizer()
    _, response = uncut(tokenizer, record)
    encoded = encode(tokenizer, record)
    kept = encoded.ids[encoded.prompt_tokens :]
    assert kept == response[: len(kept)]
    assert len(kept) >= min(len(response), CUTOFF - CUTOFF // 2)
    if encoded.truncated and len(kept) < len(response):
        assert encoded.prompt_tokens <= CUTOFF // 2


@LAW
@given(record=RECORDS)
def test_a_cut_prompt_still_asks_for_the_answer(record):
    tokenizer = CharacterTokenizer()
    encoded = encode(tokenizer, record)
    text = "".join(
        ".\n\n" if i == 0x110002 else chr(i - 3) for i in encoded.ids[1 : encoded.prompt_tokens]
    )
    assert text.endswith(ANSWER)
    assert question(record.instruction, record.input).startswith(text.removesuffix(ANSWER))


@pytest.mark.parametrize("truncation", TRUNCATIONS)
@LAW
@given(records=st.lists(RECORDS, min_size=1, max_size=5))
def test_a_batch_is_its_records_one_by_one(truncation, records):
    encoder = Encoder(CharacterTokenizer(), CUTOFF, truncation)
    assert encoder.encode(records) == [encoder.encode([r])[0] for r in records]


@given(st.integers(1, 99), st.integers(1, 99), st.integers(2, 99))
@LAW
def test_the_prompt_keeps_at_most_itself_and_at_least_half_the_room(prompt, response, max_length):
    room = prompt_room(prompt, response, max_length)
    assert min(prompt, max_length // 2) <= room <= prompt
    assert room + response <= max_length or room <= max_length // 2


@pytest.mark.parametrize("truncation", TRUNCATIONS)
def test_an_empty_output_is_one_token_that_ends(truncation):
    encoded = encode(CharacterTokenizer(), Record(0, "train", "", "Be quiet.", "", ""), truncation)
    assert encoded.ids[encoded.prompt_tokens :] == [2]


class Spy:
    """Notes what it is asked to read."""

    bos_token_id, eos_token_id = 1, 2

    def __init__(self):
        self.inner, self.seen = CharacterTokenizer(), []

    def __len__(self):
        return len(self.inner)

    def __call__(self, text, *, add_special_tokens, verbose=False):
        self.seen.extend(text)
        return self.inner(text, add_special_tokens=add_special_tokens)


@pytest.mark.parametrize("truncation", TRUNCATIONS)
@pytest.mark.parametrize("field", ["instruction", "input", "output"])
def test_no_text_is_read_much_further_than_it_can_matter(truncation, field):
    spy = Spy()
    texts = {"instruction": "a", "input": "b", "output": "c"} | {field: "long " * 60_000}
    encoded = encode(spy, Record(0, "train", "", **texts), truncation)
    assert max(len(text) for text in spy.seen) < 20 * CUTOFF
    assert encoded.truncated
    assert len(encoded.ids) == CUTOFF


def test_a_response_that_is_cut_does_not_end():
    encoded = encode(CharacterTokenizer(), Record(0, "train", "", "a", "", "b" * 5000))
    assert 2 not in encoded.ids[1:]


class Long:
    """One token per hundred characters, and the prompt's last lines alone are one token."""

    bos_token_id, eos_token_id = 1, 2

    def __init__(self, width=100):
        self.width = width

    def __len__(self):
        return 2**16

    def __call__(self, text, *, add_special_tokens, verbose=False):
        def ids(t):
            return (
                [9]
                if t == ANSWER
                else [3 + len(t[i : i + 1]) for i in range(0, len(t), self.width)]
            )

        return {"input_ids": [ids(t) for t in text]}


@pytest.mark.parametrize("truncation", TRUNCATIONS)
def test_a_response_that_was_not_read_to_its_end_does_not_end(truncation):
    """With long tokens, what is read of an output can fit `max_length` without being all of it."""
    encoded = encode(Long(), Record(0, "train", "", "a", "", "b" * 5000), truncation)
    assert len(encoded.ids) < CUTOFF
    assert encoded.truncated and encoded.ids[-1] != 2


def test_a_cut_prompt_has_its_last_lines_once():
    """Even where they have other tokens in a text than alone."""
    encoded = encode(Long(width=1), Record(0, "train", "", "a" * 90, "", "b"))
    assert encoded.ids[encoded.prompt_tokens - 1] == 9
    kept = encoded.prompt_tokens - 2
    assert kept == CUTOFF - 4
    record = Record(0, "train", "", "a" * 30, "", "b" * 5)
    encoded = encode(Long(width=1), record)
    assert encoded.prompt_tokens - 2 == min(len(question("a" * 30)), CUTOFF - 6 - 2)


def test_a_tokenizer_without_bos_begins_with_the_prompt():
    tokenizer = CharacterTokenizer(bos_token_id=None)
    encoded = encode(tokenizer, Record(0, "train", "", "Go", "", "ok"))
    assert encoded.ids[: encoded.prompt_tokens] == tokens(tokenizer, prompt("Go"))
    assert len(encode(tokenizer, Record(0, "train", "", "Go", "x" * 99, "ok")).ids) == CUTOFF


def test_a_tokenizer_without_eos_is_refused():
    with pytest.raises(DataError, match="no EOS token"):
        Encoder(CharacterTokenizer(eos_token_id=None), CUTOFF, "input")


def test_a_maximal_length_without_room_for_the_prompt_is_refused():
    with pytest.raises(ConfigError, match=r"data\.max_length=20 must be >= 30"):
        Encoder(CharacterTokenizer(), 20, "input")


def test_ids_are_those_of_transformers(tokenizer, tokenizer_folder, caplog):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tokenizer_folder, model_max_length=32)
    transformers.logging.enable_propagation()
    records = [
        Record(0, "train", "", "Translate.", text, out)
        for text, out in [("The cat", "Le chat"), ("東京 " * 40, "naïve"), ("", "")]
    ]
    assert Encoder(theirs, 64, "input").encode(records) == (
        Encoder(tokenizer, 64, "input").encode(records)
    )
    assert "longer than the specified" not in caplog.text
    assert tokenizer.bos_token_id == theirs.bos_token_id
    assert tokenizer.eos_token_id == theirs.eos_token_id
    assert len(tokenizer) == len(theirs)
