"""A run, or several side by side, as one HTML file that needs nothing else to be read.

python -m simulations.reporting.report outputs/RUN             # writes outputs/RUN/report.html
python -m simulations.reporting.report outputs/A outputs/B     # and outputs/comparison.html
"""

import argparse
import base64
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from omegaconf import OmegaConf

from fedlora.run.progress import clock, size
from simulations.reporting import figures
from simulations.reporting.run_folder import (
    Record,
    RecordError,
    Run,
    leaves,
    number,
    rank_order,
    read_run,
)

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ --ink: #1d2330; --soft: #667085; --line: #e4e7ec; --accent: #0072b2; }}
* {{ box-sizing: border-box; }}
body {{ margin: 0; background: #f6f7f9; color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }}
main {{ max-width: 1180px; margin: 0 auto; padding: 32px 24px 64px; }}
h1 {{ font-size: 24px; margin: 0; overflow-wrap: anywhere; }}
h2 {{ font-size: 17px; margin: 36px 0 12px; }}
p {{ margin: 4px 0 0; color: var(--soft); }}
.tiles {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(240px, 1fr)); gap: 12px;
  margin-top: 20px; }}
.card {{ background: #fff; border: 1px solid var(--line); border-radius: 8px; padding: 14px 16px; }}
.tile b {{ display: block; font-size: 21px; font-weight: 600; font-variant-numeric: tabular-nums; }}
.tile span, .tile small {{ color: var(--soft); font-size: 13px; display: block; }}
.figures {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(500px, 100%), 1fr));
  gap: 14px; }}
