"""Values of different groups that must agree: compared before the run has a folder."""

import json
import shutil

import pytest
from transformers import AutoTokenizer

from fedlora.core.errors import ConfigError, ModelError
from fedlora.models.folder import find_assets
from simulations.app.compose import load
from simulations.app.parts import build_parts
from simulations.app.runtime import Runtime
from simulations.app.simulate import REFUSED
from simulations.run import guarded

GPT2 = ("model=tiny_gpt2", "strategy=fedit")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((*GPT2, "data.max_length=513"), "data.max_length=513 exceeds the 512 positions"),
        (("data.max_length=1025",), "data.max_length=1025 exceeds the 1024 positions of tiny"),
        (
            (*GPT2, "evaluate=fast", "evaluate.plan.max_new_tokens=512"),
            "max_new_tokens=512 leaves no room for a prompt in the 512 positions",
        ),
        (
            ("federation.min_clients=7", "population.per_round=6"),
            "federation.min_clients=7 can never be met with 6 clients per round",
        ),
        (
            ("strategy=spp", "model.length=1025"),
            "model.length=1025 exceeds the 1024 positions of tiny",
        ),
    ],
)
def test_limits_of_another_group_are_refused_before_there_is_a_folder(
    federate, tmp_path, overrides, message
):
    with pytest.raises((ConfigError, ModelError)) as caught:
        federate(*overrides)
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def again(error):
    raise error


def _rows(path, words):
    rows = [
        {"client": f"c{i % 4}", "instruction": "Say", "input": "word " * words, "output": f"a {i}"}
        for i in range(24)
    ]
    path.write_text("\n".join(json.dumps(r) for r in rows))
    return (
        "data=jsonl", f"data.path={path}", "population.clients=0", "population.per_round=2",
        "population.unseen_fraction=0", "rounds=1",
    )  # fmt: skip


def test_the_longest_allowed_examples_train_on_all_clients(federate, tmp_path):
    """At the limit nothing fails, and the header counts what was cut."""
    words = _rows(tmp_path / "long.jsonl", 2000)
    done = federate(*GPT2, *words, "data.max_length=512", "client.steps=1")
    assert done.rounds[0]["clients"] == 2 and done.rounds[0]["failed"] == 0
    assert "24 of 24 examples are cut to data.max_length=512 tokens" in done.said
    short = federate(*GPT2, *_rows(tmp_path / "short.jsonl", 2), "client.steps=1", output="short")
    assert "are cut to" not in short.said


def test_a_tokenizer_that_knows_more_than_the_model(federate, tmp_path):
    """Refused if the data uses a token without an embedding; unused ones do no harm."""
    folder = shutil.copytree(find_assets("tiny"), tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["wordy"])
    tokenizer.save_pretrained(folder)
    model = ("model=hf", f"model.path={folder}", "strategy=fedit", "client.steps=1")
    words = _rows(tmp_path / "a.jsonl", 2)
    assert federate(*model, *words).rounds[0]["failed"] == 0
    bad = tmp_path / "b.jsonl"
    bad.write_text((tmp_path / "a.jsonl").read_text().replace("Say", "wordy"))
    with pytest.raises(ConfigError, match=r"made token 2048 .* embeddings for 0\.\.2047"):
        federate(*model, *words, f"data.path={bad}", output="bad")


def test_a_learning_rate_that_never_decays_is_mentioned(federate):
    words = ("rounds=1", "federation.lr_decay=0.5", "client.steps=1")
    assert "never changes" in federate(*words, "federation.lr_decay_round=1").said
    assert "never changes" not in federate(*words, "federation.lr_decay_round=0").said


