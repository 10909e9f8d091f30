"""What can go wrong, as exceptions whose messages are one sentence for the person concerned."""

from asyncio import CancelledError

CLIENT_ERRORS = (Exception, SystemExit, CancelledError, BaseExceptionGroup)
"""All that a client's work can raise as a failure of its own. A KeyboardInterrupt is the user's."""


class ConfigError(ValueError):
    """A mistake in the configuration: one sentence for the person who typed it."""


class DataError(ValueError):
    """A mistake in the data or its description: one sentence for the person who owns it."""


class ModelError(RuntimeError):
    """A base model that cannot be used, in a sentence for the person who named it."""


class RunError(RuntimeError):
    """The run cannot go on; the message says why and what is safe."""


class DiskError(RunError):
    """A disk that refused: one sentence with the file and what to set (`fedlora.core.reading`)."""


class WorkerDied(RunError):
    """A worker process is gone. The run can go on from its checkpoint with new workers."""


class ClientsSuspected(WorkerDied):
    """Workers died again, and the next attempt sends or leaves out clients accordingly."""


class RunFolderError(RuntimeError):
    """The run folder belongs to another run that may still be alive."""


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read: one sentence that names it and what is wrong."""


class RejectedUpdate(ValueError):
    """An update that must not be averaged, with the client who sent it and the reason."""

    def __init__(self, client: int, reason: str) -> None:
        super().__init__(f"update of client {client} rejected: {reason}")
        self.client = client
        self.reason = reason
