"""Documents say what is true: references exist, commands compose, tables are those on record."""

import importlib.util
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedlora.core.errors import ConfigError
from fedlora.core.package import ROOT
from simulations.app.compose import load
from simulations.reporting import results
from simulations.reporting.results import ALL, main, outdated, written
from simulations.reporting.tables import Records, Table, markdown
from simulations.study.spec import study_names

HISTORY = ("docs/log.md", "CHANGELOG.md")
"""Documents that speak of older versions."""
DOCUMENTS = sorted(
    str(p.relative_to(ROOT))
    for p in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *ROOT.glob("tests/*/README.md")]
    if str(p.relative_to(ROOT)) not in HISTORY
)
PACKAGES = "fedlora|strategies|simulations|tests"
GROUPS = "|".join([p.name for p in (ROOT / "conf").iterdir() if p.is_dir()] + ["federation"])
DOTTED = re.compile(rf"(?<![\w/.])(?:{PACKAGES})(?:\.\w+)+(?![\w/])")
MODULE = re.compile(rf"python -m ((?:{PACKAGES})[\w.]*)")
PATH = re.compile(rf"`((?:{PACKAGES}|conf|docs)/[\w./-]*)`")
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")
RUN = re.compile(
    r"(?:fedlora run|fedlora study|fedlora data \w+|python -m simulations\.run)((?: [^\n`#&|]*)?)"
)
FLOWER = re.compile(r"--run-config \"(experiment|overrides)='([^']*)'\"")
KEY = re.compile(rf"`((?:{GROUPS})\.(?!json)[a-z_0-9.]+)")
SIZE = 5 * 1024


