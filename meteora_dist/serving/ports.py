"""Whether a port can be listened on."""

from __future__ import annotations

import socket


def is_free(port: int) -> bool:
    """Whether nothing listens on the TCP port ``port`` of any interface."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True
