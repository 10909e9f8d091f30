"""``runtime=silos``: clients are SuperNodes with records of their own, behind a SuperLink."""

from dataclasses import dataclass

from fedlora.core.checks import at_least, within
from fedlora.core.errors import ConfigError
from simulations.app.runtime import MOST_NODES, Runtime

SIMULATED = ("nodes", "cpus_per_worker", "gpus_per_worker", "num_cpus", "num_gpus", "workers")


@dataclass(frozen=True)
class SiloRuntime(Runtime):
    """How the server meets its silos. What they compute on, their cards say."""

    silos: int = 2
    """The run begins when so many SuperNodes are connected; all that are connected then are its
    clients."""
    patience_s: float = 600.0
    """Seconds to wait for them, and for each answer before round 1: a silo tokenises its records
    then."""
    poll_s: float = 1.0
    """Seconds between two looks for replies: each is an HTTPS request to the SuperLink."""

    def __post_init__(self) -> None:
        super().__post_init__()
        within("runtime.silos", self.silos, 1, MOST_NODES)
        at_least("runtime.patience_s", self.patience_s, 0, strict=True)
        at_least("runtime.poll_s", self.poll_s, 0, strict=True)
        plain = Runtime()
        for key in (*SIMULATED, "ray_address", "device", "in_process"):
            value = getattr(self, key)
            if value != getattr(plain, key):
                raise ValueError(
                    f"runtime.{key}={value!r} has no effect on silos: each computes on what its "
                    "own silo card names"
                )

    @property
    def expected_workers(self) -> int:
        """A silo works for itself."""
        return self.silos

    @property
    def worker_device(self) -> str:
        """Where nothing else is known: engines and number formats are decided for it."""
        return "cpu"

    def check_launch(self) -> None:
        """Refuse to be started without a SuperLink.

        Raises:
            ConfigError: with the command that has one.
        """
        raise ConfigError(
            "runtime=silos: silos are reached through a SuperLink; use `flwr run . NAME "
            "--run-config \"experiment='silos'\"` (docs/deployment.md)"
        )
