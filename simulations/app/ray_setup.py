"""What Ray needs and does not say: a cluster that answers, and a directory with a short name."""

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fedlora.core.errors import ConfigError

PATIENCE_S = 10.0
"""Seconds in which a cluster must answer; without this, Ray tries for twelve minutes."""
ALIVE = "/ray.rpc.NodeInfoGcsService/CheckAlive"
LONGEST = 36
"""Characters of Ray's directory: its sockets add
``/ray/session_<time>_<pid>/sockets/plasma_store``, and Linux allows 107 in all."""
TMPDIR = "RAY_TMPDIR"
"""Ray's variable for its directory; default: the directory for temporary files."""
_ADDRESS = re.compile(r"(\[[\da-fA-F:.]+\]|[\w.-]+):\d{1,5}")


def check_cluster(address: str) -> None:
    """Ask a Ray cluster whether it is there.

    Args:
        address: ``host:port``, or ``auto`` for the one that `ray start` has begun on this machine.

    Raises:
        ConfigError: if the address is none, no process listens there, or what listens is no Ray.
    """
    where = f"runtime.ray_address={address!r}"
    if address == "auto":
        address = _local_cluster(where)
    if not _ADDRESS.fullmatch(address):
        raise ConfigError(f"{where} is not auto or host:port (port 6379 unless chosen otherwise)")
    import grpc  # installed with Flower and Ray; only runs on a cluster need it

    remedy = "start one with `ray start --head`, or use runtime=laptop, which brings its own"
    with grpc.insecure_channel(address, [("grpc.enable_http_proxy", 0)]) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=PATIENCE_S)
        except grpc.FutureTimeoutError:
            raise ConfigError(
                f"{where}: no Ray cluster answered within {PATIENCE_S:.0f} s; {remedy}"
            ) from None
        try:
            channel.unary_unary(ALIVE)(b"", timeout=PATIENCE_S)
        except grpc.RpcError as error:
            if error.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
                return  # a cluster with tokens; Ray itself knows ours
            raise ConfigError(
                f"{where}: what answers is no Ray cluster ({error.code().name}); the port is that "
                f"of the head node (6379), not of its dashboard or clients; {remedy}"
            ) from None


def _local_cluster(where: str) -> str:
    from ray._private.services import canonicalize_bootstrap_address

    try:
        found = canonicalize_bootstrap_address("auto")
    except ConnectionError:
        found = None
    if not found:
        raise ConfigError(
            f"{where}: no Ray cluster runs on this machine; start one with `ray start --head`, "
            "name another's host:port, or use runtime=laptop, which brings its own"
        )
    return str(found)


def too_long() -> str:
    """Why Ray could not make its sockets under its directory; empty if it can."""
    folder = os.environ.get(TMPDIR) or tempfile.gettempdir()
    if len(os.path.abspath(folder)) <= LONGEST:
        return ""
    name = TMPDIR if os.environ.get(TMPDIR) else "TMPDIR"
    return (
        f"{name}={folder} has {len(folder)} characters, and Ray's sockets need a directory of at "
        f"most {LONGEST}"
    )


@contextmanager
def short_folder(say: Callable[[str], None]) -> Iterator[dict[str, str]]:
    """The environment that gives Ray a directory it can use; empty where the usual one will do.

    Raises:
        ConfigError: if a short one is needed and none can be made.
    """
    problem = too_long()
    if not problem:
        yield {}
        return
    folder = _make_short()
    if folder is None:
        raise ConfigError(
            f"{problem}: set {TMPDIR} to one, such as /tmp or a short folder of yours"
        )
    say(f"{problem}: it uses {folder}")
    try:
        yield {TMPDIR: str(folder)}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _make_short() -> Path | None:
    """A new folder of this user's alone, at a place with a short name."""
    for place in ("/tmp", "/var/tmp", os.environ.get("XDG_RUNTIME_DIR", ""), "/dev/shm"):
        if not place or len(place) + len("/fedlora-12345678") > LONGEST:
            continue
        try:
            return Path(tempfile.mkdtemp(prefix="fedlora-", dir=place))
        except OSError:
            continue
    return None
