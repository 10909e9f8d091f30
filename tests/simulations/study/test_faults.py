"""Every law of the studies catches the fault that it is there for."""

from functools import partial

import pytest

from simulations.study import analysis, page, runner, spec, statistics
from tests.planted import planted
from tests.simulations.study import test_results, test_runner, test_statistics
from tests.simulations.study.test_plan import (
    test_cells_are_all_combinations_without_those_left_out as combinations,
)
from tests.simulations.study.test_results import folder

__all__ = ["folder"]

PLAIN = [
    (statistics.holm, "max(largest, min(1.0, (len(ordered) - i) * value))",
     "min(1.0, (len(ordered) - i) * value)",
     test_statistics.test_holm_is_the_closed_bonferroni_test_monotone_and_never_smaller),
    (statistics.estimate, "found.size - 1", "found.size",
     test_statistics.test_the_interval_is_scipys),
    (statistics.estimate, "stats.t.ppf((1 + level) / 2, found.size - 1)",
     "stats.norm.ppf((1 + level) / 2)",
     partial(test_statistics.test_intervals_cover_what_they_claim, 3)),
    (statistics.difference, "values.keys() ^ reference.keys()", "values.keys() - reference.keys()",
     test_statistics.test_the_order_of_seeds_changes_nothing_and_missing_ones_are_named),
    (statistics.rank, "-1.0 if higher_is_better else 1.0", "1.0",
     test_statistics.test_ranks_sum_up_turn_with_the_direction_and_ignore_scale),
    (statistics.critical_difference, "/ math.sqrt(2)", "",
     test_statistics.test_critical_differences_are_those_of_demsar),
    (statistics.at_budget, "within[-1]", "within[0]",
     test_statistics.test_budgets_areas_and_targets),
    (spec.Study.cells, "wanted and not any", "wanted or not any", combinations),
]  # fmt: skip
RECORDED = [
    (analysis._lines, "if whole else None", "if values[cell] else None",
     test_results.test_lines_are_means_and_paired_differences_of_the_records),
    (spec.Study.reference_of, "level if a == axis else b", "b",
     test_results.test_lines_are_means_and_paired_differences_of_the_records),
    (statistics.rank, "len(blocks) - n)", "0)",
     test_results.test_a_missing_run_is_said_and_its_seed_is_no_pair),
    (page.themed, "f'id=\"{prefix}-'", "'id=\"'",
     test_results.test_the_page_stands_alone_and_has_every_line),
]  # fmt: skip


@pytest.mark.parametrize(("function", "right", "wrong", "law"), PLAIN)
def test_a_fault_in_the_statistics_is_caught(function, right, wrong, law):
    with planted(function, right, wrong), pytest.raises((AssertionError, BaseExceptionGroup)):
        law()


@pytest.mark.parametrize(("function", "right", "wrong", "law"), RECORDED)
def test_a_fault_in_the_reading_of_records_is_caught(function, right, wrong, law, folder):
    with planted(function, right, wrong), pytest.raises((AssertionError, AttributeError)):
        law(folder)


def test_a_fault_in_the_runner_is_caught(tmp_path):
    laws = test_runner
    with (
        planted(
            runner.progress_of, "is_complete(one.folder, one.run.wanted)", "one.folder.is_dir()"
        ),
        pytest.raises(AssertionError),
    ):
        laws.test_a_half_run_is_started_again(tmp_path / "a")
    with (
        planted(runner.do_all, "and not is_held(one.folder)", ""),
        pytest.raises(AssertionError),
    ):
        laws.test_a_run_that_a_dying_process_holds_waits_and_the_others_begin(tmp_path / "b")
    with (
        planted(
            runner._settle, "code == 0 and is_complete(one.folder, one.run.wanted)", "code == 0"
        ),
        pytest.raises(AssertionError),
    ):
        laws.test_a_run_that_ends_well_but_is_not_complete_has_failed(tmp_path / "c")
