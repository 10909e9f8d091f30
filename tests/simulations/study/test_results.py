"""From recorded runs to tables: every number is that of the records, what is missing is said."""

import csv
import json
import re
import shutil
import statistics
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser

import pyarrow.parquet as pq
import pytest

from fedlora.core.errors import ConfigError
from simulations.reporting.study_tables import SHOWN, studies
from simulations.reporting.tables import Records
from simulations.study.__main__ import write_results
from simulations.study.analysis import FINAL, Quantity, analyse
from simulations.study.cost import cost_file
from simulations.study.plan import Planned
from simulations.study.record import record_of, write_record
from simulations.study.results import check_costs, recorded
from simulations.study.runner import progress_of
from simulations.study.spec import parse
from simulations.study.tables import table_csv, table_md, table_tex, tex

MIB = 2**20
SPEC = {
    "axes": {"method": {"fe_dit": "strategy=fedit", "50%": "strategy=flora"},
             "ranks": ["uniform", "normal"]},
    "seeds": [0, 1, 2],
    "metrics": {"accuracy": "higher", "loss": "lower"},
    "reference": {"method": "fe_dit"},
    "budgets": {"rounds": [1], "bytes": [3 * MIB]},
    "targets": {"accuracy": [0.55, 0.515]},
}  # fmt: skip


def accuracy(cell, seed, at):
    """A number of every evaluation: falls out of the cell, the seed and the round."""
    base = {"fe_dit": 0.3, "50%": 0.4}[dict(cell)["method"]]
    return base + 0.1 * at + 0.01 * seed * (1 + (dict(cell)["ranks"] == "normal"))


def some_runs(place):
    """All runs but one, two rounds each, as run folders."""
    study = parse("mine", SPEC)
    runs = [
        Planned(cell, seed, (), 2, f"{i}{seed}" * 8)
        for i, cell in enumerate(study.cells())
        for seed in study.seeds
    ]
    for one in progress_of(runs, place)[:-1]:
        one.folder.mkdir(parents=True)
        records = []
        for at in range(3):
            if at:
                records.append({"kind": "round", "round": at, "wire/up_bytes": MIB,
                                "wire/down_bytes": 2 * MIB, "round/seconds": 1.5})  # fmt: skip
            value = accuracy(one.run.cell, one.run.seed, at)
            first = {"kind": "evaluate", "round": at, "group": "seen", "adapter": "full"}
            records.append(first | {"accuracy": value, "loss": 1 - value, "nothing": None})
            records.append(first | {"adapter": "own", "accuracy": 0.0, "loss": 9.0})
        lines = "".join(json.dumps(r) + "\n" for r in records)
        (one.folder / "metrics.jsonl").write_text(lines)
        (one.folder / "status.json").write_text('{"status": "completed"}')
    return study, runs, place


