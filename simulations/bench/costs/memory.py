"""What clients keep between rounds: bytes on disk of the population, by formula and measured.

Every preset is asked what a client of one rank keeps after a round (`fedlora.server.method.Method`
``.kept``); those that keep something are shown. 64 clients are written as a run writes them
(`fedlora.server.client_state`), and since all of them hold the same shapes, the population takes
exactly as many times that as it has more clients. A file has the tensors and a header with their
names. The scalars in it must be those of `simulations.bench.costs.formulas`.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedlora.core.types import LocalPlan, Setting
from fedlora.population.ranks import RankDistribution
from fedlora.server.client_state import ClientStore
from fedlora.server.method import Method
from fedlora.server.training_round import training_jobs
from simulations.bench.aggregation import ALPHA
from simulations.bench.costs.formulas import FORMULAS, WIDTH, Visit
from simulations.bench.costs.presets import parts_of
from simulations.bench.costs.shapes import SEED, Shapes, answered, population

POPULATION = 1600
MEASURED = 64
RANK = 8


def memory(
    presets: Sequence[str], shapes: Sequence[Shapes], clients: int = MEASURED
) -> dict[str, Any]:
    """The record of all presets whose clients keep something, by shapes.

    Args:
        presets: to ask.
        shapes: of the models.
        clients: to write.
    """
    found: dict[str, Any] = {}
    for one in shapes:
        ranks = RankDistribution("homogeneous", rank=RANK, alpha=ALPHA)
        setting = population(one, ranks, clients)
        rows = {name: measured(name, setting) for name in presets}
        found[one.name] = {name: row for name, row in rows.items() if row}
    return found


def measured(preset: str, setting: Setting) -> dict[str, Any]:
    """What the clients of one preset keep; empty: nothing."""
    parts = parts_of(preset)
    written = _written(parts.strategy, setting, parts.client)
    if written is None:
        return {}
    files, tensors = written
    return {
        "files_bytes": sum(files),
        "population_bytes": sum(files) * POPULATION // len(files),
        "tensor_bytes_per_client": tensors,
        "header_bytes_per_client": files[0] - tensors,
    } | _formula(preset, setting, tensors)


def _formula(preset: str, setting: Setting, tensors: int) -> dict[str, Any]:
    formula = FORMULAS.get(preset)
    if formula is None or formula.count_kept is None:
        return {"formula": "", "formula_bytes_per_client": None, "wrong": ""}
    visits = [Visit(m.path, m.d_out, m.d_in, RANK, RANK, RANK) for m in setting.modules]
    due = WIDTH * sum(map(formula.count_kept, visits))
    wrong = f"a client keeps {tensors:,} bytes, {due:,} by formula" if tensors != due else ""
    return {"formula": formula.kept, "formula_bytes_per_client": due, "wrong": wrong}


def _written(method: Method, setting: Setting, plan: LocalPlan) -> tuple[list[int], int] | None:
    """Write what all clients of a population keep after one round.

    Returns:
        Bytes of each file, and of the tensors in each; ``None``: they keep nothing.

    Raises:
        RuntimeError: if their files differ in size.
    """
    state = method.init_state(setting)
    jobs = training_jobs(method, state, setting.clients, plan, seed=SEED, round=1)
    with tempfile.TemporaryDirectory() as folder:
        store = ClientStore(Path(folder), cached_bytes=0)
        for job in jobs:
            kept = method.kept(state, job.client, None, job.start, answered(job))
            if kept is None:
                return None
            store.stage(job.client.id, kept)
            store.commit(1)
        files = sorted(Path(folder).rglob("*.safetensors"))
        sizes, inside = [f.stat().st_size for f in files], {_tensor_bytes(f) for f in files}
    if len(sizes) != len(jobs) or len(set(sizes)) != 1 or len(inside) != 1:
        raise RuntimeError(f"{method.label}: clients of one rank keep files of sizes {set(sizes)}")
    return sizes, inside.pop()


def _tensor_bytes(file: Path) -> int:
    """Bytes of the tensors in a safetensors file: what follows its header."""
    with file.open("rb") as opened:
        header = int.from_bytes(opened.read(8), "little")
    return file.stat().st_size - 8 - header