.card + .card {{ margin-top: 12px; }}
.figures .card, .tiles .card {{ margin: 0; }}
figure img {{ width: 100%; height: auto; display: block; }}
figcaption {{ color: var(--soft); font-size: 13px; margin-top: 6px; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; width: 100%; font-size: 14px; }}
th, td {{ text-align: left; padding: 6px 14px 6px 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }}
tr:last-child td {{ border-bottom: 0; }}
th {{ color: var(--soft); font-weight: 500; font-size: 13px; }}
td.n, th.n {{ text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }}
td.key {{ white-space: nowrap; font-weight: 500; }}
td small {{ color: var(--soft); }}
code, pre {{ font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }}
pre {{ overflow-x: auto; margin: 12px 0 0; }}
summary {{ cursor: pointer; color: var(--accent); }}
.dot {{ display: inline-block; width: 10px; height: 10px; border-radius: 50%; margin-right: 7px; }}
p.key {{ display: flex; flex-wrap: wrap; gap: 4px 22px; margin: -4px 0 12px; }}
.bad {{ color: #b42318; }}
</style>
</head>
<body><main>
{body}
</main></body>
</html>
"""

Cell = tuple[str, str]
"""HTML text and CSS class."""


def write_report(folder: Path) -> Path:
    """Write ``report.html`` of a run folder, from the files in it alone.

    Raises:
        RecordError: if the folder holds no run.
    """
    run = read_run(folder)
    return _write(folder / "report.html", run.name, run_page(run))


def write_comparison(folders: Sequence[Path], file: Path) -> Path:
    """Write one page with the curves and final numbers of several runs.

    Raises:
        RecordError: if one of the folders holds no run.
    """
    runs = _distinct([read_run(folder) for folder in folders])
    return _write(file, f"{len(runs)} runs", comparison_page(runs))


def run_page(run: Run) -> str:
    """The body of one run's report."""
    only = [run]
    sections = [
        _header(run),
        _tiles(run),
        _gallery(
            "Learning",
            (figures.loss(only), "Training loss is measured while the clients train."),
            (figures.rouge(only), "The band is a bootstrap over the evaluated clients."),
            (figures.accuracy(only), ""),
            (figures.quality_per_byte(only), "What the communication bought."),
        ),
        _evaluation_table(run),
        _gallery(
            "Cost",
            (figures.traffic(only), "As a deployment would send it: each client its own adapter."),
            (figures.seconds(run), "Wall time of the simulation."),
        ),
        _gallery(
            "Clients",
            (figures.ranks(run), ""),
            (figures.histogram(run, "loss", "Training loss by client", "nats per token"), ""),
            (figures.by_rank(run, "loss", "Training loss by rank", "nats per token"), _BOXES),
            (figures.by_rank(run, "seconds", "Training time by rank", "s"), _BOXES),
            (figures.examples(run), ""),
            (figures.by_rank(run, "delta_norm", "Size of the clients' updates", "‖ΔWₖ‖"), _BOXES),
        ),
        _gallery(
            "Aggregation",
            (figures.energy(run), "A curve that rises late: the update needs a high rank."),
            (figures.truncation(run), ""),
            (figures.exactness(only), "Averaging factors is not averaging their products."),
            (figures.update_norm(only), ""),
        ),
        _failure_table(run),
        _config_table(run),
    ]
    return "\n".join(s for s in sections if s)


_BOXES = "All rounds. Box: middle half; line: median; outliers hidden."


def comparison_page(runs: Sequence[Run]) -> str:
    """The body of the page that sets several runs side by side."""
    names = (f"<span>{_dot(i)}{escape(run.name)}</span>" for i, run in enumerate(runs))
    key = f'<p class="key">{" ".join(names)}</p>'
    return "\n".join(
        s
        for s in (
            f"<h1>{len(runs)} runs side by side</h1>",
            _comparison_table(runs),
            _gallery(
                "Learning",
                (figures.loss(runs), ""),
                (figures.rouge(runs), "Bands: bootstrap over the clients of the first group."),
                (figures.accuracy(runs), ""),
                (figures.quality_per_byte(runs), ""),
                key=key,
            ),
            _gallery(
                "Cost and aggregation",
                (figures.traffic(runs), ""),
                (figures.exactness(runs), ""),
                (figures.update_norm(runs), ""),
                key=key,
            ),
            _difference_table(runs),
        )
        if s
    )


# --- numbers --------------------------------------------------------------------------------------


def totals(run: Run) -> dict[str, Any]:
    """A run in a few numbers; what was not recorded is missing."""
    found: dict[str, Any] = {"rounds": len(run.rounds)}
    if not run.rounds and not run.evaluations:
        return found
    _, losses = run.series("train/loss")
    if losses:
        found |= {"loss": losses[-1], "first_loss": losses[0]}
    for way in ("up", "down"):
        _, sent = run.series(f"wire/{way}_bytes")
        if sent:
            found[way] = sum(sent)
    _, spent = run.series("round/seconds")
    evaluating = sum(number(r.get("round/evaluate_seconds")) or 0.0 for r in run.evaluations)
    if spent:
        found["seconds"] = sum(spent) + evaluating
    for key in ("clients", "failed", "rejected"):
        found[key] = int(sum(run.series(key)[1]))
    for label, rows in run.groups().items():
        found.setdefault("evaluated", (label, rows[0], rows[-1]))
    if run.rounds:
        found["hash"] = str(run.rounds[-1].get("state/hash", ""))[:12]
    return found


def _tiles(run: Run) -> str:
    t = totals(run)
    planned = run.config.get("rounds")
    tiles = [("rounds", f"{t['rounds']}" + (f" of {planned}" if planned else ""), "")]
    if "loss" in t:
        tiles.append(("training loss", f"{t['loss']:.3f}", f"{t['first_loss']:.3f} in round 1"))
    if "evaluated" in t:
        label, first, last = t["evaluated"]
        for key, name in (
            ("loss_response", "loss"),
            ("rouge_l", "ROUGE-L"),
            ("accuracy", "accuracy"),
        ):
            now, then = number(last.get(key)), number(first.get(key))
            if now is not None:
                before = f"{then:.3f} in round {first['round']}" if then is not None else ""
                tiles.append((f"{name}, {label}", f"{now:.3f}", before))
    if "up" in t:
        tiles.append(("sent up", size(t["up"]), f"{size(t.get('down', 0))} down"))
    if "clients" in t:
        bad = t["failed"] + t["rejected"]
        share = f"{t['failed']} failed, {t['rejected']} rejected" if bad else "none failed"
        tiles.append(("local trainings", f"{t['clients']:,}", share))
    if "seconds" in t:
        rate = t["clients"] / t["seconds"] if t["seconds"] else 0.0
        tiles.append(("time", clock(t["seconds"]), f"{rate:.1f} clients/s, all included"))
    cards = [
        f'<div class="card tile"><span>{escape(name)}</span><b>{escape(value)}</b>'
        f"<small>{escape(note)}</small></div>"
        for name, value, note in tiles
    ]
    return f'<div class="tiles">{"".join(cards)}</div>'


def _header(run: Run) -> str:
    env, parts = run.environment, []
    status = str(run.status.get("status", ""))
    if status:
        shown = {"running": "running, or killed"}.get(status, status)
        parts.append(f'<span class="{"bad" if status == "failed" else ""}">{escape(shown)}</span>')
    commit = env.get("sources", {}).get("commit", "")
    if commit:
        changed = ", changed since" if env["sources"].get("dirty") else ""
        parts.append(f"commit <code>{escape(commit[:12])}</code>{changed}")
    packages = env.get("packages", {})
    parts += [escape(f"{k} {packages[k]}") for k in ("fedlora", "torch", "flwr") if k in packages]
    devices = [str(d.get("name", "")) for d in env.get("devices", [])]
    if env:
        where = ", ".join(devices) if devices else f"{env.get('cpus_usable', '?')} CPU cores"
        parts.append(escape(where))
    if env.get("recorded"):
        parts.append(escape(str(env["recorded"]).replace("T", " ").replace("+00:00", " UTC")))
    if run.rounds and run.rounds[-1].get("engine"):
        parts.append(escape(f"engine: {run.rounds[-1]['engine']}"))
    if run.rounds and run.rounds[-1].get("state/hash"):
        parts.append(f"state <code>{escape(str(run.rounds[-1]['state/hash'])[:12])}</code>")
    message = str(run.status.get("message", ""))
    error = f'<p class="bad">{escape(message)}</p>' if message else ""
    return f"<h1>{escape(run.name)}</h1><p>{' · '.join(parts)}</p>{error}"


# --- tables ---------------------------------------------------------------------------------------

_MEASURES = {
    "loss_response": "loss",
    "loss_full": "loss, prompt too",
    "perplexity": "perplexity",
    "accuracy": "accuracy",
    "rouge_l": "ROUGE-L",
    "rouge_l_unicode": "ROUGE-L, Unicode",
    "exact_match": "exact match",
}


def _evaluation_table(run: Run) -> str:
    """The last evaluation of every group: mean over clients, and the weighted mean below it."""
    last = {label: rows[-1] for label, rows in run.groups().items()}
    shown = _shown_metrics(list(last.values()))
    if not shown:
        return ""
    rows = []
    for label, r in last.items():
        cells = [(escape(label), "key"), (str(r["round"]), "n"), (str(r.get("clients", "")), "n")]
        for key in shown:
            weighted = f"<br><small>{_show(r.get(f'{key}_weighted'))}</small>"
            interval = ""
            if number(r.get(f"{key}_low")) is not None:
                low, high = _show(r[f"{key}_low"]), _show(r[f"{key}_high"])
                interval = f" <small>[{low}, {high}]</small>"
            cells.append((f"{_show(r.get(key))}{interval}{weighted}", "n"))
        rows.append(cells)
    note = "<p>Mean over clients; below it, weighted by examples or tokens.</p>"
    names = [("group", ""), *((n, "n") for n in ("round", "clients", *shown.values()))]
    return f"<h2>Last evaluation</h2>{_table(names, rows)}{note}"


def _shown_metrics(records: Sequence[Record]) -> dict[str, str]:
    """Metrics that have a mean in some record, with their titles: known ones first."""
    means = [k.removesuffix("_weighted") for r in records for k in r if k.endswith("_weighted")]
    titles = _MEASURES | {k: k.replace("_", " ") for k in means if k not in _MEASURES}
    return {k: v for k, v in titles.items() if any(number(r.get(k)) is not None for r in records)}


def _failure_table(run: Run) -> str:
    groups: dict[tuple[str, str], list[Record]] = {}
    for row in run.clients:
        if row.get("failure"):
            groups.setdefault((str(row["failure"]), _first_line(row.get("message"))), []).append(
                row
            )
    if not groups:
        return ""
    rows = []
    for (kind, message), found in sorted(groups.items(), key=lambda item: -len(item[1])):
        ranks = sorted({str(r.get("rank", "")) for r in found}, key=rank_order)
        rows.append(
            [
                (escape(kind), "key"),
                (escape(message), ""),
                (str(len(found)), "n"),
                (escape(_some(sorted({r["round"] for r in found}))), ""),
                (escape(_some(sorted({r["client"] for r in found}))), ""),
                (escape(_some(ranks)), ""),
            ]
        )
    names = [("kind", ""), ("message of the first", ""), ("times", "n"), ("rounds", "")]
    names += [("clients", ""), ("ranks", "")]
    return f"<h2>Failures</h2>{_table(names, rows)}"


def _config_table(run: Run) -> str:
    if not run.config:
        return ""
    rows, scalars = [], []
    for key, value in run.config.items():
        if isinstance(value, Mapping):
            name = str(value.get("_target_", "")).rpartition(".")[2]
            inner = [
                f"{k}={v}" for k, v in leaves(value) if not k.endswith("_target_") and _said(v)
            ]
            text = f"{escape(name)} <small>{escape('  '.join(inner))}</small>"
            rows.append([(escape(key), "key"), (text, "")])
        elif _said(value):
            scalars.append(f"{key}={value}")
    rows.insert(0, [("run", "key"), (f"<small>{escape('  '.join(scalars))}</small>", "")])
    full = escape(OmegaConf.to_yaml(OmegaConf.create(dict(run.config))))
    details = f"<details><summary>config.yaml</summary><pre>{full}</pre></details>"
    return f'<h2>Configuration</h2>{_table([], rows)}<div class="card">{details}</div>'


def _comparison_table(runs: Sequence[Run]) -> str:
    names: list[Cell] = [("run", ""), *((n, "n") for n in ("rounds", "training loss"))]
    names += [(n, "n") for n in ("evaluation loss", "ROUGE-L", "accuracy", "up", "down", "time")]
    names += [("failed", "n")]
    rows = []
    for i, run in enumerate(runs):
        t = totals(run)
        last: Record = t["evaluated"][2] if "evaluated" in t else {}
        cells = [(f"{_dot(i)}{escape(run.name)}", "key"), (str(t["rounds"]), "n")]
        cells.append((_show(t.get("loss")), "n"))
        cells += [(_show(last.get(key)), "n") for key in ("loss_response", "rouge_l", "accuracy")]
        cells += [(size(t[k]) if k in t else "–", "n") for k in ("up", "down")]
        cells.append((clock(t["seconds"]) if "seconds" in t else "–", "n"))
        cells.append((str(t.get("failed", 0) + t.get("rejected", 0)), "n"))
        rows.append(cells)
    groups = dict.fromkeys(totals(r)["evaluated"][0] for r in runs if "evaluated" in totals(r))
    note = f"<p>Evaluation: last record of {escape(', '.join(groups))}.</p>" if groups else ""
    return f"<h2>Final numbers</h2>{_table(names, rows)}{note}"


def _difference_table(runs: Sequence[Run]) -> str:
    """The configuration keys in which the runs differ."""
    flat = [dict(leaves(run.config)) for run in runs]
    keys = [k for k in dict.fromkeys(k for f in flat for k in f) if k not in ("name", "output_dir")]
    different = [k for k in keys if len({str(f.get(k, "–")) for f in flat}) > 1]
    if not different:
        return ""
    rows = [
        [(escape(k), "key"), *((escape(str(f.get(k, "–"))), "") for f in flat)] for k in different
    ]
    names = [("", ""), *((escape(run.name), "") for run in runs)]
    return f"<h2>What differs in the configuration</h2>{_table(names, rows)}"


# --- pieces ---------------------------------------------------------------------------------------


def _gallery(title: str, *shown: tuple[Figure | None, str], key: str = "") -> str:
    cards = [_card(figure, caption) for figure, caption in shown if figure is not None]
    if not cards:
        return ""
    return f'<h2>{escape(title)}</h2>{key}<div class="figures">{"".join(cards)}</div>'


def _dot(i: int) -> str:
    """The colour of the i-th run."""
    return f'<i class="dot" style="background:{figures.COLOURS[i % len(figures.COLOURS)]}"></i>'


def _card(figure: Figure, caption: str) -> str:
    data = base64.b64encode(figures.svg(figure).encode()).decode()
    title = figure.axes[0].get_title(loc="left")
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return (
        f'<figure class="card"><img alt="{escape(title)}" src="data:image/svg+xml;base64,{data}">'
        f"{below}</figure>"
    )


def _table(names: Sequence[Cell], rows: Iterable[Sequence[Cell]]) -> str:
    """A card with a table; cells are HTML already."""

    def line(cells: Sequence[Cell], tag: str) -> str:
        inner = "".join(f'<{tag} class="{css}">{text}</{tag}>' for text, css in cells)
        return f"<tr>{inner}</tr>"

    head = line(names, "th") if names else ""
    body = "".join(line(cells, "td") for cells in rows)
    return f'<div class="card wide"><table>{head}{body}</table></div>'


def _show(value: object) -> str:
    found = number(value)
    if found is None:
        return "–"
    return f"{found:,.1f}" if abs(found) >= 100 else f"{found:.3f}"


def _said(value: object) -> bool:
    """Whether a configuration value says something: not empty, not absent."""
    return value not in (None, "", [], {})


def _some(values: Sequence[object], limit: int = 8) -> str:
    more = f", … ({len(values)})" if len(values) > limit else ""
    return ", ".join(str(v) for v in values[:limit]) + more


def _first_line(message: object) -> str:
    lines = str(message or "").strip().splitlines()
    return lines[0][:300] if lines else ""


def _distinct(runs: Sequence[Run]) -> list[Run]:
    """The runs, with the folder above added to names that more than one has."""
    names = [run.name for run in runs]
    return [
        replace(run, name=f"{run.folder.resolve().parent.name}/{run.name}")
        if names.count(run.name) > 1
        else run
        for run in runs
    ]


def _write(file: Path, title: str, body: str) -> Path:
    file.write_text(_PAGE.format(title=escape(f"{title} · fedlora"), body=body), encoding="utf-8")
    return file


def main(arguments: Sequence[str] | None = None, show: Callable[[str], object] = print) -> int:
    """The command line; the exit status."""
    parser = argparse.ArgumentParser(prog="fedlora report", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folders", nargs="+", type=Path, metavar="RUN_FOLDER")
    parser.add_argument(
        "--comparison",
        type=Path,
        help="the page for several runs; default: comparison.html in the folder above them all",
    )
    chosen = parser.parse_args(arguments)
    try:
        for folder in chosen.folders:
            show(f"{write_report(folder)}")
        if len(chosen.folders) > 1:
            above = Path(os.path.commonpath([f.resolve().parent for f in chosen.folders]))
            file = chosen.comparison or above / "comparison.html"
            show(f"{write_comparison(chosen.folders, file)}")
    except RecordError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
