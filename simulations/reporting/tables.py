"""Tables of recorded results: every cell is computed from a JSON file.

Runs are in docs/results/, benchmarks in simulations/bench/results/. A table is a function of the
`Records` that returns Markdown; `TABLES` names them for the markers in documents.
"""

import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.core.reading import json_in
from fedlora.run.progress import clock
from simulations.cli import group_choices

_GROUP = re.compile(r"^  - (\w+): (\w+) +# (.+)$", re.MULTILINE)
FOLDERS = ("docs/results", "simulations/bench/results")
GIB = 1024
OF_METHODS = ("accuracy_weighted", "macro_f1_weighted", "accuracy_worst_tenth")
"""What the comparison of methods shows, in fractions."""
TUNED_AT = {"spread": "alpha_0.1", "ranks": "tiers_8_64", "clients": "all"}
"""The cells of the study of BANKING77 that all of its methods have."""


@dataclass(frozen=True)
class Records:
    """The recorded JSON files of a checkout, by the beginning of their names."""

    root: Path

    def __getitem__(self, name: str) -> dict[str, Any]:
        """The record whose file name is ``<name>.json`` or ``<name>-<machine>.json``.

        Raises:
            FileNotFoundError: if there is not exactly one; the message names the folders.
            ModelError: if it cannot be read.
        """
        files = self._files(name)
        exact = [f for f in files if f.stem == name] or files
        if len(exact) != 1:
            found = ", ".join(f.name for f in exact) or "none"
            raise FileNotFoundError(f"{name}: one JSON file is wanted in {FOLDERS}, found {found}")
        return json_in(exact[0], "the record")

    def has(self, name: str) -> bool:
        """Whether there is a record of this name."""
        return bool(self._files(name))

    def _files(self, name: str) -> list[Path]:
        return [f for folder in FOLDERS for f in sorted((self.root / folder).glob(f"{name}*.json"))]

    def text(self, name: str) -> str:
        """A recorded text of docs/results/, such as what a run printed."""
        return (self.root / FOLDERS[0] / name).read_text(encoding="utf-8")


Table = Callable[[Records], str]


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def code(command: str) -> str:
    """A command in the form used by the documents."""
    return f"`{command}`"


def change(first: float | None, last: float, digits: int = 3) -> str:
    """``before → after``."""
    before = "" if first is None else f"{first:.{digits}f} → "
    return f"{before}{last:.{digits}f}"


def traffic(mib: float | None) -> str:
    """Mebibytes, or gibibytes where those are more readable."""
    if mib is None:
        return "–"
    if mib >= GIB:
        return f"{mib / GIB:.1f} GiB"
    return f"{mib:.0f} MiB" if mib >= 100 or mib == round(mib) else f"{mib:.1f} MiB"


