"""Which sources a process runs. A worker refuses a server whose sources differ.

Ray puts the working directory of the process that started it before everything else on the path,
so a worker can import another checkout of the same packages without a word.
"""

import functools
import hashlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The folder that holds the packages and conf/: a checkout or Flower's copy of the app."""


NOT_SHIPPED = ("simulations/bench/", "simulations/pretraining/", "simulations/study/")
"""Not in Flower's bundle (``fab-exclude``): no worker runs it, and editing it stops none."""


@functools.lru_cache(maxsize=1)
def source_hash() -> str:
    """16 hexadecimal digits over the Python files of the packages beside this one."""
    digest = hashlib.sha256()
    for package in ("fedlora", "strategies", "simulations"):
        for path in sorted((ROOT / package).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            if path.name.startswith("test_") or path.name.endswith("_test.py"):
                continue  # Flower's bundle leaves these out
            if name.startswith(NOT_SHIPPED):
                continue
            digest.update(name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]
