"""Laws of reports: everything recorded is shown, nothing is fetched, nothing missing is fatal."""

import json
import math
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from jinja2 import TemplateNotFound

from fedlora.core import package, variables
from fedlora.core.metric import Metric, count
from fedlora.core.types import (
    Client,
    Evaluation,
    Ranks,
)
from fedlora.evaluation.summary import summarise
from fedlora.run.tracking import JsonlTracker
from fedlora.server.evaluation_round import evaluation_rows
from simulations.reporting import analysis_figures, drawing, fairness_figures, figures
from simulations.reporting.report import (
    main,
    write_comparison,
    write_report,
)
from simulations.reporting.run_folder import RecordError, read_run
from simulations.reporting.run_tables import totals

TIERS = {"phone": 4, "tablet": 8, "laptop": 30, "server": 200}


def fake_run(folder: Path, rounds: int = 6, seed: int = 3, speed: float = 1.0) -> Path:
    """A run folder as a real run leaves it, with made-up numbers."""
    random = np.random.default_rng(seed)
    tracker = JsonlTracker(folder)
    evaluate(tracker, 0, rounds, random, speed)
    for n in range(1, rounds + 1):
        rows = [client_row(n, k, rounds, random, speed) for k in range(40)]
        tracker.clients(rows)
        good = [r for r in rows if "failure" not in r]
        tracker.round(round_record(n, good, len(rows) - len(good), random, speed))
        if n % 2 == 0 or n == rounds:
            evaluate(tracker, n, rounds, random, speed)
    tracker.close()
    config = f"""
strategy: {{_target_: strategies.flexlora.FlexLoRA, weights: examples, svd: auto}}
ranks: {{_target_: fedlora.population.ranks.X, distribution: heavy_tail_strong, alpha: 16.0}}
client: {{_target_: fedlora.core.types.LocalPlan, optimizer: adamw, lr: {0.002 * speed}, epochs: 1}}
evaluate: {{_target_: E, plan: {{_target_: P, split: test, max_examples: 2}}, groups: [seen]}}
seed: {seed}
rounds: {rounds}
"""
    (folder / "config.yaml").write_text(config)
    population = {
        "clients": 1600,
        "tiers": {"phone": 800, "tablet": 400, "laptop": 300, "server": 100},
        "ranks": {"4": 800, "8": 400, "30": 300, "30/200": 100},
    }
    (folder / "population.json").write_text(json.dumps(population))
    (folder / "status.json").write_text('{"status": "completed", "message": ""}')
    environment = {
        "recorded": "2026-11-22T08:00:00+00:00", "cpus_usable": 2, "devices": [],
        "packages": {"fedlora": "0.1.0", "torch": "2.13.0", "flwr": "1.41.0"},
        "sources": {"commit": "0123456789abcdef", "dirty": True},
    }  # fmt: skip
    (folder / "environment.json").write_text(json.dumps(environment))
    return folder


def label_of(tier: str) -> str:
    return "30/200" if tier == "server" else str(TIERS[tier])


def client_row(n, k, rounds, random, speed) -> dict:
    tier = str(random.choice(list(TIERS), p=[0.5, 0.25, 0.2, 0.05]))
    rank, examples = TIERS[tier], int(random.lognormal(2.5, 0.7)) + 1
    row = {
        "round": n, "client": int(random.integers(1600)), "tier": tier, "rank": label_of(tier),
        "examples": examples, "bytes_down": 5000 * rank,
    }  # fmt: skip
    if random.random() < 0.02 or (n, k) == (2, 0):
        return row | {"bytes_up": 0, "failure": "ValueError", "message": "<b>no examples</b>"}
    loss = 2.6 + 1.2 * math.exp(-2 * speed * n / rounds) + 0.2 * random.normal()
    seconds = (0.1 + 0.01 * examples) * (1 + rank / 300) * random.lognormal(0, 0.1)
    return row | {
        "bytes_up": 5000 * rank, "loss": loss, "seconds": seconds,
        "delta_norm": 0.2 * random.lognormal(0, 0.2) * rank**0.2,
    }  # fmt: skip


