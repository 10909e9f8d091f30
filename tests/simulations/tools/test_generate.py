"""The command on small runs: every context once, all its references, two files, one table."""

import json
import shutil

import pytest
import yaml

from fedlora.evaluation.corpus_metrics import evaluate
from simulations.tools.generate import (
    Lines,
    contexts,
    main,
    table,
)
from tests.fedlora.engine.world import FakeStore, example

FAST = ["--max-new-tokens", "5", "--beams", "2", "--device", "cpu"]
MEANINGS = ["name : Aromi | food : Thai", "name : Cotto | area : riverside", "name : Wildwood"]


@pytest.fixture
def restaurants(tmp_path):
    """Three clients with the same three prompts, each with its own response: nine rows a split."""
    file = tmp_path / "restaurants.jsonl"
    rows = [
        {
            "instruction": "",
            "input": meaning,
            "output": f"{meaning.split()[2]} number {client} .",
            "client": f"client {client}",
            "split": split,
        }
        for client in range(3)
        for split in ("train", "eval", "test")
        for meaning in MEANINGS[: 2 if split == "eval" else 3]
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["data=jsonl", f"data.path={file}", "data.split_field=split"]


@pytest.fixture
def trained(federate, restaurants):
    words = ("population.clients=0", "population.per_round=3", "client.lr=2e-2", "ranks.alpha=12")
    return federate(*restaurants, *words, "rounds=1").folder


def scored(run):
    """What a run generated, context by context."""
    return [json.loads(line) for line in (run / "nlg.jsonl").read_text().splitlines()]


def test_contexts_are_the_distinct_prompts_with_the_references_of_all_clients():
    store = FakeStore(
        {0: [example([1, 5, 6, 9], 3), example([1, 5, 9], 2)], 1: [example([1, 5, 6, 8], 3)]},
        {0: ["first", "other"], 1: ["second"]},
    )
    store.num_clients = 2
    found = contexts(store, "test")
    assert [(c.prompt.tolist(), c.references) for c in found] == [
        ([1, 5, 6], ["first", "second"]),
        ([1, 5], ["other"]),
    ]


def test_a_run_is_scored_on_its_contexts(trained, capsys):
    assert main([str(trained), *FAST]) == 0
    said = capsys.readouterr()
    rows = scored(trained)
    assert len(rows) == 3
    for row, meaning in zip(rows, MEANINGS, strict=True):
        assert meaning in row["context"]
        assert row["references"] == [f"{meaning.split()[2]} number {k} ." for k in range(3)]
        assert row["tokens"] == 5 or row["ended"]
    record = json.loads((trained / "nlg.json").read_text())
    scores = evaluate([r["hypothesis"] for r in rows], [r["references"] for r in rows])
    for name in ("bleu", "nist", "rouge_l_e2e", "cider"):
        assert record["scores"][name] == pytest.approx(getattr(scores, name))
    assert (record["contexts"], record["references"], record["split"]) == (3, 9, "test")
    assert record["decoding"] == {
        "beams": 2, "length_penalty": 0.8, "no_repeat": 4, "max_new_tokens": 5, "stop_ids": [],
        "batch_size": 8,
    }  # fmt: skip
    head, line, *_ = said.out.splitlines()
    columns = ["run", "BLEU", "NIST", "METEOR", "ROUGE-L", "CIDEr", "contexts", "seconds"]
    assert head.split() == columns
    assert line.split()[0] == trained.name and line.split()[-2] == "3"

    # the base without the adapter, part of the other split, beside it
    assert main([str(trained), *FAST, "--adapter", "none", "--split", "eval", "--limit", "1"]) == 0
    base = json.loads((trained / "nlg-base.json").read_text())
    assert (base["contexts"], base["contexts_in_split"], base["adapter"]) == (1, 2, "none")
    assert len(scored(trained)) == 3


def test_without_an_adapter_folder_the_last_checkpoint_is_taken(trained, tmp_path, capsys):
    assert main([str(trained), *FAST]) == 0
    wanted = (trained / "nlg.jsonl").read_text()
    capsys.readouterr()
    other = tmp_path / "interrupted"
    shutil.copytree(trained, other, ignore=shutil.ignore_patterns("adapter", "nlg*"))
    assert main([str(other), str(trained), *FAST]) == 0
    said = capsys.readouterr()
    assert "interrupted: no adapter/; the checkpoint after round 1 is taken" in said.err
    assert (other / "nlg.jsonl").read_text() == wanted
    first, second = (line.split() for line in said.out.splitlines()[1:3])
    assert [first[0], second[0]] == ["interrupted", trained.name]
    assert first[1:-1] == second[1:-1]


def test_what_is_no_run_is_refused(trained, tmp_path, capsys):
    def refused(words, message):
        assert main(words) == 2
        assert message in capsys.readouterr().err

    refused([str(tmp_path)], "is not a run folder: it has no config.yaml")
    refused([str(trained), "--beams", "0"], "decoding.beams=0 must be >= 1")
    refused([str(trained), "--limit", "-1"], "limit=-1 must be >= 0")
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(trained / "config.yaml", bare)
    refused([str(bare), *FAST], "has no adapter/ and no checkpoint")
    config = yaml.safe_load((bare / "config.yaml").read_text())
    del config["data"]
    (bare / "config.yaml").write_text(yaml.safe_dump(config))
    refused([str(bare), *FAST], "lacks model or data")


def test_the_table_has_the_papers_columns():
    scores = {"bleu": 68.794, "nist": 8.72589, "rouge_l_e2e": 0.69839, "cider": 2.44111}
    with_meteor = scores | {"meteor": 0.45719, "meteor_note": ""}
    without = scores | {"meteor": None, "meteor_note": "no java"}
    records = [
        {"scores": with_meteor, "contexts": 630, "seconds": 9},
        {"scores": without, "contexts": 5, "seconds": 1},
    ]
    head, first, second, note = table(["split-r4", "b"], records).splitlines()
    assert " ".join(first.split()) == "split-r4 68.79 8.7259 0.4572 69.84 2.4411 630 9.0"
    assert second.split()[3] == "-"
    assert note == "METEOR: not computed (no java)"
    ends = [line.index(word) + len(word) for line, word in ((head, "NIST"), (first, "8.7259"))]
    assert ends[0] == ends[1]


def test_progress_is_said_now_and_then():
    said, clock = [], iter([0.0, 4.0, 12.0, 13.0])
    lines = Lines(said.append, lambda: next(clock))
    for done in (10, 30, 40):
        lines(done, 60)
    assert said == ["  30/60 contexts  ETA 0:12"]
