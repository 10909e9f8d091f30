"""The three shapes fedlora travels in: a checkout, a wheel, the bundle (FAB) that Flower runs."""

import ast
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from email import message_from_bytes
from importlib.metadata import entry_points, packages_distributions
from io import BytesIO
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_disk
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from fedlora.core.source_hash import NOT_SHIPPED

ROOT = Path(__file__).resolve().parents[1]
CODE = ("fedlora", "strategies", "simulations")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
ASSETS = ("fedlora/data/assets", "fedlora/models/assets", "simulations/reporting/templates")
"""What is neither code nor configuration: not in the bundle, and in everything else."""

# What Flower's SuperLink does in an installed bundle before every run.
INSTALL = """
from flwr.supercore.superexec.dependency_installer import install_app_dependencies
print(install_app_dependencies(".", run_id=1))
"""


def requirements(path: Path) -> list[Requirement]:
    lines = (line.partition("#")[0].strip() for line in path.read_text().splitlines())
    return [Requirement(line) for line in lines if line]


def declared() -> list[Requirement]:
    """What an installation without extras brings."""
    return requirements(ROOT / "requirements.in")


def extras(*names: str) -> list[Requirement]:
    return [Requirement(x) for n in names for x in PROJECT["project"]["optional-dependencies"][n]]


def files_below(root: Path, *tops: str, suffix: str = "") -> set[str]:
    found = (p for top in tops for p in (root / top).rglob(f"*{suffix}"))
    return {
        p.relative_to(root).as_posix()
        for p in found
        if p.is_file() and "__pycache__" not in p.parts
    }


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A clean copy of the project, so that no test writes into the working tree."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in (*CODE, "conf", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, copy)
    return copy


@pytest.fixture
def bundle(checkout, tmp_path):
    """The bundle as Flower unpacks it."""
    with zipfile.ZipFile(BytesIO(build_fab_from_disk(checkout))) as fab:
        fab.extractall(tmp_path / "bundle")
    return tmp_path / "bundle"


def install_for_a_run(bundle: Path, home: Path) -> subprocess.CompletedProcess[str]:
    """Flower's own installation step: no network, empty cache, nothing else in the environment."""
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith(("UV_", "FLWR_"))},
        **{"FLWR_HOME": str(home), "UV_CACHE_DIR": str(home / "cache"), "UV_OFFLINE": "1"},
    }
    command = [sys.executable, "-c", INSTALL]
    return subprocess.run(command, cwd=bundle, env=environment, capture_output=True, text=True)


def test_the_bundle_is_the_code_and_the_configuration(checkout, bundle):
    excluded = tuple(p.removesuffix("**") for p in PROJECT["tool"]["flwr"]["app"]["fab-exclude"])
    python = {p for p in files_below(checkout, *CODE, suffix=".py") if "/test_" not in p}
    python = {p for p in python if not p.startswith(excluded)}
    assert set(excluded) <= set(NOT_SHIPPED)
    configuration = files_below(checkout, "conf", suffix=".yaml")
    rest = {"pyproject.toml", ".info/CONTENT"}
    assert configuration
    shipped = files_below(bundle, ".") - {"LICENSE"}
    assert shipped == python | configuration | rest


def test_a_run_installs_nothing_and_needs_no_network(bundle, tmp_path):
    done = install_for_a_run(bundle, tmp_path / "home")
    assert done.returncode == 0, done.stdout + done.stderr
    environment = tmp_path / "home" / "runtime-envs" / "1"
    assert "No additional application dependencies" in done.stdout + done.stderr
    assert not list(environment.rglob("*.dist-info"))


def test_without_the_table_for_uv_a_run_would_need_the_network(bundle, tmp_path):
    pyproject = bundle / "pyproject.toml"
    text = pyproject.read_text()
    assert "dependency-metadata" in text
    pyproject.write_text(text.replace('name = "fedlora", version', 'name = "other", version'))
    assert install_for_a_run(bundle, tmp_path / "home").returncode != 0


def test_the_table_for_uv_names_this_version():
    (table,) = PROJECT["tool"]["uv"]["dependency-metadata"]
    project = PROJECT["project"]
    assert (table["name"], table["version"]) == (project["name"], project["version"])
    assert table["requires-dist"] == []


def test_in_a_checkout_uv_does_not_see_the_table():
    assert tomllib.loads((ROOT / "uv.toml").read_text()) == {"dependency-metadata": []}
    assert set(PROJECT["tool"]["uv"]) == {"dependency-metadata"}  # uv.toml hides all of [tool.uv]


