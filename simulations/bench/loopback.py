"""A SuperLink and SuperNodes as processes of this machine, for tests and measurements of silos.

Ports are free ones, FLWR_HOME and all logs lie in one folder, and every process that was started
ends with the block, by its own id.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, closing, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from fedlora.core import variables
from fedlora.core.package import ROOT

NAME = "loopback"
"""Name of the connection in Flower's config.toml."""
UP_S = 120.0
"""Seconds that a SuperLink has to answer: it imports for several on a busy machine."""
OVER = "finished:"
"""How the status of a run begins that has ended."""


def free_port() -> int:
    """A TCP port of 127.0.0.1 without a listener."""
    with closing(socket.socket()) as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def script(name: str) -> str:
    """The path of a command that is installed beside this interpreter."""
    return str(Path(sys.executable).parent / name)


class Loopback(AbstractContextManager["Loopback"]):
    """One SuperLink, and SuperNodes by name.

    Args:
        folder: for logs, the database and FLWR_HOME; must exist.
        keys: folder of `simulations.tools.keys`; None: without TLS and without authentication.
        app: folder of the Flower app that runs are of.
        more: environment variables of all processes.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keys: Path | None = None,
        app: Path = ROOT,
        more: Mapping[str, str] | None = None,
    ) -> None:
        self.folder, self.keys, self.app = folder, keys, app
        self.port = free_port()
        self.nodes: dict[str, subprocess.Popen[bytes]] = {}
        self._started: list[subprocess.Popen[bytes]] = []
        own = {
            "FLWR_HOME": str(folder / "home"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "OMP_NUM_THREADS": "1",
            variables.ROOT: str(ROOT),
        }
        self.environment = os.environ | own | dict(more or {})
        self._configure()

    def __enter__(self) -> "Loopback":
        tls = ["--insecure"]
        if self.keys is not None:
            tls = ["--ssl-ca-certfile", str(self.keys / "ca.crt")]
            tls += ["--ssl-certfile", str(self.keys / "server.pem")]
            tls += ["--ssl-keyfile", str(self.keys / "server.key"), "--enable-supernode-auth"]
        words = ["--disable-runtime-dependency-installation", "--host", "127.0.0.1"]
        words += ["--port", str(self.port), "--database", str(self.folder / "state.db")]
        try:
            self._start("superlink", script("flower-superlink"), *tls, *words)
            self._wait_until_up()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End everything that was started, and what it started."""
        for process in reversed(self._started):
            end(process)

    # --- silos --------------------------------------------------------------------------------

    def register(self, name: str) -> None:
        """Tell the SuperLink the public key of a silo (`simulations.tools.keys`)."""
        assert self.keys is not None
        self.flwr("supernode", "register", str(self.keys / f"{name}.pub"), NAME, "--name", name)

    def start_node(self, name: str, card: Path | None = None, port: int = 0) -> None:
        """Start the SuperNode of a silo.

        Args:
            name: of its log and, with TLS, of its key.
            card: its silo card; None: it has none.
            port: at which it finds the SuperLink; 0: the SuperLink's own.
        """
        words = ["--superlink", f"127.0.0.1:{port or self.port}", "--port", str(free_port())]
        if self.keys is None:
            words += ["--insecure"]
        else:
            words += ["--root-certificates", str(self.keys / "ca.crt")]
            words += ["--auth-supernode-private-key", str(self.keys / name)]
        if card is not None:
            words += ["--node-config", f'silo="{card}"']
        self.nodes[name] = self._start(name, script("flower-supernode"), *words)

    def kill_node(self, name: str, *, whole: bool = True) -> None:
        """SIGKILL to a SuperNode, and to the client that it is running (``whole``)."""
        process = self.nodes.pop(name)
        family = [psutil.Process(process.pid)]
        family += family[0].children(recursive=True) if whole else []
        for one in family:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait(30)

    def alive(self, name: str) -> bool:
        """Whether a SuperNode runs."""
        return name in self.nodes and self.nodes[name].poll() is None

    # --- runs ---------------------------------------------------------------------------------

    def flwr(self, *words: str) -> str:
        """What a ``flwr`` command prints.

        Raises:
            RuntimeError: with all that it said, if it fails.
        """
        done = subprocess.run(
            [script("flwr"), *words],
            env=self.environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=300,
        )
        if done.returncode:
            raise RuntimeError(f"flwr {' '.join(words)}: {done.stdout}{done.stderr}")
        return done.stdout

    def submit(self, config: str = "") -> str:
        """Start a run; its id.

        Args:
            config: of ``--run-config``.
        """
        words = ["--run-config", config] if config else []
        said = self.flwr("run", str(self.app), NAME, *words, "--format", "json")
        return str(_json(said)["run-id"])

    def status(self, run: str) -> str:
        """``running``, ``finished:completed``, ``finished:failed``, ..."""
        said = self.flwr("list", NAME, "--run-id", run, "--format", "json")
        return str(_json(said)["runs"][0]["status"])

    def wait(self, run: str, seconds: float, meanwhile: Callable[[], None] = lambda: None) -> str:
        """The status with which a run ends, or has after so many seconds.

        Args:
            run: its id.
            seconds: to wait at most.
            meanwhile: is called between looks.
        """
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            meanwhile()
            if (status := self.status(run)).startswith(OVER):
                return status
            time.sleep(1.0)
        return self.status(run)

    def log(self, run: str) -> str:
        """What the server of a run has printed."""
        return self.flwr("log", run, NAME, "--show")

    def said(self, name: str) -> str:
        """What a process has printed: ``superlink``, or a silo's name."""
        return (self.folder / f"{name}.log").read_text(errors="replace")

    # ------------------------------------------------------------------------------------------

    def _configure(self) -> None:
        home = self.folder / "home"
        home.mkdir(exist_ok=True)
        lines = [f"[superlink.{NAME}]", f'address = "127.0.0.1:{self.port}"']
        trust = "insecure = true"
        if self.keys is not None:
            trust = f'root-certificates = "{self.keys / "ca.crt"}"'
        default = ["[superlink]", f'default = "{NAME}"', ""]
        (home / "config.toml").write_text("\n".join([*default, *lines, trust, ""]))

    def _start(self, name: str, *command: str) -> "subprocess.Popen[bytes]":
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment,
                cwd=self.folder,
                start_new_session=True,
            )
        self._started.append(process)
        return process

    def _wait_until_up(self) -> None:
        deadline = time.monotonic() + UP_S
        while time.monotonic() < deadline:
            if self._started[0].poll() is not None:
                raise RuntimeError(f"the SuperLink ended: {self.said('superlink')}")
            with suppress(OSError), closing(socket.create_connection(("127.0.0.1", self.port), 1)):
                return
            time.sleep(0.2)
        raise RuntimeError(f"no SuperLink within {UP_S:.0f} s: {self.said('superlink')}")


def end(process: "subprocess.Popen[bytes]", grace_s: float = 10.0) -> None:
    """Terminate a process and its descendants; kill those that are left after a while."""
    family: list[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):
        root = psutil.Process(process.pid)
        family = [*root.children(recursive=True), root]
    for one in family:
        with suppress(psutil.NoSuchProcess):
            one.send_signal(signal.SIGTERM)
    _, left = psutil.wait_procs(family, timeout=grace_s)
    for one in left:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    psutil.wait_procs(left, timeout=grace_s)
    with suppress(subprocess.TimeoutExpired):
        process.wait(grace_s)


def _json(text: str) -> dict[str, Any]:
    """The object in what a command printed around it."""
    found: dict[str, Any] = json.loads(text[text.index("{") : text.rindex("}") + 1])
    return found


def words_of(overrides: Sequence[str]) -> str:
    """Hydra overrides as Flower's ``--run-config``."""
    return f"overrides='{' '.join(overrides)}'"