def round_record(n, rows, failed, random, speed) -> dict:
    loss = float(np.mean([r["loss"] for r in rows]))
    record = {
        "kind": "round", "round": n, "clients": len(rows), "failed": failed, "rejected": 0,
        "train/loss": loss, "train/loss_first": loss + 0.1, "train/tokens": 4000,
        "round/train_seconds": 5 + random.random(), "round/aggregate_seconds": 0.6,
        "round/clients_per_second": 8.0, "wire/up_bytes": sum(r["bytes_up"] for r in rows),
        "wire/down_bytes": sum(r["bytes_down"] for r in rows), "state/hash": f"{n:012x}",
        "aggregate/exactness_gap": 0.01 * n, "aggregate/exactness_gap_relative": 0.02 / n,
        "aggregate/update_norm": 1.0 + n**0.5 * speed,
    }  # fmt: skip
    record["round/seconds"] = record["round/train_seconds"] + 0.9
    for rank in (4, 8, 30, 200):
        left = math.exp(-rank / (3 + n))
        record[f"aggregate/energy_at_rank_{rank}"] = 1 - left
        label = "30/200" if rank == 200 else str(rank)
        record[f"aggregate/truncation_error_{label}"] = math.sqrt(left)
    return record | analysed(n)


def analysed(n: int) -> dict[str, float]:
    """The analyses of a round whose energy leaves the indices beyond 4."""
    left = 0.5**n
    record = {
        "spectrum/energy_1-4": 1 - left, "spectrum/energy_5-8": left / 2,
        "spectrum/energy_9-30": left / 4,
        "spectrum/energy_31-200": left / 4, "spectrum/energy_rest": 0.0,
        "spectrum/effective_rank": 4 + left, "spectrum/stable_rank": 2.0,
        "drift/norm": 1.0, "drift/norm_std": 0.1, "drift/cosine": 0.5, "drift/cosine_std": 0.1,
        "drift/pairs": 0.2, "drift/diversity": 3.0,
    }  # fmt: skip
    for i, tier in enumerate(TIERS):
        record |= {f"tier/{tier}/lost": 0.5 / (i + 1), f"tier/{tier}/truncation_error": 0.2}
        for name in ("norm", "cosine"):
            record |= {f"tier/{tier}/drift_{name}": 0.3, f"tier/{tier}/drift_{name}_std": 0.0}
    return record


def evaluate(tracker, n, rounds, random, speed) -> None:
    for group, adapter, worse in (("seen", "full", 0), ("unseen_random", "full", 0.2),
                                  ("unseen_random", "own", 0.3)):  # fmt: skip
        done = 1 - math.exp(-2 * speed * n / rounds)
        found = [
            Evaluation(
                Client(k, Ranks({"q": 4}), 9, "phone" if k % 2 else "server"),
                {
                    "examples": count(4), "tokens_full": count(300), "tokens_response": count(80),
                    "loss_full": Metric(3.3 + worse - done + 0.1 * random.normal(), 300),
                    "loss_response": Metric(3.5 + worse - done + 0.2 * random.normal(), 80),
                    "accuracy": Metric(0.25 + 0.2 * done - worse / 10, 80),
                    "rouge_l": Metric(
                        float(np.clip(0.1 + 0.2 * done + 0.1 * random.normal(), 0, 1)),
                        4, interval=True,
                    ),
                    "exact_match": Metric(0.0, 4),
                },
            )
            for k in range(20)
        ]  # fmt: skip
        head = {"kind": "evaluate", "round": n, "group": group, "adapter": adapter, "failed": 0}
        tracker.round(head | {"round/evaluate_seconds": 0.7} | summarise(found))
        tracker.evaluated(evaluation_rows(f"{group}:{adapter}", found, round=n))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return fake_run(tmp_path_factory.mktemp("runs") / "flexlora-heavy_tail-sotu-tiny-s3")


@pytest.fixture
def undrawn(monkeypatch):
    """Figures are made but not rendered, for tests of what surrounds them."""
    monkeypatch.setattr(drawing, "svg", lambda figure: "<svg></svg>")


def titles(page: str) -> set[str]:
    return set(re.findall(r'<img alt="([^"]*)"', page))


def test_everything_that_was_recorded_is_shown(folder, undrawn):
    page = write_report(folder).read_text(encoding="utf-8")
    for section in ("Learning", "Last evaluation", "Cost", "Clients", "Client drift",
                    "Aggregation", "Failures"):  # fmt: skip
        assert f"<h2>{section}</h2>" in page
    assert len(titles(page)) == 25
    run = read_run(folder)
    assert folder.name in page
    assert f"{run.rounds[-1]['train/loss']:.3f}" in page
    assert f"{run.rounds[-1]['state/hash']}" in page
    assert "unseen random, own rank" in page
    assert "FlexLoRA" in page


