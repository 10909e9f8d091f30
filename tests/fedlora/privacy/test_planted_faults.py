"""Do the tests of privacy bite? Each row is one wrong line and a default test that notices it."""

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fedlora.core.example_privacy import ExamplePrivacy
from fedlora.engine.fused.private import ExampleRows
from fedlora.population import sampling
from fedlora.privacy import account, adaptive, client, clip, noise
from fedlora.training import private
from tests.fedlora.engine.fused import test_private
from tests.fedlora.privacy import test_account, test_mechanism, test_sensitivity
from tests.planted import planted

Function = Callable[..., Any]


def in_folder(test: Function) -> Function:
    """A test that takes a folder and nothing else."""

    def run() -> None:
        with tempfile.TemporaryDirectory() as folder:
            test(Path(folder))

    return run


NOTICED = (AssertionError, ArithmeticError, RuntimeError)
BOUND = partial(test_sensitivity.test_one_client_moves_a_release_by_at_most_the_clip, "fedit")
SHAPED = test_mechanism.test_noise_has_the_moments_of_its_formula_and_is_a_function_of_the_round
LARGER = (
    test_mechanism.test_the_mean_of_a_run_that_stands_for_a_larger_one_has_the_larger_ones_noise
)
RESUMED = in_folder(
    test_mechanism.test_a_resumed_run_goes_on_with_its_clip_its_noise_and_its_epsilon
)
BUDGET = in_folder(test_mechanism.test_the_run_ends_before_the_round_that_would_exceed_the_budget)
INVERSE = partial(test_mechanism.test_banded_noise_is_the_inverse_of_its_matrix, 3)

MEAN = partial(
    test_private.test_a_step_without_noise_and_clip_is_the_mean_of_gradients_by_example,
    (True, True),
    "llama",
)
ONE = test_private.test_one_example_moves_a_step_by_at_most_the_clip_over_the_batch
DRAWN = test_private.test_noise_is_a_function_of_the_step_and_has_its_size
FUSED = partial(test_private.test_the_fused_engine_is_the_sequential_one, "llama", True)

