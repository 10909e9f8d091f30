"""The report of a classification: what is shown is what the records add up to."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from fedlora.core.confusion import added, confusion
from fedlora.core.metric import HIGHEST, LOWEST, Metric, count, macro_f1
from fedlora.core.types import Client, Evaluation, Failure, Ranks
from fedlora.run.progress import round_summary
from fedlora.run.tracking import JsonlTracker
from fedlora.server.evaluation_round import evaluation_record, evaluation_rows
from simulations.reporting import class_figures, class_tables, drawing
from simulations.reporting.report import write_comparison, write_report
from simulations.reporting.run_folder import Run, read_run

NAMES = ["card arrival", "card <b>linking</b>", "exchange rate", "top up", "lost phone"]
TIERS = {"phone": 8, "laptop": 64}
CLIENTS = 12
GROUPS = ("seen:full", "seen:own", "unseen_random:full")


def measured(client: int, skill: float, random: np.random.Generator) -> Evaluation:
    """A client of few classes that answers right as often as it is skilled."""
    true = random.choice(len(NAMES) - 1, 20, p=np.roll([0.7, 0.1, 0.1, 0.1], client % 4))
    guess = np.where(random.random(20) < skill, true, random.integers(0, len(NAMES), 20))
    hits, tier = float((true == guess).mean()), list(TIERS)[client % 2]
    metrics = {
        "examples": count(20),
        "loss": Metric(1.5 - hits, 20, worst=HIGHEST),
        "accuracy": Metric(hits, 20, interval=True, worst=LOWEST),
        "macro_f1": macro_f1(confusion(true, guess, len(NAMES))),
    }
    return Evaluation(Client(client, Ranks({"q": TIERS[tier]}), 30, tier), metrics)


def fake_run(folder: Path, rounds: int = 4, seed: int = 0) -> Path:
    """A run folder as a classification leaves it, with made-up answers."""
    random = np.random.default_rng(seed)
    tracker = JsonlTracker(folder)
    for n in range(rounds + 1):
        if n:
            row = {"round": n, "client": 0, "rank": "8", "loss": 3 / n, "seconds": 0.1}
            tracker.clients([row])
            tracker.round(
                {"kind": "round", "round": n, "train/loss": 3 / n, "wire/up_bytes": 10**6}
            )
        for tag in GROUPS:
            skill = 0.9 * n / rounds
            found = [measured(i, skill, random) for i in range(CLIENTS)]
            failed = Failure(Client(CLIENTS, Ranks({"q": 8}), 30, "phone"), "ValueError", "no")
            tracker.evaluated(evaluation_rows(tag, [*found, failed], round=n))
            tracker.round(evaluation_record(tag, [*found, failed], round=n, seconds=0.5))
    tracker.close()
    (folder / "config.yaml").write_text(f"model: {{task: classification}}\nseed: {seed}\n")
    (folder / "population.json").write_text(
        json.dumps({"tiers": dict.fromkeys(TIERS, 6), "unseen_model": "an untrained head"})
    )
    held = [[[i % len(NAMES), 25], [4, 5]] if i % len(NAMES) != 4 else [[4, 9]] for i in range(40)]
    (folder / "labels.json").write_text(json.dumps({"labels": NAMES, "train": held}))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    return read_run(fake_run(tmp_path_factory.mktemp("runs") / "fedit-intents"))


def cells(table) -> list[list[str]]:
    return [[cell.text for cell in row] for row in table.rows]


def test_everything_that_was_measured_is_shown(run):
    page = write_report(run.folder).read_text(encoding="utf-8")
    titles = set(re.findall(r'<img alt="([^"]*)"', page))
    assert {"Accuracy", "Accuracy by client, last evaluation", "Loss"} < titles
    assert "Training examples by client and label" in titles
    assert "Next-token accuracy on responses" not in titles
    for section in ("Last evaluation", "Spread over clients", "By tier", "The 4 worst classes"):
        assert f"<h2>{section}</h2>" in page
    assert "<b>linking</b>" not in page
    assert "macro F1" in page


def test_it_says_what_unseen_clients_are_evaluated_with(run):
    page = write_report(run.folder).read_text(encoding="utf-8")
    assert "Clients that never took part are evaluated with an untrained head." in page


def test_the_worst_classes_are_those_of_all_clients_together(run):
    rows = run.last_clients()["seen"]
    assert len(rows) == CLIENTS
    table = added(confusion(*_answers(r), len(NAMES)) for r in rows)
    scores = {NAMES[s.label]: s for s in table.by_class}
    shown = cells(class_tables.class_table(run))
    assert {row[0] for row in shown} == set(scores)
    f1 = [float(row[4]) for row in shown]
    assert f1 == sorted(f1)
    for name, true, precision, recall, _, mistaken in shown:
        score = scores[name]
        assert int(true) == score.true
        assert float(precision) == pytest.approx(score.precision, abs=1e-3)
        assert float(recall) == pytest.approx(score.recall, abs=1e-3)
        told = {text.rpartition(" (")[0] for text in mistaken.split(", ") if text}
        assert told <= {NAMES[i] for i in score.mistaken_for}
    pooled = run.groups()["seen"][-1]["macro_f1_weighted"]
    assert pooled == pytest.approx(np.mean([s.f1 for s in scores.values()]))


def _answers(row) -> tuple[list[int], list[int]]:
    pairs = [(t, p) for t, p, n in row["counts"]["macro_f1"] for _ in range(n)]
    return [t for t, _ in pairs], [p for _, p in pairs]


def test_a_tier_is_shown_with_its_clients(run):
    shown = cells(class_tables.tier_table(run))
    assert [row[:2] for row in shown[:2]] == [["seen", "phone"], ["seen", "laptop"]]
    record = run.groups()["seen"][-1]
    values = [record[f"tier/phone/{m}"] for m in ("clients", "loss", "accuracy", "macro_f1")]
    assert [float(x) for x in shown[0][2:]] == pytest.approx(values, abs=1e-3)
    assert len(shown) == len(GROUPS) * len(TIERS)


def test_how_far_clients_are_apart_is_shown_for_each_metric(run):
    shown = cells(class_tables.spread_table(run))
    assert [row[:2] for row in shown[:3]] == [["seen", m] for m in ("loss", "accuracy", "macro F1")]
    record = run.groups()["seen"][-1]
    ends = ("", "_worst_tenth", "_std", "_p10", "_p90", "_gini", "_jain")
    wanted = [record[f"accuracy{end}"] for end in ends]
    assert [float(x) for x in shown[1][2:]] == pytest.approx(wanted, abs=1e-3)


def test_the_heat_map_has_a_row_per_client_and_a_column_per_label(run):
    figure = class_figures.label_counts(run)
    (image,) = figure.axes[0].images
    drawn = image.get_array().filled(0)
    assert drawn.shape == (40, len(NAMES))
    for client, held in enumerate(run.labels["train"]):
        assert {i: int(n) for i, n in enumerate(drawn[client]) if n} == dict(held)
    assert image.get_array().mask.sum() == (drawn == 0).sum()


def test_many_clients_are_drawn_in_part(run, monkeypatch):
    monkeypatch.setattr(class_figures, "ROWS", 7)
    figure = class_figures.label_counts(run)
    assert figure.axes[0].images[0].get_array().shape == (7, len(NAMES))
    assert "first 7 of 40 clients" in figure.axes[0].get_title(loc="left")


@pytest.mark.parametrize("missing", ["labels.json", "evaluations.jsonl", "population.json"])
def test_a_missing_file_costs_its_part_alone(run, tmp_path, missing, monkeypatch):
    monkeypatch.setattr(drawing, "svg", lambda figure: "<svg/>")
    for file in run.folder.iterdir():
        if file.name != missing:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "<h2>By tier</h2>" in page
    assert ("worst classes" in page) == (missing == "population.json")
    assert ("by client and label" in page) == (missing != "labels.json")


def test_runs_are_compared_by_their_accuracy(run, tmp_path, monkeypatch):
    monkeypatch.setattr(drawing, "svg", lambda figure: "<svg/>")
    other = fake_run(tmp_path / "flexlora-intents", seed=1)
    page = write_comparison([run.folder, other], tmp_path / "c.html").read_text(encoding="utf-8")
    for title in ("evaluation loss", "accuracy", "macro F1", "worst tenth"):
        assert f'<th class="n">{title}</th>' in page
    assert "ROUGE-L" not in page
    for r in (run, read_run(other)):
        assert f"{r.groups()['seen'][-1]['accuracy_weighted']:.3f}" in page


def test_the_log_says_what_all_examples_together_give(run):
    record = run.groups()["seen"][-1]
    line = round_summary(record)
    assert f"accuracy {record['accuracy_weighted']:.3f}" in line
    assert f"worst tenth {record['accuracy_worst_tenth']:.3f}" in line
    assert f"macro F1 {record['macro_f1_weighted']:.3f}" in line
    assert "token" not in line


def test_counts_are_in_the_rows_of_clients_alone(run):
    assert not [k for record in run.evaluations for k in record if "counts" in k]
    assert all(np.isscalar(v) for record in run.evaluations for v in record.values())