def test_nothing_is_fetched_and_nothing_recorded_becomes_markup(folder, undrawn):
    page = write_report(folder).read_text(encoding="utf-8")
    assert not re.search(r'(?:src|href)\s*=\s*"(?!data:)', page)
    assert not re.search(r"@import|url\(|<script|<link", page)
    assert "<b>no examples</b>" not in page
    assert "&lt;b&gt;no examples&lt;/b&gt;" in page


def test_the_page_is_well_formed(folder, undrawn):
    page = write_report(folder).read_text(encoding="utf-8")
    body = page[page.index("<main>") : page.index("</main>") + len("</main>")]
    ElementTree.fromstring(re.sub(r"(<img[^>]*|<br)>", r"\1/>", body))


def test_the_same_records_give_the_same_picture(folder):
    run = read_run(folder)
    first = drawing.svg(figures.loss([run]))
    ElementTree.fromstring(first)
    assert drawing.svg(figures.loss([read_run(folder)])) == first


def test_figures_follow_the_readers_scheme_and_keep_the_colours_of_data(folder):
    plain = drawing.svg(figures.loss([read_run(folder)]))
    found = drawing.adaptive(plain)
    ElementTree.fromstring(found)
    assert "prefers-color-scheme: dark" in found
    body = found[found.index("</style>") :]
    assert not re.findall("#ffffff|#444444|#555555", body)
    for colour in drawing.COLOURS[:3]:
        assert body.count(colour.lower()) == plain.count(colour.lower()) > 0


def test_the_report_reads_the_folder_and_nothing_else(folder, tmp_path, undrawn):
    copy = tmp_path / folder.name
    copy.mkdir()
    for name in ("metrics.jsonl", "clients.jsonl", "config.yaml", "population.json",
                 "environment.json", "status.json", "evaluations.jsonl"):  # fmt: skip
        (copy / name).write_bytes((folder / name).read_bytes())
    assert write_report(copy).read_bytes() == write_report(folder).read_bytes()


def test_templates_are_found_where_flowers_bundle_lacks_them(
    folder, tmp_path, monkeypatch, undrawn
):
    here = package.ROOT
    monkeypatch.setattr(package, "ROOT", tmp_path / "bundle")
    monkeypatch.setattr(package.metadata, "distributions", lambda **_: [])
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(variables.ROOT, raising=False)
    with pytest.raises(
        TemplateNotFound, match=r"run\.html.*bundle/simulations/reporting/templates"
    ):
        write_report(folder)
    monkeypatch.setenv(variables.ROOT, str(here))
    assert write_report(folder).is_file()


def test_totals_are_sums_of_the_records(folder):
    run, found = read_run(folder), totals(read_run(folder))
    failed = sum("failure" in row for row in run.clients)
    assert found["failed"] == failed > 0
    assert found["clients"] == len(run.clients) - failed
    assert found["up"] == sum(row["bytes_up"] for row in run.clients)
    assert found["rounds"] == 6


@pytest.mark.parametrize(
    "missing",
    ["clients.jsonl", "config.yaml", "population.json", "environment.json", "status.json"],
)
def test_a_missing_file_costs_its_section_alone(folder, tmp_path, missing, undrawn):
    for file in folder.iterdir():
        if file.is_file() and file.name != missing:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "<h2>Learning</h2>" in page
    assert ("<h2>Configuration</h2>" in page) == (missing != "config.yaml")
    assert ("<h2>Failures</h2>" in page) == (missing != "clients.jsonl")


@pytest.mark.parametrize(
    "record",
    [
        None,
        {"kind": "evaluate", "round": 0, "group": "seen", "loss_response": None, "rouge_l": 0.0},
        {"kind": "round", "round": 1, "train/loss": None},
        {"kind": "round", "round": 1, "train/loss": 3.0, "round/seconds": 0.0, "wire/up_bytes": 0},
    ],
)
def test_a_run_that_hardly_began_has_a_report(tmp_path, record, undrawn):
    tracker = JsonlTracker(tmp_path)
    (tmp_path / "metrics.jsonl").touch()
    if record:
        tracker.round(record)
    assert tmp_path.name in write_report(tmp_path).read_text(encoding="utf-8")


