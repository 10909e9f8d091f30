"""Private runs: what they record, how they end and go on, and what they refuse."""

import pytest

from fedlora.core.errors import ConfigError, RunError
from simulations.app.compose import load
from simulations.app.parts import build_parts

PRIVATE = (
    "strategy=fedit",
    "strategy.weights=uniform",
    "federation.norm_bound=off",
    "privacy=client",
)
SHARP = ("privacy.epsilon=0", "privacy.sigma=0.5")


def test_a_private_run_records_its_epsilon_and_a_resumed_one_draws_the_same_noise(federate):
    whole = federate(*PRIVATE, *SHARP, "rounds=3", "evaluate=none", output="whole")
    spent = [r["privacy/epsilon"] for r in whole.rounds]
    assert 0 < spent[0] < spent[1] < spent[2]
    assert all(r["privacy/clip"] > 0 for r in whole.rounds)
    assert len({r["clients"] for r in whole.rounds}) > 1, "cohorts of one size are not Poisson"
    for part in ("privacy=client: epsilon", "after 3 rounds", "clips each", "Not covered"):
        assert part in whole.said
    federate(*PRIVATE, *SHARP, "rounds=1", "evaluate=none", output="cut")
    cut = federate(*PRIVATE, *SHARP, "rounds=3", "evaluate=none", "resume=auto", output="cut")
    assert cut.hash == whole.hash
    assert [r["privacy/epsilon"] for r in cut.rounds] == spent
    assert [r["privacy/clip"] for r in cut.rounds] == [r["privacy/clip"] for r in whole.rounds]


def test_clients_are_private_in_real_sums_as_in_simulated_ones(federate):
    """Sampled cohorts, a clip that adapts to a count in the sum, and clients that are lost."""
    words = ["strategy=ffa", *PRIVATE[1:], *SHARP, "population.per_round=20", "evaluate=none"]
    words += ["secagg.losses.vector=0.1"]
    real, simulated = (
        federate(*words, f"secagg={kind}", "engine=sequential", output=kind)
        for kind in ("real", "simulated")
    )
    assert real.hash == simulated.hash
    for name in ("privacy/clip", "privacy/epsilon", "secagg/clients"):
        found = [r[name] for r in real.rounds]
        assert found == [r[name] for r in simulated.rounds]
        assert len(set(found)) == 2
    assert sum(r["secagg/lost"] for r in real.rounds) > 0
    assert all(r["secagg/cut"] == 0 for r in real.rounds)
    assert "20 of 22 clients expected per round" in real.said


@pytest.mark.slow
def test_the_run_ends_before_its_budget_is_exceeded_and_empty_rounds_go_on(federate):
    """One client in ten rounds or so: most rounds are empty and release noise alone."""
    done = federate(
        *PRIVATE,
        *SHARP,
        "privacy.max_epsilon=12",
        "population.per_round=1",
        "rounds=60",
        "evaluate=none",
    )
    assert 0 < len(done.rounds) < 60
    assert done.rounds[-1]["privacy/epsilon"] <= 12
    assert "the run ends after round" in done.said
    empty = [r for r in done.rounds if r["clients"] == 0]
    assert empty
    assert len({r["state/hash"] for r in done.rounds}) == len(done.rounds)


def test_too_many_failures_end_a_private_run_and_count_as_a_release(federate, tmp_path):
    broken = ["engine=faulty", "engine.raise_fraction=0.9", "federation.min_success=0.9"]
    with pytest.raises(RunError, match="min_success"):
        federate(*PRIVATE, *SHARP, *broken, "evaluate=none")
    (noted,) = tmp_path.glob("out/*/privacy_aborted.json")
    assert noted.read_text() == '{"rounds": 1}'


@pytest.mark.parametrize(
    "strategy",
    [
        ("strategy=flexlora", "rounds=1"),
        # sparse values in the first round, factors in the second
        ("strategy=slora", "strategy.stage1_rounds=1", "rounds=2"),
    ],
    ids=lambda words: words[0],
)
def test_examples_are_private_under_both_engines_with_one_result(federate, strategy):
    words = [*strategy, "privacy=example", "privacy.epsilon=0", "privacy.sigma=1.0"]
    words += ["evaluate=none", "client.dropout=0"]
    one = federate(*words, "engine=sequential", output="one")
    many = federate(*words, "engine=fused", output="many")
    for a, b in zip(one.rounds, many.rounds, strict=True):
        assert a["privacy/epsilon"] == b["privacy/epsilon"] > 0
        assert a["train/loss"] == pytest.approx(b["train/loss"], rel=1e-4)
    assert "privacy=example: epsilon at most" in one.said


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["strategy.weights=examples"], "use strategy.weights=uniform"),
        (["federation.norm_bound=cohort"], "use federation.norm_bound=off"),
        (["federation.min_clients=2"], "use federation.min_clients=1"),
        (["strategy=flexlora"], "choose strategy.residual=carry"),
        (["strategy=heterolora"], "strategy.average"),
        (["robust=median"], "use robust=none"),
        (["attack=little"], "use an attack of each client alone"),
        (["compression=int8", "compression.error_feedback=true"], "error_feedback=false"),
        (["federation.wire=bfloat16", "federation.error_feedback=true"], "error_feedback=false"),
        (
            ["strategy=slora", "strategy@strategy.aggregator=fedit"],
            "its aggregator FedIT weighs clients by their examples",
        ),
        (["runtime=silos", "data=jsonl", "data.path=x.jsonl"], "use privacy=example"),
    ],
)
def test_what_breaks_the_claim_is_refused_in_one_sentence(words, why):
    with pytest.raises(ConfigError, match=why) as found:
        build_parts(load([*PRIVATE, *words]))
    assert "privacy=client" in str(found.value)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["secagg.sketch=one"], "use secagg.sketch=none"),
        (["secagg.degree=4"], "use secagg.degree=0"),
    ],
)
def test_sums_that_break_the_claim_are_refused_in_one_sentence(words, why):
    with pytest.raises(ConfigError, match=rf"secagg=real.* with privacy=client: .*{why}"):
        build_parts(load([*PRIVATE, "secagg=real", *words]))


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["population.per_round=6"], "a sampled round may have fewer than 2 clients"),
        (["secagg.levels=4", "population.per_round=20"], "secagg.levels=4: rounding"),
    ],
)
def test_rounds_in_which_no_change_is_hidden_are_refused_before_the_first(federate, words, why):
    with pytest.raises(ConfigError, match=why):
        federate(*PRIVATE, *SHARP, "secagg=simulated", *words)


def test_a_norm_bound_goes_with_privacy():
    parts = build_parts(load([*PRIVATE, "postprocess=bound"]))
    assert list(parts.between) == ["postprocess=bound", "privacy=client"]
