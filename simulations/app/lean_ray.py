"""Ray without those of its processes that no run uses.

Beside what hands out work, a Ray of one machine starts a server for its dashboard, an autoscaler
and two agents, each a Python process that imports Ray; ``ray.init`` waits for the server, and the
raylet for the agents, before the first worker starts. Every worker imports Ray twice, first in a
process that sets up a runtime environment, which runs on one machine do not have. None of this can
be configured, so two methods of Ray's node are replaced, for the versions that have been looked at;
others start as they are.
"""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray._private import node, services

KNOWN = ("2.55.1",)
"""Versions of Ray in which these processes can be left out."""
HERE = Path(__file__).parent
AGENTS = {
    "--dashboard_agent_command": (
        "METRICS_AGENT_PORT_NAME",
        "METRICS_EXPORT_PORT_NAME",
        "DASHBOARD_AGENT_LISTEN_PORT_NAME",
    ),
    "--runtime_env_agent_command": ("RUNTIME_ENV_AGENT_PORT_NAME",),
}
"""The raylet's argument for an agent's command, and the ports that it waits to be told of, by the
names of Ray's constants."""


@contextmanager
def lean() -> Iterator[None]:
    """Let ``ray.init`` start what a run needs and nothing more."""
    if ray.__version__ not in KNOWN:
        yield
        return
    module: Any = node
    full, module.Node = module.Node, _Node
    try:
        yield
    finally:
        module.Node = full


class _Node(node.Node):
    """A node without dashboard, autoscaler and agents."""

    def __init__(self, ray_params: Any, *args: Any, **words: Any) -> None:
        ray_params.update_if_absent(setup_worker_path=str(HERE / "ray_worker.py"))
        ray_params.no_monitor = True
        super().__init__(ray_params, *args, **words)

    def start_api_server(self, **words: Any) -> None:
        """None is started."""

    def start_raylet(self, *args: Any, **words: Any) -> None:
        """Start the raylet with stand-ins for its agents."""
        full = services.start_ray_process

        def start(command: list[str], *args: Any, **words: Any) -> Any:
            return full([self._without_agent(word) for word in command], *args, **words)

        services.start_ray_process = start
        try:
            super().start_raylet(*args, **words)
        finally:
            services.start_ray_process = full

    def _without_agent(self, word: str) -> str:
        """An argument of the raylet, with the command of an agent replaced."""
        name, _, _ = word.partition("=")
        if name not in AGENTS:
            return word
        names: Any = ray._raylet
        folder = Path(self._session_dir)
        ports = [getattr(names, port) for port in AGENTS[name]]
        files = [folder / names.get_port_filename(self._node_id, port) for port in ports]
        command = [sys.executable, "-S", "-E", str(HERE / "ray_agent.py"), *map(str, files)]
        return f"{name}={subprocess.list2cmdline(command)}"