@pytest.fixture
def folder(tmp_path):
    """Study, runs and a place that has their records."""
    return some_runs(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The same with all results: to be read only."""
    found = some_runs(tmp_path_factory.mktemp("whole"))
    written(found)
    return found


@pytest.fixture
def copied(whole, tmp_path):
    """The same in a copy that may be changed."""
    study, runs, place = whole
    return study, runs, shutil.copytree(place, tmp_path / "copy")


def written(folder):
    study, runs, place = folder
    write_results(study, progress_of(runs, place), place)
    return analysed(folder)


def analysed(folder):
    study, runs, place = folder
    standing = progress_of(runs, place)
    found = [recorded(one.run, one.folder) for one in standing if one.state.name == "DONE"]
    return analyse(study, found)


def test_virtual_time_is_a_budget_where_clients_have_devices(folder):
    study, runs, place = folder
    timed = replace(study, budgets={"virtual": (4.0,)}, equal=("virtual",))
    standing = [one for one in progress_of(runs, place) if one.state.name == "DONE"]
    without = [recorded(one.run, one.folder) for one in standing]
    with pytest.raises(ConfigError, match=r"budgets.virtual: the clients of .* have no devices"):
        check_costs(["bytes", "virtual"], without, "study mine: budgets")
    for one in standing:
        file = one.folder / "metrics.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        clock = [
            r | ({"time/virtual": 3.0 * r["round"]} if r["kind"] == "round" else {}) for r in lines
        ]
        file.write_text("".join(json.dumps(r) + "\n" for r in clock))
    found = [recorded(one.run, one.folder) for one in standing]
    check_costs(["virtual"], found, "study mine: budgets")
    assert [row["virtual"] for row in found[0].rows] == [0, 0, 3, 3, 6, 6]
    analysis = analyse(timed, found)
    lines = {(q.what, x.cell): x for x in analysis.lines if (q := x.quantity).metric == "accuracy"}
    cell = found[0].run.cell
    within = lines["at 4 seconds of virtual time", cell].estimate
    assert within is not None and within.mean == pytest.approx(
        statistics.fmean(accuracy(cell, one.run.seed, 1) for one in found if one.run.cell == cell)
    )
    assert any(what.startswith("at equal virtual time, ") for what, _ in lines)


def test_every_evaluation_is_a_row_with_its_costs(whole):
    table = pq.read_table(whole[2] / "results.parquet")
    assert table.column_names[:8] == [
        "method", "ranks", "seed", "run", "group", "adapter", "round", "bytes",
    ]  # fmt: skip
    rows = table.to_pylist()
    assert len(rows) == 11 * 3 * 2
    last = [r for r in rows if r["adapter"] == "full" and r["round"] == 2]
    assert {(r["bytes_up"], r["bytes_down"], r["bytes"], r["seconds"]) for r in last} == {
        (2.0 * MIB, 4.0 * MIB, 6.0 * MIB, 3.0)
    }
    for row in last:
        cell = (("method", row["method"]), ("ranks", row["ranks"]))
        assert row["accuracy"] == accuracy(cell, row["seed"], 2)


def test_lines_are_means_and_paired_differences_of_the_records(folder):
    found = {(line.cell, line.quantity): line for line in analysed(folder).lines}
    cell = (("method", "50%"), ("ranks", "uniform"))
    final = found[cell, Quantity("accuracy", FINAL)]
    assert final.estimate.mean == pytest.approx(0.61) and final.missing == ()
    assert final.difference.estimate.mean == pytest.approx(0.1)
    assert found[cell, Quantity("accuracy", "at 1 round")].estimate.mean == pytest.approx(0.51)
    assert found[cell, Quantity("accuracy", "at 3.14573e+06 bytes")].estimate.mean == (
        pytest.approx(0.51)
    )
    reached = found[cell, Quantity("accuracy", "bytes to 0.55", "bytes")]
    assert reached.estimate.mean == 6 * MIB
    never = found[(("method", "fe_dit"), cell[1]), Quantity("accuracy", "rounds to 0.55", "rounds")]
    assert never.estimate is None and never.without == (0, 1, 2)
    some = found[never.cell, Quantity("accuracy", "rounds to 0.515", "rounds")]
    assert some.estimate is None and some.without == (0, 1)
    reference = found[(("method", "fe_dit"), cell[1]), Quantity("accuracy", FINAL)]
    assert reference.difference is None and reference.p_holm is None


def test_an_equal_budget_is_the_least_that_a_run_has_spent(folder):
    _, runs, place = folder
    file = place / "runs" / runs[0].name / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    shorter = [line for line in lines if line["round"] < 2]
    file.write_text("".join(json.dumps(line) + "\n" for line in shorter))
    study = parse("mine", SPEC | {"budgets": {"rounds": "equal", "bytes": ["equal", 6 * MIB]}})
    assert study.budgets == {"bytes": (6.0 * MIB,)}
    found = {(x.cell, x.quantity.what): x for x in analysed((study, runs, place)).lines
             if x.quantity.metric == "accuracy"}  # fmt: skip
    for cell in list(study.cells())[1:3]:
        last, at = found[cell, FINAL], found[cell, "at 6.29146e+06 bytes"]
        assert last.estimate == at.estimate
        expected = [accuracy(cell, seed, 1) for seed in study.seeds]
        for what in ("at equal bytes, 3.0 MiB", "at equal rounds, 1"):
            assert found[cell, what].estimate.mean == pytest.approx(sum(expected) / 3)
    text = table_md(study, analysed((study, runs, place)))
    assert "### accuracy at equal bytes, 3.0 MiB, less that of method fe_dit" in text


def test_a_missing_run_is_said_and_its_seed_is_no_pair(folder):
    analysis = analysed(folder)
    cell = (("method", "50%"), ("ranks", "normal"))
    (line,) = [x for x in analysis.lines if (x.cell, x.quantity) == (cell, Quantity("loss", FINAL))]
    assert (line.missing, line.complete, line.estimate.seeds) == ((2,), 2, 2)
    assert line.difference.missing == (2,) and line.difference.estimate.seeds == 2
    ranking = analysis.rankings["loss"]
    assert (ranking.blocks, ranking.left_out) == (5, 1)
    assert ranking.ranks == {"fe_dit": 2.0, "50%": 1.0}
    text = table_md(folder[0], analysis)
    assert "- method 50%, ranks normal: no complete run of seed 2" in text
    assert "accuracy, rounds to 0.55: not in seed 0, 1, 2" in text
    assert "1 left out because a run is missing" in text


def test_tables_are_well_formed_and_say_the_same(folder):
    analysis = analysed(folder)
    rows = list(csv.DictReader(table_csv(folder[0], analysis).splitlines()))
    assert len(rows) == len(analysis.lines)
    for row, line in zip(rows, analysis.lines, strict=True):
        mean = float(row["mean"]) if row["mean"] else None
        assert mean == (line.estimate.mean if line.estimate else None)
        assert row["method"] == dict(line.cell)["method"]
    blocks = table_md(folder[0], analysis).split("\n\n")
    for block in blocks:
        assert len({line.count("|") for line in block.splitlines() if line[:1] == "|"}) <= 1
    assert "| 50% | uniform | 3 of 3 | 0.610 [0.585, 0.635] |" in "\n".join(blocks)


def test_the_latex_table_is_balanced(folder):
    text = table_tex(folder[0], analysed(folder))
    begun = Counter(re.findall(r"\\begin\{(\w+)\}", text))
    assert begun == Counter(re.findall(r"\\end\{(\w+)\}", text)) == Counter(["tabular"])
    assert [text.count(rule) for rule in (r"\toprule", r"\midrule", r"\bottomrule")] == [1] * 3
    columns = len(re.search(r"\\begin\{tabular\}\{(\w+)\}", text)[1])
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len(rows) == 1 + 4
    for row in rows:
        assert len(re.findall(r"(?<!\\)&", row)) == columns - 1
        assert len(re.findall(r"(?<!\\)\$", row)) % 2 == 0
        bare = re.sub(r"\$[^$]*\$", "", row.replace(r"\$", ""))
        assert not re.search(r"(?<!\\)[_%#^]", bare)
    assert r"fe\_dit" in text and r"50\%" in text


@pytest.mark.parametrize(
    ("raw", "escaped"),
    [("a_b&c", r"a\_b\&c"), ("~\\", r"\textasciitilde{}\textbackslash{}"), ("plain", "plain")],
)
def test_special_characters_of_latex(raw, escaped):
    assert tex(raw) == escaped


def test_a_metric_that_no_run_has_is_refused(folder):
    _, runs, place = folder
    study = parse("mine", SPEC | {"metrics": {"acuracy": "higher"}, "targets": {}})
    with pytest.raises(
        ConfigError, match=r"metrics: no evaluation has .* 'acuracy'; there are acc"
    ):
        write_results(study, progress_of(runs, place), place)


def test_a_metric_is_read_from_the_group_and_the_adapter_that_it_names(folder):
    _, runs, place = folder
    names = ["accuracy@/own", "accuracy@seen/own", "accuracy@seen", "accuracy"]
    study = parse("mine", SPEC | {"metrics": dict.fromkeys(names, "higher"), "targets": {}})
    found = analysed((study, runs, place))
    finals = {x.quantity.metric: x.estimate.mean for x in found.lines
              if x.quantity.what == FINAL and x.estimate}  # fmt: skip
    assert finals["accuracy@/own"] == finals["accuracy@seen/own"] == 0.0
    assert finals["accuracy@seen"] == finals["accuracy"] > 0.0
    study = parse("mine", SPEC | {"metrics": {"accuracy@other": "higher"}, "targets": {}})
    with pytest.raises(ConfigError, match=r"'accuracy@other'; groups and .* seen/full, seen/own"):
        write_results(study, progress_of(runs, place), place)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"metrics": {"loss": "min"}}, "metrics.loss is 'min'; it must be higher or lower"),
        ({"metrics": ["loss"]}, "must be names with higher or lower"),
        ({"reference": "fedit"}, "one axis with a level"),
        ({"reference": {"method": "x"}}, "reference names method='x'; its levels are fe_dit, 50%"),
        ({"budgets": {"rounds": [0]}}, "budgets.rounds has 0; a budget is more than 0"),
        ({"budgets": {"bytes": []}}, "budgets.bytes is []; it must be a list of numbers"),
        ({"budgets": {"bytes": "same"}}, "it must be a list of numbers"),
        ({"budgets": {"euros": [1]}}, "it may have rounds, bytes, seconds"),
        ({"budgets": {"bytes": ["many"]}}, "it must be a list of numbers"),
        ({"targets": {"f1": [1]}}, "it may have those of metrics: accuracy, loss"),
        ({"axes": {"seed": [1]}}, "axes.seed is a column of the results"),
    ],
)
def test_mistakes_of_the_statistics_are_one_sentence(change, said):
    with pytest.raises(ConfigError) as error:
        parse("mine", SPEC | change)
    assert said in str(error.value) and "\n" not in str(error.value)


# --------------------------------------------------------------------------------------- records


def test_a_record_has_every_cell_with_its_cost_and_makes_a_table(folder, tmp_path):
    study, runs, place = folder
    analysis = analysed(folder)
    standing = progress_of(runs, place)
    for seconds, one in enumerate(standing):
        line = {"cpu_s": seconds, "wall_s": 2 * seconds, "machine": "box", "load": 1.5}
        cost_file(one.folder).write_text(2 * (json.dumps(line) + "\n"))
    record = record_of(study, analysis, [], standing, "fedlora study mine")
    results = tmp_path / "docs" / "results"
    assert write_record(results, record) == results / "study-mine.json"
    assert json.loads((results / "study-mine.json").read_text()) == json.loads(json.dumps(record))
    assert [tuple(row["cell"].items()) for row in record["rows"]] == list(study.cells())
    assert record["cost"]["cpu_s"] == 2 * sum(range(12))
    for i, row in enumerate(record["rows"]):
        assert row["cpu_s"] == 2 * (3 * i + 1)
        finals = [x for x in analysis.lines if dict(x.cell) == row["cell"]
                  and x.quantity == Quantity("accuracy", FINAL)]  # fmt: skip
        assert row["metrics"]["accuracy"]["interval"][0] == round(finals[0].estimate.mean, 6)
    text = studies(Records(tmp_path))
    assert "`fedlora study mine`: 11 runs, 132 CPU seconds" in text and "on box" in text
    assert "no complete run of seed 2" in text
    budgets = {key for row in record["rows"] for key in row["budgets"]}
    assert budgets and all(", at " in key for key in budgets)
    assert all((key in text) == key.startswith("accuracy, ") for key in budgets)
    empty, *rest = record["rows"]
    level = ", ".join(f"{axis} {level}" for axis, level in empty["cell"].items())
    lines = [f"{level}: no complete run of seed 0", *(f"x: {n}" for n in range(20))]
    rows = [empty | {"complete": 0}, *rest]
    write_record(results, record | {"rows": rows, "missing": lines})
    fewer = studies(Records(tmp_path))
    assert f"1 of {len(rows)} cells have no complete run yet." in fewer and level not in fewer
    assert fewer.count("\n- x: ") == SHOWN and "and 12 more in the record" in fewer
    for block in text.split("\n\n"):
        assert len({line.count("|") for line in block.splitlines() if line[:1] == "|"}) <= 1


def test_without_a_record_documents_say_so(tmp_path):
    assert studies(Records(tmp_path)) == "No study has been recorded yet."


# ----------------------------------------------------------------------------- page and figures


class Page(HTMLParser):
    """What a page has: elements, ids, addresses, text of the results' cells."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.ids, self.used, self.keys = Counter(), [], [], set(), []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        at = dict(attrs)
        self.tags[tag] += 1
        if tag not in ("meta", "input", "br"):
            self.open.append(tag)
        self.ids += [at["id"]] if "id" in at else []
        self.used |= {v for k, v in attrs if k in ("href", "xlink:href", "src")}
        self.used |= {v[4:-1] for v in at.values() if v and v.startswith("url(")}
        self.keys += [at["data-key"]] if "data-key" in at else []

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        if self.open and tag not in ("meta", "input", "br"):
            assert self.open.pop() == tag


def test_the_page_stands_alone_and_has_every_line(folder):
    analysis = written(folder)
    text = (folder[2] / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert len(page.ids) == len(set(page.ids)) and page.used
    assert {used.removeprefix("#") for used in page.used} <= set(page.ids)
    assert len(page.keys) == len(analysis.lines) * 9
    means = page.keys[5::9]
    assert means == [str(x.estimate.mean) if x.estimate else "" for x in analysis.lines]
    figures = sorted(f.stem for f in (folder[2] / "figures").glob("*.pdf"))
    # for each metric the final values, the ranks, and three costs in two settings
    assert len(figures) == page.tags["svg"] == 2 * (2 + 3 * 2)
    assert "no complete run of seed 2" in text and "prefers-color-scheme: dark" in text
    assert not re.search(r"(?:#ffffff|#000000)\b(?![^<]*</style>)", text.partition("<svg")[2])


def test_the_page_escapes_what_was_recorded(folder, monkeypatch):
    study, runs, place = folder
    monkeypatch.setattr("simulations.study.__main__.all_figures", lambda *found: [])
    odd = replace(study, name="<b>&")
    write_results(odd, progress_of(runs, place), place)
    text = (place / "report.html").read_text()
    assert "<b>&" not in text and "&lt;b&gt;&amp;" in text


def test_results_of_a_study_that_has_changed_do_not_stay(copied):
    study, _, place = copied
    write_results(study, [], place)
    assert [f.name for f in place.rglob("*") if f.is_file() and "runs" not in f.parts] == []


def test_files_are_the_same_for_the_same_records(whole, copied):
    written(copied)
    for name in ("report.html", "table.md", "results.parquet", "figures/accuracy-final.pdf"):
        assert (copied[2] / name).read_bytes() == (whole[2] / name).read_bytes()
