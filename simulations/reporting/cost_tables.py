"""Tables of what every method costs: the records of ``simulations.bench.costs``."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from simulations.reporting.tables import Records, Table, code, markdown, times

REFERENCE = "fedit"
MODELS = {"tiny": "tiny", "smollm2": "SmolLM2-135M"}
RANKS = ("equal", "unequal")


def server(record: Mapping[str, Any]) -> str:
    """A round's average and starts by method, in milliseconds and beside FedIT's."""
    found = record["found"]
    names = list(next(iter(found.values()))["presets"])
    rows = []
    for name in names:
        cells = [code(name)]
        for model in found.values():
            for clock in ("cpu_ms", "wall_ms"):
                cells.append(f"{_round(model['presets'][name], clock):,.0f}")
            cells.append(_beside(model["presets"], name, _round))
        rows.append(cells)
    heads = [f"{m}: {x}" for m in found for x in ("CPU ms", "wall ms", "of FedIT's CPU")]
    return markdown(["method", *heads], rows)


def _round(row: Mapping[str, Any], clock: str) -> float:
    parts = zip(row["aggregate"][clock], row["starts"][clock], strict=True)
    return float(statistics.median(a + s for a, s in parts))


def _beside(presets: Mapping[str, Any], name: str, of: Callable[[Any, str], float]) -> str:
    if REFERENCE not in presets:
        return "–"
    return times(of(presets[name], "cpu_ms") / of(presets[REFERENCE], "cpu_ms"))


def steps(record: Mapping[str, Any]) -> str:
    """A client's step by method, engine and model, in milliseconds and beside FedIT's; below the
    table why a method has none."""
    found = record["found"]
    columns = [(m, e) for m, f in found.items() for e in next(iter(f["presets"].values()))]
    first = next(iter(found.values()))
    rows = []
    for name in first["presets"]:
        cells = [code(name)]
        for model, engine in columns:
            of_engine = {p: row[engine] for p, row in found[model]["presets"].items()}
            cells.append(f"{_step(of_engine[name], 'cpu_ms'):,.1f}")
            cells.append(_beside(of_engine, name, _step))
        rows.append(cells)
    heads = [
        f"{MODELS[model]}, {engine}: {x}"
        for model, engine in columns
        for x in ("CPU ms", "of FedIT's")
    ]
    left_out = [f"- {code(name)}: {why}" for name, why in first["left_out"].items()]
    return "\n".join([markdown(["method", *heads], rows), *([""] if left_out else []), *left_out])


def _step(row: Mapping[str, Any], clock: str) -> float:
    return float(statistics.median(row[clock]))


def traffic(record: Mapping[str, Any]) -> str:
    """Bytes of a client at one rank by method, their mean of a layer, and whether all of them, at
    four tiers of ranks too, are those of the formula."""
    rows = []
    for name, found in record["found"].items():
        equal, modules = found["equal"], found["equal"]["modules"]
        when = equal["down_bytes"].values()
        wrong = sum(len(found[ranks]["wrong"]) for ranks in RANKS)
        count = sum(found[ranks]["client_rounds"] for ranks in RANKS)
        compared = sum(found[ranks]["compared"] for ranks in RANKS)
        verdict = f"{compared - wrong} of {count}" if found["up"] else "no formula"
        formulas = [found[way] or "–" for way in ("up", "down")]
        if found["smallest"]:
            formulas[0] += "; r: the smallest"
        cells = [_bytes(x, modules) for x in (equal["up_bytes"], *when)]
        rows.append([code(name), *formulas, *cells, verdict])
    names = ["method", "up, scalars of a layer", "down", "up", "down, round 1"]
    return markdown([*names, "the round after", "later", "equal to the byte"], rows)


def _bytes(ends: Sequence[int], modules: int) -> str:
    """``bytes of a client (mean of a layer)``, or the range."""
    shown = dict.fromkeys(ends)
    whole, layer = (" to ".join(f"{x / y:,.0f}" for x in shown) for y in (1, modules))
    return f"{whole} ({layer})" if any(shown) else whole


def exactness(record: Mapping[str, Any]) -> str:
    """The largest gap of any round by method, absolute and relative, at one rank and at several."""
    rows = []
    for name, found in record["found"].items():
        cells = []
        for ranks in RANKS:
            for kind in ("gap", "relative"):
                values = found[ranks][kind]
                cells.append(f"{max(values):.1e}" if values else "–")
        rows.append([code(name), *cells])
    names = [f"{ranks} ranks, {kind}" for ranks in RANKS for kind in ("absolute", "relative")]
    return markdown(["method", *names], rows)


def memory(record: Mapping[str, Any]) -> str:
    """What clients keep: scalars of a layer, bytes of a client, and of the whole population."""
    rows = []
    for model, found in record["found"].items():
        for name, row in found.items():
            due, held = row["formula_bytes_per_client"], row["tensor_bytes_per_client"]
            equal = "–" if due is None else "yes" if due == held else f"no: {due:,}"
            sizes = [f"{held:,}", f"{row['header_bytes_per_client']:,}"]
            whole = f"{row['population_bytes'] / 1e6:,.0f} MB"
            rows.append([code(name), model, row["formula"] or "–", *sizes, equal, whole])
    names = ["method", "model", "scalars of a layer", "bytes of a client", "header of its file"]
    return markdown([*names, "equal to the formula", "1,600 clients on disk"], rows)


PARTS: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "server": server,
    "steps": steps,
    "traffic": traffic,
    "exactness": exactness,
    "memory": memory,
}
"""Part of the benchmark -> its table."""


def recorded(part: str) -> Table:
    """A part's table from the record of a checkout, or the command that makes one."""

    def table(records: Records) -> str:
        if not records.has(f"costs-{part}"):
            return f"Not recorded yet: {code(f'python -m simulations.bench.costs {part}')}."
        return PARTS[part](records[f"costs-{part}"])

    return table


COST_TABLES: dict[str, Table] = {f"costs-{part}": recorded(part) for part in PARTS}
