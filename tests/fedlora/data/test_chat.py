"""Chat templates: the ids and the mask are transformers' own, and only answers have a loss."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from fedlora.core.errors import ConfigError, DataError
from fedlora.data import Jsonl, Record, TokenStore, prepare
from fedlora.data.batches import collate, supervised_tokens, targets_of
from fedlora.data.chat import ChatEncoder, token_span
from fedlora.data.encode import Encoder, exchanges
from fedlora.data.records import Turn
from fedlora.data.template import ALPACA, INSTRUCTION, TEMPLATES
from fedlora.data.tokenizer import FolderTokenizer

from .conftest import CharacterTokenizer, Listed

LAW = settings(derandomize=True, deadline=None, max_examples=25)

CHATML = (
    "{% for m in messages %}<bos>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<eos>{% endgeneration %}"
    "{% else %}{{ m.content }}<eos>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<bos>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set system = '<<S>>' + messages[0].content %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}{{ bos_token }}[INST] "
    "{{ system if loop.first else '' }}{{ m.content | trim }} [/INST]"
    "{% else %}{% generation %} {{ m.content | trim }} {{ eos_token }}{% endgeneration %}"
    "{% endif %}{% endfor %}"
)
PLAIN = (
    "{% for m in messages %}{{ m.role }}: "
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{% if not loop.last %}{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n' }}assistant: {% endif %}"
)
REASONING = (  # leaves the thoughts of earlier turns out, as Qwen3's does
    "{% for m in messages %}<bos>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<eos>{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<bos>assistant\n{% endif %}"
)
TAGGED = {"chatml": CHATML, "llama2": LLAMA2, "plain": PLAIN}
WORDS = st.text(alphabet="abc .,é東🙂", min_size=1, max_size=30).filter(str.strip)


def untagged(template):
    return template.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def talk(questions, answers, system=""):
    """A record of alternating questions and answers."""
    turns = [Turn("system", system)] if system else []
    for question, answer in zip(questions, answers, strict=True):
        turns += [Turn("user", question), Turn("assistant", answer)]
    return Record(0, "train", "", "", "", turns.pop().text, turns=tuple(turns))


def messages(record):
    turns = (*record.turns, Turn("assistant", record.output))
    return [{"role": t.role, "content": t.text} for t in turns]


TALK = talk(["What is 1 + 1?", "And 2 + 2?"], ["It is 2.", "It is 4."], "Be brief.")
RECORDS = st.integers(1, 3).flatmap(
    lambda n: st.builds(
        talk,
        st.lists(WORDS, min_size=n, max_size=n),
        st.lists(WORDS, min_size=n, max_size=n),
        st.sampled_from(["", "Be brief."]),
    )
)


@pytest.fixture(scope="module")
def theirs(tokenizer_folder):
    return AutoTokenizer.from_pretrained(tokenizer_folder)


def encode(tokenizer, template, record, max_length=4096, truncation="input"):
    (encoded,) = ChatEncoder(tokenizer, max_length, truncation, "chat", template).encode([record])
    assert len(encoded.responses) == len(encoded.ids)
    return encoded


def trained(tokenizer, encoded):
    """The text of each run of tokens with a loss."""
    flags = np.array([False, *encoded.responses, False])
    borders = np.flatnonzero(np.diff(flags)).reshape(-1, 2).tolist()
    return [tokenizer.decode(encoded.ids[a:b]) for a, b in borders]


@pytest.mark.parametrize("name", ["chatml", "llama2"])
@LAW
@given(record=RECORDS)
def test_ids_and_mask_are_those_of_transformers(name, record, tokenizer, theirs):
    wanted = theirs.apply_chat_template(
        messages(record),
        chat_template=TAGGED[name],
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    for mine in (tokenizer, theirs):
        encoded = encode(mine, TAGGED[name], record)
        assert encoded.ids == wanted["input_ids"]
        assert encoded.responses == [bool(flag) for flag in wanted["assistant_masks"]]


@pytest.mark.parametrize("name", TAGGED)
@LAW
@given(record=RECORDS)
@example(record=TALK)
def test_without_tags_the_same_answers_are_found_from_prefixes(name, record, tokenizer):
    tagged, plain = TAGGED[name], untagged(TAGGED[name])
    wanted, found = (encode(tokenizer, t, record) for t in (tagged, plain))
    assert found.ids == wanted.ids
    assert found.prompt_tokens == wanted.prompt_tokens
    mine, theirs = trained(tokenizer, found), trained(tokenizer, wanted)
    assert len(mine) == len(theirs) == len([m for m in messages(record) if m["role"][0] == "a"])
    for one, other in zip(mine, theirs, strict=True):  # the line's end belongs to a turn
        assert one.rstrip("\n") == other.rstrip("\n")


@pytest.mark.parametrize("template", [CHATML, untagged(CHATML)], ids=["tags", "prefixes"])
def test_only_answers_and_their_ends_have_a_loss(template, tokenizer):
    encoded = encode(tokenizer, template, TALK)
    texts = [text.rstrip("\n") for text in trained(tokenizer, encoded)]
    assert texts == ["It is 2.<eos>", "It is 4.<eos>"]
    prompt = tokenizer.decode(encoded.ids[: encoded.prompt_tokens])
    assert prompt.endswith("And 2 + 2?<eos>\n<bos>assistant\n")


def test_an_instruction_record_is_a_question_with_its_input(tokenizer):
    record = Record(0, "train", "", "Add.", "1 and 1", "2")
    encoded = encode(tokenizer, CHATML, record)
    text = tokenizer.decode(encoded.ids)
    assert text == "<bos>user\nAdd.\n\n1 and 1<eos>\n<bos>assistant\n2<eos>\n"


def test_eos_ends_an_answer_that_the_template_leaves_open(tokenizer):
    for template in (PLAIN, untagged(PLAIN)):
        encoded = encode(tokenizer, template, TALK)
        assert encoded.ids[-1] == tokenizer.eos_token_id
        assert trained(tokenizer, encoded)[-1] == "It is 4.<eos>"


def test_a_jinja_file_sees_the_fields_of_a_record(tokenizer, tmp_path):
    file = tmp_path / "own.jinja"
    file.write_text("Q: {{ instruction }} ({{ input }})\nA: {{ output }}")
    source = Listed(rows=(Record(0, "train", "", "Add", "1, 1", "2"),), template=str(file))
    (encoded,) = source.encoder(tokenizer).encode(source.rows)
    assert tokenizer.decode(encoded.ids) == "Q: Add (1, 1)\nA: 2<eos>"
    assert trained(tokenizer, encoded) == ["2<eos>"]
    file.write_text("Q: {{ instruction }}")
    with pytest.raises(DataError, match="does not show the answer of a record of client 0"):
        source.encoder(tokenizer).encode(source.rows)


def test_thoughts_left_out_of_earlier_turns_do_not_hide_answers(tokenizer):
    encoded = encode(tokenizer, REASONING, TALK)
    assert [t.rstrip("\n") for t in trained(tokenizer, encoded)] == [
        "It is 2.<eos>",
        "<think>\n\n</think>\n\nIt is 4.<eos>",
    ]


@pytest.mark.parametrize(
    ("template", "record", "message"),
    [
        (LLAMA2, Record(3, "train", "", "", "", "A", turns=(Turn("user", "Q"),) * 2), "alternate"),
        ("{{ messages | length }}", TALK, "differently once more messages follow"),
        ("{% for m in messages %}", TALK, "refuses a record of client 0 .*: .*endfor"),
        (CHATML.replace("assistant'", "nobody'"), TALK, "does not show the answer"),
    ],
)
def test_a_template_that_cannot_be_used_is_explained(template, record, message, tokenizer):
    with pytest.raises(DataError, match=message) as caught:
        encode(tokenizer, template, record)
    assert "data.template=chat" in str(caught.value)


# --- where the template comes from ----------------------------------------------------------------


@pytest.mark.parametrize("place", ["file", "config", "named"])
def test_the_template_of_a_folder_is_that_of_transformers(place, tokenizer_folder, tmp_path):
    shutil.copytree(tokenizer_folder, tmp_path / "t")
    config = json.loads((tmp_path / "t" / "tokenizer_config.json").read_text())
    if place == "file":
        (tmp_path / "t" / "chat_template.jinja").write_text(CHATML)
    elif place == "config":
        config["chat_template"] = CHATML
    else:
        config["chat_template"] = [
            {"name": "rag", "template": "x"},
            {"name": "default", "template": CHATML},
        ]
    (tmp_path / "t" / "tokenizer_config.json").write_text(json.dumps(config))
    ours, theirs = FolderTokenizer(tmp_path / "t"), AutoTokenizer.from_pretrained(tmp_path / "t")
    source = Listed(rows=(TALK,), template="chat")
    mine, same = source.encoder(ours), source.encoder(theirs)
    assert mine.version == same.version
    assert mine.encode([TALK]) == same.encode([TALK])
    assert mine.version != replace(mine, template=LLAMA2).version


def test_a_base_model_without_a_chat_template_is_named(tokenizer):
    with pytest.raises(ConfigError, match=r"the model's tokenizer has no chat template.*; use"):
        Listed(rows=(TALK,), template="chat").encoder(tokenizer)
    with pytest.raises(ValueError, match=r"data\.template='vicuna' is not one of .*nor a Jinja"):
        Listed(rows=(), template="vicuna")


# --- cutting --------------------------------------------------------------------------------------


@pytest.mark.parametrize("truncation", ["input", "right"])
@LAW
@given(record=RECORDS, limit=st.integers(48, 120))
def test_what_is_too_long_keeps_its_last_answer(truncation, record, limit, tokenizer):
    whole = encode(tokenizer, CHATML, record)
    cut = encode(tokenizer, CHATML, record, limit, truncation)
    assert len(cut.ids) <= limit
    assert cut.truncated == (len(whole.ids) > limit)
    if truncation == "right":
        assert (cut.ids, cut.responses) == (whole.ids[:limit], whole.responses[:limit])
    else:
        answer = whole.ids[whole.prompt_tokens :]
        kept = cut.ids[cut.prompt_tokens :]
        assert kept == answer[: len(kept)]
        assert len(kept) >= min(len(answer), limit - limit // 2)
        assert tokenizer.decode(cut.ids[: cut.prompt_tokens]).endswith("<eos>\n<bos>assistant\n")


def test_the_first_exchanges_go_before_the_last_question(tokenizer):
    short = talk(["And 2 + 2?"], ["It is 4."], "Be brief.")
    room = len(encode(tokenizer, CHATML, short).ids)
    cut = encode(tokenizer, CHATML, TALK, room)
    assert cut == replace(encode(tokenizer, CHATML, short), truncated=True)


# --- conversations without a chat template --------------------------------------------------------


@pytest.mark.parametrize("template", [INSTRUCTION, ALPACA], ids=["ours", "alpaca"])
@LAW
@given(record=RECORDS)
def test_other_templates_lay_out_each_exchange_like_a_record(template, record):
    tokenizer = CharacterTokenizer()
    encoder = Encoder(tokenizer, 4096, "input", template)
    (whole,) = encoder.encode([record])
    parts = encoder.encode(exchanges(record))
    ids = [parts[0].ids, *(p.ids[1:] for p in parts[1:])]  # one BOS
    assert whole.ids == [i for part in ids for i in part]
    answers = [i for p in parts for i in p.ids[p.prompt_tokens :]]
    assert [i for i, f in zip(whole.ids, whole.responses, strict=True) if f] == answers
    assert whole.ids[whole.prompt_tokens :] == parts[-1].ids[parts[-1].prompt_tokens :]


def test_a_long_conversation_loses_its_first_exchanges():
    encoder = Encoder(CharacterTokenizer(), 90, "input", INSTRUCTION)
    (cut,) = encoder.encode([TALK])
    (last,) = encoder.encode([talk(["And 2 + 2?"], ["It is 4."], "Be brief.")])
    assert (cut.ids, cut.prompt_tokens, cut.truncated) == (last.ids, last.prompt_tokens, True)


def test_messages_of_tools_need_a_chat_template():
    turns = (Turn("user", "a"), Turn("tool", "b"))
    with pytest.raises(DataError, match=r"a message of a tool.*use data.template=chat"):
        exchanges(Record(0, "train", "", "", "", "c", turns=turns))


def test_alpaca_is_the_prompt_of_stanford():
    with_input = ALPACA.question("Add.", "1 and 1") + ALPACA.mark
    assert with_input == (
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 and 1\n\n### Response:"
    )
    assert ALPACA.question("Add.", "") == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nAdd."
    )
    assert len({t.version for t in TEMPLATES.values()}) == len(TEMPLATES)


# --- stores and batches ---------------------------------------------------------------------------


def test_a_store_keeps_the_mask(tokenizer, tmp_path):
    rows = (TALK, Record(0, "train", "", "Add.", "", "2"), replace(TALK, client=1))
    (tmp_path / "c.jinja").write_text(CHATML)
    source = Listed(rows=rows, template=str(tmp_path / "c.jinja"), mark="chat")
    store = TokenStore(prepare(source, tokenizer, "t", tmp_path))
    wanted = source.encoder(tokenizer).encode(rows)
    found = [*store.examples(0, "train"), *store.examples(1, "train")]
    for k, info in enumerate(store.clients):
        held = store.examples(k, "train")
        for loss in ("full", "response"):
            assert info.trains(loss) == sum(supervised_tokens(e, loss) > 0 for e in held)
    answers = store.statistics()["response_tokens_by_split"]["train"]
    assert answers["max"] == max(sum(e.responses) for e in wanted)
    assert answers["min"] == min(sum(e.responses) for e in wanted)
    for encoded, held in zip(wanted, found, strict=True):
        assert held.responses.tolist() == encoded.responses
        assert targets_of(held, "response").tolist() == np.flatnonzero(encoded.responses).tolist()
        assert supervised_tokens(held, "response") == sum(encoded.responses)
        assert supervised_tokens(held, "full") == len(encoded.ids) - 1
        batch = collate([held], "response")
        assert batch.targets.tolist() == held.input_ids[held.responses].tolist()


def test_a_store_without_gaps_has_no_mask(tokenizer, tmp_path):
    row = Record(0, "train", "", "Add.", "", "2")
    store = TokenStore(prepare(Listed(rows=(row,), mark="plain"), tokenizer, "t", tmp_path))
    assert store.examples(0, "train")[0].responses is None
    assert Jsonl(path="x").template == "ours"


def test_the_span_of_a_character_in_several_tokens_is_whole():
    places = [(0, 1), (1, 2), (1, 2), (2, 4)]
    assert token_span(places, (1, 2)) == (1, 3)
    assert token_span(places, (0, 4)) == (0, 4)
    assert token_span(places, (4, 9)) == (4, 4)
