"""Every option and every recorded experiment composes and builds, so that none can rot."""

from pathlib import Path

import pytest

from fedlora.core.errors import ConfigError
from fedlora.core.package import ROOT
from fedlora.techniques.spp.technique import Scaling
from simulations.app.compose import load, split_overrides
from simulations.app.parts import build_parts

CONF = ROOT / "conf"
EXPERIMENTS = sorted(p.stem for p in (CONF / "experiment").glob("*.yaml"))
OPTIONS = sorted(
    f"{p.parent.relative_to(CONF)}={p.stem}"
    for p in CONF.glob("*/**/*.yaml")
    if p.relative_to(CONF).parts[0] not in ("experiment", "hydra", "study")
)
NEEDED = {
    # options that name something only a user can name
    "data=jsonl": ["data.path=records.jsonl"],
    "model=hf": ["model.path=somewhere"],
    "client=spp": ["strategy=spp"],
    "engine=faulty": ["engine.raise_fraction=0.2"],
    "client=switchlora": ["strategy=switchlora"],  # refused elsewhere
    "client/technique=spp": ["strategy=spp"],
    "client/technique=switchlora": ["strategy=switchlora"],
    "postprocess=bound": ["strategy=fedit"],
    **{
        f"robust={name}": ["strategy=fedit"]
        for name in ("bound", "median", "trimmed", "krum", "multikrum", "geometric")
    },
    "ranks=by_device": ["devices=lognormal"],
    "secagg=simulated": ["strategy=fedit"],
    "secagg=real": ["strategy=fedit"],
    "runtime=silos": ["data=jsonl", "data.path=records.jsonl"],
    "data=intents": ["model.task=classification"],
    "model=minilm": ["data=intents"],
}


@pytest.mark.parametrize("option", OPTIONS)
def test_option_builds(option):
    parts = build_parts(load([option, *NEEDED.get(option, [])]))
    assert parts.name


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_builds(name):
    parts = build_parts(load(split_overrides(name, "")))
    text = (CONF / "experiment" / f"{name}.yaml").read_text()
    assert text.startswith("# @package _global_\n# "), "an experiment says what it claims"
    assert parts.federation.rounds >= 1


def test_every_strategy_has_one_file_and_its_presets():
    files = {p.stem for p in (ROOT / "strategies").glob("*.py")} - {"__init__", "base"}
    presets = [f"strategy={p.stem}" for p in (CONF / "strategy").glob("*.yaml")]
    targets = [load([words, *NEEDED.get(words, [])]).strategy["_target_"] for words in presets]
    assert files == {target.split(".")[1] for target in targets}


def test_fedavg_brings_its_own_optimizer_and_the_command_line_wins():
    assert build_parts(load(["strategy=fedavg"])).client.optimizer == "sgd"
    assert build_parts(load(["strategy=fedavg", "client=adamw"])).client.optimizer == "adamw"
    assert build_parts(load(["strategy=fedit"])).client.optimizer == "adamw"


def test_spp_brings_a_pruned_model_and_its_own_plan():
    parts = build_parts(load(["strategy=spp"]))
    assert isinstance(parts.client.technique, Scaling)
    assert (parts.model.name, parts.model.calibration) == ("tiny-wanda-0.5", parts.data)
    other = build_parts(load(["strategy=spp", "model@model.base=smollm2", "model.pattern=2:4"]))
    assert other.model.name == "smollm2-wanda-2of4"
    assert build_parts(load(["strategy=spp", "model=tiny"])).model.name == "tiny"


def test_the_name_says_what_ran():
    cfg = load(["strategy=fedit", "ranks=uniform", "seed=7"])
    assert cfg.name == "fedit-uniform-sotu-tiny-s7"


