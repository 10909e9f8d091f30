"""Tasks of lm-evaluation-harness on a run's model, on data that needs no network."""

import json

import pytest
import torch

from fedlora.models.spec import Tiny
from fedlora.techniques.lora.peft import load_peft
from simulations.tools import evaluate
from simulations.tools.evaluate import main, table

needs_harness = pytest.mark.skipif(
    not evaluate.installed(),
    reason="lm-evaluation-harness is not installed: pip install -e '.[evaluate]'",
)
ROWS = [
    ("The United States of", [" America", " river"], 0),
    ("The President of the United", [" oak", " States"], 1),
    ("We have the honor to", [" report", " zebra"], 1),
]
TASK = """\
task: states
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1.0}}
"""


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    lines = [dict(zip(("question", "choices", "answer"), r, strict=True)) for r in ROWS]
    (folder / "states.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "states.yaml").write_text(TASK.format(file=folder / "states.json"))
    return folder


def accuracy(model):
    """By hand: the choice of the larger likelihood."""
    right = 0
    for question, choices, answer in ROWS:
        scores = []
        for choice in choices:
            whole = model.tokenizer(question + choice, return_tensors="pt")["input_ids"]
            start = len(model.tokenizer(question)["input_ids"])
            logs = model.network(input_ids=whole).logits.log_softmax(-1)[0, :-1]
            picked = logs.gather(1, whole[0, 1:, None])[:, 0]
            scores.append(float(picked[start - 1 :].sum()))
        right += scores.index(max(scores)) == answer
    return right / len(ROWS)


@needs_harness
def test_the_harness_measures_the_mounted_model(finished, tasks, capsys):
    done = finished("client.lr=2e-2")
    words = ["--tasks", "states", "--include", str(tasks), "--device", "cpu"]
    assert main([str(done.folder), *words]) == 0
    assert main([str(done.folder), *words, "--adapter", "none"]) == 0
    assert "states" in capsys.readouterr().out
    model = Tiny().load(torch.device("cpu"))
    for name, payload in (
        ("lm_eval.json", load_peft(done.folder / "adapter", model.info)),
        ("lm_eval-base.json", None),
    ):
        record = json.loads((done.folder / name).read_text())
        with torch.no_grad():
            model.mount(payload)
            assert record["results"]["states"]["acc,none"] == pytest.approx(accuracy(model))
        assert record["base"] == model.info.fingerprint
        assert record["examples"]["states"]["effective"] == len(ROWS)


@needs_harness
def test_an_unknown_task_is_named_before_anything_is_loaded(finished, tasks, capsys):
    done = finished()
    assert main([str(done.folder), "--tasks", "state", "--include", str(tasks)]) == 2
    assert "has no task 'state'; near it: states" in capsys.readouterr().err


def test_without_the_harness_one_sentence_says_what_to_install(finished, monkeypatch, capsys):
    done = finished()
    monkeypatch.setattr(evaluate, "installed", lambda: False)
    assert main([str(done.folder), "--tasks", "boolq"]) == 2
    assert "pip install 'fedlora[evaluate]'" in capsys.readouterr().err


def test_the_table_has_a_line_per_task_and_metric():
    scores = {"alias": "a", "acc,none": 0.5, "acc_stderr,none": 0.1, "f1,none": 0.25}
    head, *lines = table({"results": {"task_a": scores}}).splitlines()
    assert head.split() == ["task", "metric", "value", "stderr"]
    assert [line.split() for line in lines] == [
        ["task_a", "acc", "0.5000", "0.1000"],
        ["task_a", "f1", "0.2500", "-"],
    ]
