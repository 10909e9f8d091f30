"""Do the tests bite? A sweep of planted faults over pruning, switching, the split and evaluation.

Each row of `FAULTS` is one wrong line in the product and a default test that must fail because of
it. The sweep over strategies is ``tests/strategies/test_planted_faults.py``.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from fedlora.core import confusion
from fedlora.evaluation import beam_search, corpus_metrics, metrics, rouge, scorers, summary
from fedlora.prune import methods, pattern, prune, spec, statistics
from fedlora.split import batches, client, loss, noise, rounds, server, trainable
from fedlora.split.protocol import Cut
from fedlora.techniques.switchlora import controller, layer, local, optimizer, replica, schedule
from fedlora.wire import rows
from tests.fedlora.core import test_confusion
from tests.fedlora.evaluation import (
    test_beam_search,
    test_classification,
    test_corpus_metrics,
    test_metrics,
    test_rouge,
    test_summary,
)
from tests.fedlora.prune import test_prune, test_spec
from tests.fedlora.split import (
    test_loss,
    test_noise,
    test_rounds,
    test_trainable,
)
from tests.fedlora.techniques.switchlora import (
    test_layer,
    test_local,
    test_optimizer,
    test_peft,
    test_replica,
    test_schedule,
)
from tests.fedlora.wire import test_rows
from tests.planted import planted

Function = Callable[..., Any]
Fault = tuple[Function, str, str, Function]
"""A function, a piece of its source, what is planted instead, and a test that notices."""


def by_plain_wanda(name: str = "llama", pattern: str = "0.5", sequential: bool = True) -> Function:
    test = test_prune.test_masks_of_every_layer_are_those_of_plain_wanda
    return partial(test, name, pattern, sequential)


NOTICED = (AssertionError, ArithmeticError, RuntimeError)
"""What a fault may make of a test: it fails, or the product crashes in it."""


def patched(test: Function) -> Function:
    """A test that takes pytest's ``monkeypatch`` and nothing else."""

    def run() -> None:
        with pytest.MonkeyPatch.context() as patch:
            test(patch)

    return run


NEIGHBOUR = (
    "seen.squares[next(p for p in reversed(paths) if len(seen.squares[p]) == weight.shape[1])]"
)

PRUNE: list[Fault] = [
    # The mask of a layer from another layer's input statistics.
    (prune.prune_from, "seen.squares[path]", NEIGHBOUR, by_plain_wanda()),
    (prune.prune_from, "seen.squares[path]", NEIGHBOUR, by_plain_wanda(sequential=False)),
    (prune.prune_from, "seen.squares[path]", NEIGHBOUR, by_plain_wanda("gpt2", "2:4")),
    (statistics._spread, "shared.get(p, p)", "next(iter(squares))", by_plain_wanda()),
    (statistics._InputSums.hook, "id(inputs[0])", "0", by_plain_wanda()),
    # Statistics of the dense model where those behind pruned blocks are due, and the other way.
    (prune.prune_by, "if pruning.sequential", "if False", by_plain_wanda()),
    (prune.prune_by, "if pruning.sequential", "if True", by_plain_wanda(sequential=False)),
    (statistics.measure, "for batch in batches:", "for batch in batches[:1]:", by_plain_wanda()),
    (statistics._InputSums._sum, "x.square().sum(0)", "x.abs().sum(0)", by_plain_wanda()),
    (statistics._InputSums._sum, "x.square().sum(0)", "x.sum(0).square()", by_plain_wanda()),
    (methods.wanda, "squares.sqrt()", "squares", by_plain_wanda()),
    (methods.wanda, "weight.abs()", "weight", by_plain_wanda()),
    (methods.wanda, "kept(", "kept(compete='layer', scores=", by_plain_wanda()),
    (pattern.Pattern.kept, "[..., :lowest]", "[..., -lowest:]", by_plain_wanda(pattern="2:4")),
    (prune.prune_from, "masked_fill_(~kept, 0)", "masked_fill_(kept, 0)", by_plain_wanda()),
    (
        spec.prune_federated,
        "else total + seen",
        "else seen",
        partial(test_spec.test_clients_say_what_all_their_text_would_have_said, "wanda", False),
    ),
    (methods.sparsegpt, "(w * kept)", "(weight * kept)", test_prune.test_sparsegpt_by_hand),
    (methods.sparsegpt, "DAMPING * h", "0 * h", test_prune.test_sparsegpt_by_hand),
    (
        methods.sparsegpt,
        "errors @ u[at, at.stop :]",
        "0 * errors @ u[at, at.stop :]",
        patched(test_prune.test_blocks_of_columns_change_the_rounding_of_sparsegpt_alone),
    ),
]

