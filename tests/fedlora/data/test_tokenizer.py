"""Two files read as transformers reads the folder: the same ids, the same borders of a text."""

import json

import pytest
from transformers import AutoTokenizer, GPT2Config

from fedlora.data.encode import Encoder
from fedlora.data.records import Record
from fedlora.data.tokenizer import FolderTokenizer
from tests.fedlora.models.networks import save_gpt2_tokenizer

TEXTS = ["The name is Blue Spice, near the river.", "naïve café\n\n东京 1900", ""]


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2")
    save_gpt2_tokenizer(folder, TEXTS * 9)
    GPT2Config(vocab_size=300, n_embd=8, n_layer=1, n_head=1).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("named", [{"model_max_length": 8}, {"tokenizer_class": "GPT2Tokenizer"}])
def test_gpt2s_borders_are_those_of_transformers(named, gpt2_folder):
    (gpt2_folder / "tokenizer_config.json").write_text(json.dumps(named))
    ours, theirs = FolderTokenizer(gpt2_folder), AutoTokenizer.from_pretrained(gpt2_folder)
    assert theirs.pad_token is None
    end = theirs.convert_tokens_to_ids("<|endoftext|>")
    assert (ours.bos_token_id, ours.eos_token_id) == (end, end)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (end, end)
    assert ours(TEXTS)["input_ids"] == theirs(TEXTS, add_special_tokens=False)["input_ids"]
    assert [ours.decode(ids) for ids in ours(TEXTS)["input_ids"]] == TEXTS


def test_another_class_without_names_has_no_borders(gpt2_folder):
    named = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (gpt2_folder / "tokenizer_config.json").write_text(json.dumps(named))
    ours = FolderTokenizer(gpt2_folder)
    assert (ours.bos_token_id, ours.eos_token_id) == (None, None)


def test_a_text_begins_and_ends_with_the_one_special_token(gpt2_folder):
    (gpt2_folder / "tokenizer_config.json").write_text("{}")
    theirs = AutoTokenizer.from_pretrained(gpt2_folder)
    record = Record(0, "train", "x", "Say it.", "Blue Spice", "It is near the river.")
    (encoded,) = Encoder(theirs, 512, "input").encode([record])
    borders = [i for i, token in enumerate(encoded.ids) if token == theirs.eos_token_id]
    assert borders == [0, len(encoded.ids) - 1]
    answer = encoded.ids[encoded.prompt_tokens : -1]
    assert theirs.decode(answer) == record.output
