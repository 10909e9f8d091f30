"""The values and tables of a report; the templates turn them into HTML."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedlora.run.progress import clock, size
from simulations.reporting.drawing import COLOURS
from simulations.reporting.run_folder import Record, Run, leaves, number, rank_order


@dataclass(frozen=True)
class Cell:
    """One cell of a table."""

    text: str = ""
    css: str = ""
    """``n``: a number; ``key``: what the row is about."""
    note: str = ""
    """Small, behind the text."""
    below: str = ""
    """Small, on a line of its own."""
    colour: str = ""
    """Colour of a dot before the text."""


@dataclass(frozen=True)
class Table:
    """A table under a heading."""

    title: str
    rows: Sequence[Sequence[Cell]]
    names: Sequence[Cell] = ()
    note: str = ""


@dataclass(frozen=True)
class Tile:
    """One of the large values at the top."""

    name: str
    value: str
    note: str


@dataclass(frozen=True)
class Fact:
    """One piece of the line below a run's name."""

    text: str
    code: str = ""
    after: str = ""
    bad: bool = False


def colour(i: int) -> str:
    """Colour of the i-th run."""
    return COLOURS[i % len(COLOURS)]


# --- numbers --------------------------------------------------------------------------------------


def totals(run: Run) -> dict[str, Any]:
    """A few values that summarise a run; values that were not recorded are missing."""
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


_TOKENS = {"loss": "loss_response", "ROUGE-L": "rouge_l", "accuracy": "accuracy"}
_LABELS = {
    "loss": "loss_weighted",
    "accuracy": "accuracy_weighted",
    "macro F1": "macro_f1_weighted",
    "worst tenth": "accuracy_worst_tenth",
}
_HEADLINES = {False: _TOKENS, True: _LABELS}
"""Whether labels are predicted -> what of an evaluation is shown first, by title."""


def tiles(run: Run) -> list[Tile]:
    """The large values at the top of a run's page."""
    t = totals(run)
    planned = run.config.get("rounds")
    early = "stopped early" if ended_early(run) else ""
    shown = [("rounds", f"{t['rounds']}" + (f" of {planned}" if planned else ""), early)]
    if "loss" in t:
        shown.append(("training loss", f"{t['loss']:.3f}", f"{t['first_loss']:.3f} in round 1"))
    if "evaluated" in t:
        label, first, last = t["evaluated"]
        for name, key in _HEADLINES[run.classifies].items():
            now, then = number(last.get(key)), number(first.get(key))
            if now is not None:
                before = f"{then:.3f} in round {first['round']}" if then is not None else ""
                shown.append((f"{name}, {label}", f"{now:.3f}", before))
    if "up" in t:
        shown.append(("sent up", size(t["up"]), f"{size(t.get('down', 0))} down"))
    if "clients" in t:
        bad = t["failed"] + t["rejected"]
        share = f"{t['failed']} failed, {t['rejected']} rejected" if bad else "none failed"
        shown.append(("local trainings", f"{t['clients']:,}", share))
    if "seconds" in t:
        rate = t["clients"] / t["seconds"] if t["seconds"] else 0.0
        shown.append(("time", clock(t["seconds"]), f"{rate:.1f} clients/s, all included"))
    return [Tile(*tile) for tile in shown]


def ended_early(run: Run) -> str:
    """The sentence with which a complete run ended before its last round; empty: it did not."""
    message = str(run.status.get("message", ""))
    return message if run.status.get("status") == "completed" else ""


def facts(run: Run) -> Iterator[Fact]:
    """The final status of the run, and its machine."""
    env = run.environment
    if status := str(run.status.get("status", "")):
        shown = {"running": "running, or killed"}.get(status, status)
        yield Fact(shown, bad=status == "failed")
    if commit := env.get("sources", {}).get("commit", ""):
        changed = ", changed since" if env["sources"].get("dirty") else ""
        yield Fact("commit", code=commit[:12], after=changed)
    packages = env.get("packages", {})
    for name in ("fedlora", "torch", "flwr"):
        if name in packages:
            yield Fact(f"{name} {packages[name]}")
    devices = [str(d.get("name", "")) for d in env.get("devices", [])]
    if env:
        yield Fact(", ".join(devices) or f"{env.get('cpus_usable', '?')} CPU cores")
    if recorded := env.get("recorded"):
        yield Fact(str(recorded).replace("T", " ").replace("+00:00", " UTC"))
    last = run.rounds[-1] if run.rounds else {}
    if engine := last.get("engine"):
        yield Fact(f"engine: {engine}")
    if state := last.get("state/hash"):
        yield Fact("state", code=str(state)[:12])


# --- tables ---------------------------------------------------------------------------------------

MEASURES = {  # names of metrics, in the order in which they are shown
    "loss": "loss",
    "loss_response": "loss",
    "loss_full": "loss, prompt too",
    "perplexity": "perplexity",
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "rouge_l": "ROUGE-L",
    "rouge_l_unicode": "ROUGE-L, Unicode",
    "exact_match": "exact match",
}


