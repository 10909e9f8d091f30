"""Whole runs of classifiers: heads, exports, continuation, and what is refused."""

import dataclasses
import json

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from fedlora.core.errors import ConfigError
from fedlora.models.headed import HEAD, WithHead
from fedlora.run import checkpoint
from simulations.app.compose import load
from simulations.app.export import READ_BACK
from simulations.app.parts import build_parts
from simulations.tools import export, generate
from simulations.tools.base_model import base_of
from simulations.tools.final_payload import final_payload, run_config
from simulations.tools.merge import merge_run

INTENTS = ("data=intents", "model.task=classification", "model.layers=top:1")
OWN = ("evaluate=loss", "evaluate.adapters=[own]", "evaluate.clients=4", "evaluate.every=2")
SEED_HEAD = "score.weight"


def spec_of(done):
    return base_of(done.folder, run_config(done.folder).model, lambda line: None)


def exported_head(done):
    tensors = load_file(done.folder / "adapter" / "adapter_model.safetensors")
    return tensors[f"base_model.model.{SEED_HEAD}"]


@pytest.mark.parametrize(
    ("strategy", "mode"),
    [
        ("fedit", "frozen"),
        ("flexlora", "averaged"),
        ("heterolora", "averaged"),
        ("fedavg", "averaged"),
        ("flexlora", "local"),
        ("local", "local"),
    ],
)
def test_a_run_trains_exports_and_is_read_by_plain_peft(finished, strategy, mode):
    words = (*INTENTS, *OWN, f"strategy={strategy}", f"model.head={mode}")
    done = finished(*words, read_back=True)
    assert "WARNING" not in done.said
    folder, spec = done.folder / "adapter", spec_of(done)
    assert len(spec.labels) == 77
    record = json.loads((folder / "fedlora.json").read_text())
    assert record[READ_BACK]["agrees"]
    card = (folder / "README.md").read_text()
    assert "text-classification" in card
    assert "num_labels=77" in card
    assert f"76 {spec.labels[76]}" in card
    moved = not torch.equal(exported_head(done), spec.head_state()[SEED_HEAD])
    assert moved == (mode == "averaged")
    evaluated = [r for r in done.records if r["kind"] == "evaluate"]
    assert {"loss", "accuracy", "accuracy_low"} <= evaluated[-1].keys()
    base = AutoModelForSequenceClassification.from_pretrained(
        spec.folder(), num_labels=77, pad_token_id=spec.tokenizer().pad_token_id
    )
    theirs = peft.PeftModel.from_pretrained(base, str(folder))
    assert torch.equal(theirs.base_model.model.score.weight, exported_head(done))


def test_heads_that_travel_are_counted_and_local_ones_are_kept(finished):
    runs = {
        mode: finished(*INTENTS, "strategy=fedit", f"model.head={mode}", "rounds=1", output=mode)
        for mode in ("frozen", "averaged", "local")
    }
    head = 4 * spec_of(runs["frozen"]).head_state()[SEED_HEAD].numel()
    up = {mode: done.rounds[0]["wire/up_bytes"] for mode, done in runs.items()}
    assert up["local"] == up["frozen"]
    assert up["averaged"] - up["frozen"] == 6 * head
    assert runs["local"].rounds[0]["client_state/clients"] == 6
    assert "never took part are evaluated with the global update and the fi" in runs["local"].said
    assert "never took part" not in runs["averaged"].said
    for mode, what in (("frozen", "frozen"), ("averaged", "averaged"), ("local", "first")):
        population = json.loads((runs[mode].folder / "population.json").read_text())
        assert population["unseen_model"].startswith(f"the global update and the {what} head")
    assert "client_state/clients" not in runs["averaged"].rounds[0]


@pytest.mark.parametrize("mode", ["averaged", "local"])
def test_a_run_with_heads_goes_on_as_if_unbroken(federate, mode):
    words = (*INTENTS, "strategy=flexlora", f"model.head={mode}", "federation.wire=bfloat16")
    whole = federate(*words, "federation.error_feedback=true", output="whole")
    words = (*words, "federation.error_feedback=true", "resume=auto")
    federate(*words, "rounds=1")
    assert federate(*words).hash == whole.hash


def test_tools_read_a_run_of_a_classifier(finished, tmp_path):
    done = finished(*INTENTS, *OWN, "strategy=flexlora", "model.head=averaged")
    config, spec = run_config(done.folder), spec_of(done)
    final = final_payload(done.folder, config, spec.describe(), lambda line: None)
    assert isinstance(final, WithHead)
    state = checkpoint.latest(done.folder / "checkpoints").state
    assert torch.equal(final.values[SEED_HEAD], state[f"{HEAD}{SEED_HEAD}"])
    export.export_run(done.folder)
    again = final_payload(done.folder, config, spec.describe(), lambda line: None)
    assert torch.equal(again.values[SEED_HEAD], final.values[SEED_HEAD])
    merge_run(done.folder, tmp_path / "merged")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert torch.equal(plain.score.weight, final.values[SEED_HEAD])
    assert plain.config.id2label[0] == spec.labels[0]
    assert "AutoModelForSequenceClassification" in (tmp_path / "merged" / "README.md").read_text()


def test_a_classifier_writes_no_text(finished, capsys):
    done = finished(*INTENTS, "strategy=fedit", "model.head=frozen", "rounds=1")
    assert generate.main([str(done.folder)]) == 2
    assert "writes no text" in capsys.readouterr().err


def test_generation_is_off_for_a_classifier_whatever_the_schedule_says():
    words = [*INTENTS, "evaluate=fast", "evaluate.plan.generate=true"]
    assert not build_parts(load(words)).evaluate.plan.generate
    assert build_parts(load(["evaluate=fast"])).evaluate.plan.generate


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["data=intents"], r"data=intents .*model\.task=causal_lm.*use model\.task=classification"),
        (["model.task=classification"], r"needs labels, and data=sotu has none: use data=intents"),
        ([*INTENTS, "strategy=splitlora"], r"classification with strategy=splitlora: .*another"),
        (["model.head=averaged"], r"model\.head=averaged with model\.task=causal_lm"),
        (
            [*INTENTS, "strategy=switchlora", "model.head=averaged"],
            r"model\.head=averaged: clients of SwitchLoRA .*use model\.head=frozen",
        ),
        (
            [*INTENTS, "strategy=local", "model.head=averaged"],
            r"Local averages nothing; use model\.head=local",
        ),
        (
            [*INTENTS, "model.head=local", "evaluate=loss"],
            r"evaluate\.adapters=\['full'\] .*use evaluate\.adapters=\[own\]",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(words, said):
    with pytest.raises(ConfigError, match=said) as error:
        build_parts(load(words))
    assert "\n" not in str(error.value)


def test_an_evaluation_on_validation_rows_that_train_is_refused(federate):
    words = ("data.train_on=train_valid", "evaluate=loss", "evaluate.plan.split=eval")
    with pytest.raises(ConfigError, match="in the eval split; use another") as error:
        federate(*INTENTS, "strategy=fedit", *words)
    assert "\n" not in str(error.value)


def test_seeds_give_heads(federate):
    one, other = (federate(*INTENTS, "rounds=1", f"seed={s}", output=str(s)) for s in (0, 1))
    assert not torch.equal(exported_head(one), exported_head(other))
    spec = spec_of(one)
    assert torch.equal(exported_head(one), spec.head_state()[SEED_HEAD])
    assert (
        dataclasses.replace(spec, head_seed=1).head_state()[SEED_HEAD].equal(exported_head(other))
    )
