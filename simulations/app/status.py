"""status.json of a run folder: how the run stands, or how it ended."""

import json
from pathlib import Path
from typing import Any

from fedlora.core.files import write_file

FILE = "status.json"
RUNNING, COMPLETED, FAILED = "running", "completed", "failed"


def write_status(
    folder: Path,
    status: str,
    rounds_done: int,
    error: BaseException | None = None,
    said: str = "",
) -> None:
    """Write the file.

    Args:
        folder: the run folder.
        status: one of those above.
        rounds_done: complete rounds.
        error: why the run failed.
        said: a sentence on how it ended without one.
    """
    kind = type(error).__name__ if error else ""
    value = {"status": status, "rounds_done": rounds_done, "kind": kind}
    value["message"] = (str(error) or kind) if error else said
    write_file(folder / FILE, json.dumps(value, indent=1) + "\n")


def read_status(folder: Path | None) -> dict[str, Any]:
    """The file's content; empty if there is no folder, or nothing in it that can be read."""
    try:
        value = json.loads((folder / FILE).read_text(encoding="utf-8")) if folder else {}
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def close_status(folder: Path | None, error: BaseException) -> None:
    """Write how a run ended whose process is gone and could not write it itself."""
    status = read_status(folder)
    if folder is not None and folder.is_dir() and status.get("status") in (None, RUNNING):
        write_status(folder, FAILED, int(status.get("rounds_done") or 0), error)
