"""The folder from which Flower makes its bundle: a checkout, or a copy of an installed package.

``flwr run`` needs a project with a pyproject.toml. Where fedlora was installed there is none, and
beside it lies everything else that was installed.
"""

import shutil
import tomllib
from importlib import metadata
from pathlib import Path

from fedlora.run.source_hash import ROOT, shipped_sources

PROJECT = """\
[project]
name = "fedlora"
version = "{version}"
license = "Apache-2.0"

[tool.flwr.app]
publisher = "fedlora"

[tool.flwr.app.components]
serverapp = "simulations.app.server_app:app"
clientapp = "simulations.app.client_app:app"

[tool.flwr.app.config]
experiment = ""
overrides = ""
"""
"""The part of a checkout's pyproject.toml that Flower reads."""


def app_folder(scratch: Path) -> Path:
    """The project folder for ``flwr run``.

    Args:
        scratch: a folder of the run, for the copy of an installed package (3 MB).
    """
    if _is_checkout():
        return ROOT
    app = scratch / "app"
    configuration = (path.relative_to(ROOT) for path in (ROOT / "conf").rglob("*.yaml"))
    for name in (*shipped_sources(), *configuration):
        (app / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, app / name)
    text = PROJECT.format(version=metadata.version("fedlora"))
    (app / "pyproject.toml").write_text(text, encoding="utf-8")
    return app


def _is_checkout() -> bool:
    """Whether the pyproject.toml beside the packages, if there is one, is ours."""
    file = ROOT / "pyproject.toml"
    if not file.is_file():
        return False
    project = tomllib.loads(file.read_text(encoding="utf-8")).get("project", {})
    return bool(project.get("name") == "fedlora")