def test_the_hash_ignores_what_cannot_matter():
    def of(*words: str) -> str:
        return build_parts(load(list(words))).hash("data", "model")

    assert of() == of("rounds=9", "output_dir=/elsewhere", "runtime=multi_gpu", "name=x")
    assert of() == of("analyses=all") == of("analyses=none")
    assert of() == of("federation.keep=1", "tracking=wandb", "federation.clients_per_message=1")
    assert of() != of("seed=1")
    assert of() == of("model.path=/moved/tiny")
    assert of() != of("client.lr=1e-9")
    assert of("model=tiny_gpt2") != of("model=tiny_gpt2", "model.split_qkv=true")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("roundz=3", "roundz"),
        ("strategy=flexlore", "flexlore"),
        ("stragety=flexlora", "stragety"),
        ("client.lrr=1", "client has: _target_, autocast, batch_size,"),
        ("client.lr=fast", "'fast'"),
        ("client.epochs=1.5", "1.5"),
        ("client.optimizer=adam", "'adam' is not one of"),
        ("seed=-1", "seed=-1 must be >= 0"),
        ("seed=x", "seed='x' must be of type int"),
        ("rounds=0", "rounds=0 must be >= 1"),
        ("ranks.distribution=zipf", "'zipf' is not one of"),
        ("ranks=homogeneous ranks.rank=-1", "rank=-1 must be >= 0"),
        ("population.fraction=2", "fraction=2.0 must lie in"),
        ("evaluate.groups=[everyone]", "'everyone' is not one of"),
        ("federation.wire=int8", "'int8' is not one of"),
        ("runtime.gpus_per_worker=-1", "gpus_per_worker=-1.0 must be >= 0"),
        ("runtime.ray_address=a:1 runtime.num_cpus=2", "the cluster's resources are its own"),
        ("engine=faulty engine.kill_round=1", "needs engine.kill_marker"),
        ("strategy._target_=strategies.nowhere.X", "names no class"),
        ("experiment=nothing", "nothing"),
        ("'unbalanced", "No closing quotation"),
        ("+foo=1", "unknown key foo=1"),
        ("output_dir=null", "output_dir=None must be of type str"),
        ("strategy=null", "Config group override must be a string"),
        ("name=..", "name='..' must be letters"),
        ("name=/elsewhere", "name='/elsewhere' must be letters"),
        ("client.lr=inf", "inf"),
        ("evaluate.adapters=[]", "must not be empty"),
        ("runtime.device=tpu", "'tpu' is not auto"),
        ("strategy=fedit client=spp", "FedIT averages LoRA's A and B, over a base"),
        ("strategy=flexlora client=spp", "FlexLoRA averages LoRA's A and B, over a base"),
        ("strategy=splitlora client=spp", "SplitLoRA averages LoRA's A and B, over a base"),
        ("strategy=slora client=spp", "SLoRA averages LoRA's A and B, over a base"),
        (
            "strategy=spp client=adamw",
            "SPP averages SPP's alpha and beta: use strategy=flexlora, or client=spp",
        ),
        (
            "strategy=slora strategy@strategy.aggregator=spp client=adamw",
            "strategy.aggregator=SPP averages SPP's alpha and beta, and SLoRA gives it LoRA's A",
        ),
        ("strategy=spp client.train_a=false", "set strategy.mode or strategy.schedule"),
        (
            "strategy=heterolora client.self_prune={_target_:fedlora.core.types.SelfPrune}",
            "client.self_prune is client.technique.self_prune since version 0.2",
        ),
        (
            "strategy=switchlora client.switch.interval=20",
            "client.switch.interval is client.technique.interval since version 0.2",
        ),
        (
            "strategy=spp model=hf model.path=x model.quantization=int8",
            "model.quantization=int8 with strategy=spp: quantised weights cannot be scaled",
        ),
        (
            "strategy=spp model@model.base=hf model.base.path=x model.base.quantization=int4",
            "model.base.quantization=int4: quantised weights cannot be pruned",
        ),
        (
            "strategy=spp federation.wire=bfloat16 strategy.merge_every=2",
            "federation.wire=bfloat16 with strategy.merge_every",
        ),
        (
            "strategy=spp federation.wire=bfloat16 strategy.mode=stack",
            "federation.wire=bfloat16 with strategy.mode=stack",
        ),
        ("robust=median", "robust=median: strategy.residual=drop, strategy.weighting=all"),
        ("robust=krum robust.attackers=0.5", "robust.attackers=0.5 must be below 0.5"),
        ("attack=sign attack.start=3 attack.end=2", "attack.end=2 must be 0 (never) or at least"),
        ("attack=sign strategy=splitlora", "attack=sign: clients of SplitLoRA train together"),
        (
            "attack=sign runtime=silos data=jsonl data.path=x",
            "attack=sign: a silo does what its own operator says",
        ),
        (
            "strategy=fedit compression=int8 federation.wire=bfloat16",
            "compression: federation.wire=bfloat16, federation.error_feedback=False: one rounding",
        ),
        (
            "strategy=splitlora compression=int8",
            "compression: clients of SplitLoRA send activations",
        ),
        ("strategy=fedsa compression=int8", "compression: clients of FedSA keep a part of what"),
        ("strategy=ffa compression=int8", "use compression.down.kind=none"),
        (
            "strategy=flora compression=int8 compression.down.kind=none",
            "compression: what clients of Rebase exchange must not be rounded",
        ),
        ("strategy=fedit compression.error_feedback=true", "nothing is rounded off"),
        ("strategy=fedit compression.down.kind=int8", "use compression.up.kind=fp32, or another"),
        ("strategy=fedit compression.up.kind=int2", "'int2' is not one of"),
        ("strategy=spp model.pattern=0", "pattern='0' must be the fraction of weights"),
        ("strategy=spp model.base.targets=[q_proj]", "model.base.targets=[q_proj] says nothing"),
        (
            "client.technique=spp",
            "client.technique='spp' is no group of settings: use client/technique=",
        ),
        ("client/technique=dora", "Available options in 'client/technique': lora spp switchlora"),
        ("client/term=fedprox client.term.mu=-1", "client.term.mu=-1.0 must be >= 0"),
        ("client/term=fedprox client.term.metric=weight", "'weight' is not one of"),
        (
            "client/term=fedprox "
            "client.term._target_=fedlora.techniques.lora.self_pruning.SelfPrune "
            "~client.term.mu ~client.term.metric +client.term.weight=1 +client.term.gamma=0.5 "
            "+client.term.min_rank=1",
            "client.term: SelfPrune is not a LocalTerm",
        ),
        ("strategy=splitlora client/term=fedprox", "client.term with strategy=splitlora"),
        (
            "strategy=switchlora strategy.mode=dense client/term=fedprox",
            "a client that switches vectors replaces them during the round",
        ),
        (
            "strategy=spp client/term=fedprox client.term.metric=product",
            "strategy=spp trains alpha and beta: use client.term.metric=factor",
        ),
        (
            "strategy=slora client/term=fedprox client.term.metric=product",
            "client.term.metric=product with strategy.stage1_rounds=5",
        ),
        ("strategy=spp model.pattern=4:2", "pattern='4:2' must be the fraction of weights"),
        ("strategy=spp model.pattern=1.5", "pattern='1.5' must be the fraction of weights"),
        ("strategy=spp model.calibration=null", "model.method=wanda needs text"),
        ("strategy=spp strategy.schedule=[alpha]", "must begin with beta"),
        (
            "strategy.server_optimizer._target_=fedlora.core.types.LocalPlan",
            "is not a ServerOptimizer",
        ),
    ],
)
def test_a_mistake_ends_in_one_sentence_that_names_it(overrides, message):
    with pytest.raises(ConfigError) as caught:
        build_parts(load(split_overrides("", overrides)))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_paths_are_made_absolute_where_the_user_works(tmp_path, monkeypatch):
    (tmp_path / "mine.jsonl").write_text("{}")
    monkeypatch.setenv("FEDLORA_CWD", str(tmp_path))
    cfg = load(["data=jsonl", "data.path=mine.jsonl"])
    assert Path(cfg.data.path) == tmp_path / "mine.jsonl"


def test_a_pattern_is_anchored_too(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDLORA_CWD", str(tmp_path))
    assert (
        load(["data=jsonl", "data.path='parts/*.jsonl'"]).data.path == f"{tmp_path}/parts/*.jsonl"
    )
    assert load(["data=natural_instructions", "data.path=user/set"]).data.path == "user/set"


def test_workers_without_a_gpu_share_are_told_to_use_the_cpu():
    def device(*words: str) -> str:
        return build_parts(load(list(words))).runtime.worker_device

    assert device() == "cpu"
    assert device("runtime=one_gpu") == "cuda"
    assert device("runtime=in_process") == "auto"
    assert device("runtime.device=cuda:1") == "cuda:1"
