"""A TCP relay that keeps every byte which passes towards the server."""

import socket
import threading
from contextlib import suppress

from simulations.bench.loopback import free_port


class Relay:
    """Between SuperNodes and a SuperLink: listens on `port`, connects to the SuperLink's.

    What each connection sends to the server is one entry of `received`.
    """

    def __init__(self, target: int) -> None:
        self.port, self._target = free_port(), target
        self.received: list[bytearray] = []
        self._server = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Take no more connections."""
        self._server.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._server.accept()
                far = socket.create_connection(("127.0.0.1", self._target))
                kept = bytearray()
                self.received.append(kept)
                for source, sink, note in ((near, far, kept), (far, near, None)):
                    threading.Thread(target=_pump, args=(source, sink, note), daemon=True).start()


def _pump(source: socket.socket, sink: socket.socket, kept: bytearray | None) -> None:
    with suppress(OSError):
        while data := source.recv(2**16):
            if kept is not None:
                kept.extend(data)
            sink.sendall(data)
    for one in (source, sink):
        with suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)
