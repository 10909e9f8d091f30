"""The machine resources of a run: Flower nodes, Ray workers, CPUs and GPUs."""

import math
import os
import re
import sys
from dataclasses import dataclass
from typing import Any

from fedlora.core.checks import at_least, within
from fedlora.core.errors import ConfigError

MOST_NODES = 2**16
"""Flower keeps a record of each node, and the server a list of messages for each worker."""


@dataclass(frozen=True)
class Runtime:
    """Resources of one run. Results do not depend on any of these fields."""

    nodes: int = 64
    """Flower SuperNodes: slots for messages, not clients."""
    cpus_per_worker: int = 1
    gpus_per_worker: float = 0.0
    """A fraction such as 0.5 puts two workers on one GPU. Use 0.5, 0.25 or 0.125: Flower stores it
    in 32 bits, and Ray loses a worker to the rounding of 0.1."""
    num_cpus: int = 0
    """CPUs that Ray may use; 0: all of this machine, or what the cluster has."""
    num_gpus: int = 0
    """GPUs that Ray may use; 0: those it finds."""
    workers: int = 0
    """Worker processes to expect when work is split into messages; 0: from the fields above."""
    ray_address: str = ""
    """Address of a running Ray cluster, ``host:port``; empty: Ray is started for the run."""
    device: str = "auto"
    in_process: bool = False
    """Run everything in one process, without Ray (for debugging)."""
    restarts: int = 1
    """Continuations in a row from the last checkpoint after deaths of workers that named no client
    (`fedlora.server.incidents`); 0: nothing is continued."""

    def __post_init__(self) -> None:
        within("runtime.nodes", self.nodes, 1, MOST_NODES)
        at_least("runtime.cpus_per_worker", self.cpus_per_worker, 1)
        at_least("runtime.gpus_per_worker", self.gpus_per_worker, 0)
        at_least("runtime.num_cpus", self.num_cpus, 0)
        at_least("runtime.num_gpus", self.num_gpus, 0)
        within("runtime.workers", self.workers, 0, MOST_NODES)
        at_least("runtime.restarts", self.restarts, 0)
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise ValueError(f"runtime.device={self.device!r} is not auto, cpu, cuda or cuda:N")
        if self.ray_address and (self.num_cpus or self.num_gpus):
            raise ValueError(
                f"runtime.ray_address={self.ray_address!r}: the cluster's resources are its own; "
                "leave runtime.num_cpus and runtime.num_gpus at 0"
            )
        self._check_lost()

    def _check_lost(self) -> None:
        """Refuse settings that would have no effect.

        Raises:
            ValueError: naming them and what to set.
        """
        if self.in_process and (self.ray_address or self.num_gpus > 1):
            raise ValueError(
                f"runtime.in_process=true with runtime.ray_address={self.ray_address!r} and "
                f"runtime.num_gpus={self.num_gpus}: one process uses neither Ray nor several GPUs"
            )
        if self.num_gpus and not self.gpus_per_worker:
            raise ValueError(
                f"runtime.num_gpus={self.num_gpus} with runtime.gpus_per_worker=0: no worker would "
                "use a GPU; set runtime.gpus_per_worker, 0.5 for two workers on each"
            )
        if self.gpus_per_worker > 1 and self.gpus_per_worker % 1:
            raise ValueError(
                f"runtime.gpus_per_worker={self.gpus_per_worker:g}: above 1 Ray gives whole GPUs "
                "only"
            )

    @property
    def expected_workers(self) -> int:
        """Worker processes that Flower will start, as far as can be said without asking Ray."""
        if self.workers or self.in_process:
            return self.workers or 1
        by_cpu = (self.num_cpus or len(os.sched_getaffinity(0))) // self.cpus_per_worker
        by_gpu = self.num_gpus / self.gpus_per_worker if self.gpus_per_worker else by_cpu
        return max(1, int(min(by_cpu, by_gpu or by_cpu)))

    @property
    def worker_device(self) -> str:
        """The device that workers are told. ``auto`` means a GPU where workers were given one, and
        then nothing else: a worker without it would train on the CPU in silence. It means the CPU
        elsewhere, or all workers would sit on the same card."""
        if self.device != "auto":
            return self.device
        if self.gpus_per_worker:
            return "cuda"
        return "auto" if self.in_process else "cpu"

    def check_launch(self) -> None:
        """Refuse to start on this machine what another command starts; a simulation is not."""

    def check_machine(self, cpus: int, gpus: int) -> None:
        """Refuse what this machine does not have: Ray would wait for it, or do without in silence.

        A cluster's resources are not known here, and are not checked.

        Args:
            cpus: cores that this process may use.
            gpus: CUDA devices that it sees.

        Raises:
            ConfigError: naming what is asked for and what is there.
        """
        if self.ray_address:
            return
        index = int(self.device.partition(":")[2] or 0)
        if self.device.startswith("cuda") and index >= gpus:
            raise ConfigError(
                f"runtime.device={self.device}, and PyTorch sees {gpus} CUDA devices on this "
                "machine: use runtime.device=auto or cpu"
            )
        wanted = max(self.num_gpus, math.ceil(self.gpus_per_worker))
        if wanted > gpus and self.device != "cpu":  # on the CPU, Ray only counts them
            raise ConfigError(
                f"runtime.num_gpus={self.num_gpus} with runtime.gpus_per_worker="
                f"{self.gpus_per_worker} needs {wanted} GPUs, and PyTorch sees {gpus} on this "
                "machine: set runtime.num_gpus to what it has, or use runtime=laptop"
            )
        have = self.num_cpus or cpus
        if not self.in_process and self.cpus_per_worker > have:
            raise ConfigError(
                f"runtime.cpus_per_worker={self.cpus_per_worker} exceeds the {have} CPUs that Ray "
                "may use: no worker would ever start"
            )

    def describe(self) -> str:
        """What Ray will start, for the person who waits for it."""
        each = f"{self.cpus_per_worker} CPU"
        each += f", {self.gpus_per_worker:g} GPU" if self.gpus_per_worker else ""
        if self.ray_address:
            return f"workers of {each} on the Ray cluster at {self.ray_address}"
        return f"Ray with {self.expected_workers} workers of {each}"

    def ray_init(self) -> dict[str, Any]:
        """Arguments of ``ray.init`` beside those that are the same for every run."""
        if self.ray_address:  # its nodes inherit nothing from this process
            paths = os.pathsep.join(filter(None, sys.path))
            return {
                "address": self.ray_address,
                "runtime_env": {"env_vars": {"PYTHONPATH": paths}},
            }
        # "local": else Ray joins whatever cluster `ray start` has left a note of on this machine.
        words: dict[str, Any] = {"address": "local"}
        if self.num_cpus:
            words["num_cpus"] = self.num_cpus
        if self.num_gpus:
            words["num_gpus"] = self.num_gpus
        return words

    def ray_environment(self) -> dict[str, str]:
        """Environment variables of a Ray that is started for the run.

        Ray starts one worker process per CPU before anybody asks for one. That is what is wanted
        where each worker has one CPU; else they would be more than are used.
        """
        as_many = self.cpus_per_worker == 1 and not self.gpus_per_worker
        return {
            "RAY_preload_python_modules": "simulations.app.preload",
            "RAY_prestart_worker_first_driver": "true" if as_many else "false",
        }

    def backend(self) -> dict[str, dict[str, Any]]:
        """``backend_config`` of Flower's simulation engine."""
        resources = {"num_cpus": self.cpus_per_worker, "num_gpus": float(self.gpus_per_worker)}
        return {"client_resources": resources}

    def federation_config(self) -> str:
        """The ``--federation-config`` of ``flwr run``."""
        words = {
            "num-supernodes": self.nodes,
            "client-resources-num-cpus": self.cpus_per_worker,
            "client-resources-num-gpus": float(self.gpus_per_worker),
        }
        if self.num_cpus:
            words["init-args-num-cpus"] = self.num_cpus
        if self.num_gpus:
            words["init-args-num-gpus"] = self.num_gpus
        return " ".join(f"{k}={v}" for k, v in words.items())
