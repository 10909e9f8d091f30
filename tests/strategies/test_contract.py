"""Every strategy under conf/strategy obeys the laws: a new file is tested on arrival."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from unittest import mock

import pytest
from hydra import compose, initialize_config_dir

import conf
from fedlora.core.config import build
from fedlora.core.errors import ConfigError
from strategies.base import LoRAStrategy
from tests.strategies.laws import (
    ABOUT,
    DOUBLE,
    LAWS,
    SINGLE,
    Law,
    after_rounds,
    assert_close,
    effects,
    kept_by,
    population_for,
    weights,
    why_not,
)

CONF = Path(next(iter(conf.__path__)))
NAMES = sorted(path.stem for path in (CONF / "strategy").glob("*.yaml"))

CHANGE = ["strategy=heterolora", "strategy.average=change", "strategy.prune=false"]
OPTIONS = [
    ["strategy=fedavg", "strategy.weights=uniform"],
    ["strategy=fedavg", "strategy/server_optimizer=fedavgm"],
    ["strategy=fedavg", "strategy.heterogeneous=covered", "strategy.weights=uniform"],
    ["strategy=rbla", "strategy/server_optimizer=fedavgm"],
    ["strategy=fedrot", "strategy.align_strength=0.5"],
    ["strategy=rbla", "strategy.align=rotate"],
    ["strategy=fedit", "strategy.correct=ridge"],
    ["strategy=fedrot", "strategy.correct=ridge", "strategy/server_optimizer=fedavgm"],
    ["strategy=ffa", "strategy.weighting=covered"],
    ["strategy=ffa", "strategy.heterogeneous=smallest", "strategy.weights=uniform"],
    ["strategy=ffa", "strategy/server_optimizer=fedavgm"],
    ["strategy=rolora", "strategy.init_a=orthonormal"],
    ["strategy=rolora", "strategy.weighting=covered"],
    ["strategy=rolora", "strategy.heterogeneous=smallest"],
    ["strategy=rolora", "strategy/server_optimizer=fedavgm"],
    ["strategy=fedsb", "strategy.heads=2", "strategy.weights=uniform"],
    ["strategy=fedsb", "strategy.heterogeneous=smallest", "strategy/server_optimizer=fedavgm"],
    ["strategy=ravan", "strategy.weighting=all"],
    ["strategy=fedsvd", "strategy.init_a=orthonormal", "strategy.weighting=covered"],
    ["strategy=fedsvd", "strategy.residual=carry"],
    ["strategy=fedsvd", "strategy.period=2"],
    ["strategy=fedsvd", "strategy.period=3", "strategy.residual=carry"],
    ["strategy=flexlora", "strategy/server_optimizer=fedavgm"],
    ["strategy=flexlora", "strategy.weights=uniform"],
    ["strategy=flexlora", "strategy.weighting=covered"],
    ["strategy=flexlora", "strategy.residual=carry"],
    ["strategy=flexlora", "strategy.residual=carry", "strategy.weighting=covered"],
    ["strategy=flexlora", "strategy.svd_split=balanced"],
    ["strategy=flexlora", "strategy.svd_split=a"],
    ["strategy=flexlora", "strategy.backend=dense"],
    ["strategy=flexlora", "strategy.backend=core"],
    ["strategy=flexlora", "strategy.residual=carry", "strategy.backend=core"],
    ["strategy=heterolora", "strategy.weights=examples"],
    ["strategy=heterolora", "strategy.weights=examples_sparsity"],
    ["strategy=heterolora", "strategy.norm_scope=model"],
    ["strategy=heterolora", "strategy.scale=raw"],
    ["strategy=heterolora", "strategy.uncovered=zero"],
    ["strategy=heterolora", "strategy.prune=false"],
    [*CHANGE, "strategy.weights=examples"],
    [*CHANGE, "strategy.weights=uniform"],
    [*CHANGE, "strategy.weights=examples", "strategy.scale=raw"],
    ["strategy=heterolora", "strategy.weights=uniform"],
    ["strategy=flexlora", "strategy.residual=carry", "strategy/server_optimizer=fedavgm"],
    ["strategy=flora", "strategy.own_a=true"],
    ["strategy=flora", "strategy.heterogeneous=smallest", "strategy.weights=uniform"],
    ["strategy=flora", "strategy/server_optimizer=fedavgm"],
    ["strategy=fedex", "strategy.heterogeneous=own"],
    ["strategy=fedex", "strategy.energy=0.9"],
    ["strategy=flora", "strategy.hold=svd"],
    ["strategy=flora", "strategy.hold=svd", "strategy.heterogeneous=smallest"],
    ["strategy=flora", "strategy.hold=svd", "strategy/server_optimizer=fedavgm"],
    ["strategy=fedsa", "strategy.weighting=all"],
    ["strategy=scaffold", "strategy.weights=uniform", "strategy/server_optimizer=fedavgm"],
    ["strategy=feddyn", "strategy.weights=uniform", "strategy.strength=1.0"],
    ["strategy=fedsa", "strategy.weights=uniform"],
    ["strategy=lora_a2", "strategy.global_rank=7", "strategy.weights=uniform"],
    ["strategy=slora", "strategy.stage1_rounds=0"],
    ["strategy=splitlora", "strategy.cut=11"],
    ["strategy=splitlora", "strategy.tail=3"],
    ["strategy=splitlora", "strategy.rule.update=per_client"],
    ["strategy=splitlora", "strategy@strategy.aggregator=flexlora"],
    ["strategy=splitlora", "strategy@strategy.aggregator=rbla"],
    [
        "strategy=splitlora",
        "strategy@strategy.aggregator=heterolora",
        "strategy.aggregator.prune=false",
    ],
    ["strategy=slora", "strategy.stage1_rounds=2"],
    ["strategy=switchlora", "strategy.mode=sync_product"],
    ["strategy=switchlora", "strategy.mode=dense"],
    ["strategy=slora", "strategy.sparse_average=coverage"],
    ["strategy=slora", "strategy.stage1_rounds=2", "strategy@strategy.aggregator=fedit"],
    ["strategy=slora", "strategy.stage1_rounds=2", "strategy@strategy.aggregator=heterolora"],
    ["strategy=slora", "strategy.stage1_rounds=2", "strategy@strategy.aggregator=rbla"],
    ["strategy=slora", "strategy.stage1_rounds=2", "strategy@strategy.aggregator=rolora"],
    ["strategy=slora", "strategy.stage1_rounds=2", "strategy@strategy.aggregator=fedex"],
    ["strategy=slora", "strategy.stage1_rounds=2", "strategy@strategy.aggregator=lora_a2"],
    ["strategy=slora", "strategy.stage1_rounds=2", "strategy@strategy.aggregator=fedsb"],
    [
        *("strategy=slora", "strategy.stage1_rounds=2"),
        *("strategy@strategy.aggregator=fedsb", "strategy.aggregator.bases=svd"),
    ],
    ["strategy=spp", "strategy.merge_every=2"],
    ["strategy=spp", "strategy.mode=beta_only", "strategy.merge_every=1"],
    ["strategy=spp", "strategy.mode=stack"],
    ["strategy=spp", "strategy.mode=separate"],
]
"""Options that change what is computed; the defaults come from the files themselves."""

CHOICES = [[f"strategy={name}"] for name in NAMES] + OPTIONS


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """With ``--config-dir``, strategies of that folder are tested in place of ours."""
    if "strategy" not in metafunc.fixturenames:
        return
    choices, folder = CHOICES, metafunc.config.getoption("config_dir")
    if folder:
        own = Path(folder).resolve()
        names = sorted(path.stem for path in (own / "strategy").glob("*.yaml"))
        choices = [[f"strategy={n}", f"hydra.searchpath=['file://{own}']"] for n in names]
    ids = [",".join(c for c in o if "hydra" not in c).replace("strategy", "s") for o in choices]
    metafunc.parametrize("strategy", choices, ids=ids, indirect=True, scope="module")


@cache
def composed(*overrides: str) -> LoRAStrategy:
    with initialize_config_dir(str(CONF), version_base=None):
        node = compose("config", overrides=list(overrides)).strategy
    return build(node, LoRAStrategy, "strategy")


@pytest.fixture(scope="module")
def strategy(request: pytest.FixtureRequest) -> LoRAStrategy:
    return composed(*request.param)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_laws(strategy: LoRAStrategy, law: Law) -> None:
    """One test for both precisions: thousands of tests are slow to hand out and to report."""
    if reason := why_not(law, strategy):
        pytest.skip(reason)
    for precision in (DOUBLE, SINGLE):
        try:
            law(strategy, 1, precision)
        except Exception as error:
            error.add_note(f"where clients send {precision.dtype}")
            raise


@pytest.mark.parametrize("name", NAMES)
def test_a_method_of_ones_own_weighs_clients_by_one_hook(name: str) -> None:
    """What a subclass says of weights is what is averaged with (docs/own_method.md)."""
    strategy = composed(f"strategy={name}")
    if weights(strategy, 2) != "examples" or hasattr(strategy, "aggregator"):
        pytest.skip("its clients weigh otherwise, or another method's rule averages them")
    population = population_for(strategy)
    state, updates = after_rounds(strategy, population, 1)
    own = [2.0 + k for k in range(len(updates))]
    as_examples = [replace(u, num_examples=int(w)) for u, w in zip(updates, own, strict=True)]
    kept = kept_by(strategy, state, updates)
    wanted = effects(strategy, strategy.aggregate(state, as_examples), population, kept)
    with mock.patch.object(type(strategy), "reference_weights", return_value=own):
        found = strategy.aggregate(state, updates)
    for x, y in zip(effects(strategy, found, population, kept), wanted, strict=True):
        assert_close(x, y, DOUBLE, "weights of its own")


@pytest.mark.parametrize("law", ABOUT, ids=lambda law: law.__name__)
def test_no_law_is_skipped_for_good(law: Law) -> None:
    about = [o for o in CHOICES if not why_not(law, composed(*o))]
    assert len(about) >= 2, about
    assert law in LAWS


def client_of(*overrides: str) -> str:
    with initialize_config_dir(str(CONF), version_base=None):
        return str(compose("config", overrides=list(overrides)).client.optimizer)


def test_fedavg_and_fedit_differ_by_the_local_optimizer() -> None:
    """And what is asked for on the command line wins."""
    assert client_of("strategy=fedavg") == "sgd"
    assert client_of("strategy=fedit") == "adamw"
    assert client_of("strategy=fedavg", "client=adamw") == "adamw"
    assert client_of("strategy=slora", "strategy@strategy.aggregator=fedavg") == "sgd"


def test_a_server_optimizer_is_refused_where_it_means_nothing() -> None:
    node = {
        "_target_": "strategies.heterolora.HeteroLoRA",
        "server_optimizer": {"_target_": "fedlora.algebra.server_optimizer.FedAvgM"},
    }
    with pytest.raises(ConfigError, match="strategy: unknown key 'server_optimizer'"):
        build(node, LoRAStrategy, "strategy")


def test_there_is_something_to_test() -> None:
    assert {"fedavg", "fedit", "flexlora", "heterolora", "slora"} <= set(NAMES)
