"""Where things that can be made again are kept between runs."""

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger(__name__)

VARIABLE = "FEDLORA_CACHE"


def cache_root() -> Path:
    """``$FEDLORA_CACHE``, else ``~/.cache/fedlora``: token stores, models, tuning."""
    root = os.environ.get(VARIABLE)
    return Path(root).expanduser().absolute() if root else Path.home() / ".cache" / "fedlora"


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an advisory lock that dies with its holder; where there is none, go on without.

    Without a lock two processes may make the same thing; whoever uses this must survive that, or
    fail loudly.
    """
    with path.open("w") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        except (ImportError, OSError) as error:
            log.warning("no lock on %s (%s): start one process first", path, error)
        yield
