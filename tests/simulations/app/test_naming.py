"""Names of runs: readable, bounded, one for each configuration."""

import itertools

import pytest

from simulations.app.compose import load, split_overrides
from simulations.app.naming import LONGEST

PLAIN = "flexlora-heavy_tail_strong-sotu-tiny-s0"


def name(*words: str) -> str:
    return str(load(words).name)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], PLAIN),
        (["experiment=smoke"], f"smoke-{PLAIN}"),
        (["experiment=smoke", "rounds=3", "resume=auto"], f"smoke-{PLAIN}"),
        (["runtime=in_process", "runtime.nodes=3", "output_dir=/x", "report=false"], PLAIN),
        (["tracking=wandb", "tracking.project=p", "federation.timeout_s=9"], PLAIN),
        (["client.lr=1e-3"], f"{PLAIN}-client.lr=0.001"),
        (["evaluate=none", "client.steps=2"], f"{PLAIN}-client.steps=2-evaluate=none"),
        (["seed=7", "strategy=fedit", "ranks=uniform"], "fedit-uniform-sotu-tiny-s7"),
        (["client/term=fedprox"], f"{PLAIN}-client.term=fedprox"),
        (["evaluate.groups=[seen,participants]"], f"{PLAIN}-evaluate.groups=seen,participants"),
        (["name=mine", "client.lr=1"], "mine"),
    ],
)
def test_a_name_says_what_is_run_and_what_was_changed(words, expected):
    assert name(*words) == expected


def test_spelling_and_order_make_no_difference():
    assert name("client.lr=1e-3", "client.steps=2") == name("client.steps=2", "client.lr=0.001")
    assert name("client.lr=5", "client.lr=1e-3") == name("client.lr=0.001")
    assert load(split_overrides("smoke", "client.lr=1e-3")).name == name(
        "client.lr=1e-3", "experiment=smoke"
    )


DIFFERENT = [
    [],
    ["experiment=smoke"],
    ["experiment=full_participation"],
    ["client.lr=1e-3"],
    ["client.lr=2e-3", "client.batch_size=2"],
    ["client=sgd"],
    ["~evaluate.plan.metrics.rouge"],
    ["data=jsonl", "data.path=a/x.jsonl"],
    ["data=jsonl", "data.path=b/x.jsonl"],
    ["data=jsonl", "data.path=b/y.jsonl"],
    ["data=jsonl", "data.path=a/x.jsonl", "data.key='a-b=c'"],
    ["data=jsonl", "data.path=a/x.jsonl", "data.key='a b'"],
    ["data=jsonl", "data.path=a/x.jsonl", "data.key=a_b"],
    ["strategy=spp", "model@model.base=tiny_gpt2", "model.targets=[c_attn]"],
    ["population.clients=400", "population.per_round=40", "client.batch_size=3", "client.steps=7",
     "evaluate=loss", "client.dropout=0.1", "client.lr=1e-3"],
    ["population.clients=400", "population.per_round=40", "client.batch_size=3", "client.steps=7",
     "evaluate=loss", "client.dropout=0.1", "client.lr=2e-3"],
]  # fmt: skip


def test_different_configurations_have_different_names():
    names = [name(*words) for words in DIFFERENT]
    assert len(set(names)) == len(names)
    for given in names:
        assert len(given) <= LONGEST
        assert given == given.encode("ascii").decode() and "/" not in given and " " not in given


def test_a_sweep_has_readable_folders_that_do_not_collide():
    swept = itertools.product(("client.lr=1e-3", "client.lr=2e-3"), ("seed=0", "seed=1"))
    assert sorted(name("experiment=smoke", *words) for words in swept) == [
        f"smoke-flexlora-heavy_tail_strong-sotu-tiny-s{seed}-client.lr={lr}"
        for seed in (0, 1)
        for lr in (0.001, 0.002)
    ]