def deviation(values: Sequence[float], digits: int = 1) -> str:
    """``mean ± standard deviation`` of several seeds."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def times(x: float) -> str:
    """A ratio."""
    return f"{x:.2f}x" if x < 3 else f"{x:.1f}x" if x < 10 else f"{x:.0f}x"


def printed(records: Records) -> str:
    """The output of the default run, without the lines in the middle."""
    return f"```\n{records.text('default.log')}```"


def groups(records: Records) -> str:
    """The groups of conf/ with what they decide (the comments of config.yaml) and their choices."""
    text = (records.root / "conf/config.yaml").read_text(encoding="utf-8")
    about = {m[1]: (m[2], m[3]) for m in _GROUP.finditer(text)}
    rows = []
    for name, choices in group_choices(records.root / "conf"):
        default, decides = about.get(name, ("", f"within {code(name.rpartition('/')[0])}"))
        listed = ", ".join(f"**{code(c)}**" if c == default else code(c) for c in choices)
        if name != "experiment":
            rows.append([code(name), decides, listed])
    return markdown(["group", "decides", "choices, the default in bold"], rows)


# --- runs -----------------------------------------------------------------------------------------


def learning(records: Records) -> str:
    """Runs: loss and ROUGE-L of clients that never train, before and after."""
    rows = []
    for r in _of(records, "loss_response"):
        loss = change(r["first"]["loss_response"], r["last"]["loss_response"])
        rows.append([*_named(r), loss, rouge(r), *_cost(r)])
    return markdown(["run", "command", "loss", "ROUGE-L", "sent up", "time"], rows)


def classification(records: Records) -> str:
    """Runs: accuracy of predicted labels, before and after; macro F1 and the worst tenth after."""
    rows = []
    for r in _of(records, "accuracy_weighted"):
        before, after = (100 * r[end]["accuracy_weighted"] for end in ("first", "last"))
        scores = [100 * r["last"][k] for k in ("macro_f1_weighted", "accuracy_worst_tenth")]
        shown = [change(before, after, digits=1), *(f"{x:.1f}" for x in scores)]
        rows.append([*_named(r), *shown, *_cost(r)])
    names = ["run", "command", "accuracy, %", "macro F1, %", "worst tenth, %", "sent up", "time"]
    return markdown(names, rows)


def percent(runs: Iterable[Mapping[str, Any]], metric: str = OF_METHODS[0]) -> list[float]:
    """The last value of a metric of each run of ``simulations.bench.methods``, in percent."""
    return [100 * run["metrics"][metric][-1] for run in runs]


def by_method(runs: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Runs by method and seed as ``simulations.bench.methods`` records them, the best accuracy
    first; below the table why a method cannot run."""
    all_of = {method: list(seeds.values()) for method, seeds in runs.items()}
    ran = {m: found for m, found in all_of.items() if not any("refused" in r for r in found)}

    rows = []
    for method in sorted(ran, key=lambda m: -statistics.mean(percent(ran[m]))):
        scores = [deviation(percent(ran[method], metric)) for metric in OF_METHODS]
        sent = [statistics.mean(r[way] for r in ran[method]) for way in ("up_bytes", "down_bytes")]
        cpu = deviation([r["cpu_s"] for r in ran[method]], 0)
        cost = [*(traffic(x / 2**20) for x in sent), cpu]
        rows.append([code(method), str(len(ran[method])), *scores, *cost])
    names = ["method", "seeds", "accuracy, %", "macro F1, %", "worst tenth, %", "sent up"]
    lines = [markdown([*names, "sent down", "CPU s"], rows)]
    refused = {m: found[0]["refused"] for m, found in all_of.items() if m not in ran}
    lines += [f"- {code(method)} cannot run: {why}" for method, why in refused.items()]
    return "\n".join(lines[:1] + [""] * bool(refused) + lines[1:])


def methods(records: Records) -> str:
    """BANKING77 under the methods that have been run so far."""
    return by_method(records["methods-intents_banking77"]["runs"])


def published(records: Records) -> str:
    """Accuracy on BANKING77 as published, beside ours of the same method in another setting."""
    record, runs = records["published-banking77"], records["methods-intents_banking77"]["runs"]
    spreads = list(dict.fromkeys(a for row in record["rows"] for a in row["accuracy"]))
    rows = []
    for row in record["rows"]:
        theirs = [row["accuracy"].get(a) for a in spreads]
        ours = deviation(percent(runs[row["method"]].values()))
        shown = ["–" if value is None else f"{value:.1f}" for value in theirs]
        rows.append(
            [code(row["method"]), row["ranks"], *shown, ours, _tuned(records, row["method"])]
        )
    heads = ["method", "ranks", *(f"Dirichlet {a}" for a in spreads), "ours, above", "ours, tuned"]
    return f"{record['source']}: {record['about']}.\n\n{markdown(heads, rows)}"


def _tuned(records: Records, method: str) -> str:
    """The method's accuracy at its tuned rate in the setting that all methods of the study of
    BANKING77 have, percent, with the half width of its 95 % interval."""
    if records.has("study-banking77"):
        for row in records["study-banking77"]["rows"]:
            found = row["metrics"].get("accuracy_weighted", {})
            if row["cell"] == {"method": method} | TUNED_AT and found:
                mean, low, high = found["interval"]
                spread = "" if low is None else f" ± {50 * (high - low):.1f}"
                return f"{100 * mean:.1f}{spread}"
    return "–"


