import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from fedlora.core.config import (
    build,
    describe,
    locate,
)
from fedlora.core.errors import ConfigError
from fedlora.data import Jsonl, Source
from fedlora.data.tokenizer import FolderTokenizer
from fedlora.models.folder import find_assets
from simulations.app.compose import load
from simulations.tools.data import main, sources

CONF = Path(__file__).parents[3] / "conf" / "data"


@pytest.fixture
def jsonl(tmp_path):
    rows = [
        {
            "instruction": "Say it.",
            "input": f"{i}",
            "output": "" if i > 5 else f"{i}!",
            "client": i % 2,
        }
        for i in range(10)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / "cache"))


def tokens_of(folder: Path) -> list[str]:
    """The words that name a model folder."""
    return ["model=hf", f"model.path={folder}"]


def test_labels_are_printed_as_a_row_of_bars_for_each_client(tmp_path, tokenizer_folder, capsys):
    rows = [{"text": f"t {i}", "label": "abc"[i % 3], "client": int(i % 3 > 0)} for i in range(30)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["data=jsonl", f"data.path={tmp_path / 'rows.jsonl'}", "data.label_field=label"]
    words += ["data.eval_fraction=0", "data.test_fraction=0", *tokens_of(tokenizer_folder)]
    assert main(["stats", *words]) == 0
    table = capsys.readouterr().out
    assert re.search(r"^labels +3; training examples: 10 \(a\) to 10 \(a\)$", table, re.MULTILINE)
    assert "response" not in table and "moved" not in table
    assert table.endswith("       0     10 of   1   █  \n       1     20 of   2    ██\n")
    assert main(["show", *words, "--client", "1", "--index", "0"]) == 0
    assert re.search(
        r"label \d of 3: [bc]\n--- text, \d+ tokens\nt \d+\n$", capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "the global update"),
        (["strategy=local"], r"the base model as it is \(clients share nothing\)"),
        (["strategy=fedsa"], r"the base model as it is \(each client keeps its own B\)"),
        (["model.task=classification"], "the global update and the frozen head, drawn from .*"),
        (["model.task=classification", "model.head=averaged"], ".* and the averaged head"),
        (
            ["model.task=classification", "model.head=local", "strategy=local"],
            r"the base model as it is \(clients share nothing\) and the first head, drawn .*",
        ),
    ],
)
def test_it_says_what_unseen_clients_use(words, said, jsonl, tokenizer_folder, capsys):
    words = ["data=jsonl", f"data.path={jsonl}", *words, *tokens_of(tokenizer_folder)]
    assert main(["stats", *words]) == 0
    found = re.search(
        r"^unseen clients +evaluated with (.*)$", capsys.readouterr().out, re.MULTILINE
    )
    assert re.fullmatch(said, found[1])


def test_examples_that_a_partition_moved_are_counted(tokenizer_folder, capsys):
    words = ["data=intents", "data.alpha=0.001", "data.clients=100", *tokens_of(tokenizer_folder)]
    assert main(["stats", *words]) == 0
    table = capsys.readouterr().out
    assert re.search(r"^moved +\d+ of 13,083 examples were moved to clients", table, re.MULTILINE)
    assert "     ... and 50 clients more" in table


def test_statistics_are_printed(jsonl, tokenizer_folder, capsys):
    words = ["data=jsonl", f"data.path={jsonl}", "data.max_length=64", *tokens_of(tokenizer_folder)]
    assert main(["stats", *words]) == 0
    table = capsys.readouterr().out
    assert re.search(r"^data +jsonl, max_length 64, truncation input$", table, re.MULTILINE)
    assert re.search(r"^examples +10 \(train 6, eval 2, test 2\)$", table, re.MULTILINE)
    assert re.search(r"^empty outputs +4$", table, re.MULTILINE)


def test_an_example_is_shown_as_the_model_sees_it(jsonl, tokenizer_folder, capsys):
    words = ["data=jsonl", f"data.path={jsonl}"]
    tokens = tokens_of(tokenizer_folder)
    assert main(["show", *words, "--client", "1", *tokens]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"<bos>### Task\nSay it\.\n\n### Input\n\d\n\n### Answer\n\n--- resp", shown)
    assert main(["show", *words, "--client", "2", *tokens]) == 2
    assert capsys.readouterr().err == "error: client 2 is not in 0..1\n"


