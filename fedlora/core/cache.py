"""The folder of files that can be made again, kept between runs."""

import os
from pathlib import Path

from fedlora.core import variables


def cache_root() -> Path:
    """``$FEDLORA_CACHE``, else ``~/.cache/fedlora``: token stores and models."""
    root = os.environ.get(variables.CACHE)
    return Path(root).expanduser().absolute() if root else Path.home() / ".cache" / "fedlora"
