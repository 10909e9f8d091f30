"""Write the tables of recorded results into the documents, or check that they are up to date.

python -m simulations.reporting.results              # write README.md and docs/results.md
python -m simulations.reporting.results --check      # exit 1 if a table differs from its JSON
python -m simulations.reporting.results --record outputs/RUN --name "default, FlexLoRA"

A document says where a table goes: between ``<!-- table: NAME -->`` and ``<!-- /table -->``.
``--record`` adds a finished run to docs/results/runs.json, or replaces the run of that name.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedlora.core.errors import ConfigError
from fedlora.core.package import ROOT
from fedlora.core.reading import json_in
from simulations.reporting.cost_tables import COST_TABLES
from simulations.reporting.run_folder import Run, read_run
from simulations.reporting.speed import overview, speed
from simulations.reporting.study_tables import rank_collapse, studies
from simulations.reporting.tables import TABLES, Records

DOCUMENTS = ("README.md", "docs/results.md", "docs/configuration.md")
OF_STUDIES = {"studies": studies, "rank-collapse": rank_collapse}
ALL = TABLES | {"speed": speed, "overview": overview} | OF_STUDIES | COST_TABLES
_MARKED = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)


OF_TOKENS = ("loss_response", "rouge_l", "rouge_l_low", "rouge_l_high")
OF_LABELS = ("loss_weighted", "accuracy_weighted", "accuracy_worst_tenth", "macro_f1_weighted")
"""What is recorded of an evaluation."""


def written(text: str, records: Records) -> str:
    """A document with every marked table made anew.

    Raises:
        ConfigError: for a marker that names no table.
    """

    def fill(found: re.Match[str]) -> str:
        if found[2] not in ALL:
            raise ConfigError(f"<!-- table: {found[2]} --> names no table; there are {list(ALL)}")
        return f"{found[1]}{ALL[found[2]](records)}\n{found[3]}"

    return _MARKED.sub(fill, text)


def outdated(root: Path) -> list[str]:
    """The documents whose tables are not those of the recorded results."""
    records = Records(root)
    texts = {name: (root / name).read_text(encoding="utf-8") for name in DOCUMENTS}
    return [name for name, text in texts.items() if written(text, records) != text]


def write(root: Path) -> None:
    """Bring all documents up to date."""
    records = Records(root)
    for name in DOCUMENTS:
        file = root / name
        file.write_text(written(file.read_text(encoding="utf-8"), records), encoding="utf-8")


def row_of(run: Run, name: str, command: str, note: str = "") -> dict[str, Any]:
    """A finished run as a row of docs/results/runs.json, with all digits.

    Raises:
        ConfigError: if the run was not evaluated before and after.
    """
    groups = list(run.groups().values())
    if not groups or len(groups[0]) < 2 or not run.rounds:
        raise ConfigError(f"{run.folder} has no evaluation before the first and after a last round")
    keys = OF_LABELS if run.classifies else OF_TOKENS
    first, last = ({k: r[k] for k in keys if k in r} for r in (groups[0][0], groups[0][-1]))
    return {
        "run": name,
        "command": command,
        "first": first,
        "last": last,
        "up_mib": sum(r["wire/up_bytes"] for r in run.rounds) / 2**20,
        "seconds": sum(r["round/seconds"] for r in run.rounds),
        "state": run.rounds[-1]["state/hash"],
        "sources": run.environment.get("sources", {}),
        **({"note": note} if note else {}),
    }


def record(root: Path, row: dict[str, Any]) -> None:
    """Add a row to the recorded runs, in the place of the one of its name."""
    file = root / "docs/results/runs.json"
    found = json_in(file, "the table of recorded runs,")
    names = [r["run"] for r in found["rows"]]
    at = names.index(row["run"]) if row["run"] in names else len(names)
    found["rows"][at : at + 1] = [row]
    file.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m simulations.reporting.results")
    parser.description, parser.formatter_class = __doc__, argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--check", action="store_true", help="write nothing; exit 1 if a document is out of date")
    add("--record", type=Path, metavar="RUN_FOLDER", help="add this run to the recorded ones")
    add("--name", default="", help="of the row; default: the folder's name")
    add("--command", default="", help="that gave the run")
    add("--note", default="", help="what a reader must know beside the name")
    return parser


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """The command; its exit code."""
    options = _parser().parse_args(arguments)
    try:
        if options.record is not None:
            run = read_run(options.record)
            record(root, row_of(run, options.name or run.name, options.command, options.note))
        if options.check:
            late = outdated(root)
            if late:
                print(f"{', '.join(late)}: run python -m simulations.reporting.results")
            return int(bool(late))
        write(root)
    except (ValueError, FileNotFoundError) as error:  # of run folders and configuration too
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