def evaluation_table(run: Run) -> Table | None:
    """The last evaluation of every group: mean over clients, and the weighted mean below it."""
    last = {label: rows[-1] for label, rows in run.groups().items()}
    shown = _shown_metrics(list(last.values()))
    if not shown:
        return None
    rows = []
    for label, r in last.items():
        cells = [
            Cell(label, "key"),
            Cell(str(r["round"]), "n"),
            Cell(str(r.get("clients", "")), "n"),
        ]
        for key in shown:
            interval = ""
            if number(r.get(f"{key}_low")) is not None:
                interval = f"[{show(r[f'{key}_low'])}, {show(r[f'{key}_high'])}]"
            weighted = show(r.get(f"{key}_weighted"))
            cells.append(Cell(show(r.get(key)), "n", note=interval, below=weighted))
        rows.append(cells)
    names = [Cell("group"), *(Cell(n, "n") for n in ("round", "clients", *shown.values()))]
    note = "Mean over clients; below it, weighted by examples or tokens."
    if unseen := run.population.get("unseen_model"):
        note += f" Clients that never took part are evaluated with {unseen}."
    return Table("Last evaluation", rows, names, note)


def _shown_metrics(records: Sequence[Record]) -> dict[str, str]:
    """Metrics that have a mean in some record, with their titles: known ones first."""
    means = [k.removesuffix("_weighted") for r in records for k in r if k.endswith("_weighted")]
    titles = MEASURES | {k: k.replace("_", " ") for k in means if k not in MEASURES}
    return {k: v for k, v in titles.items() if any(number(r.get(k)) is not None for r in records)}


def failure_table(run: Run) -> Table | None:
    """The failures of clients, the most frequent first."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for row in run.clients:
        if row.get("failure"):
            same = (str(row["failure"]), _first_line(row.get("message")))
            groups.setdefault(same, []).append(row)
    if not groups:
        return None
    rows = []
    for (kind, message), found in sorted(groups.items(), key=lambda item: -len(item[1])):
        ranks = sorted({str(r.get("rank", "")) for r in found}, key=rank_order)
        rows.append(
            [
                Cell(kind, "key"),
                Cell(message),
                Cell(str(len(found)), "n"),
                Cell(_some(sorted({r["round"] for r in found}))),
                Cell(_some(sorted({r["client"] for r in found}))),
                Cell(_some(ranks)),
            ]
        )
    names = [Cell("kind"), Cell("message of the first"), Cell("times", "n"), Cell("rounds")]
    return Table("Failures", rows, [*names, Cell("clients"), Cell("ranks")])


def config_table(run: Run) -> Table | None:
    """The configuration, a row per group."""
    if not run.config:
        return None
    rows, scalars = [], []
    for key, value in run.config.items():
        if isinstance(value, Mapping):
            name = str(value.get("_target_", "")).rpartition(".")[2]
            inner = [
                f"{k}={v}" for k, v in leaves(value) if not k.endswith("_target_") and _says(v)
            ]
            rows.append([Cell(key, "key"), Cell(name, note="  ".join(inner))])
        elif _says(value):
            scalars.append(f"{key}={value}")
    rows.insert(0, [Cell("run", "key"), Cell(note="  ".join(scalars))])
    return Table("Configuration", rows)


def comparison_table(runs: Sequence[Run]) -> Table:
    """The final results of several runs."""
    evaluated = list(dict.fromkeys(k for run in runs for k in _HEADLINES[run.classifies]))
    titles = ["evaluation loss" if k == "loss" else k for k in evaluated]
    numbers = ("rounds", "training loss", *titles, "up", "down", "time", "failed")
    names = [Cell("run"), *(Cell(n, "n") for n in numbers)]
    rows = []
    groups: dict[str, None] = {}
    for i, run in enumerate(runs):
        t = totals(run)
        last: Record = t["evaluated"][2] if "evaluated" in t else {}
        if "evaluated" in t:
            groups[t["evaluated"][0]] = None
        shown = [str(t["rounds"]), show(t.get("loss"))]
        keys = _HEADLINES[run.classifies]
        shown += [show(last.get(keys.get(title, ""))) for title in evaluated]
        shown += [size(t[k]) if k in t else "–" for k in ("up", "down")]
        shown.append(clock(t["seconds"]) if "seconds" in t else "–")
        shown.append(str(t.get("failed", 0) + t.get("rejected", 0)))
        name = Cell(run.name, "key", colour=colour(i))
        rows.append([name, *(Cell(text, "n") for text in shown)])
    note = f"Evaluation: last record of {', '.join(groups)}." if groups else ""
    return Table("Final results", rows, names, note)


def difference_table(runs: Sequence[Run]) -> Table | None:
    """The configuration keys in which the runs differ."""
    flat = [dict(leaves(run.config)) for run in runs]
    keys = [k for k in dict.fromkeys(k for f in flat for k in f) if k not in ("name", "output_dir")]
    different = [k for k in keys if len({str(f.get(k, "–")) for f in flat}) > 1]
    if not different:
        return None
    rows = [[Cell(k, "key"), *(Cell(str(f.get(k, "–"))) for f in flat)] for k in different]
    names = [Cell(), *(Cell(run.name) for run in runs)]
    return Table("What differs in the configuration", rows, names)


# --- words ----------------------------------------------------------------------------------------


def show(value: object) -> str:
    """A number with three digits, or a dash."""
    found = number(value)
    if found is None:
        return "–"
    return f"{found:,.1f}" if abs(found) >= 100 else f"{found:.3f}"


def _says(value: object) -> bool:
    """Whether a configuration value is neither empty nor absent."""
    return value not in (None, "", [], {})


def _some(values: Sequence[object], limit: int = 8) -> str:
    more = f", … ({len(values)})" if len(values) > limit else ""
    return ", ".join(str(v) for v in values[:limit]) + more


def _first_line(message: object) -> str:
    lines = str(message or "").strip().splitlines()
    return lines[0][:300] if lines else ""