@pytest.mark.parametrize(
    ("runtime", "cpus", "gpus", "message"),
    [
        (Runtime(gpus_per_worker=0.5), 2, 0, "PyTorch sees 0"),
        (Runtime(gpus_per_worker=0.5, num_gpus=4), 2, 1, "needs 4 GPUs, and PyTorch sees 1"),
        (Runtime(device="cuda:0"), 2, 0, "sees 0 CUDA devices"),
        (Runtime(device="cuda", in_process=True), 2, 0, "sees 0 CUDA devices"),
        (Runtime(device="cuda:1", gpus_per_worker=0.5), 2, 1, "sees 1 CUDA devices"),
        (Runtime(gpus_per_worker=0.5, in_process=True), 2, 0, "PyTorch sees 0"),
        (Runtime(cpus_per_worker=3), 2, 0, "exceeds the 2 CPUs"),
        (Runtime(cpus_per_worker=3, num_cpus=2), 8, 0, "exceeds the 2 CPUs"),
    ],
)
def test_what_the_machine_does_not_have_is_refused(runtime, cpus, gpus, message):
    with pytest.raises(ConfigError) as caught:
        runtime.check_machine(cpus, gpus)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "runtime",
    [
        Runtime(),
        Runtime(gpus_per_worker=0.5, num_gpus=1),
        Runtime(gpus_per_worker=0.5, num_gpus=2, device="cpu"),
        Runtime(gpus_per_worker=0.5, in_process=True),
        Runtime(cpus_per_worker=64, gpus_per_worker=1.0, ray_address="host:6379"),
    ],
)
def test_what_it_has_is_not(runtime):
    runtime.check_machine(2, 1)


@pytest.mark.parametrize(
    "fields",
    [
        {"num_gpus": 4},
        {"gpus_per_worker": 1.5, "num_gpus": 3},
        {"in_process": True, "num_gpus": 4, "gpus_per_worker": 0.5},
        {"in_process": True, "ray_address": "auto"},
    ],
)
def test_settings_without_effect_are_refused(fields):
    with pytest.raises(ValueError, match="runtime"):
        Runtime(**fields)


def test_a_worker_that_was_given_a_gpu_never_falls_back():
    assert Runtime(gpus_per_worker=0.5, num_gpus=1).worker_device == "cuda"
    assert Runtime(gpus_per_worker=0.5, device="cpu").worker_device == "cpu"
    assert Runtime().worker_device == "cpu"
    assert Runtime(in_process=True).worker_device == "auto"


def test_a_recorded_runtime_is_checked_where_it_runs():
    """Composing for another machine is no mistake: the machine is compared when a run begins."""
    assert build_parts(load(["runtime=multi_gpu"])).runtime.num_gpus == 4


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["population.per_round=10000"], "population.per_round=10000 must be at most 22"),
        (["population.per_round=23"], "2 are held out (population.unseen_fraction"),
        (["population.clients=401"], "population.clients=401 must be at most 400"),
        (["population.unseen_fraction=1"], "no client is left to train"),
        (["population.unseen_categories=[nobody]"], "unseen_categories: ['nobody'] are not in"),
        (["data.clients=1896"], "data.clients=1896 is more than the addresses can give"),
        (["data.max_length=32", "data.template=chat"], "data.template=chat: the model's tokenizer"),
        (["ranks=homogeneous", "ranks.rank=129", "ranks.clamp=false"], "rank 129 is above 128"),
        (["model.targets=[nothing]"], "'nothing' is the end of no adaptable linear layer"),
        (["client.train_a=false", "client.train_b=false"], "a client would train nothing"),
        (["federation.threads=1025"], "threads=1025 must lie in 1..1,024"),
        (["engine.threads=1025"], "engine.threads=1025 must lie in 0..1,024"),
        (["runtime.nodes=65537"], "runtime.nodes=65537 must lie in 1..65,536"),
        (["evaluate=fast", "evaluate.groups=[seen,seen]"], "lists seen more than once"),
        (["strategy=splitlora", "strategy.cut=0"], "a client that holds none of the 4 blocks"),
        (
            ["strategy=splitlora", "model.targets=[layers.3.self_attn.q_proj]"],
            "no layer of blocks 0..0, which clients hold, carries an adapter",
        ),
        (["strategy=splitlora", "strategy.average_every=3"], "average_every=3 does not divide"),
        (
            ["strategy=splitlora", "client.steps=0", "strategy.average_every=100"],
            "average_every=100 does not divide",
        ),
    ],
)
def test_a_value_out_of_range_is_a_mistake_of_the_configuration(federate, overrides, message):
    with pytest.raises(ConfigError) as caught:
        federate(*overrides)
    assert message in str(caught.value)
    assert guarded(lambda: again(caught.value)) == REFUSED