KEEPS = partial(
    test_peft.test_wrapping_and_exchanges_keep_the_function, "llama", torch.float64, 1e-13, "ring"
)
SWITCH: list[Fault] = [
    (layer.SwitchLayer.switch, "self.weight.addmm_(left.t(), right)", "pass", KEEPS),
    (layer.SwitchLayer.switch, "gone - fresh, scaled", "fresh - gone, scaled", KEEPS),
    (layer.SwitchLayer.switch, "self.scale * self.vectors", "self.vectors", KEEPS),
    (layer.begin, "-alpha / rank * b", "-alpha * b", KEEPS),
    (
        layer.SwitchLayer.switch,
        "pool[[ids[slot] for slot in slots]] = gone.to(pool.device, pool.dtype)",
        "pass",
        test_layer.test_a_vector_comes_back_as_it_was_trained,
    ),
    (
        layer.SwitchLayer.switch,
        "self.frozen[partner][slot] = freeze",
        "self.frozen[side][slot] = freeze",
        partial(test_peft.test_partners_do_not_move_for_as_long_as_they_are_frozen, True),
    ),
    (
        layer.SwitchLayer.thaw,
        "f - 1",
        "f - 2",
        partial(test_peft.test_partners_do_not_move_for_as_long_as_they_are_frozen, True),
    ),
    (
        controller.SwitchController.before_step,
        "rows[held] = 0.0",
        "pass",
        partial(test_peft.test_partners_do_not_move_for_as_long_as_they_are_frozen, True),
    ),
    (
        controller.SwitchController._switch,
        "optimizer.reset(parameters[other(side)], other(side), slots)",
        "optimizer.reset(parameters[side], side, slots)",
        test_peft.test_exactly_the_partners_forget,
    ),
    (
        layer.SwitchLayer.max_switches,
        "max(0, min(*gaps, self.num_candidates - r))",
        "self.num_candidates - r",
        test_layer.test_no_frozen_vector_is_exchanged,
    ),
    (
        optimizer.RowAdamW.reset,
        '("exp_avg", "exp_avg_sq", "step")',
        '("exp_avg", "exp_avg_sq")',
        partial(test_optimizer.test_a_reset_is_of_these_vectors_alone, 0, "a"),
    ),
    (
        optimizer._update,
        "1 - b2**count",
        "1 - b1**count",
        partial(test_optimizer.test_without_resets_it_is_adamw, torch.float64, 1e-12, 0.0),
    ),
    (
        schedule.decay,
        "0.3, (step + 1)",
        "0.3, 2 * (step + 1)",
        test_schedule.test_exchanges_are_a_third_as_frequent_after_the_share,
    ),
    (
        schedule.draw,
        "int(u < mean - whole)",
        "1",
        test_peft.test_as_many_are_exchanged_as_the_schedule_says,
    ),
    (
        replica.Timetable.count,
        "2 if self.mode == ALTERNATE else 1",
        "1",
        partial(test_replica.test_as_many_are_exchanged_as_the_schedule_says, "sync_alternate", 8),
    ),
    (
        local._layer,
        "update.moved = update.moved.clone()",
        "pass",
        test_local.test_training_leaves_its_start_to_the_other_clients,
    ),
    (
        local.turn_of,
        "round - 1",
        "0 * round",
        test_local.test_two_rounds_are_stand_alone_training_twice_on_one_schedule,
    ),
    (
        local._steps,
        "switching.first + step",
        "step",
        test_local.test_two_rounds_are_stand_alone_training_twice_on_one_schedule,
    ),
]