FAULTS = [
    # A clip of each module by itself, and none.
    (
        clip.clipped,
        "found, left = scaled(summands, MARGIN * clip / length), length",
        "return {n: scaled({n: x}, min(1.0, clip / max(1e-99, norm({n: x}))))[n] "
        "for n, x in summands.items()}, length",
        BOUND,
    ),
    (clip.clipped, "if length <= clip", "if True", BOUND),
    # Weights by examples, and the cohort's own denominator.
    (client.Release.weights, "[1.0] * len(weights)", "weights", BOUND),
    (client.Release.weights, "[1.0] * len(weights)", "[x + 1 for x in range(len(weights))]", BOUND),
    (client.Release.weight, "self.cohort", "weight", BOUND),
    # Noise without the round, or another after a resume.
    (noise.standard, "PURPOSE, round", "PURPOSE, 1", SHAPED),
    (noise.standard, "torch_generator(seed, PURPOSE, round)", "torch.default_generator", SHAPED),
    # The standard deviation of the sum used for the mean, and the other way.
    (client.ClientPrivacy.release, "* self.clip", "* self.clip / self.cohort_size", SHAPED),
    (client.ClientPrivacy.release, "* self._scale", "", LARGER),
    # Clips are counted the wrong way round.
    (
        adaptive.counted,
        "0.5 if n <= clip else -0.5",
        "-0.5 if n <= clip else 0.5",
        partial(test_mechanism.test_the_clip_reaches_the_quantile_of_the_norms, 0.1, 0.5),
    ),
    (
        adaptive.Adaptive.moved,
        "(count + noise) / cohort",
        "(count + noise) / max(1, 2 * abs(count))",
        test_mechanism.test_a_client_that_is_missing_counts_as_neither_short_nor_long,
    ),
    (
        adaptive.Adaptive.left_for_changes,
        "(2 * sigma) ** -2",
        "sigma**-2",
        test_mechanism.test_the_spec_of_the_page_costs_half_a_percent,
    ),
    # The rate over all clients, and a fixed cohort accounted as if it were sampled.
    (
        client.ClientPrivacy.releases.fget,
        "len(self.roster.trainable)",
        "len(self.roster.clients)",
        LARGER,
    ),
    (
        client.ClientPrivacy.releases.fget,
        "if spec.sampling == FIXED",
        "if False",
        test_mechanism.test_the_noise_of_fixed_cohorts_is_accounted_over_twice_the_clip,
    ),
    (
        account._epsilon.__wrapped__,
        "releases.multiplier / 2",
        "releases.multiplier",
        test_account.test_the_numbers_of_the_specification,
    ),
    (
        sampling.poisson,
        "< rate",
        "< rate * len(roster.trainable) / len(roster.clients)",
        test_mechanism.test_clients_are_sampled_independently_at_the_rate,
    ),
    # The account is lost on resume, or an aborted round is.
    (
        client.ClientPrivacy.restore,
        'float(own["clip"])',
        "self.clip",
        RESUMED,
    ),
    (
        client.ClientPrivacy.restore,
        'float(own["multiplier"])',
        "self.multiplier",
        RESUMED,
    ),
    # One round too many.
    (client.ClientPrivacy.exhausted, "done + 1,", "done,", BUDGET),
    (client.ClientPrivacy.record, "done, self._aborted()", "done", BUDGET),
    # Bands: the rate without their factor (as in a published benchmark), columns not of norm one.
    (
        client.ClientPrivacy.releases.fget,
        "spec.bands * m / n",
        "m / n",
        test_mechanism.test_under_bands_a_client_takes_part_every_so_many_rounds_at_most,
    ),
    (noise.coefficients, "[x / length for x in c]", "c", INVERSE),
    (noise.Noise._step, "z -= c[k]", "z += c[k]", INVERSE),
    # DP-SGD: a mean over all tokens, gradients that pile up, no clip, the size that was drawn.
    (private.add_private_gradient, "seeds, own, plan", "seeds, sum(tokens), plan", MEAN),
    (private.add_private_gradient, "flat.zero_grad()", "None", MEAN),
    (private.add_private_gradient, "factor * grad", "grad", ONE),
    (
        private.add_private_gradient,
        "grad /= plan.batch_size",
        "grad /= max(1, len(examples))",
        FUSED,
    ),
    (ExampleRows.add_clipped, "factors @ rows[:, s]", "rows[:, s].sum(0)", FUSED),
    (ExampleRows.add_clipped, "if self._empty:", "if False:", FUSED),
    (ExampleRows.finish, "bt.t()", "bt", FUSED),
    (ExamplePrivacy.noise, "round, client, step", "round, client", DRAWN),
    (ExamplePrivacy.noise, "if not self.seeded", "if False", DRAWN),
    (
        ExamplePrivacy.batches,
        "size / n",
        "size / (n + 9)",
        test_private.test_batches_have_the_expected_size,
    ),
]


@pytest.fixture(autouse=True)
def _nothing_is_remembered() -> Iterator[None]:
    account._epsilon.cache_clear()
    yield
    account._epsilon.cache_clear()


def _id(fault: tuple[Function, str, str, Function]) -> str:
    function, right, wrong, _ = fault
    return f"{function.__module__.rpartition('.')[2]}.{function.__qualname__}: {right} -> {wrong}"


@pytest.mark.parametrize("fault", FAULTS, ids=_id)
def test_a_planted_fault_is_noticed(fault: tuple[Function, str, str, Function]) -> None:
    """The test passes without the fault (it is a default test) and fails because of it."""
    function, right, wrong, notices = fault
    with planted(function, right, wrong), pytest.raises(NOTICED):
        notices()
