"""Attempts at one run: what of it is continued after a death, and the line it ends with."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedlora.core.errors import ClientsSuspected, RunError, WorkerDied
from simulations.app.status import COMPLETED, close_status, read_status

FAILED_LINE = "RUN FAILED: "


class ProcessEnded(RunError):
    """The process that did the run is gone, and did not say why."""


@dataclass
class Attempt:
    """One attempt, filled in while it goes on, so that an interrupted one is known too."""

    folder: Path | None = None
    """The run folder, once it is known."""
    completed: bool = False
    """Whether the program underneath says so."""
    code: int = 1
    """Exit code of a run that failed."""
    reason: str = ""
    """Why not, if nothing else says it."""
    said: bool = False
    """Whether the user has been shown the line that says how it ended."""


@dataclass
class Lines:
    """Shows lines and remembers the last one.

    Args:
        show: shows one line.
    """

    show: Callable[[str], None]
    last: str = field(default="", init=False)

    def __call__(self, line: str) -> None:
        self.show(line)
        self.last = line if line.strip() else self.last


def complete(
    do: Callable[[Sequence[str], Attempt, Callable[[str], None]], None],
    overrides: Sequence[str],
    restarts: int,
    emit: Callable[[str], None],
) -> int:
    """Do a run, and continue it from its checkpoint while deaths of workers allow it.

    Args:
        do: makes one attempt with the given overrides.
        overrides: of the first attempt.
        restarts: continuations in a row that may follow deaths which taught nothing. A death that
            makes clients run one to a message, or leaves one out, does not count; with 0 nothing
            is continued.
        emit: shows one line.

    Returns:
        The exit code: 0 only if the run completed. Otherwise the last line says why it failed, and
        status.json is final.
    """
    show, words, used = Lines(emit), list(overrides), 0
    while True:
        attempt = Attempt()
        try:
            do(words, attempt, show)
        except BaseException as error:
            close_status(attempt.folder, error)
            raise
        close_status(attempt.folder, ProcessEnded(attempt.reason))
        status = read_status(attempt.folder)
        if status.get("status", COMPLETED if attempt.completed else "") == COMPLETED:
            return 0
        kind = status.get("kind")
        learnt = kind == ClientsSuspected.__name__ and restarts > 0
        used = 0 if learnt else used + 1
        if not learnt and (kind != WorkerDied.__name__ or used > restarts):
            if not (attempt.said or show.last.startswith(FAILED_LINE)):
                show(f"{FAILED_LINE}{status.get('message') or attempt.reason}")
            return attempt.code
        why = status["message"] if learnt else f"{used} of {restarts}"
        show(f"starting again from the last checkpoint ({why})")
        words = [*(w for w in overrides if not w.startswith("resume="))]
        words.append(f"resume='{attempt.folder}'")