ALONE = partial(test_rounds.test_one_client_split_is_the_client_unsplit, "llama")
CUT, U_SHAPED = partial(ALONE, Cut(2)), partial(ALONE, Cut(1, 1))
SMOOTHED = partial(test_loss.test_the_loss_is_that_of_its_definition, 0.1)
U_SHAPES = partial(
    test_rounds.test_the_joint_gradient_is_the_sum_of_the_clients,
    "examples",
    {i: Cut(1, 0) for i in range(3)},
)
JOINT = partial(
    test_rounds.test_the_joint_gradient_is_the_sum_of_the_clients, "examples", test_rounds.UNEQUAL
)
SPLIT: list[Fault] = [
    (client.SplitClient._learn, "gradient.to(pending.packed)", "-gradient.to(pending.packed)", CUT),
    (client.SplitClient._forward, "number, step.shape", "number + 1, step.shape", CUT),
    (client.SplitClient._finish, "/ step.batch.tokens).backward", ").backward", U_SHAPED),
    (server.SplitServer._backward, "losses[i].total / ups[i].tokens", "losses[i].total", CUT),
    (server.SplitServer._answer, "gradient / done.weights[i]", "gradient", JOINT),
    (server.SplitServer._weights, "w / total", "1 / len(weights)", JOINT),
    (server.SplitServer._positions, " + rows * width", "", JOINT),
    (server.SplitServer._backward, "for term in terms[1:]", "for term in terms[2:]", JOINT),
    (
        server.SplitServer._backward_from,
        "padded if done.weights[i] == 1 else padded * done.weights[i]",
        "padded",
        U_SHAPES,
    ),
    (
        server.SplitServer._begin,
        "trainable.zero_grad()",
        "pass",
        CUT,
    ),
    (
        rounds._Round._learn,
        "self.plan.client_rates[self.k]",
        "self.plan.client_rates[0]",
        CUT,
    ),
    (
        rounds._Round._average,
        "client.resume(averages[i])",
        "client.resume(client.adapter)",
        test_rounds.test_everybody_holds_the_average_afterwards,
    ),
    (
        server.SplitServer.groups,
        'if self.rule.update != "sequential"',
        "if True",
        test_rounds.test_sequential_is_one_round_after_another_at_the_server,
    ),
    (loss.sum_loss, 'reduction="sum", label', 'reduction="mean", label', SMOOTHED),
    (loss.sum_loss, "Loss(total, nll.detach())", "Loss(total, total.detach())", SMOOTHED),
    (
        trainable.TrainableStage.optimizer_state,
        '.to("cpu", copy=True)',
        ".cpu()",
        test_trainable.test_copies_are_copies,
    ),
    (
        batches.Order.__getitem__,
        "at * self.size : (at + 1) * self.size",
        "at * self.size : at * self.size + 1",
        CUT,
    ),
    (
        rows._Codes._scales,
        "largest / self._levels",
        "largest / self._levels * 2",
        test_rows.test_a_hand_made_row_of_int8,
    ),
    (
        rows._round_at_random,
        "drawn < x - below",
        "drawn < 0.5",
        test_rows.test_stochastic_rounding_has_no_bias_and_is_a_function_of_its_generator,
    ),
    (
        rows._TopK.encode,
        "x.abs().topk",
        "x.topk",
        test_rows.test_a_hand_made_row_of_topk,
    ),
    (
        noise.clip_rows,
        "dim=-1, keepdim=True",
        "dim=0, keepdim=True",
        partial(
            test_noise.test_no_row_is_longer_than_the_clip_and_short_rows_stay.hypothesis.inner_test,
            0,
            1.0,
            2.0,
        ),
    ),
    (
        noise.Noise._epsilon,
        "self.sigma / 2",
        "self.sigma",
        patched(test_noise.test_the_accountant_is_asked_about_sensitivity_2c_and_every_release),
    ),
]

