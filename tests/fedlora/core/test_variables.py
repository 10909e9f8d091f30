"""Every environment variable of fedlora is in one module and in one table."""

import re

from fedlora.core import variables
from fedlora.core.package import ROOT

DOCUMENT = ROOT / "docs" / "configuration.md"


def test_every_variable_is_listed_and_documented():
    listed = {v for k, v in vars(variables).items() if k.isupper()}
    files = [
        path
        for folder in ("fedlora", "strategies", "simulations", "conf", "notebooks")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".yaml")
    ]
    used = {name for path in files for name in re.findall(r"FEDLORA_[A-Z0-9_]+", path.read_text())}
    assert used == listed
    table = re.findall(r"^\| `(FEDLORA_[A-Z0-9_]+)", DOCUMENT.read_text(), flags=re.M)
    assert sorted(table) == sorted(listed)