def _of(records: Records, metric: str) -> list[Mapping[str, Any]]:
    """The runs that measured this."""
    return [r for r in records["runs"]["rows"] if metric in r["last"]]


def _named(row: Mapping[str, Any]) -> tuple[str, str]:
    note = f", {row['note']}" if row.get("note") else ""
    return f"{row['run']}{note}", code(row["command"])


def _cost(row: Mapping[str, Any]) -> tuple[str, str]:
    return traffic(row["up_mib"]), clock(row["seconds"])


def rouge(row: Mapping[str, Any]) -> str:
    """ROUGE-L with its interval where there is one, else before and after."""
    last = row["last"]
    if "rouge_l_low" in last:
        return f"{last['rouge_l']:.3f} [{last['rouge_l_low']:.3f}, {last['rouge_l_high']:.3f}]"
    return change(row["first"].get("rouge_l"), last["rouge_l"])


def e2e(records: Records) -> str:
    """Split-federated runs on E2E."""
    rows = []
    for r in records["e2e"]["rows"]:
        run = f"{code(r['experiment'])}: {r['what']}"
        scores = (r["bleu"], r["nist"], 100 * r["rouge_l_e2e"], r["cider"])
        texts = (f"{x:.{digits}f}" for x, digits in zip(scores, (2, 2, 1, 3), strict=True))
        rows.append([run, f"{r['perplexity']:.3f}", traffic(r["up_mib_per_round"]), *texts])
    names = ["experiment", "perplexity", "sent up in a round", "BLEU", "NIST", "ROUGE-L (E2E)"]
    return markdown([*names, "CIDEr"], rows)


# --- pre-training and pruning ---------------------------------------------------------------------


def switchlora(records: Records) -> str:
    """Pre-training a small Llama by four methods, several seeds."""
    found = records["switchlora-d"]
    rows = []
    for side, seeds in found["runs"].items():
        runs = list(seeds.values())
        ranks = statistics.mean(r["update_rank"]["mean"] for r in runs)
        possible = runs[0]["update_rank"]["possible"]
        perplexity = deviation([r["perplexity"] for r in runs])
        parameters = f"{runs[0]['trained_parameters']:,}"
        rows.append([side, f"{runs[0]['lr']:g}", perplexity, parameters])
        rows[-1].append(f"{ranks:.1f} of {possible:.0f}")
    names = ["method", "learning rate", "held-out perplexity", "trained parameters"]
    return markdown([*names, "rank of the update"], rows)


def switchlora_rounds(records: Records) -> str:
    """The same idea under federation: loss of clients that never train, and traffic."""
    rows = []
    for side, seeds in records["switchlora-rounds"]["runs"].items():
        runs = list(seeds.values())
        up, down = (
            statistics.mean(sum(r[way]) for r in runs) / 2**20 for way in ("up_bytes", "down_bytes")
        )
        last = deviation([r["loss"][-1] for r in runs], 3)
        rows.append([side, f"{runs[0]['lr']:g}", last, traffic(up), traffic(down)])
    return markdown(["side", "learning rate", "loss", "sent up", "sent down"], rows)


def sparse(records: Records) -> str:
    """Fine-tuning pruned models: perplexity by method and pattern."""
    found = {name: records[f"sparse-{name}"]["patterns"] for name in ("tiny", "smollm2")}
    columns = [(name, pattern) for name in found for pattern in ("0.5", "2:4")]
    tables = [{r["name"]: r for r in found[name][pattern]} for name, pattern in columns]
    titles = {"tiny": "tiny", "smollm2": "SmolLM2-135M"}
    heads = [f"{titles[n]}, {'50 %' if p == '0.5' else p}" for n, p in columns]
    rows = [
        [name, *(f"{t[name]['perplexity']:.1f}" if name in t else "–" for t in tables)]
        for name in dict.fromkeys(name for t in tables for name in t)
    ]
    return markdown(["method", *heads], rows)


TABLES: dict[str, Table] = {
    "groups": groups,
    "printed": printed,
    "learning": learning,
    "classification": classification,
    "methods": methods,
    "published": published,
    "e2e": e2e,
    "switchlora": switchlora,
    "switchlora-rounds": switchlora_rounds,
    "sparse": sparse,
}
