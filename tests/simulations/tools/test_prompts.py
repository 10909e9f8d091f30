"""Answers to prompts: one, a file, a conversation, laid out as the training data is."""

import json
from pathlib import Path

import numpy as np
import pytest

from fedlora.data.encode import Encoder
from fedlora.evaluation.beam_search import Decoding, Hypothesis
from fedlora.models.spec import Tiny
from simulations.tools import generate
from simulations.tools.generate import main
from simulations.tools.prompts import Answerer, Question, chat, questions

SHORT = ["--max-new-tokens", "6", "--device", "cpu"]


class Parrot(Answerer):
    """Answers with the number of tokens that it has read."""

    def answer(self, prompts):
        self.read.extend(p.tolist() for p in prompts)
        return [Hypothesis(np.array([len(p)]), str(len(p)), True) for p in prompts]


@pytest.fixture
def parrot():
    class Model:
        tokenizer = Tiny().tokenizer()

    found = Parrot(Model(), Encoder(Model.tokenizer, 512, "input"), Decoding(beams=1))
    object.__setattr__(found, "read", [])
    return found


def test_a_prompt_is_what_the_model_was_trained_on(parrot):
    ids = parrot.prompt(Question("Name a tree.", "oak"))
    text = parrot.model.tokenizer.decode(ids.tolist(), skip_special_tokens=True)
    assert text == "### Task\nName a tree.\n\n### Input\noak\n\n### Answer\n"
    assert ids[0] == parrot.model.tokenizer.bos_token_id


def test_a_conversation_is_read_from_its_beginning(parrot):
    said = []
    chat(parrot, iter(["one", "", "two", "/new", "three", "/exit", "never"]), said.append)
    one, two, three = (parrot.prompt(Question(q)).tolist() for q in ("one", "two", "three"))
    end, bos = parrot.model.tokenizer.eos_token_id, parrot.model.tokenizer.bos_token_id
    answer = parrot.model.tokenizer(str(len(one)), add_special_tokens=False)["input_ids"]
    assert parrot.read == [one, [*one, *answer, end, *two[1:]], three]
    assert [ids.count(bos) for ids in parrot.read] == [1, 1, 1]
    assert said == [str(len(ids)) for ids in parrot.read]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.txt", "Name a tree.\n\nWhat is an oak?\n"),
        (
            "p.jsonl",
            '{"instruction": "Name a tree."}\n\n{"prompt": "What is an oak?", "input": ""}',
        ),
    ],
)
def test_files_of_prompts(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    assert questions(tmp_path / name) == [Question("Name a tree."), Question("What is an oak?")]


def test_one_prompt_a_file_and_a_conversation_are_answered(finished, tmp_path, capsys, monkeypatch):
    run = str(finished().folder)
    assert main([run, *SHORT, "--prompt", "Name a tree."]) == 0
    answer = capsys.readouterr().out
    (tmp_path / "p.txt").write_text("Name a tree.\nName a river.\n")
    assert main([run, *SHORT, "--file", str(tmp_path / "p.txt")]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [r["instruction"] for r in rows] == ["Name a tree.", "Name a river."]
    assert rows[0]["output"] + "\n" == answer
    monkeypatch.setattr(generate, "typed", lambda: iter(["Name a tree."]))
    assert main([run, *SHORT, "--chat"]) == 0
    assert capsys.readouterr().out == answer


def test_mistakes_are_one_sentence(finished, tmp_path, capsys):
    run = str(finished().folder)
    (tmp_path / "bad.jsonl").write_text('{"instruction": "x"}\n{"question": "y"}\n')
    (tmp_path / "torn.jsonl").write_text('{"instruction": ')
    (tmp_path / "empty.txt").write_text("\n")
    for words, message in (
        ([run, run, "--prompt", "x"], "name one run folder"),
        ([run, "--prompt", " "], "--prompt is empty"),
        ([run, "--file", str(tmp_path / "no.txt")], "cannot be read"),
        ([run, "--file", str(tmp_path / "bad.jsonl")], "bad.jsonl, line 2 must be an object"),
        ([run, "--file", str(tmp_path / "torn.jsonl")], "torn.jsonl, line 1 is no JSON"),
        ([run, "--file", str(tmp_path / "empty.txt")], "has no prompt"),
    ):
        assert main([*words, *SHORT]) == 2
        said = capsys.readouterr().err.strip().splitlines()
        assert message in said[-1] and len(said) == 1
    assert not (Path(run) / "nlg.json").exists()