def test_a_run_of_many_rounds_and_ranks_has_a_report(tmp_path):
    tracker = JsonlTracker(tmp_path)
    for n in range(1, 60):
        rows = [{"round": n, "client": r, "rank": str(r), "loss": 1.0 + r} for r in range(1, 33)]
        tracker.clients(rows)
        tracker.round({"kind": "round", "round": n, "train/loss": 1 / n, "round/seconds": 1.0})
    assert "Clients by LoRA rank" in titles(write_report(tmp_path).read_text(encoding="utf-8"))


def test_a_failed_run_says_so(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "status.json").write_text('{"status": "failed", "message": "too few <clients>"}')
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert '<p class="bad">too few &lt;clients&gt;</p>' in page


def test_several_runs_are_told_apart(folder, tmp_path):
    other = fake_run(tmp_path / folder.name, seed=4, speed=2.0)
    page = write_comparison([folder, other], tmp_path / "c.html").read_text(encoding="utf-8")
    assert "2 runs side by side" in page
    for run in (folder, other):
        assert f"{run.parent.name}/{run.name}" in page
    differing = page[page.index("What differs") :]
    for key in ("seed", "client.lr"):
        assert f'<td class="key">{key}</td>' in differing
    assert "ranks.alpha" not in differing
    assert len(titles(page)) == 10


def test_analyses_that_were_not_recorded_cost_nothing_but_their_figures(folder, tmp_path, undrawn):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    for row in rows:
        if row["kind"] == "round":
            for key in analysed(1):
                del row[key]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "Client drift" not in page
    assert "Lost when the global update is cut to a client&#39;s rank" in titles(page)
    whole = titles(write_report(folder).read_text(encoding="utf-8"))
    assert {"Lost of the global update, by tier", "Energy in the indices of each rank"} <= whole


def test_the_energies_of_ranks_are_the_sums_of_their_ranges(folder):
    figure = analysis_figures.energy_by_tier(read_run(folder))
    assert figure is not None
    drawn = {line.get_label(): line.get_ydata() for line in figure.axes[0].lines}
    assert set(drawn) == {"indices 1-4", "indices 5-8", "indices 9-30", "indices 31-200"}
    assert drawn["indices 1-4"] == pytest.approx([1 - 0.5**n for n in range(1, 7)])


def test_the_quality_of_tiers_is_pooled_over_their_clients(folder):
    run = read_run(folder)
    figure = fairness_figures.tier_quality(run)
    assert figure is not None
    drawn = {line.get_label(): line.get_ydata() for line in figure.axes[0].lines}
    assert list(drawn) == ["phone", "server", "worst tenth"]
    rows = run.last_clients()["seen"]
    losses = sorted(r["metrics"]["loss_response"] for r in rows)
    phones = [r["metrics"]["loss_response"] for r in rows if r["tier"] == "phone"]
    assert drawn["phone"][-1] == pytest.approx(np.mean(phones))
    assert drawn["worst tenth"][-1] == pytest.approx(np.mean(losses[-2:]))


def test_quality_is_drawn_against_all_bytes_so_far(folder):
    run = read_run(folder)
    figure = fairness_figures.quality_by_bytes([run])
    assert figure is not None
    whole, sent = figure.axes[0].lines
    up, down = (sum(run.series(f"wire/{way}_bytes")[1]) for way in ("up", "down"))
    scale, _ = drawing.byte_scale([run])
    assert whole.get_xdata()[-1] == pytest.approx((up + down) / scale)
    assert sent.get_xdata()[-1] == pytest.approx(up / scale)
    assert list(whole.get_ydata()) == list(sent.get_ydata())


def test_the_last_recorded_analysis_counts(folder):
    run = read_run(folder)
    assert run.analyses(0) == {}
    for n in (1, 4, 9):
        assert run.analyses(n).items() >= analysed(min(n, 6)).items()
    assert "train/loss" not in run.analyses(3)


def test_the_command_writes_each_report_and_one_comparison(tmp_path, undrawn):
    runs = [fake_run(tmp_path / name, rounds=2) for name in ("a", "b")]
    shown: list[str] = []
    assert main([str(runs[0])], show=shown.append) == 0
    assert shown == [str(runs[0] / "report.html")]
    assert main([str(r) for r in runs], show=shown.append) == 0
    assert (tmp_path / "comparison.html").is_file()
    assert shown[-1] == str(tmp_path / "comparison.html")


def test_a_folder_without_a_run_is_named(tmp_path, capsys):
    with pytest.raises(RecordError, match=str(tmp_path)):
        write_report(tmp_path)
    assert main([str(tmp_path / "absent")]) == 2
    assert "absent is no run folder" in capsys.readouterr().err
