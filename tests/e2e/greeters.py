"""Instances that only say hello as an sshd does: enough for what asks whether ssh answers."""

from __future__ import annotations

import contextlib
import socket
import threading


class Greeters:
    """One listener on loopback per instance."""

    def __init__(self) -> None:
        self.listeners: dict[int, socket.socket] = {}

    def start(self, instance: int, env: dict[str, str], onstart: str) -> tuple[str, int]:
        listener = socket.create_server(("127.0.0.1", 0))
        self.listeners[instance] = listener
        threading.Thread(target=self._greet, args=(listener,), daemon=True).start()
        return "127.0.0.1", listener.getsockname()[1]

    def authorize(self, instance: int, key: str) -> None:
        pass

    def stop(self, instance: int) -> None:
        listener = self.listeners.pop(instance, None)
        if listener:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()

    @staticmethod
    def _greet(listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                peer, _ = listener.accept()
                with contextlib.suppress(OSError), peer:
                    peer.sendall(b"SSH-2.0-greeter\r\n")
