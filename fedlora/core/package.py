"""Files of the package that Flower's bundle leaves out: weights, tokenizers, texts, templates.

Flower ships an app as .py, .toml, .md, .yaml and .json files alone. Code that needs another file
looks where the package was installed from, or into.
"""

import json
import os
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from urllib.parse import unquote, urlparse

from fedlora.core import variables

ROOT = Path(__file__).resolve().parents[2]
"""The folder that holds the packages and conf/: a checkout or Flower's copy of the app."""


def places(inside: str) -> Iterator[Path]:
    """The places where a file or folder of the package may be, most likely first.

    Args:
        inside: its path below the folder that holds the packages.
    """
    if root := os.environ.get(variables.ROOT):
        yield Path(root).expanduser() / inside
    yield ROOT / inside
    for distribution in metadata.distributions(name="fedlora"):
        origin = distribution.read_text("direct_url.json")
        if origin and (url := urlparse(json.loads(origin)["url"])).scheme == "file":
            yield Path(unquote(url.path)) / inside
        yield Path(str(distribution.locate_file(inside)))
    yield Path.cwd() / inside