def text_of(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def found(pattern: re.Pattern[str], document: str) -> list[str]:
    return sorted({m[m.lastindex or 0] for m in pattern.finditer(text_of(document))})


def exists(dotted: str) -> bool:
    """Whether a dotted name is a module, or an attribute of one."""
    parts = dotted.split(".")
    for n in range(len(parts), 0, -1):
        name = ".".join(parts[:n])
        try:
            if importlib.util.find_spec(name) is None:
                continue
        except ModuleNotFoundError:
            continue
        value: object = importlib.import_module(name)
        for attribute in parts[n:]:
            fields = getattr(value, "__dataclass_fields__", {})
            if not hasattr(value, attribute) and attribute not in fields:
                return False
            value = getattr(value, attribute, None)
        return True
    return False


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_reference_exists(document):
    wrong = [name for name in found(DOTTED, document) if not exists(name)]
    wrong += [f"python -m {name}" for name in found(MODULE, document) if not exists(name)]
    wrong += [path for path in found(PATH, document) if not (ROOT / path).exists()]
    folder = (ROOT / document).parent
    wrong += [link for link in found(LINK, document) if not (folder / link).exists()]
    assert not wrong, f"{document} names what is not there"


def commands(document: str) -> Iterator[list[str]]:
    """The overrides of every run that a document shows in full, without those of Hydra's launchers,
    which are extras."""
    text = text_of(document)
    for match in [*RUN.finditer(text), *FLOWER.finditer(text)]:
        words = match[match.lastindex or 0].strip()
        if match.re is FLOWER and match[1] == "experiment":
            words = f"experiment={words}"
        if not re.search(r"\.\.\.|[<|]", words) and "--" not in words:
            left_out = ("-m", "COMMAND", "hydra/launcher", "hydra.launcher")
            given = [word for word in shlex.split(words) if not word.startswith(left_out)]
            if "fedlora study" in match[0] and given[:1]:
                named = given[0] in study_names() or given[0].endswith(".yaml")
                given = given[1:] if named else given
            yield given


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_composes(document):
    """Renamed keys and choices do not survive in a document. Of a sweep, the first values."""
    for words in commands(document):
        first = [re.sub(r"=([^\[{(]*?),.*", r"=\1", word) for word in words]
        try:
            load(first)
        except ConfigError as error:
            pytest.fail(f"{document}: {' '.join(words)}: {error}")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_key_in_prose_is_a_key(document):
    wrong = []
    for key in found(KEY, document):
        group, _, rest = key.partition(".")
        files = [*(ROOT / "conf" / group).rglob("*.yaml"), ROOT / "conf/config.yaml"]
        texts = [f.read_text(encoding="utf-8") for f in files]
        if not any(re.search(rf"\b{rest.split('.')[-1]}:", text) for text in texts):
            wrong.append(key)
    assert not wrong, f"{document}: no file of that group has these keys"


def test_readme_is_short():
    assert len(text_of("README.md").encode()) <= SIZE


def test_tables_are_those_of_the_recorded_results():
    assert outdated(ROOT) == [], "run python -m simulations.reporting.results"
    assert main(["--check"]) == 0


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout with one recorded run and one table."""
    runs = {"rows": [row("a", 2.0), row("b", 3.0)]}
    (tmp_path / "docs/results").mkdir(parents=True)
    (tmp_path / "docs/results/runs.json").write_text(json.dumps(runs))
    monkeypatch.setattr(results, "DOCUMENTS", ("README.md", "docs/results.md"))
    for name in results.DOCUMENTS:
        (tmp_path / name).write_text("x\n<!-- table: learning -->\nold\n<!-- /table -->\ny\n")
    return tmp_path


def row(name: str, loss: float) -> dict[str, object]:
    measured = {"loss_response": loss, "rouge_l": 0.5}
    return {
        "run": name, "command": f"run {name}", "first": {"loss_response": 4.0}, "last": measured,
        "up_mib": 2048.0, "seconds": 61.0,
    }  # fmt: skip


def test_a_table_is_made_of_its_record_and_nothing_else_changes(checkout):
    assert main(["--check"], checkout) == 1
    assert main([], checkout) == 0
    text = (checkout / "README.md").read_text()
    assert text.startswith("x\n<!--") and text.endswith("-->\ny\n") and "old" not in text
    assert "| b | `run b` | 4.000 → 3.000 | 0.500 | 2.0 GiB | 1:01 |" in text
    assert main(["--check"], checkout) == 0
    results.record(checkout, row("b", 1.0))
    results.record(checkout, row("c", 1.5))
    rows = json.loads((checkout / "docs/results/runs.json").read_text())["rows"]
    assert [(r["run"], r["last"]["loss_response"]) for r in rows] == [
        ("a", 2.0), ("b", 1.0), ("c", 1.5),
    ]  # fmt: skip
    assert main(["--check"], checkout) == 1


def test_what_cannot_be_made_is_refused(checkout, capsys):
    with pytest.raises(ConfigError, match=r"prices --> names no table; there are"):
        written("<!-- table: prices -->\n<!-- /table -->", Records(checkout))
    with pytest.raises(FileNotFoundError, match=r"sparse: one JSON file is wanted in .* none"):
        Records(checkout)["sparse"]
    assert main(["--record", str(checkout)], checkout) == 2
    assert "is no run folder" in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(ALL))
def test_every_table_is_well_formed(name):
    table: Table = ALL[name]
    for block in table(Records(ROOT)).split("\n\n"):  # some have a table for each record
        lines = [x for x in block.splitlines() if x.startswith("|")]
        assert len({line.count(" | ") for line in lines}) <= 1
    assert markdown(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


def test_a_finished_run_is_a_row(tmp_path):
    records = [
        {"kind": "evaluate", "round": 0, "group": "seen", "loss_response": 4.0, "rouge_l": 0.1},
        {"kind": "round", "round": 1, "wire/up_bytes": 2**20, "round/seconds": 2.0,
         "state/hash": "abc"},
        {"kind": "evaluate", "round": 1, "group": "seen", "loss_response": 3.5, "rouge_l": 0.2},
    ]  # fmt: skip
    folder: Path = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    got = results.row_of(results.read_run(folder), "x", "fedlora run")
    assert (got["up_mib"], got["seconds"], got["state"]) == (1.0, 2.0, "abc")
    assert (got["first"]["loss_response"], got["last"]["loss_response"]) == (4.0, 3.5)
    (folder / "metrics.jsonl").write_text(json.dumps(records[1]) + "\n")
    with pytest.raises(ConfigError, match="no evaluation before the first"):
        results.row_of(results.read_run(folder), "x", "fedlora run")


def test_a_finished_classification_is_a_row_of_its_own_table(tmp_path):
    scores = {"macro_f1_weighted": 0.5, "accuracy_worst_tenth": 0.25, "loss_weighted": 1.0}
    ends = [
        {"kind": "evaluate", "round": n, "group": "seen", "accuracy_weighted": a, **scores}
        for n, a in enumerate((0.125, 0.75))
    ]
    trained = {"kind": "round", "round": 1, "wire/up_bytes": 2**20, "round/seconds": 62.0,
               "state/hash": "abc"}  # fmt: skip
    folder: Path = tmp_path / "run"
    folder.mkdir()
    lines = [json.dumps(r) + "\n" for r in (ends[0], trained, ends[1])]
    (folder / "metrics.jsonl").write_text("".join(lines))
    (folder / "config.yaml").write_text("model: {task: classification}\n")
    row = results.row_of(results.read_run(folder), "x", "fedlora run")
    (tmp_path / "docs/results").mkdir(parents=True)
    (tmp_path / "docs/results/runs.json").write_text(json.dumps({"rows": [row]}))
    shown = ALL["classification"](Records(tmp_path)).splitlines()
    assert shown[2:] == ["| x | `fedlora run` | 12.5 → 75.0 | 50.0 | 25.0 | 1 MiB | 1:02 |"]
    assert len(ALL["learning"](Records(tmp_path)).splitlines()) == 2


def test_every_method_has_its_row_and_is_named_in_the_readme():
    methods, readme = text_of("docs/methods.md"), text_of("README.md")
    for name in sorted(p.stem for p in (ROOT / "conf" / "strategy").glob("*.yaml")):
        assert f"\n| `{name}` |" in methods, f"docs/methods.md has no row for {name}"
        assert f"`{name}`" in readme, f"README.md does not name {name}"