LOSSES = partial(test_metrics.test_losses_equal_those_of_each_example_alone, "llama", 3)
EVALUATION: list[Fault] = [
    (metrics.guesses_of, 'supervised_tokens(e, "full")', "len(e.input_ids)", LOSSES),
    (metrics.outputs_of, '"response") - 1', '"response")', LOSSES),
    (metrics.likelihoods, "guesses |= zip(rows,", "guesses |= zip(sorted(rows),", LOSSES),
    (scorers.Likelihood.score, "nll[at:].sum()", "nll.sum()", LOSSES),
    (scorers.Likelihood.score, "(response / n, n, EXP_MEAN)", "(full / n, n, EXP_MEAN)", LOSSES),
    (
        metrics.generate,
        "texts |= zip(rows,",
        "texts |= zip(sorted(rows),",
        partial(test_metrics.test_batched_generation_equals_one_by_one, "llama", 2),
    ),
    (
        metrics.generate_ids,
        "ids[row, width - len(prompt) :] = prompt",
        "ids[row, : len(prompt)] = prompt",
        partial(test_metrics.test_batched_generation_equals_one_by_one, "llama", 5),
    ),
    (
        metrics.trim,
        "len(ids) - room + 1",
        "len(ids) - room",
        test_metrics.test_a_long_prompt_keeps_its_start_token_and_its_end,
    ),
    (
        metrics.select_panel,
        'seed, "evaluate", client',
        'seed, "evaluate"',
        test_metrics.test_the_measured_part_of_a_client_is_the_same_in_every_round,
    ),
    (
        metrics.select_panel,
        "references[i] for i in indices",
        "references[i] for i in sorted(indices)[::-1]",
        test_metrics.test_references_follow_the_drawn_examples,
    ),
    (
        summary._means,
        "m.value * m.weight for m",
        "m.value for m",
        test_summary.test_each_metric_is_weighted_by_what_it_is_a_mean_of,
    ),
    (
        summary._means,
        'means[f"{name}_weighted"] = shown(weighted)',
        'means[f"{name}_weighted"] = weighted',
        test_summary.test_each_metric_is_weighted_by_what_it_is_a_mean_of,
    ),
    (  # F1 averaged over clients instead of pooled
        summary._means,
        "and metrics[0].over_clients == MACRO_F1",
        "and False",
        test_summary.test_macro_f1_is_of_the_summed_counts_not_a_mean_of_clients,
    ),
    (
        summary._distribution,
        "reverse=worst != LOWEST",
        "reverse=worst == LOWEST",
        test_summary.test_the_distribution_over_clients_is_that_of_their_values,
    ),
    (  # label ids shifted
        scorers.Classification.score,
        "int(best[0]) for",
        "(int(best[0]) + 1) % len(outputs.labels) for",
        partial(test_classification.test_scores_equal_those_of_each_example_alone, "bert", 4),
    ),
    (
        confusion.ClassScore.f1.fget,
        "(self.true + self.predicted)",
        "(2 * self.true)",
        test_confusion.test_scores_are_those_of_the_definitions,
    ),
    (
        summary.summarise,
        "for m in metrics if math.isfinite(m.value)",
        "for m in metrics",
        test_summary.test_what_was_not_measured_on_a_client_is_not_counted_as_zero,
    ),
    (
        summary.bootstrap,
        "[0.025, 0.975]",
        "[0.25, 0.75]",
        test_summary.test_the_bootstrap_is_deterministic_and_as_wide_as_theory_says,
    ),
    (
        rouge.rouge_l,
        "fmeasure",
        "recall",
        partial(test_rouge.test_by_hand, "the cat sat", "the cat", 0.8, False),
    ),
    (
        corpus_metrics._clipped,
        "_grams(hypothesis, n) & most",
        "_grams(hypothesis, n)",
        test_corpus_metrics.test_nist_by_hand,
    ),
    (
        corpus_metrics._similarity,
        "min(w, r[gram])",
        "w",
        test_corpus_metrics.test_cider_clips_what_is_said_too_often,
    ),
    (
        corpus_metrics._rouge_l,
        "max(n for n, _ in common)",
        "min(n for n, _ in common)",
        test_corpus_metrics.test_rouge_l_takes_precision_and_recall_from_different_references,
    ),
    (
        beam_search.NoRepeat.__call__,
        "input_ids[:, self._prompt :]",
        "input_ids",
        test_beam_search.test_the_rule_bans_what_completes_a_generated_n_gram_only,
    ),
    (
        beam_search._batch,
        '"length_penalty": plan.length_penalty',
        '"length_penalty": 1.0',
        partial(
            test_beam_search.test_a_beam_as_wide_as_the_tree_finds_the_best_of_all_sequences, 0, 3.0
        ),
    ),
]

FAULTS = [*PRUNE, *SWITCH, *SPLIT, *EVALUATION]


def _id(fault: Fault) -> str:
    function, right, wrong, _ = fault
    return f"{function.__module__.rpartition('.')[2]}.{function.__qualname__}: {right} -> {wrong}"


@pytest.mark.parametrize("fault", FAULTS, ids=_id)
def test_a_planted_fault_is_noticed(fault: Fault) -> None:
    """The test passes without the fault (it is a default test) and fails because of it."""
    function, right, wrong, notices = fault
    with planted(function, right, wrong), pytest.raises(NOTICED):
        notices()