CHAT = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% if m.role == 'assistant' %}<eos>{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def test_a_conversation_is_shown_with_the_loss_of_each_part(tmp_path, tokenizer_folder, capsys):
    turns = [("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"), ("assistant", "So long")]
    rows = [{"client": 1, "messages": [{"role": r, "content": t} for r, t in turns]}] * 3
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "own.jinja").write_text(CHAT)
    words = ["data=jsonl", f"data.path={tmp_path}/rows.json", *tokens_of(tokenizer_folder)]
    assert main(["show", *words, f"data.template={tmp_path}/own.jinja"]) == 0
    shown = capsys.readouterr().out
    parts = re.findall(r"^--- (\w+), (\d+) tokens, (\d+) with a loss$", shown, re.MULTILINE)
    assert [name for name, _, _ in parts] == ["prompt", "response"] * 2
    for name, tokens, trained in parts:
        assert trained == (tokens if name == "response" else "0")
    trained, tokens = (sum(int(part[i]) for part in parts) for i in (2, 1))
    assert f"client.loss=response: {trained} of {tokens} tokens have a loss" in shown


@pytest.mark.parametrize(
    ("words", "loss"),
    [
        ([], "full"),
        (["data.template=alpaca"], "full"),
        (["data.template=chat"], "response"),
        (["data.template=chat", "client.loss=response"], "response"),
        (["data.template=alpaca", "client.loss=response"], "response"),
    ],
)
def test_a_chat_template_has_its_loss_on_answers(words, loss):
    assert load(words).client.loss == loss


def test_a_chat_template_with_a_loss_on_all_tokens_is_refused():
    with pytest.raises(ConfigError, match=r"client\.loss=full with data\.template=chat: a chat"):
        load(["data.template=chat", "client.loss=full"])


def test_the_file_of_a_template_is_found_from_any_directory(tmp_path, monkeypatch):
    (tmp_path / "own.jinja").write_text(CHAT)
    monkeypatch.chdir(tmp_path)
    cfg = load(["data.template=own.jinja"])
    assert (cfg.data.template, cfg.client.loss) == (str(tmp_path / "own.jinja"), "response")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data=dolly"], "e2e intents jsonl natural_instructions sotu"),
        (["data=jsonl"], "missing mandatory value: path"),
        (["data=sotu", "data.clients=many"], "clients='many'"),
        (
            ["data=sotu", "data.client=7"],
            "data has: _target_, clients, max_length, template, truncation",
        ),
        (["data=sotu", "clients=7"], "Could not override 'clients'"),
        (["sotu"], "'sotu' missing EQUAL"),
        (["data=natural_instructions", "data.path=no/such/file"], "neither a folder nor a file"),
    ],
)
def test_a_mistake_is_one_line_and_an_exit_code(words, message, tokenizer_folder, capsys):
    code = main(["stats", *words, *tokens_of(tokenizer_folder)])
    printed = capsys.readouterr()
    assert code == 2
    assert message in printed.err and printed.err.count("\n") == 1 and not printed.out


def test_a_folder_without_tokenizer_is_named(tmp_path, capsys):
    assert main(["stats", *tokens_of(tmp_path)]) == 2
    assert "has no tokenizer.json" in capsys.readouterr().err


def test_the_words_are_those_of_a_run():
    words = ["data=jsonl", "data.path=/x", "data.partition=iid", "data.clients=12"]
    source, folder, loss, _ = sources([*words, "client.lr=1"])
    assert loss == "full"
    assert source == Jsonl(path="/x", partition="iid", clients=12)
    assert folder == find_assets("tiny")


def test_pruning_leaves_the_tokenizer_alone():
    assert sources(["model=pruned"])[1] == find_assets("tiny")  # and nothing is pruned for it


@pytest.mark.parametrize("file", sorted(CONF.glob("*.yaml")), ids=lambda f: f.stem)
def test_a_configuration_lists_every_option_with_its_default(file):
    node = OmegaConf.load(file)
    cls = locate(node._target_)
    if OmegaConf.is_missing(node, "path"):
        node.path = "x"
    source = build(node, Source, "data")
    assert list(node)[1:] == sorted(
        (f.name for f in fields(cls)), key=lambda n: n in ("max_length", "truncation", "template")
    )
    assert source.name == file.stem
    required = {"path": source.path} if hasattr(source, "path") else {}
    assert source == cls(**required)
    assert build(describe(source), Source, "data") == source


def test_a_typing_mistake_in_the_configuration_is_named():
    with pytest.raises(ConfigError, match=r"data: unknown key 'cut_off'=7; Sotu has"):
        build({"_target_": "fedlora.data.sotu.Sotu", "cut_off": 7}, Source, "data")


def test_the_default_tokenizer_ships_with_the_package():
    tokenizer = FolderTokenizer(find_assets("tiny"))
    text = "The state of the Union: naïve, 東京."
    (ids,) = tokenizer([text], add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert None not in (tokenizer.bos_token_id, tokenizer.eos_token_id)


def test_looking_at_data_imports_no_model_library():
    code = (
        "import sys, simulations.tools.data; "
        "sys.exit(bool({'transformers', 'datasets', 'pandas'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
