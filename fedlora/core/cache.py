"""Where things that can be made again are kept between runs."""

import os
from pathlib import Path

VARIABLE = "FEDLORA_CACHE"


def cache_root() -> Path:
    """``$FEDLORA_CACHE``, else ``~/.cache/fedlora``: token stores, models, tuning."""
    root = os.environ.get(VARIABLE)
    return Path(root).expanduser().absolute() if root else Path.home() / ".cache" / "fedlora"
