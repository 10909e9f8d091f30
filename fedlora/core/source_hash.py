"""Which sources a process runs. A worker refuses a server whose sources differ.

Ray puts the working directory of the process that started it before everything else on the path,
so a worker can import another checkout of the same packages without a word.
"""

import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path

from fedlora.core.package import ROOT

PACKAGES = ("fedlora", "strategies", "simulations")
NOT_SHIPPED = ("simulations/bench/", "simulations/pretraining/", "simulations/study/")
"""Not in Flower's bundle (``fab-exclude``): no worker runs it, and editing it stops none."""


def shipped_sources() -> Iterator[Path]:
    """The Python files that Flower's bundle holds, relative to `ROOT`, in order."""
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = path.relative_to(ROOT)
            if path.name.startswith("test_") or path.name.endswith("_test.py"):
                continue  # Flower's bundle leaves these out
            if not name.as_posix().startswith(NOT_SHIPPED):
                yield name


@functools.lru_cache(maxsize=1)
def source_hash() -> str:
    """16 hexadecimal digits over the Python files of the packages beside this one."""
    digest = hashlib.sha256()
    for name in shipped_sources():
        digest.update(name.as_posix().encode() + b"\0" + (ROOT / name).read_bytes())
    return digest.hexdigest()[:16]