def build(checkout: Path, kind: str, out: Path) -> Path:
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(out)!r})"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory):
    pytest.importorskip("setuptools", minversion="77")
    return build(checkout, "wheel", tmp_path_factory.mktemp("wheel"))


def test_the_wheel_requires_what_is_declared(wheel):
    with zipfile.ZipFile(wheel) as z:
        (metadata,) = [n for n in z.namelist() if n.endswith(".dist-info/METADATA")]
        header = message_from_bytes(z.read(metadata))
    required = [Requirement(line) for line in header.get_all("Requires-Dist", [])]
    plain = {str(r) for r in required if r.marker is None}
    assert plain == {str(r) for r in declared()}


def test_the_wheel_has_code_configuration_and_assets(checkout, wheel):
    expected = (
        files_below(checkout, *CODE, suffix=".py")
        | files_below(checkout, "conf", suffix=".yaml")
        | files_below(checkout, *ASSETS)
    )
    with zipfile.ZipFile(wheel) as z:
        names = set(z.namelist())
    assert expected <= names
    assert not [n for n in names if n.startswith("tests/")]


def test_the_source_distribution_can_build_itself(checkout, tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    with tarfile.open(build(checkout, "sdist", tmp_path)) as tar:
        names = {n.partition("/")[2] for n in tar.getnames()}
    needed = {"pyproject.toml", "requirements.in", "constraints.txt", "uv.toml", "LICENSE"}
    assert needed | files_below(checkout, "conf", suffix=".yaml") <= names
    assert files_below(checkout, *ASSETS) | {"tests/test_packaging.py"} <= names


def test_the_lock_pins_everything_that_is_declared_and_obeys_its_bounds():
    pins = {canonicalize_name(r.name): r.specifier for r in requirements(ROOT / "constraints.txt")}
    for requirement in [*declared(), *extras("dev", "notebooks", "smollm2", "joblib", "slurm")]:
        name = canonicalize_name(requirement.name)
        assert name in pins, f"{name} is not in constraints.txt"
        (pin,) = pins[name]
        assert pin.operator == "==", f"{name}{pin} is no exact pin"
        assert requirement.specifier.contains(pin.version), f"{requirement} excludes {pin.version}"


def imported(path: Path) -> set[str]:
    """Top-level names of all absolute imports, also of those inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.partition(".")[0])
    return names


def test_everything_imported_is_declared():
    known = {
        canonicalize_name(r.name)
        for r in [
            *declared(),
            *extras("smollm2", "quantization", "privacy", "meteor", "pfl", "evaluate"),
        ]
    } | {"ray"}  # flwr[simulation] pins it
    distributions = packages_distributions()
    third_party = {
        name
        for path in files_below(ROOT, *CODE, suffix=".py")
        for name in imported(ROOT / path)
        if name not in sys.stdlib_module_names and name not in CODE
    }
    undeclared = {
        name
        for name in third_party
        if not {canonicalize_name(d) for d in distributions.get(name, [name])} & known
    }
    assert not undeclared


# --- installed elsewhere -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The bin folder of an environment with the wheel and this environment's other packages."""
    home = tmp_path_factory.mktemp("installed") / "venv"
    subprocess.run([sys.executable, "-m", "venv", home], check=True)
    python, (site,) = home / "bin" / "python", home.glob("lib/python3*/site-packages")
    pip = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run(pip, check=True)
    (site / "others.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    for entry in entry_points(group="console_scripts"):
        if entry.dist and entry.dist.name == "flwr":  # pip wrote them for another Python
            script, function = home / "bin" / entry.name, entry.attr
            call = f"import sys\nfrom {entry.module} import {function}\nsys.exit({function}())\n"
            script.write_text(f"#!{python}\n{call}")
            script.chmod(0o755)
    return home / "bin"


def elsewhere(bin_folder: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The installed command in an empty folder, with nothing in the environment that helps it."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "FEDLORA_ROOT")}
    command = [bin_folder / "fedlora", *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("runtime", ["in_process", "laptop"])
def test_the_command_works_from_an_empty_folder(installed, tmp_path, runtime):
    done = elsewhere(installed, tmp_path, "run", "experiment=smoke", f"runtime={runtime}")
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "RUN COMPLETED" in said and "report: " in said
    (run,) = (tmp_path / "outputs").iterdir()
    assert {"adapter", "report.html", "metrics.jsonl"} <= {p.name for p in run.iterdir()}
    assert str(ROOT) not in said
    assert {p.name for p in tmp_path.iterdir()} == {"outputs"}
